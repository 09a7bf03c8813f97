//! Flows by name: the datapath's events and counters, with workloads and rules instead of numbers.
//!
//! A [`FlowReader`] hands what the datapath tells to a [`FlowSink`], of which there are:
//!
//! | Sink | Makes of flows |
//! |---|---|
//! | [`JsonLines`] | a line of JSON each |
//! | [`LastFlows`] | the last ones, in memory |
//! | `prometheus::FlowMetrics` (feature `metrics`) | counters |
//! | [`ipfix::IpfixExporter`] | records for a collector (RFC 7011) |
//! | [`Tee`] | what several others make of them |
//! | [`Logged`] | what another makes of those whose rules are to be logged |
//!
//! What every sink must do is written down as a test in `conformance` (feature `test-support`).

#[cfg(any(test, feature = "test-support"))]
pub mod conformance;
mod counters;
pub mod ipfix;
mod json;
mod last;
mod logged;
mod names;
#[cfg(feature = "metrics")]
pub mod prometheus;
mod reader;
mod tee;

use std::io;
use std::net::IpAddr;
use std::ops::AddAssign;

use dcenet_core::model::{AttachmentKey, IfIndex};
use dcenet_ebpf::abi::Direction as PodDirection;
use serde::Serialize;

pub use self::counters::{ReasonCounter, RuleCounter};
pub(crate) use self::counters::{counters, reason_counters, rule_counters};
pub use self::json::JsonLines;
pub use self::last::LastFlows;
pub use self::logged::Logged;
pub(crate) use self::names::Names;
pub use self::reader::FlowReader;
pub use self::tee::{Tee, TeeError};
use crate::compiler::Audit;
use crate::model::{Direction, PodId, PolicyId, Protocol, Verdict};

/// What happened to a packet or flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Flow {
    /// Nanoseconds since the machine started (CLOCK_MONOTONIC), at the resolution of the kernel's tick.
    pub time: u64,
    /// What is told.
    pub kind: FlowKind,
    /// Whether the packet passed.
    pub verdict: Verdict,
    /// Why, in the datapath's words, such as `allowed`, `denied` or `revoked`.
    pub reason: &'static str,
    /// The direction seen from the endpoint: of the packet, or of the policy that admitted the flow where no packet is
    /// told of ([`FlowKind::Active`], [`FlowKind::Ended`]).
    pub direction: Direction,
    /// The endpoint's attachment, where it still exists.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attachment: Option<AttachmentKey>,
    /// The endpoint's end.
    pub pod: FlowEnd,
    /// The other end.
    pub peer: FlowEnd,
    /// The protocol.
    #[serde(serialize_with = "as_text")]
    pub protocol: Protocol,
    /// The interface on the host that the packet came or went by, or the endpoint's where no packet is told of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interface: Option<IfIndex>,
    /// Flags of the packet's TCP header (RFC 9293, section 3.1), FIN being the lowest bit; none for other protocols, and
    /// where no packet is told of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp_flags: Option<u8>,
    /// ICMP type and code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icmp: Option<(u8, u8)>,
    /// The policy that decided, where one did.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
    pub policy: Option<PolicyId>,
    /// The rule that decided, in words; none where the packet met no policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// The rule's number. It stands for the same rule until that falls out of use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule_number: Option<u32>,
    /// Whether the rule that decided wants its flows marked ([`Rule::log`](crate::model::Rule::log)), for whoever keeps these and
    /// no others ([`Logged`]). Events about them have the same limits as others.
    #[serde(skip_serializing_if = "is_false")]
    pub log: bool,
    /// What the verdict would be if the policies in audit were in force, where one governs the pod and something else would
    /// decide. As [`Flow::rule`], it is what was found when the flow was judged last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<FlowAudit>,
    /// Packets that the pod sent, of the flow so far.
    pub egress_packets: u64,
    /// Bytes that the pod sent.
    pub egress_bytes: u64,
    /// Packets that the pod received.
    pub ingress_packets: u64,
    /// Bytes that the pod received.
    pub ingress_bytes: u64,
}

/// What policies in [audit](crate::model::Mode::Audit) would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct FlowAudit {
    /// The verdict that there would be.
    pub verdict: Verdict,
    /// The policy that would decide, where one would.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
    pub policy: Option<PolicyId>,
    /// The rule that would decide, in words.
    pub rule: String,
}

