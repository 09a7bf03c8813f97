//! Flows by name: the datapath's events and counters, with workloads and rules instead of numbers.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::model::AttachmentKey;
use dcenet_ebpf::abi::{self, Direction as PodDirection, Event, EventKind, EventLimit, Reason};
use dcenet_ebpf::maps::{Array, PerCpuArray, RingBuffer};
use parking_lot::{Mutex, RwLock};
use serde::Serialize;

use super::EnforcerError;
use super::state::Shared;
use super::sweep::Ended;
use crate::compiler::RuleTable;
use crate::ir::RuleId;
use crate::isolation;
use crate::model::{Direction, PodId, PolicyId, Protocol, RuleRef, Verdict};

/// What happened to a packet or flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flow {
    /// Nanoseconds since the machine started (CLOCK_MONOTONIC), at the resolution of the kernel's tick.
    pub time: u64,
    /// What is told.
    pub kind: FlowKind,
    /// Whether the packet passed.
    pub verdict: Verdict,
    /// Why, in the datapath's words, such as `allowed`, `denied` or `revoked`.
    pub reason: &'static str,
    /// The packet's direction, seen from the endpoint.
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
    /// ICMP type and code.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icmp: Option<(u8, u8)>,
    /// The policy that decided, where one did.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
    pub policy: Option<PolicyId>,
    /// The rule that decided, in words; none where the packet met no policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Packets that the pod sent, of the flow so far.
    pub egress_packets: u64,
    /// Bytes that the pod sent.
    pub egress_bytes: u64,
    /// Packets that the pod received.
    pub ingress_packets: u64,
    /// Bytes that the pod received.
    pub ingress_bytes: u64,
}

/// What a [`Flow`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowKind {
    /// A flow was admitted.
    New,
    /// A packet was dropped.
    Denied,
    /// A TCP flow ends.
    Closed,
    /// A flow is over by silence: no packet came for its time. Told up to ten seconds later, with the time of its last
    /// packet, all its counts and the direction that admitted it. A flow that had to make room for others is not told of.
    Ended,
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
    /// One flow, in the order in which the datapath saw them.
    ///
    /// # Errors
    /// Ends the drain. Events that had left the ring by then and were not handed over count as lost
    /// ([`Losses::undelivered`]).
    fn flow(&mut self, flow: &Flow) -> io::Result<()>;

    /// Says how many events were lost since the last call, for want of room or by the limit on denied packets.
    ///
    /// # Errors
    /// As [`FlowSink::flow`].
    fn lost(&mut self, losses: Losses) -> io::Result<()>;
}

/// Events that nobody will see.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Losses {
    /// The ring buffer, or the list of flows that ended by silence, was full.
    pub full: u64,
    /// Beyond the limit of events about dropped packets.
    pub limited: u64,
    /// Not of the form that this release knows.
    pub unreadable: u64,
    /// The sink failed before their turn.
    pub undelivered: u64,
}

impl Losses {
    fn since(self, before: Self) -> Self {
        Self {
            full: self.full.saturating_sub(before.full),
            limited: self.limited.saturating_sub(before.limited),
            unreadable: self.unreadable.saturating_sub(before.unreadable),
            undelivered: self.undelivered.saturating_sub(before.undelivered),
        }
    }
}

/// Writes a line of JSON for each flow, and one with the key `lost` for losses.
#[derive(Debug)]
pub struct JsonLines<W>(pub W);

impl<W: Write> FlowSink for JsonLines<W> {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        serde_json::to_writer(&mut self.0, flow)?;
        self.0.write_all(b"\n")
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        #[derive(Serialize)]
        struct Line {
            lost: Losses,
        }
        serde_json::to_writer(&mut self.0, &Line { lost: losses })?;
        self.0.write_all(b"\n")
    }
}

/// Keeps the last flows in memory.
#[derive(Debug)]
pub struct LastFlows {
    room: usize,
    kept: Mutex<(std::collections::VecDeque<Flow>, Losses)>,
}

impl LastFlows {
    /// Keeps at most `room`.
    pub fn new(room: usize) -> Self {
        Self { room, kept: Mutex::default() }
    }

    /// The flows, oldest first.
    pub fn flows(&self) -> Vec<Flow> {
        self.kept.lock().0.iter().cloned().collect()
    }

    /// All losses so far.
    pub fn losses(&self) -> Losses {
        self.kept.lock().1
    }
}

