//! From the ring buffer and the sweeps to a sink.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::model::{AttachmentKey, IfIndex};
use dcenet_ebpf::abi::{self, Direction as PodDirection, Event, EventKind, EventLimit, Reason};
use dcenet_ebpf::maps::{Array, RingBuffer};
use parking_lot::RwLock;

use super::super::EnforcerError;
use super::super::state::Shared;
use super::super::sweep::{Swept, Told};
use super::names::Names;
use super::{Flow, FlowEnd, FlowKind, FlowSink, Losses, direction_of};
use crate::ir::RuleId;
use crate::isolation;
use crate::model::{PodId, Protocol, Verdict};

/// Reads the node's flow events.
#[derive(Debug)]
pub struct FlowReader {
    shared: Arc<Shared>,
    ring: RingBuffer,
    swept: Arc<Swept>,
    limits: Array<EventLimit>,
    unreadable: u64,
    undelivered: u64,
    /// What sweeps told and found no room.
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
            swept: shared.listener.subscribe(),
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

    /// Tells of flows while they live, each so often as it had packets in the meantime ([`FlowKind::Active`]): long flows are
    /// seen, with their counts, before their end. Every sweep of the owner looks whether a report is due, so intervals are
    /// those of the sweeps, ten seconds, at the least. `None`, as at first, tells of none.
    ///
    /// While a report waits for [`FlowReader::drain`] there is no other; the next one then tells of the time since that one.
    /// It takes 104 bytes for each flow: 16 MiB where the tables of default size are full.
    pub fn report_every(&self, interval: Option<Duration>) {
        self.swept.report_every(interval);
    }

    /// Waits until an event is there, at most for `limit`; `false` when none came. What sweeps tell does not end the wait,
    /// and is found after it.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn wait(&self, limit: Duration) -> Result<bool, EnforcerError> {
        let waited = self.ring.wait(limit).map_err(|e| EnforcerError::map(abi::EVENTS, e))?;
        Ok(waited || !self.swept.is_empty())
    }

    /// Hands all events that wait now to the sink, then what was lost, and returns how many there were. What comes
    /// meanwhile is for the next call, so that this one ends however fast events come.
    ///
    /// # Errors
    /// The sink's, and what the kernel refuses.
    pub fn drain(&mut self, sink: &mut dyn FlowSink) -> Result<usize, EnforcerError> {
        // Before the ring is looked at: what told of the flow's beginning is in there by now.
        let (mut told, lost) = self.swept.take();
        self.full = self.full.saturating_add(lost);
        told.sort_by_key(time_of);
        let mut told = VecDeque::from(told);
        let handed = self.hand_over_all(&mut told, sink);
        self.undelivered = self.undelivered.saturating_add(told.len() as u64);
        let handed = handed?;
        let losses = self.losses()?;
        let new = losses.since(self.told);
        if new != Losses::default() {
            sink.lost(new).map_err(sink_failed)?;
            self.told = losses;
        }
        sink.flush().map_err(sink_failed)?;
        Ok(handed)
    }

    /// What waits in the ring, and what sweeps told, of which that is left which no attempt was made to hand over.
    fn hand_over_all(&mut self, told: &mut VecDeque<Told>, sink: &mut dyn FlowSink) -> Result<usize, EnforcerError> {
        let Self { shared, ring, unreadable, undelivered, .. } = self;
        let mut handed = 0;
        let mut waiting = ring.pending();
        let mut resolver = None;
        while waiting > 0 {
            let mut events = Vec::new();
            let read = ring.drain(BATCH, |bytes| {
                waiting = waiting.saturating_sub((bytes.len() as u64).next_multiple_of(8) + 8);
                match Event::decode(bytes) {
                    Some(event) => events.push((None, event)),
                    None => *unreadable += 1,
                }
            });
            let read = read.map_err(|e| EnforcerError::map(abi::EVENTS, e))?;
            if read == 0 {
                break;
            }
            let resolver = resolver.get_or_insert_with(|| Resolver::new(shared));
            handed += hand_over(resolver, &merged(events, told), sink, unreadable, undelivered)?;
        }
        let rest: Vec<Told> = std::mem::take(told).into();
        if !rest.is_empty() {
            let resolver = resolver.get_or_insert_with(|| Resolver::new(shared));
            handed += hand_over(resolver, &rest, sink, unreadable, undelivered)?;
        }
        Ok(handed)
    }

    /// Losses since the maps were made, of all slots: what those have lost whose endpoint is gone counts as well, and a
    /// sum over those that are there now would fall when one goes.
    fn losses(&self) -> Result<Losses, EnforcerError> {
        let Self { unreadable, undelivered, full, .. } = *self;
        let mut losses = Losses { unreadable, undelivered, full, ..Losses::default() };
        for limit in self.limits.load_all().map_err(|e| EnforcerError::map(abi::EVENT_LIMITS, e))? {
            losses.full = losses.full.saturating_add(limit.lost);
            losses.limited = losses.limited.saturating_add(limit.limited);
        }
        Ok(losses)
    }
}

