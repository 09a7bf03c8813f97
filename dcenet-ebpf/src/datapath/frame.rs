//! Where everything lies on the stack. Offsets from the frame pointer, in bytes.

use crate::abi::FlowKey;

/// The flow's key, zeros at first.
pub(super) const KEY: i16 = -24;
pub(super) const SLOT: i16 = KEY + FlowKey::SLOT;
pub(super) const PROTOCOL: i16 = KEY + FlowKey::PROTOCOL;
pub(super) const VERSION: i16 = KEY + FlowKey::VERSION;
/// Both ports, the pod's first.
pub(super) const PORTS: i16 = KEY + FlowKey::POD_PORT;
pub(super) const POD_PORT: i16 = KEY + FlowKey::POD_PORT;
pub(super) const PEER_PORT: i16 = KEY + FlowKey::PEER_PORT;
pub(super) const PEER: i16 = KEY + FlowKey::PEER;
/// The last four bytes of the peer's address: an IPv4 address.
pub(super) const PEER_V4: i16 = PEER + 12;

/// The fragment's key, set where the packet is a fragment.
pub(super) const FRAGMENT_KEY: i16 = -48;
/// Room for what a head tells.
pub(super) const FRAGMENT: i16 = -72;
/// Who sent an ICMP error, while the key has the peer of the flow that it is about.
pub(super) const OUTER_PEER: i16 = -88;

/// Shared by the copied headers, a new flow's value and, the counters apart, an event.
pub(super) const SCRATCH: i16 = -184;
/// A copied IP header, 40 bytes, or ARP packet.
pub(super) const L3: i16 = SCRATCH;
/// A copied extension or transport header, 24 bytes.
pub(super) const L4: i16 = SCRATCH + 40;
/// What the extension header at hand is, while it lies before this; in no slot's lower half, as the numbers below.
pub(super) const HEADER_KIND: i16 = L4 + 12;
/// A copied option of neighbour discovery, 8 bytes.
pub(super) const OPTION: i16 = L4 + 24;
pub(super) const FLOW: i16 = SCRATCH;
pub(super) const EVENT: i16 = SCRATCH;

// Numbers of 4 bytes that branches depend on lie in the upper half of a slot of 8: newer verifiers follow the value of the
// lower half, and would look at all that follows once for each value.
pub(super) const NOW: i16 = -192;
/// Key of an array map.
pub(super) const INDEX: i16 = -196;
/// Offset in the packet at which IPv4 options end; in the place of what only look-ups need.
pub(super) const OPTIONS_END: i16 = INDEX;
/// The generation that a verdict will be of.
pub(super) const GENERATION: i16 = -200;
pub(super) const FLAGS: i16 = -204;
pub(super) const TCP_FLAGS: i16 = -212;
pub(super) const REASON: i16 = -216;
/// ICMP type and code, `type << 8 | code`.
pub(super) const ICMP: i16 = -220;
pub(super) const EVENT_KIND: i16 = -224;
/// The direction whose classifier judges.
pub(super) const JUDGE: i16 = -228;
/// Counter of a loop; 8 bytes, for here the verifier must follow the value.
pub(super) const COUNT: i16 = -240;
/// Number of an entry of a trie.
pub(super) const ENTRY: i16 = -244;
/// Sequence and acknowledgement number of TCP, network order; the latter until a classifier is asked.
pub(super) const SEQUENCE: i16 = -248;
pub(super) const ACKNOWLEDGED: i16 = ENTRY;
/// Offset in the packet of the next extension header.
pub(super) const NEXT_HEADER: i16 = ENTRY;
/// Offset in the packet at which the IP packet ends.
pub(super) const IP_END: i16 = -252;
/// The rule that decided; in the place of what only parsing needs.
pub(super) const RULE: i16 = IP_END;

/// Bytes of the stack in use.
pub(super) const BYTES: i16 = 256;

/// The packet is the head of a fragmented one.
pub(super) const HEAD: i32 = 1;
/// No entry is made for the packet.
pub(super) const STATELESS: i32 = 2;
/// Nor is one looked for.
pub(super) const NO_LOOKUP: i32 = 4;
/// An ICMP error; the key is of the flow that it is about.
pub(super) const RELATED: i32 = 8;
/// The flow is judged anew.
pub(super) const STALE: i32 = 16;
/// The flow's entry was found among the new ones.
pub(super) const BEGUN: i32 = 32;
/// The key has an entry that is over; the one that is made takes its place.
pub(super) const REPLACES: i32 = 64;
