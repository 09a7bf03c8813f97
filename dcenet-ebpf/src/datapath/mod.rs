//! The programs on the host's end of a pod's veth: what may pass, by policy and by flow.
//!
//! An endpoint has two: [`FROM_POD`] on the ingress hook of the device, where the pod sends, and [`TO_POD`] on the
//! egress hook, where it receives; [`FROM_ONE_POD`] and [`TO_ONE_POD`] the other way round on a device in the pod. Both are written by [`program`] around two classifiers, which a policy compiler
//! supplies ([`EmitClassifier`]). [`default_program`] is what runs until the policy is known.
//!
//! ```text
//! packet -> parse -> ARP, neighbour discovery, spoofed source, malformed ...: verdict
//!             |
//!             v
//!        conntrack -- hit, generation of now --> count, pass; an answered flow moves from the new to the settled
//!             |  \
//!             |   hit, older generation --> classifier of the direction that admitted the flow
//!            miss                             allowed: new generation, pass; denied: drop, as old as before
//!             |
//!             v
//!    peer -> class -> local id -> classifier of the packet's direction
//!                                   allowed: new entry, event, pass; denied: event, drop
//! ```
//!
//! What a rule rejects ([`abi::REJECTS`]) is dropped like all that is denied, and the packet itself is turned into the answer
//! ([`answer`]), as long as [`Spec::answers`] allows it.
//!
//! A packet that may pass is left to the next program or filter (`TC_ACT_UNSPEC`), never accepted for good.
//!
//! | Case | Verdict |
//! |---|---|
//! | policy not known yet | drop, but for ARP and neighbour discovery |
//! | peer that no rule names | class 0, local id 0: the classifier decides |
//! | no room for the flow among those that are new | as [`FullTable`](abi::FullTable) says |
//! | fragment without its head, more than 8 extension headers, other EtherType, headers cut off | drop |
//! | IPv4 source route, IPv6 routing header with segments left | drop: policy would judge a stop on the way |
//! | VLAN tag, in the packet or beside it | drop, unless the endpoint is a [trunk](abi::Endpoint::TRUNK) |
//! | source from the pod is not its own address | drop |
//! | unicast frame to the pod that is for another Ethernet address | drop, without an event: its own receiver would ignore it (PACKET_OTHERHOST), but whoever listens in the pod would see it |
//! | packet to the pod that is for another IP address, no group, and no broadcast address of its network | the same: the sender's policy has judged that destination, not this pod |
//! | ARP from the pod | pass a request or reply if its sender is the pod, or unspecified and the target the pod |
//! | ARP with more behind it than a short frame's padding | drop |
//! | neighbour discovery from the pod | the same, of an advertisement by its target; to its link: a group of link scope, a link-local address, the target of a solicitation, anybody for an advertisement; router advertisement and redirect are dropped |
//! | neighbour discovery with a hop limit below 255, a code, or behind an extension header; longer than one option makes it, from the pod | drop |
//! | ARP, other neighbour discovery to the pod | pass |
//! | multicast listener discovery: a report of few groups of the link from the pod, a question to it | pass; others are judged as other ICMP |
//! | TCP without an entry in mid-flow | judged as if new |
//! | ICMP echo | a flow, by its identifier; a reply without a question is judged as a packet of its own |
//! | ICMP error about a known flow | pass |
//! | other ICMP | judged packet by packet |
//!
//! # Minimum kernel version
//! 5.12 (32-bit jumps and fetching atomics), and 5.11 for the coarse clock.

mod account;
#[cfg(feature = "test-support")]
pub mod alone;
pub mod answer;
pub mod classes;
mod classifier;
mod emitter;
mod flows;
mod fragments;
mod frame;
pub mod guard;
mod icmp;
mod judge;
mod neighbour;
mod parse;
mod sweep;

use std::num::NonZeroU32;
use std::time::Duration;

pub use classifier::{AllowAll, DenyAll, EmitClassifier, Exits};
pub use sweep::{Found, sweep};

use crate::abi::{self, Direction, Reason, Sizes};
use crate::asm::{AsmError, Function};
use crate::insn::{self, AluOp, Cond, Insn, IsaLevel, Reg::*, Src};
use crate::object::{Object, ObjectError};

use self::emitter::Emitter;

/// Name of the program for what the pod sends, where its slot comes with the attachment.
pub const FROM_POD: &str = "from_pod";

/// Name of the program for what the pod receives, where its slot comes with the attachment.
pub const TO_POD: &str = "to_pod";

/// As [`FROM_POD`], where the slot is in the program.
pub const FROM_ONE_POD: &str = "from_one_pod";

/// As [`TO_POD`], where the slot is in the program.
pub const TO_ONE_POD: &str = "to_one_pod";

