//! What the programs of [`crate::datapath`] and user space share: every map, key, value and event, byte by byte.
//!
//! This is the only place that lays out bytes. A record here is a plain struct with `encode` and `decode`, and a constant
//! for the offset of each field, which the code emitter uses too. Numbers are in native byte order unless their field
//! says otherwise; addresses and ports are in network byte order (big-endian), IPv4 addresses as `::ffff:a.b.c.d`.
//! Times are nanoseconds of CLOCK_MONOTONIC at the resolution of the kernel's tick (`CLOCK_MONOTONIC_COARSE`).
//!
//! | Map | Kind | Key | Value |
//! |---|---|---|---|
//! | [`ENDPOINTS`] | array | slot | [`Endpoint`] |
//! | [`CLASS_V4`] | array | entry number / 2 | two entries of the IPv4 trie |
//! | [`MEMBERS_V6`] | array | place in the table | [`MemberV6`] |
//! | [`CLASS_V6`] | array | entry number / 2 | two entries of the IPv6 trie |
//! | [`NODES_V6`] | array | block number | [`NodeV6`] |
//! | [`LOCAL_IDS_EGRESS`], [`LOCAL_IDS_INGRESS`] | array, one map per policy set | class / 4 | four local ids |
//! | [`CONNTRACK`] | LRU hash (or hash) | [`FlowKey`] | [`Flow`] |
//! | [`CONNTRACK_NEW`] | LRU hash (or hash) | [`FlowKey`] | [`Flow`] |
//! | [`FRAGMENTS`] | LRU hash | [`FragmentKey`] | [`Fragment`] |
//! | [`RULES`] | per-CPU array | rule id | [`Traffic`] |
//! | [`REASONS`] | per-CPU array | [`reason_index`] | [`Traffic`] |
//! | [`EVENT_LIMITS`] | array | slot | [`EventLimit`] |
//! | [`EVENTS`] | ring buffer | | [`Event`] |
//! | [`REJECTS`] | array | rule id / 64 | 64 bits: whether the rule rejects |
//! | [`ANSWERED`] | LRU hash | [`FlowKey`] | [`Answered`] |
//! | [`ANSWERERS`] | programs | by hook | the program that answers ([`answer`](crate::datapath::answer)) |
//! | [`SENDERS`](crate::datapath::guard::SENDERS) | hash | [`Sender`] | [`Guarded`] |
//! | [`NAMESPACES`](crate::datapath::guard::NAMESPACES) | hash | [`Namespace`] | 8 bytes that say nothing |
//! | [`JUDGES`](crate::datapath::guard::JUDGES) | programs | slot | the program that judges the slot's endpoint |

mod class;
mod endpoint;
mod event;
mod flow;
mod guard;
mod layout;
mod verdict;

use crate::object::{MapFlags, MapKind, MapSpec};

pub use class::{
    BLOCK_ENTRIES, CHILD, ClassId, LocalId, MEMBER_DELETED, MEMBER_USED, MemberV6, NodeV6, PROBES_V6, ROOT_V4_ENTRIES,
    local_ids_element, member_v6_place,
};
pub(crate) use class::{HASH_HIGH, HASH_LOW};
pub use endpoint::{Endpoint, EventLimit};
pub use event::{Event, EventKind};
pub use flow::{Answered, Flow, FlowKey, FlowState, Fragment, FragmentKey};
pub use guard::{Guarded, Namespace, Sender};
pub use layout::Be16;
pub use verdict::{Direction, Reason, Traffic, reason_index};

/// Endpoints by their slot.
pub const ENDPOINTS: &str = "endpoints";
/// The trie from IPv4 addresses to classes.
pub const CLASS_V4: &str = "class_v4";
/// The table of single IPv6 addresses.
pub const MEMBERS_V6: &str = "members_v6";
/// Blocks of the trie from IPv6 prefixes to classes.
pub const CLASS_V6: &str = "class_v6";
/// What each block of [`CLASS_V6`] stands for; the first one holds the trie's root.
pub const NODES_V6: &str = "nodes_v6";
/// Class to local id, for a policy set of egress.
pub const LOCAL_IDS_EGRESS: &str = "local_ids_out";
/// Class to local id, for a policy set of ingress.
pub const LOCAL_IDS_INGRESS: &str = "local_ids_in";
/// Flows that were admitted, and whose opening side went on after an answer.
pub const CONNTRACK: &str = "conntrack";
/// Flows that were admitted and have not come that far: what a flood of opening packets fills, for it costs its sender
/// nothing. Flows in [`CONNTRACK`] do not feel it.
pub const CONNTRACK_NEW: &str = "conntrack_new";
/// Where flows are, in the order in which programs look.
pub const FLOW_TABLES: [&str; 2] = [CONNTRACK, CONNTRACK_NEW];
/// Ports of fragmented packets whose head has passed.
pub const FRAGMENTS: &str = "fragments";
/// New-flow verdicts by rule.
pub const RULES: &str = "rules";
/// Verdicts by reason.
pub const REASONS: &str = "reasons";
/// How many events each endpoint may still cause, and how many were lost.
pub const EVENT_LIMITS: &str = "event_limits";
/// Events for user space.
pub const EVENTS: &str = "events";
/// Rules whose packets are answered, a bit each.
pub const REJECTS: &str = "rejects";
/// What was answered just now, so that the answer passes the pod's other program.
pub const ANSWERED: &str = "answered";
/// The programs that answer, in the order of [`PROGRAMS`](crate::datapath::answer::PROGRAMS).
pub const ANSWERERS: &str = "answerers";

