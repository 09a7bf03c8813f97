//! Flows that are over: removed from the datapath's tables, and told to whoever reads flows.

use std::sync::{Arc, Weak};
use std::time::Duration;

use dcenet_ebpf::abi::{self, Endpoint, Event, EventKind, Flow, FlowKey, FlowState, Reason};
use dcenet_ebpf::datapath::{self, Found};
use dcenet_ebpf::maps::{Array, HashTable};
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};

use super::EnforcerError;
use super::flows::FlowKind;
use super::state::Shared;

/// How often the owner sweeps.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);

/// Ended flows that wait for their reader: 832 KiB.
const ROOM: usize = 8192;

/// What a sweep of the flows found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sweep {
    /// Flows that are under way.
    pub live: usize,
    /// Flows that were removed because their time was up.
    pub ended: usize,
    /// Flows that were removed because their endpoint is gone.
    pub orphans: usize,
}

/// What sweeps tell, on its way to a reader.
#[derive(Debug, Default)]
pub(crate) struct Swept(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    /// Flows that are over.
    ended: Vec<Told>,
    /// The report of active flows that nobody has taken yet. Until then there is no other.
    active: Vec<Told>,
    lost: u64,
    reports: Option<Reports>,
}

/// A kind that the datapath does not tell, and what it would tell.
pub(crate) type Told = (Option<FlowKind>, Event);

/// When active flows are told of; in nanoseconds of the datapath's clock.
#[derive(Debug, Clone, Copy)]
struct Reports {
    every: u64,
    last: u64,
}

impl Swept {
    /// All that waits, and how much found no room since the last call.
    pub(crate) fn take(&self) -> (Vec<Told>, u64) {
        let mut waiting = self.0.lock();
        let mut told = std::mem::take(&mut waiting.ended);
        told.append(&mut waiting.active);
        waiting.active = Vec::new();
        (told, std::mem::take(&mut waiting.lost))
    }

    /// Whether nothing waits.
    pub(crate) fn is_empty(&self) -> bool {
        let waiting = self.0.lock();
        waiting.ended.is_empty() && waiting.active.is_empty()
    }

    /// Wants reports of active flows at such intervals.
    pub(crate) fn report_every(&self, interval: Option<Duration>) {
        let reports = interval
            .map(|interval| Reports { every: u64::try_from(interval.as_nanos()).unwrap_or(u64::MAX), last: now() });
        self.0.lock().reports = reports;
    }

    /// Since when flows must have had a packet to be told of in a report that is due at the time `now`. One is due at the
    /// sweep that is nearest to its time, and the earlier one has been taken.
    fn due(&self, now: u64) -> Option<u64> {
        let waiting = self.0.lock();
        let Reports { every, last } = waiting.reports?;
        let soon = now.saturating_add(INTERVAL.as_nanos() as u64 / 2);
        (waiting.active.is_empty() && soon >= last.saturating_add(every)).then_some(last)
    }

    fn push(&self, event: Event) {
        let mut waiting = self.0.lock();
        if waiting.ended.len() < ROOM {
            waiting.ended.push((Some(FlowKind::Ended), event));
        } else {
            waiting.lost = waiting.lost.saturating_add(1);
        }
    }

    /// A report that was [`due`](Self::due), of flows as they were at `begun`.
    fn report(&self, active: Vec<Told>, begun: u64) {
        let mut waiting = self.0.lock();
        waiting.active = active;
        if let Some(reports) = &mut waiting.reports {
            reports.last = begun;
        }
    }
}

/// Whoever reads flows now.
#[derive(Debug, Default)]
pub(crate) struct Listener {
    reader: Mutex<Weak<Swept>>,
    /// Held by a sweep: of two at once, both would find the same report due.
    sweeping: Mutex<()>,
}

impl Listener {
    /// What sweeps tell goes to this reader from now on.
    pub(crate) fn subscribe(&self) -> Arc<Swept> {
        let swept = Arc::default();
        *self.reader.lock() = Arc::downgrade(&swept);
        swept
    }
}