/// Whether a loaded program of this name learns its slot from the class of its attachment ([`Slot::Class`]). The kernel keeps
/// the name with the program, so that it is known of a pinned one, too.
pub(crate) fn reads_class(name: &str) -> bool {
    [FROM_POD, TO_POD].contains(&name) || Slot::Guarded.program_names().contains(&name)
}

/// Where an endpoint's programs learn its slot ([`abi::Endpoint`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Slot {
    /// From the class id of the attachment ([`Tag::class`](crate::attach::Tag::class)), so that endpoints with equal policies
    /// share their programs. Only clsact carries one. tcx and netkit leave in `tc_classid` what is there (kernel/bpf/tcx.c
    /// does not set it): 0 as a rule, but a classifier before, also one on the pod's own end where the pod has CAP_NET_ADMIN,
    /// may have left the slot of another endpoint. Attachers by links refuse such programs
    /// ([`AttachError::ReadsClass`](crate::attach::AttachError::ReadsClass)), which they know by their names.
    #[default]
    Class,
    /// It is a constant of the programs, 1 to 65,535: they serve this endpoint alone, by any attacher, in any namespace.
    Constant(u16),
    /// As [`Slot::Class`], from a guard on the parent of the pod's device ([`guard`]), which calls the program about frames that
    /// the pod's own programs have seen already, if the pod let them. They are judged again, and what passes is neither
    /// counted nor remembered. There is but one such program, for what the pod sends.
    Guarded,
    /// There is none yet: for default programs alone ([`default_program_of`]), which then let nothing of the pod pass.
    Nobody,
}

impl Slot {
    /// The names of the programs for what the pod sends and for what it receives.
    pub const fn program_names(self) -> [&'static str; 2] {
        match self {
            Self::Class => [FROM_POD, TO_POD],
            Self::Constant(_) | Self::Nobody => [FROM_ONE_POD, TO_ONE_POD],
            Self::Guarded => [guard::FROM_GUARDED, guard::TO_GUARDED],
        }
    }

    /// Those that there are, and what they judge.
    pub fn programs(self) -> impl Iterator<Item = (&'static str, Direction)> {
        let count = if self == Self::Guarded { 1 } else { PROGRAMS.len() };
        self.program_names().into_iter().zip(PROGRAMS).take(count)
    }
}

/// What the programs of an endpoint are made of.
#[derive(Clone)]
pub struct Spec<'a> {
    /// Sizes of the maps.
    pub sizes: &'a Sizes,
    /// Where the programs learn their endpoint's slot.
    pub slot: Slot,
    /// How long flows are remembered.
    pub timeouts: Timeouts,
    /// Events about dropped packets for each endpoint in 2^30 ns (1.07 s); the others are counted
    /// ([`EventLimit::limited`](abi::EventLimit::limited)).
    pub denied_events: u32,
    /// The same for events about flows: new, closed and sampled, together. All endpoints share one ring, which an endpoint
    /// that opens flows as fast as it can would fill for all.
    pub flow_events: u32,
    /// Packets that rules reject and that are answered, for each endpoint in 2^30 ns (RFC 1812, section 4.3.2.8, and RFC 4443,
    /// section 2.4 (f), want a limit); the others are dropped alone. With 0 the programs have no code for it, and no tail call.
    pub answers: u32,
    /// Tells of one in so many packets of known flows, each packet picked by chance (RFC 5475, section 5.2.2.2: uniform
    /// probabilistic sampling) and independently of others: [`EventKind::Sampled`](abi::EventKind::Sampled). Packets that
    /// other events tell of are not picked. `None` adds no instruction; a random number costs each packet some
    /// nanoseconds.
    pub sample: Option<NonZeroU32>,
    /// Level of the instruction set. [`IsaLevel::V4`] spares islands in programs of more than 10,900 slots.
    pub isa: IsaLevel,
    /// Judges what the pod opens.
    pub egress: &'a dyn EmitClassifier,
    /// Judges what is opened to the pod.
    pub ingress: &'a dyn EmitClassifier,
}

impl<'a> Spec<'a> {
    /// With default timeouts, 100 events about drops, 1,000 about flows and 100 answers in each window, no sampling, ISA v3, for attachments with a class id.
    pub fn new(sizes: &'a Sizes, egress: &'a dyn EmitClassifier, ingress: &'a dyn EmitClassifier) -> Self {
        Self {
            sizes,
            slot: Slot::Class,
            timeouts: Timeouts::default(),
            denied_events: 100,
            flow_events: 1000,
            answers: 100,
            sample: None,
            isa: IsaLevel::V3,
            egress,
            ingress,
        }
    }
}