fn time_of((_, event): &Told) -> u64 {
    event.time
}

/// Events of the ring, with those before the last of them that sweeps told, by time. Of one time, the ring's come first.
fn merged(mut events: Vec<Told>, told: &mut VecDeque<Told>) -> Vec<Told> {
    if let Some(last) = events.iter().map(time_of).max() {
        let until = told.partition_point(|one| time_of(one) <= last);
        events.extend(told.drain(..until));
        events.sort_by_key(time_of);
    }
    events
}

/// Hands events to a sink; those that it did not take are counted. Returns how many it took.
fn hand_over(
    resolver: &Resolver,
    events: &[Told],
    sink: &mut dyn FlowSink,
    unreadable: &mut u64,
    undelivered: &mut u64,
) -> Result<usize, EnforcerError> {
    let mut handed = 0;
    for (index, (kind, event)) in events.iter().enumerate() {
        let Some(flow) = resolver.flow(*kind, event) else {
            *unreadable += 1;
            continue;
        };
        if let Err(error) = sink.flow(&flow) {
            *undelivered += (events.len() - index) as u64;
            return Err(sink_failed(error));
        }
        handed += 1;
    }
    Ok(handed)
}

fn sink_failed(source: std::io::Error) -> EnforcerError {
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

    /// A kind is given where sweeps tell, and no packet is told of.
    fn flow(&self, swept: Option<FlowKind>, event: &Event) -> Option<Flow> {
        let reason = Reason::from_number(event.reason)?;
        let kind = match (swept, EventKind::from_number(event.kind)?) {
            (Some(kind), _) => kind,
            (None, EventKind::New) => FlowKind::New,
            (None, EventKind::Denied) => FlowKind::Denied,
            (None, EventKind::Closed) => FlowKind::Closed,
            (None, EventKind::Sampled) => FlowKind::Sampled,
            (None, _) => return None,
        };
        let direction = direction_of(PodDirection::from_number(event.direction)?);
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
            interface: IfIndex::new(event.ifindex),
            tcp_flags: (protocol == Protocol::TCP && swept.is_none()).then_some(event.tcp_flags),
            icmp: (icmp && swept.is_none()).then_some((icmp_type, icmp_code)),
            policy: rule.and_then(|id| names.policy(id)),
            rule: rule.map(|id| names.text(id)),
            rule_number: rule.map(|id| id.0),
            log: rule.is_some_and(|id| names.is_logged(id)),
            audit: rule.and_then(|id| names.audit(id)),
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

/// Events between two looks at the names.
const BATCH: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sweeps_told_comes_at_its_time() {
        let told = |kind, times: &[u64]| -> Vec<Told> {
            times.iter().map(|time| (kind, Event { time: *time, ..Event::default() })).collect()
        };
        let ended = Some(FlowKind::Ended);
        let mut swept = VecDeque::from(told(ended, &[1, 20, 21, 30]));
        let seen: Vec<_> = merged(told(None, &[10, 21, 20]), &mut swept).iter().map(|t| (t.0, t.1.time)).collect();
        assert_eq!(seen, [(ended, 1), (None, 10), (None, 20), (ended, 20), (None, 21), (ended, 21)]);
        assert_eq!(swept.len(), 1);
        assert!(merged(Vec::new(), &mut swept).is_empty() && swept.len() == 1, "no event says what time it is");
    }
}