/// Removes what is over, and tells of active flows where a report is due.
pub(crate) fn sweep(shared: &Shared) -> Result<Sweep, EnforcerError> {
    let _alone = shared.listener.sweeping.lock();
    let failed = |name: &'static str| move |e| EnforcerError::map(name, e);
    let cells = Array::<Endpoint>::new(shared.maps.get(abi::ENDPOINTS)?).map_err(failed(abi::ENDPOINTS))?;
    let endpoints = cells.load_all().map_err(failed(abi::ENDPOINTS))?;
    let has = |endpoint: &Endpoint, tenure| endpoint.flags & Endpoint::ACTIVE != 0 && endpoint.tenure == tenure;
    // A slot may have been given away since: its new endpoint's flows are not orphans; nor is what cannot be asked after.
    let lives = |slot: u16, tenure: u16| {
        endpoints.get(usize::from(slot)).is_some_and(|endpoint| has(endpoint, tenure))
            || cells.load(u32::from(slot)).map_or(true, |endpoint| has(&endpoint, tenure))
    };
    let devices = shared.devices();
    let told = |key: &FlowKey, flow: &Flow| {
        let endpoint = endpoints.get(usize::from(key.slot)).copied().unwrap_or_default();
        Event { ifindex: devices.get(&key.slot).map_or(0, |device| device.get()), ..event(key, flow, &endpoint) }
    };
    let listener = shared.listener.reader.lock().upgrade();
    let begun = now();
    let since = listener.as_ref().and_then(|listener| listener.due(begun));
    let (mut found, mut active) = (Sweep::default(), Vec::new());
    for name in abi::FLOW_TABLES {
        let flows = HashTable::<FlowKey, Flow>::new(shared.maps.get(name)?).map_err(failed(name))?;
        let mut tell = |key: &FlowKey, flow: &Flow, what: Found| match what {
            Found::Orphan => found.orphans += 1,
            Found::Live => {
                found.live += 1;
                if since.is_some_and(|since| flow.last_seen >= since) && flow.state != FlowState::Closing as u8 {
                    active.push((Some(FlowKind::Active), told(key, flow)));
                }
            }
            Found::Silent => {
                found.ended += 1;
                // Of one that closed as well: packets came after its first FIN.
                if let Some(listener) = &listener {
                    listener.push(told(key, flow));
                }
            }
        };
        datapath::sweep(&flows, now(), &lives, &mut tell).map_err(failed(name))?;
    }
    if let (Some(listener), Some(_)) = (listener, since) {
        listener.report(active, begun);
    }
    Ok(found)
}

/// The clock of the datapath.
fn now() -> u64 {
    let now = clock_gettime(ClockId::MonotonicCoarse);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// As the datapath would tell of the flow's last packet.
fn event(key: &FlowKey, flow: &Flow, endpoint: &Endpoint) -> Event {
    let pod = if key.version & !FlowKey::ASKED_BY_PEER == 4 {
        let [a, b, c, d] = endpoint.ipv4;
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
    } else {
        endpoint.ipv6
    };
    Event {
        time: flow.last_seen,
        kind: EventKind::Closed as u8,
        reason: Reason::Allowed as u8,
        direction: flow.direction,
        protocol: key.protocol,
        slot: key.slot,
        version: key.version,
        rule: flow.rule,
        pod,
        peer: key.peer,
        pod_port: key.pod_port,
        peer_port: key.peer_port,
        egress_packets: flow.egress_packets,
        egress_bytes: flow.egress_bytes,
        ingress_packets: flow.ingress_packets,
        ingress_bytes: flow.ingress_bytes,
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_report_waits_for_its_reader_and_the_next_begins_where_it_ended() {
        let swept = Swept::default();
        assert_eq!(swept.due(u64::MAX), None, "nobody asked");
        swept.report_every(Some(Duration::ZERO));
        let begun = now() + SECOND;
        assert!(swept.due(begun).is_some());
        swept.report(vec![(Some(FlowKind::Active), Event::default())], begun);
        assert_eq!(swept.due(begun + SECOND), None, "another would take its place");
        assert!(!swept.is_empty());
        let (told, lost) = swept.take();
        assert_eq!((told.len(), lost), (1, 0));
        assert_eq!(swept.due(begun + SECOND), Some(begun));
        swept.report(Vec::new(), begun + SECOND);
        assert_eq!(swept.due(begun + 2 * SECOND), Some(begun + SECOND), "nobody takes nothing");
    }

    #[test]
    fn a_report_is_due_at_the_sweep_that_is_nearest() {
        let swept = Swept::default();
        swept.report_every(Some(Duration::from_secs(30)));
        let begun = now() + SECOND;
        swept.report(Vec::new(), begun);
        assert_eq!(swept.due(begun + 20 * SECOND), None);
        // A sweep is as early as the clock's tick is long.
        assert_eq!(swept.due(begun + 30 * SECOND - 4_000_000), Some(begun));
    }
}