/// How long after its last packet a flow is forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// TCP of which only the SYN was seen; 60 s.
    pub tcp_new: Duration,
    /// TCP with packets both ways; 2 h 4 min (RFC 5382, REQ-5).
    pub tcp_established: Duration,
    /// TCP after a FIN or RST; 4 min (RFC 5382, REQ-5).
    pub tcp_closing: Duration,
    /// UDP one way; 30 s.
    pub udp_new: Duration,
    /// UDP both ways; 5 min (RFC 4787, REQ-5).
    pub udp_established: Duration,
    /// Other protocols, ICMP echo among them; 60 s.
    pub other: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_new: Duration::from_secs(60),
            tcp_established: Duration::from_secs(7440),
            tcp_closing: Duration::from_secs(240),
            udp_new: Duration::from_secs(30),
            udp_established: Duration::from_secs(300),
            other: Duration::from_secs(60),
        }
    }
}

macro_rules! nanoseconds {
    ($($field:ident $method:ident)+) => {
        impl Timeouts {
            $(fn $method(&self) -> u64 {
                // Compared as signed numbers; 292 years are enough.
                u64::try_from(self.$field.as_nanos()).map_or(i64::MAX as u64, |ns| ns.min(i64::MAX as u64))
            })+
        }
    };
}

nanoseconds! {
    tcp_new tcp_new_ns
    tcp_established tcp_established_ns
    tcp_closing tcp_closing_ns
    udp_new udp_new_ns
    udp_established udp_established_ns
    other other_ns
}

/// Why an endpoint's programs cannot be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatapathError {
    /// A size that the programs cannot work with.
    #[error("size {field} is {value}: {reason}")]
    Size {
        /// The field of [`Sizes`].
        field: &'static str,
        /// Its value.
        value: u32,
        /// What would be accepted.
        reason: &'static str,
    },
    /// A slot that no endpoint can have.
    #[error("slot {slot}: want 1 to {last}, for the map of endpoints has {} places, the first of them nobody's", last + 1)]
    Slot {
        /// The slot.
        slot: u16,
        /// The last one that there is.
        last: u32,
    },
    /// The code cannot be assembled, for example because a classifier is too large or leaves a label open.
    #[error("the program cannot be assembled")]
    Assemble(#[from] AsmError),
    /// The object cannot be put together, for example because a classifier's map has a name that is taken.
    #[error("the object cannot be put together")]
    Object(#[from] ObjectError),
}

/// Who judges new flows.
#[derive(Clone, Copy)]
pub(crate) enum Judgement<'a> {
    /// Nobody: the policy is not known.
    Unknown,
    /// A policy's classifiers.
    Classifiers {
        egress: &'a dyn EmitClassifier,
        ingress: &'a dyn EmitClassifier,
        members_v6_bits: u32,
        denied_events: u32,
        flow_events: u32,
        answers: u32,
    },
}

/// Writes both programs of endpoints with a policy, with all their maps.
///
/// By [`Slot::Class`] the same object serves every endpoint with this policy. A loader is given the maps that exist already by
/// their names.
///
/// # Errors
/// See [`DatapathError`].
pub fn program(spec: &Spec<'_>) -> Result<Object, DatapathError> {
    let Spec { sizes, slot, timeouts, denied_events, flow_events, answers, sample, isa, egress, ingress } = spec;
    check(sizes)?;
    check_slot(*slot, sizes)?;
    if *slot == Slot::Nobody {
        return Err(no_such_slot(0, sizes));
    }
    let mut object = Object::new();
    for map in sizes.shared_maps().into_iter().chain(Direction::ALL.map(|d| sizes.local_ids(d))) {
        object.add_map(map)?;
    }
    for map in egress.maps().into_iter().chain(ingress.maps()) {
        if !object.maps().contains(&map) {
            object.add_map(map)?;
        }
    }
    for (name, direction) in slot.programs() {
        let judgement = Judgement::Classifiers {
            egress: *egress,
            ingress: *ingress,
            members_v6_bits: sizes.members_v6.trailing_zeros(),
            denied_events: *denied_events,
            flow_events: *flow_events,
            answers: *answers,
        };
        let mut emitter = Emitter::new(name, direction, *slot, judgement);
        emitter.asm.isa(*isa);
        emitter.asm.mark("the endpoint");
        emitter.prologue();
        emitter.asm.mark("parse by address");
        emitter.fast();
        emitter.asm.mark("the flow and its verdict");
        match slot {
            Slot::Guarded => emitter.flow_again_judged(),
            Slot::Class | Slot::Constant(_) | Slot::Nobody => emitter.flow(timeouts, *sample),
        }
        emitter.asm.mark("parse by copies");
        emitter.slow();
        emitter.asm.mark("events and verdicts");
        emitter.ends();
        object.add(emitter.asm.finish()?)?;
    }
    for function in egress.functions().into_iter().chain(ingress.functions()) {
        if !object.functions().contains(&function) {
            object.add(function)?;
        }
    }
    Ok(object)
}

