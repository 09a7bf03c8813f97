//! Routes to the other nodes, on a thread that hears of two others: one waits for the store, one for the kernel.
//!
//! | Name | Of |
//! |---|---|
//! | `dcenet_fabric_routes_wanted` | routes that are wanted on this node |
//! | `dcenet_fabric_routes_installed` | those of them that are there |
//! | `dcenet_fabric_problems` | what cannot be, as told in the log; 1 where nothing could be done at all |
//! | `dcenet_fabric_errors_total` | what the kernel or the store refused, single entries too, and is tried again |
//! | `dcenet_fabric_mtu_bytes` | the largest packet that VXLAN carries on this node; 0 without VXLAN |

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use dcenet_core::fabric::{Fabric, FabricError, KernelEvents, Look, Report};
use dcenet_core::model::Mtu;
use dcenet_core::netns::Host;
use dcenet_core::provider::{FabricNode, FabricSource, FabricSourceError, FabricTable};
use dcenet_ipam::Ipam;
use dcenet_ipam::fabric::FabricFeed;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::threads::Threads;

/// What Prometheus sees of it.
#[derive(Debug, Clone, Default)]
pub struct FabricMetrics {
    wanted: Gauge,
    installed: Gauge,
    problems: Gauge,
    errors: Counter,
    mtu: Gauge,
}

impl FabricMetrics {
    /// Enters them into a registry.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let r = registry.sub_registry_with_prefix("dcenet_fabric");
        r.register("routes_wanted", "Routes that are wanted on this node", metrics.wanted.clone());
        r.register("routes_installed", "Wanted routes that are there", metrics.installed.clone());
        r.register("problems", "What cannot be, as told in the log", metrics.problems.clone());
        r.register("errors", "What was refused and is tried again", metrics.errors.clone());
        r.register_with_unit("mtu", "The largest packet that VXLAN carries here", Unit::Bytes, metrics.mtu.clone());
        metrics
    }

    fn publish(&self, report: &Report) {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.wanted.set(count(report.wanted));
        self.installed.set(count(report.installed));
        self.problems.set(count(report.problems.len()));
        self.mtu.set(report.mtu.map_or(0, i64::from));
        self.errors.inc_by(report.failures.len() as u64);
    }
}

/// What makes the host be looked at, or nobody look any more.
enum Event {
    Table(FabricTable),
    Host,
    Stop,
}

/// Keeps the routes right until it is dropped. They stay then.
#[derive(Debug)]
pub struct Following {
    tell: Sender<Event>,
}

impl Drop for Following {
    fn drop(&mut self) {
        if self.tell.send(Event::Stop).is_err() {
            tracing::debug!("nobody looks after routes any more");
        }
    }
}

impl Following {
    /// Begins, on the host whose namespace the calling thread is in.
    ///
    /// # Errors
    /// Where there can be no thread.
    pub fn start(
        fabric: Fabric,
        host: Host,
        ipam: &Arc<Ipam>,
        metrics: FabricMetrics,
        threads: &Threads,
    ) -> io::Result<Self> {
        let (tell, told) = mpsc::channel();
        let mut feed = FabricFeed::new(ipam.clone());
        let (to, stop) = (tell.clone(), tell.clone());
        threads.spawn("dcenetd-blocks", move || {
            loop {
                let event = match pollster::block_on(feed.next(RESYNC)) {
                    Ok(Some(table)) => Event::Table(table),
                    Ok(None) => continue,
                    Err(error) => {
                        tracing::warn!(%error, "blocks of nodes cannot be followed; it is tried again");
                        std::thread::sleep(AGAIN);
                        continue;
                    }
                };
                if to.send(event).is_err() {
                    return;
                }
            }
        })?;
        threads.spawn("dcenetd-kernel", move || {
            let mut events = None;
            loop {
                let heard = match &mut events {
                    None => KernelEvents::listen(&host)
                        .map(|new| events.insert(new))
                        .map_err(|e| e.to_string())
                        .map(|_| true),
                    Some(events) => events.wait(RESYNC).map_err(|e| e.to_string()),
                };
                match heard {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(error) => {
                        tracing::warn!(error, "changes of links and routes are not heard of; it is tried again");
                        events = None;
                        std::thread::sleep(AGAIN);
                    }
                }
                if tell.send(Event::Host).is_err() {
                    return;
                }
            }
        })?;
        let announcer = FabricFeed::new(ipam.clone());
        let (table, local, inside, told_before) = (None, None, Inside::default(), Vec::new());
        let mut worker = Worker { fabric, announcer, metrics, table, local, inside, told: told_before };
        threads.spawn("dcenetd-fabric", move || worker.run(&told))?;
        Ok(Self { tell: stop })
    }
}

struct Worker {
    fabric: Fabric,
    announcer: FabricFeed<Arc<Ipam>>,
    metrics: FabricMetrics,
    /// Nothing is done before it is known who has what, lest routes go that the process before has left.
    table: Option<FabricTable>,
    local: Option<FabricNode>,
    inside: Inside,
    /// What was told of problems last: once, however often it is found.
    told: Vec<String>,
}

/// The addresses that this node itself sends from.
#[derive(Default)]
struct Inside {
    addresses: Vec<IpAddr>,
    /// Why there are none.
    problem: Option<String>,
    /// When it is asked again whether they are still this node's; none before they were asked for.
    again: Option<Instant>,
}