impl FlowSink for &LastFlows {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        let kept = &mut self.kept.lock().0;
        if kept.len() >= self.room {
            kept.pop_front();
        }
        kept.push_back(flow.clone());
        Ok(())
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        let all = &mut self.kept.lock().1;
        all.full += losses.full;
        all.limited += losses.limited;
        all.unreadable += losses.unreadable;
        all.undelivered += losses.undelivered;
        Ok(())
    }
}

/// What numbers stand for. Rules that fell out of use keep their names until their number is given to another.
#[derive(Debug, Default)]
pub(crate) struct Names {
    rules: BTreeMap<RuleId, RuleRef>,
    /// Numbers that an earlier owner gave to rules and that now stand for something else.
    taken_back: Vec<RuleId>,
}

impl Names {
    /// Where names are kept for the next owner.
    pub(crate) fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("policy.rules")
    }

    /// The names that an earlier owner has left. A file that cannot be read is as good as none: names are then given anew,
    /// and counters begin at zero.
    pub(crate) fn resume(run_dir: &Path) -> Self {
        let path = Self::path(run_dir);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the names of rules are lost");
                return Self::default();
            }
        };
        match serde_json::from_slice::<Vec<(u32, RuleRef)>>(&text) {
            Ok(rules) => {
                let rules = rules.into_iter().map(|(id, rule)| (RuleId(id), rule));
                let (rules, taken_back): (BTreeMap<_, _>, BTreeMap<_, _>) =
                    rules.partition(|(id, _)| *id >= RuleId::FIRST);
                Self { rules, taken_back: taken_back.into_keys().collect() }
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the names of rules are lost");
                Self::default()
            }
        }
    }

    /// The rules with their numbers.
    pub(crate) fn rules(&self) -> impl Iterator<Item = (RuleId, RuleRef)> {
        self.rules.iter().map(|(id, rule)| (*id, rule.clone()))
    }

    /// Notes the names of an update, before any program uses the numbers. What gets the number of another rule begins to
    /// count at zero, also where it is no rule: a release may have fewer numbers for rules than the one before it.
    pub(crate) fn learn(
        &mut self,
        table: &RuleTable,
        counters: &PerCpuArray<[u64; 2]>,
        run_dir: &Path,
    ) -> Result<(), EnforcerError> {
        let learnt: Vec<_> = table.iter().filter(|(id, rule)| self.rules.get(id) != Some(*rule)).collect();
        if !learnt.is_empty() || !self.taken_back.is_empty() {
            for id in learnt.iter().map(|(id, _)| *id).chain(self.taken_back.iter().copied()) {
                if id.0 < counters.entries() {
                    counters.store(id.0, &[0; 2]).map_err(|e| EnforcerError::map(abi::RULES, e))?;
                }
            }
            let mut rules = self.rules.clone();
            rules.extend(learnt.into_iter().map(|(id, rule)| (id, rule.clone())));
            let path = Self::path(run_dir);
            let failed = |source| EnforcerError::File { path: path.clone(), source };
            let fresh = run_dir.join("policy.rules,new");
            let text: Vec<(u32, &RuleRef)> = rules.iter().map(|(id, rule)| (id.0, rule)).collect();
            let text = serde_json::to_vec(&text).map_err(|e| failed(e.into()))?;
            fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, &path)).map_err(failed)?;
            // Only now: what is not written down is learnt again by the next attempt.
            *self = Self { rules, taken_back: Vec::new() };
        }
        Ok(())
    }

    fn policy(&self, id: RuleId) -> Option<PolicyId> {
        self.rules.get(&id).map(|rule| rule.policy.clone())
    }

    fn text(&self, id: RuleId) -> String {
        match self.rules.get(&id) {
            Some(rule) => rule.to_string(),
            None => RuleTable::default().name(id),
        }
    }
}

/// Reads the node's flow events.
#[derive(Debug)]
pub struct FlowReader {
    shared: Arc<Shared>,
    ring: RingBuffer,
    ended: Arc<Ended>,
    limits: Array<[u64; 4]>,
    unreadable: u64,
    undelivered: u64,
    /// Ended flows that found no room.
    full: u64,
    told: Losses,
}