/// What happens when there is no room for a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum FullTable {
    /// The flow of its map that was used least recently goes (`BPF_MAP_TYPE_LRU_HASH`), about: each CPU keeps a few free
    /// places for itself (kernel/bpf/bpf_lru_list.c).
    #[default]
    Evict,
    /// A new flow is dropped, with its reason, where [`CONNTRACK_NEW`] is full; it stays there where [`CONNTRACK`] is
    /// (`BPF_MAP_TYPE_HASH`). Entries then leave by user space alone ([`sweep`](crate::datapath::sweep)).
    Refuse,
}

/// Sizes of the maps. Memory is stated for a 64-bit kernel; all is taken when the map is made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Sizes {
    /// Endpoint slots, at most 65,536. 64 + 32 bytes each: 96 KiB at 1,024.
    pub endpoints: u32,
    /// Blocks of the IPv4 trie beside its root. 1 KiB each, 256 KiB for the root: 4.25 MiB at 4,096.
    pub blocks_v4: u32,
    /// Places for single IPv6 addresses, a power of two. 24 bytes each: 1.5 MiB at 65,536.
    pub members_v6: u32,
    /// Blocks of the IPv6 trie. 1 KiB + 40 bytes each: 1 MiB at 1,024.
    pub blocks_v6: u32,
    /// Classes that the local ids of each policy set have room for. 2 bytes each: 32 KiB at 16,384.
    pub classes: u32,
    /// Flows whose opening side went on after an answer. 88 bytes and about 60 of the kernel's each: 19 MiB at 131,072.
    pub conntrack: u32,
    /// Flows that have not come that far, such as a question with its one answer, or what goes one way. Each as above:
    /// 4.7 MiB at 32,768.
    pub conntrack_new: u32,
    /// What happens to a flow when there is no room.
    pub full_table: FullTable,
    /// Fragmented packets under way. 48 bytes and about 60 of the kernel's each: 860 KiB at 8,192.
    pub fragments: u32,
    /// Rule ids. 16 bytes each on each possible CPU: 1 MiB per CPU at 65,536, and a bit each.
    pub rules: u32,
    /// Bytes of the ring buffer, a power of two: 1 MiB holds 10,082 events (96 + 8 bytes).
    pub event_bytes: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            endpoints: 1024,
            blocks_v4: 4096,
            members_v6: 65_536,
            blocks_v6: 1024,
            classes: 16_384,
            conntrack: 131_072,
            conntrack_new: 32_768,
            full_table: FullTable::Evict,
            fragments: 8192,
            rules: 65_536,
            event_bytes: 1 << 20,
        }
    }
}

impl Sizes {
    /// For tests of some pods: maps that are made in no time.
    #[cfg(feature = "test-support")]
    pub fn small() -> Self {
        Self {
            endpoints: 64,
            blocks_v4: 64,
            members_v6: 256,
            blocks_v6: 64,
            classes: 256,
            conntrack: 4096,
            conntrack_new: 4096,
            full_table: FullTable::Evict,
            fragments: 64,
            rules: 1024,
            event_bytes: 1 << 18,
        }
    }

    /// The maps that all endpoints of a node share.
    pub fn shared_maps(&self) -> Vec<MapSpec> {
        let pair = 8;
        let flows = |name, entries| MapSpec {
            kind: match self.full_table {
                FullTable::Evict => MapKind::LruHash,
                FullTable::Refuse => MapKind::Hash,
            },
            ..MapSpec::hash(name, FlowKey::BYTES as u32, Flow::BYTES as u32, entries)
        };
        vec![
            MapSpec::array(ENDPOINTS, Endpoint::BYTES as u32, self.endpoints),
            MapSpec::array(CLASS_V4, pair, (ROOT_V4_ENTRIES + self.blocks_v4 * BLOCK_ENTRIES) / 2)
                .with_flags(MapFlags::MMAPABLE),
            MapSpec::array(MEMBERS_V6, MemberV6::BYTES as u32, self.members_v6),
            MapSpec::array(CLASS_V6, pair, self.blocks_v6 * BLOCK_ENTRIES / 2).with_flags(MapFlags::MMAPABLE),
            MapSpec::array(NODES_V6, NodeV6::BYTES as u32, self.blocks_v6),
            flows(CONNTRACK, self.conntrack),
            flows(CONNTRACK_NEW, self.conntrack_new),
            MapSpec::lru_hash(FRAGMENTS, FragmentKey::BYTES as u32, Fragment::BYTES as u32, self.fragments),
            MapSpec::percpu_array(RULES, Traffic::BYTES as u32, self.rules),
            MapSpec::percpu_array(REASONS, Traffic::BYTES as u32, REASON_CELLS),
            MapSpec::array(EVENT_LIMITS, EventLimit::BYTES as u32, self.endpoints),
            MapSpec::ringbuf(EVENTS, self.event_bytes),
            MapSpec::array(REJECTS, 8, self.rules.div_ceil(64)),
            MapSpec::lru_hash(ANSWERED, FlowKey::BYTES as u32, Answered::BYTES as u32, ANSWERED_ENTRIES),
            MapSpec::prog_array(ANSWERERS, crate::datapath::answer::PROGRAMS.len() as u32),
        ]
    }

    /// The map of local ids, of which each policy set has its own. A policy set is of one direction.
    pub fn local_ids(&self, direction: Direction) -> MapSpec {
        let name = match direction {
            Direction::Egress => LOCAL_IDS_EGRESS,
            Direction::Ingress => LOCAL_IDS_INGRESS,
        };
        MapSpec::array(name, 8, self.classes.div_ceil(4))
    }
}

/// Room for every [`Reason`] in both directions, and for some more to come without a new map.
const REASON_CELLS: u32 = 64;

/// An answer is on its way for microseconds; each CPU keeps some places for itself (kernel/bpf/bpf_lru_list.c).
const ANSWERED_ENTRIES: u32 = 1024;

#[cfg(test)]
mod tests;