#[derive(Debug)]
enum Failure {
    Fabric(FabricError),
    Source(FabricSourceError),
}

impl Worker {
    fn run(&mut self, events: &Receiver<Event>) {
        let mut wait = RESYNC;
        loop {
            match events.recv_timeout(wait) {
                Ok(event) => {
                    // Pods come and go by the dozen, and each makes some noise.
                    std::thread::sleep(QUIET);
                    for event in std::iter::once(event).chain(events.try_iter()) {
                        match event {
                            Event::Table(table) => self.table = Some(table),
                            Event::Host => {}
                            Event::Stop => return,
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            wait = if self.look() { RESYNC } else { AGAIN };
        }
    }

    /// Returns whether all is done that can be.
    fn look(&mut self) -> bool {
        let mut report = match self.announce().and_then(|look| self.apply(look)) {
            Ok(Some(report)) => report,
            Ok(None) => return true,
            Err(failure) => {
                self.metrics.errors.inc();
                self.metrics.problems.set(1);
                let text = match failure {
                    Failure::Fabric(error) => error.to_string(),
                    Failure::Source(error) => error.to_string(),
                };
                self.tell(vec![text]);
                return false;
            }
        };
        report.problems.extend(self.inside.problem.clone());
        self.metrics.publish(&report);
        if report.changed > 0 {
            tracing::info!(changed = report.changed, wanted = report.wanted, mtu = report.mtu, "routes between nodes");
        }
        let whole = report.failures.is_empty();
        self.tell(report.problems.into_iter().chain(report.failures).collect());
        whole
    }

    fn tell(&mut self, problems: Vec<String>) {
        for problem in problems.iter().filter(|problem| !self.told.contains(problem)) {
            tracing::warn!(problem, "routes between nodes");
        }
        self.told = problems;
    }

    /// Looks at the host, and has the others know where this node is.
    fn announce(&mut self) -> Result<Look, Failure> {
        let mut look = self.fabric.look().map_err(Failure::Fabric)?;
        let local = &mut look.local;
        if local.vtep.is_some() {
            self.lease_inside().map_err(Failure::Source)?;
            local.inside.clone_from(&self.inside.addresses);
        }
        let known = self.table.as_ref().and_then(|table| table.nodes.get(&local.name));
        if self.local.as_ref() != Some(&*local) || known != Some(&*local) {
            pollster::block_on(self.announcer.announce(local)).map_err(Failure::Source)?;
            self.local = Some(local.clone());
        }
        Ok(look)
    }

    /// Asks once, and then from time to time: who forgets the node gives its addresses to others.
    fn lease_inside(&mut self) -> Result<(), FabricSourceError> {
        let Inside { addresses, problem, again } = &mut self.inside;
        if again.is_some_and(|at| Instant::now() < at) {
            return Ok(());
        }
        match pollster::block_on(self.announcer.lease_inside(self.fabric.node())) {
            Ok(leased) => (*addresses, *problem) = (leased, None),
            Err(error @ FabricSourceError::Inside { .. }) => {
                (*addresses, *problem) = (Vec::new(), Some(error.to_string()));
            }
            // What is there stays.
            Err(error) if again.is_some() => *problem = Some(error.to_string()),
            Err(error) => return Err(error),
        }
        *again = Some(Instant::now() + RESYNC);
        Ok(())
    }

    fn apply(&self, look: Look) -> Result<Option<Report>, Failure> {
        let Some(table) = &self.table else { return Ok(None) };
        self.fabric.apply_seen(look, table).map(Some).map_err(Failure::Fabric)
    }
}

/// Refuses pools that say of their pods' links what VXLAN cannot carry.
///
/// # Errors
/// Field, value and remedy in words.
pub fn check_mtu<'a>(
    pools: impl Iterator<Item = (usize, Option<&'a Mtu>)>,
    carried: Option<u32>,
) -> Result<(), String> {
    let Some(carried) = carried else { return Ok(()) };
    for (i, mtu) in pools {
        if let Some(mtu) = mtu.filter(|mtu| mtu.get() > carried) {
            return Err(format!(
                "ipam.pools[{i}].mtu: {} does not fit: VXLAN on this node carries {carried}; write {carried} or less, or \
                 drop it and set link.mtu",
                mtu.get()
            ));
        }
    }
    Ok(())
}

/// How long it is waited after an event for others that come with it.
const QUIET: Duration = Duration::from_millis(100);
/// When what failed is tried again.
const AGAIN: Duration = Duration::from_secs(2);
/// When the host is looked at without an event.
const RESYNC: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_with_a_larger_mtu_than_vxlan_carries_is_refused() {
        let mtu = |n: u32| Mtu::try_from(n).unwrap();
        let (small, large) = (mtu(1450), mtu(1500));
        assert_eq!(check_mtu([(0, None), (1, Some(&small))].into_iter(), Some(1450)), Ok(()));
        assert_eq!(check_mtu([(0, Some(&large))].into_iter(), None), Ok(()));
        let refused = check_mtu([(0, None), (1, Some(&large))].into_iter(), Some(1450)).unwrap_err();
        assert!(refused.starts_with("ipam.pools[1].mtu: 1500 does not fit"), "{refused}");
        assert!(refused.contains("write 1450 or less"), "{refused}");
    }
}