impl FlowReader {
    pub(crate) fn new(shared: &Arc<Shared>) -> Result<Self, EnforcerError> {
        let failed = |name: &'static str| move |e| EnforcerError::map(name, e);
        let ring = RingBuffer::new(shared.maps.get(abi::EVENTS)?).map_err(failed(abi::EVENTS))?;
        let limits = Array::new(shared.maps.get(abi::EVENT_LIMITS)?).map_err(failed(abi::EVENT_LIMITS))?;
        let mut reader = Self {
            shared: Arc::clone(shared),
            ring,
            ended: shared.listener.subscribe(),
            limits,
            unreadable: 0,
            undelivered: 0,
            full: 0,
            told: Losses::default(),
        };
        // Losses before this reader are not its own.
        reader.told = reader.losses()?;
        Ok(reader)
    }

    /// Waits until an event is there, at most for `limit`; `false` when none came. Flows that end by silence do not end
    /// the wait, and are found after it.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn wait(&self, limit: Duration) -> Result<bool, EnforcerError> {
        let waited = self.ring.wait(limit).map_err(|e| EnforcerError::map(abi::EVENTS, e))?;
        Ok(waited || !self.ended.is_empty())
    }

    /// Hands all events that wait now to the sink, then what was lost, and returns how many there were. What comes
    /// meanwhile is for the next call, so that this one ends however fast events come.
    ///
    /// # Errors
    /// The sink's, and what the kernel refuses.
    pub fn drain(&mut self, sink: &mut dyn FlowSink) -> Result<usize, EnforcerError> {
        let Self { shared, ring, ended, unreadable, undelivered, full, .. } = self;
        let mut handed = 0;
        let mut waiting = ring.pending();
        let mut resolver = None;
        while waiting > 0 {
            let mut events = Vec::new();
            let read = ring.drain(BATCH, |bytes| {
                waiting = waiting.saturating_sub((bytes.len() as u64).next_multiple_of(8) + 8);
                match Event::decode(bytes) {
                    Some(event) => events.push(event),
                    None => *unreadable += 1,
                }
            });
            let read = read.map_err(|e| EnforcerError::map(abi::EVENTS, e))?;
            if read == 0 {
                break;
            }
            let resolver = resolver.get_or_insert_with(|| Resolver::new(shared));
            for (index, event) in events.iter().enumerate() {
                match resolver.flow(event) {
                    Some(flow) => {
                        if let Err(error) = sink.flow(&flow) {
                            *undelivered += (events.len() - index) as u64;
                            return Err(sink_failed(error));
                        }
                        handed += 1;
                    }
                    None => *unreadable += 1,
                }
            }
        }
        let (mut silent, lost) = ended.take();
        *full += lost;
        while let Some(event) = silent.front() {
            let resolver = resolver.get_or_insert_with(|| Resolver::new(shared));
            match resolver.flow(event) {
                Some(flow) => {
                    if let Err(error) = sink.flow(&Flow { kind: FlowKind::Ended, ..flow }) {
                        *undelivered += silent.len() as u64;
                        return Err(sink_failed(error));
                    }
                    handed += 1;
                }
                None => *unreadable += 1,
            }
            silent.pop_front();
        }
        let losses = self.losses()?;
        let new = losses.since(self.told);
        if new != Losses::default() {
            sink.lost(new).map_err(sink_failed)?;
            self.told = losses;
        }
        Ok(handed)
    }

    /// Losses since the maps were made, of all slots: what those have lost whose endpoint is gone counts as well, and a
    /// sum over those that are there now would fall when one goes.
    fn losses(&self) -> Result<Losses, EnforcerError> {
        let Self { unreadable, undelivered, full, .. } = *self;
        let mut losses = Losses { unreadable, undelivered, full, ..Losses::default() };
        for slot in 0..self.limits.entries() {
            let words = self.limits.load(slot).map_err(|e| EnforcerError::map(abi::EVENT_LIMITS, e))?;
            let word = |offset: i16| words[offset as usize / 8];
            losses.full += word(EventLimit::LOST);
            losses.limited += word(EventLimit::LIMITED);
        }
        Ok(losses)
    }
}

fn sink_failed(source: io::Error) -> EnforcerError {
    EnforcerError::File { path: "flow sink".into(), source }
}

/// Names at one moment.
struct Resolver {
    endpoints: BTreeMap<u16, AttachmentKey>,
    pods: BTreeMap<IpAddr, PodId>,
    nodes: BTreeMap<IpAddr, String>,
    names: Arc<RwLock<Names>>,
}

