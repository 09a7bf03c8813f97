//! Flows that are over: removed from the datapath's tables, and told to whoever reads flows.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use dcenet_ebpf::abi::{self, Endpoint, Event, EventKind, Flow, FlowKey, FlowState, Reason};
use dcenet_ebpf::datapath::{self, Over};
use dcenet_ebpf::maps::{Array, HashTable};
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};

use super::EnforcerError;
use super::state::Shared;

/// How often the owner sweeps.
pub(crate) const INTERVAL: Duration = Duration::from_secs(10);

/// Ended flows that wait for their reader: 768 KiB.
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

/// Flows that ended by silence, on their way to a reader.
#[derive(Debug, Default)]
pub(crate) struct Ended(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<Event>,
    lost: u64,
}

impl Ended {
    /// All that wait, and how many found no room since the last call.
    pub(crate) fn take(&self) -> (VecDeque<Event>, u64) {
        let mut waiting = self.0.lock();
        (std::mem::take(&mut waiting.events), std::mem::take(&mut waiting.lost))
    }

    /// Whether none waits.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().events.is_empty()
    }

    fn push(&self, event: Event) {
        let mut waiting = self.0.lock();
        if waiting.events.len() < ROOM {
            waiting.events.push_back(event);
        } else {
            waiting.lost += 1;
        }
    }
}

/// Whoever reads flows now.
#[derive(Debug, Default)]
pub(crate) struct Listener(Mutex<Weak<Ended>>);

impl Listener {
    /// Ended flows go to this reader from now on.
    pub(crate) fn subscribe(&self) -> Arc<Ended> {
        let ended = Arc::default();
        *self.0.lock() = Arc::downgrade(&ended);
        ended
    }
}

/// Removes what is over.
pub(crate) fn sweep(shared: &Shared) -> Result<Sweep, EnforcerError> {
    let failed = |name: &'static str| move |e| EnforcerError::map(name, e);
    let cells = Array::<Endpoint>::new(shared.maps.get(abi::ENDPOINTS)?).map_err(failed(abi::ENDPOINTS))?;
    let mut endpoints = BTreeMap::new();
    for slot in 0..cells.entries() {
        let endpoint = cells.load(slot).map_err(failed(abi::ENDPOINTS))?;
        endpoints.insert(slot as u16, endpoint);
    }
    let has = |endpoint: &Endpoint, tenure| endpoint.flags & Endpoint::ACTIVE != 0 && endpoint.tenure == tenure;
    // A slot may have been given away since: its new endpoint's flows are not orphans; nor is what cannot be asked after.
    let lives = |slot: u16, tenure: u16| {
        endpoints.get(&slot).is_some_and(|endpoint| has(endpoint, tenure))
            || cells.load(u32::from(slot)).map_or(true, |endpoint| has(&endpoint, tenure))
    };
    let listener = shared.listener.0.lock().upgrade();
    let mut found = Sweep::default();
    for name in abi::FLOW_TABLES {
        let flows = HashTable::<FlowKey, Flow>::new(shared.maps.get(name)?).map_err(failed(name))?;
        let mut tell = |key: &FlowKey, flow: &Flow, over: Over| match over {
            Over::Orphan => found.orphans += 1,
            Over::Silent => {
                found.ended += 1;
                // One that closed was told by its FIN or RST.
                if flow.state != FlowState::Closing as u8
                    && let Some(listener) = &listener
                {
                    listener.push(event(key, flow, &endpoints.get(&key.slot).copied().unwrap_or_default()));
                }
            }
        };
        found.live += datapath::sweep(&flows, now(), &lives, &mut tell).map_err(failed(name))?;
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