impl FlowAudit {
    fn of(audit: &Audit) -> Self {
        let Audit { verdict, by } = audit;
        Self { verdict: *verdict, policy: by.policy().cloned(), rule: by.to_string() }
    }
}

/// What a [`Flow`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum FlowKind {
    /// A flow was admitted.
    New,
    /// A packet was dropped.
    Denied,
    /// A TCP flow ends: its first FIN or RST was seen, and the counts are those of that moment. [`FlowKind::Ended`] follows
    /// with the final ones.
    Closed,
    /// A flow is under way: told at intervals where that is asked for ([`FlowReader::report_every`]), of each flow that had
    /// a packet since the report before and that no FIN or RST has closed, with the time of its last packet and its counts
    /// so far.
    Active,
    /// A packet of a known flow, one of so many as the lowering says ([`Tc::sample`](crate::target::Tc::sample)).
    Sampled,
    /// A flow is over: no packet came for its time, which is short after a FIN or RST
    /// ([`Timeouts`](dcenet_ebpf::datapath::Timeouts)). Told up to ten seconds later, with the time of its last packet, its
    /// final counts and the direction that admitted it. Sums of traffic are those of these counts and no others. A flow that
    /// had to make room for others, whose ports another flow took within its time, or whose endpoint went is not told of.
    Ended,
}

impl FlowKind {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::New, Self::Denied, Self::Closed, Self::Active, Self::Sampled, Self::Ended];

    /// Its name, in lower case.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Denied => "denied",
            Self::Closed => "closed",
            Self::Active => "active",
            Self::Sampled => "sampled",
            Self::Ended => "ended",
        }
    }
}

/// One end of a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FlowEnd {
    /// Its address; none where the packet was dropped before it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Its port; 0 for protocols without ports.
    pub port: u16,
    /// The pod that has the address, where known.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
    pub workload: Option<PodId>,
    /// The node that has the address, where known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// Takes flows.
pub trait FlowSink {
    /// One flow. Those of a drain come by their [`time`](Flow::time), as far as packets on several CPUs have an order; what a
    /// sweep tells bears the time of a packet before, and so may be older than what an earlier drain handed over.
    ///
    /// # Errors
    /// Ends the drain. Events that had left the ring by then and were not handed over count as lost
    /// ([`Losses::undelivered`]).
    fn flow(&mut self, flow: &Flow) -> io::Result<()>;

    /// Says how many events were lost since the last call, for want of room or by the limits of their endpoints.
    ///
    /// # Errors
    /// As [`FlowSink::flow`].
    fn lost(&mut self, losses: Losses) -> io::Result<()>;

    /// Sends on what the sink has gathered. Called at the end of each drain.
    ///
    /// # Errors
    /// As [`FlowSink::flow`].
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Events that nobody will see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Losses {
    /// The ring buffer, or the list of flows that are over, was full.
    pub full: u64,
    /// Beyond the limits of an endpoint: of events about dropped packets, and of those about flows
    /// ([`Spec::flow_events`](dcenet_ebpf::datapath::Spec::flow_events)).
    pub limited: u64,
    /// Not of the form that this release knows.
    pub unreadable: u64,
    /// The sink failed before their turn.
    pub undelivered: u64,
}

impl Losses {
    /// All of them.
    pub fn total(self) -> u64 {
        let Self { full, limited, unreadable, undelivered } = self;
        [limited, unreadable, undelivered].into_iter().fold(full, u64::saturating_add)
    }

    fn since(self, before: Self) -> Self {
        Self {
            full: self.full.saturating_sub(before.full),
            limited: self.limited.saturating_sub(before.limited),
            unreadable: self.unreadable.saturating_sub(before.unreadable),
            undelivered: self.undelivered.saturating_sub(before.undelivered),
        }
    }
}

impl AddAssign for Losses {
    fn add_assign(&mut self, more: Self) {
        let Self { full, limited, unreadable, undelivered } = self;
        *full = full.saturating_add(more.full);
        *limited = limited.saturating_add(more.limited);
        *unreadable = unreadable.saturating_add(more.unreadable);
        *undelivered = undelivered.saturating_add(more.undelivered);
    }
}

fn direction_of(direction: PodDirection) -> Direction {
    match direction {
        PodDirection::Egress => Direction::Egress,
        PodDirection::Ingress => Direction::Ingress,
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

fn as_text<T: std::fmt::Display, S: serde::Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn as_optional_text<T: std::fmt::Display, S: serde::Serializer>(
    value: &Option<T>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.collect_str(value),
        None => serializer.serialize_none(),
    }
}