impl Resolver {
    fn new(shared: &Shared) -> Self {
        let slots = shared.statuses().into_iter().filter_map(|status| Some((status.slot?, status.attachment)));
        let cluster = shared.state.lock().cluster();
        let ambiguous = isolation::ambiguous(&cluster);
        let mut pods: BTreeMap<IpAddr, PodId> =
            cluster.pods.iter().flat_map(|(id, pod)| pod.addresses.iter().map(|a| (*a, id.clone()))).collect();
        // Whose flow it is, nobody can tell.
        pods.retain(|address, _| !ambiguous.contains_key(address));
        let nodes =
            cluster.nodes.iter().flat_map(|(node, addresses)| addresses.iter().map(|a| (*a, node.clone()))).collect();
        Self { endpoints: slots.collect(), pods, nodes, names: Arc::clone(&shared.names) }
    }

    fn flow(&self, event: &Event) -> Option<Flow> {
        let reason = Reason::from_number(event.reason)?;
        let kind = match EventKind::from_number(event.kind)? {
            EventKind::New => FlowKind::New,
            EventKind::Denied => FlowKind::Denied,
            EventKind::Closed => FlowKind::Closed,
            _ => return None,
        };
        let direction = match PodDirection::from_number(event.direction)? {
            PodDirection::Egress => Direction::Egress,
            PodDirection::Ingress => Direction::Ingress,
        };
        let rule = (event.rule != Event::NO_RULE).then_some(RuleId(event.rule));
        let names = self.names.read();
        let protocol = Protocol(event.protocol);
        let icmp = matches!(protocol, Protocol::ICMP | Protocol::ICMPV6);
        let [icmp_type, icmp_code] = event.icmp.to_be_bytes();
        Some(Flow {
            time: event.time,
            kind,
            verdict: if reason.passes() { Verdict::Allow } else { Verdict::Deny },
            reason: reason.name(),
            direction,
            attachment: self.endpoints.get(&event.slot).cloned(),
            pod: self.end(event.pod, event.pod_port.0),
            peer: self.end(event.peer, event.peer_port.0),
            protocol,
            icmp: icmp.then_some((icmp_type, icmp_code)),
            policy: rule.and_then(|id| names.policy(id)),
            rule: rule.map(|id| names.text(id)),
            egress_packets: event.egress_packets,
            egress_bytes: event.egress_bytes,
            ingress_packets: event.ingress_packets,
            ingress_bytes: event.ingress_bytes,
        })
    }

    fn end(&self, address: [u8; 16], port: u16) -> FlowEnd {
        let address = Ipv6Addr::from(address);
        let address = (!address.is_unspecified()).then(|| address.to_canonical());
        FlowEnd {
            address,
            port,
            workload: address.and_then(|a| self.pods.get(&a).cloned()),
            node: address.and_then(|a| self.nodes.get(&a).cloned()),
        }
    }
}

/// What one rule has decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RuleCounter {
    /// The rule, in words.
    pub rule: String,
    /// The policy, where the rule is one's.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_optional_text")]
    pub policy: Option<PolicyId>,
    /// Packets that began a flow, or were dropped.
    pub packets: u64,
    /// Their bytes, Ethernet headers included.
    pub bytes: u64,
}

/// Packets and bytes by rule.
pub(crate) fn counters(shared: &Shared) -> Result<PerCpuArray<[u64; 2]>, EnforcerError> {
    PerCpuArray::new(shared.maps.get(abi::RULES)?).map_err(|e| EnforcerError::map(abi::RULES, e))
}

pub(crate) fn rule_counters(shared: &Shared) -> Result<Vec<RuleCounter>, EnforcerError> {
    let failed = |e| EnforcerError::map(abi::RULES, e);
    let map = counters(shared)?;
    let names = shared.names.read();
    let fixed = (0..RuleId::FIRST.0).map(RuleId);
    let mut counters = Vec::new();
    for id in fixed.chain(names.rules.keys().copied()).filter(|id| id.0 < map.entries()) {
        let [packets, bytes] = map.sum(id.0).map_err(failed)?;
        counters.push(RuleCounter { rule: names.text(id), policy: names.policy(id), packets, bytes });
    }
    Ok(counters)
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

/// Events between two looks at the names.
const BATCH: usize = 1024;