/// Where the slot of [`Slot::Constant`] stands in an object's ELF file: offsets of 32 bits, one of each program. Whoever writes
/// another slot there has what [`program`] makes of that slot, so that endpoints with equal policies share all but these bytes.
/// `None` where the file is not the object's, or the object's programs have no such slot.
pub fn slot_places(object: &Object, elf: &[u8]) -> Option<[usize; 2]> {
    let names = Slot::Constant(0).program_names();
    let mut programs = object.functions().iter().filter(|function| names.contains(&function.name()));
    // Ahead of the first reference to a map, which is written with its relocation.
    let head = programs.next()?.insns().get(..3)?;
    if !matches!(head[1], Insn::Alu { op: AluOp::Mov, dst: R8, src: Src::Imm(_), .. })
        || programs.next()?.insns().get(..3)? != head
        || programs.next().is_some()
    {
        return None;
    }
    let head = insn::encode(head);
    let mut found = (0..elf.len().saturating_sub(head.len())).filter(|at| elf[*at..].starts_with(&head));
    let places = [found.next()?, found.next()?].map(|at| at + insn::SLOT_BYTES + IMMEDIATE);
    found.next().is_none().then_some(places)
}

/// Writes the programs that stand in until the policy is known. Only the maps `endpoints` and `reasons` are used.
///
/// ARP and neighbour discovery from the pod need its own addresses: where the attachment's slot holds no endpoint,
/// nothing from the pod passes.
///
/// # Errors
/// See [`DatapathError`].
pub fn default_program(sizes: &Sizes) -> Result<Object, DatapathError> {
    default_program_of(sizes, Slot::Class)
}

/// As [`default_program`], with the slot from elsewhere.
///
/// # Errors
/// See [`DatapathError`].
pub fn default_program_of(sizes: &Sizes, slot: Slot) -> Result<Object, DatapathError> {
    check_slot(slot, sizes)?;
    let mut object = Object::new();
    for map in sizes.shared_maps() {
        if [abi::ENDPOINTS, abi::REASONS].contains(&map.name.as_str()) {
            object.add_map(map)?;
        }
    }
    for (name, direction) in slot.programs() {
        object.add(undecided(name, direction, slot)?)?;
    }
    Ok(object)
}

fn undecided(name: &str, direction: Direction, slot: Slot) -> Result<Function, AsmError> {
    let mut emitter = Emitter::new(name, direction, slot, Judgement::Unknown);
    let unknown = emitter.drop(Reason::PolicyUnknown);
    emitter.asm.mark("the attachment's slot");
    emitter.slot();
    if direction == Direction::Egress {
        emitter.asm.jump_if(Cond::Eq, R0, 0, unknown).mov(R9, R0);
    }
    emitter.clear(0.into());
    emitter.asm.mark("parse by copies");
    emitter.slow();
    emitter.asm.bind(emitter.places.lookup).jump(unknown);
    emitter.asm.mark("events and verdicts");
    emitter.ends();
    emitter.asm.finish()
}

fn check(sizes: &Sizes) -> Result<(), DatapathError> {
    let error = |field, value, reason| Err(DatapathError::Size { field, value, reason });
    if !sizes.members_v6.is_power_of_two() {
        return error("members_v6", sizes.members_v6, "a power of two");
    }
    if sizes.endpoints == 0 || sizes.endpoints > 1 << 16 {
        return error("endpoints", sizes.endpoints, "1 to 65,536, as a slot has 16 bits");
    }
    Ok(())
}

fn check_slot(slot: Slot, sizes: &Sizes) -> Result<(), DatapathError> {
    match slot {
        Slot::Constant(slot) if slot == 0 || u32::from(slot) >= sizes.endpoints => Err(no_such_slot(slot, sizes)),
        Slot::Constant(_) | Slot::Class | Slot::Guarded | Slot::Nobody => Ok(()),
    }
}

fn no_such_slot(slot: u16, sizes: &Sizes) -> DatapathError {
    DatapathError::Slot { slot, last: sizes.endpoints.saturating_sub(1) }
}

/// Where an instruction's immediate begins in its 8 bytes (include/uapi/linux/bpf.h, `struct bpf_insn`).
const IMMEDIATE: usize = 4;

/// In the order of [`Slot::program_names`].
const PROGRAMS: [Direction; 2] = [Direction::Egress, Direction::Ingress];
