//! The daemon at work.

mod owner;

use std::collections::BTreeSet;
use std::error::Error;
use std::ffi::OsString;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use dcenet_core::engine::Engine;
use dcenet_core::fabric::Fabric;
use dcenet_core::model::AttachmentKey;
use dcenet_core::netlink::{AddressView, Family, LinkView};
use dcenet_core::netns::{Host, NetNs};
use dcenet_core::provider::{FabricSource, PolicySink};
use dcenet_ebpf::abi::Sizes;
use dcenet_ebpf::attach::{ClsactAttacher, Scrubber};
use dcenet_ebpf::loader::AyaLoader;
use dcenet_ebpf::probe::Features;
use dcenet_ipam::Ipam;
use dcenet_ipam::fabric::FabricFeed;
use dcenet_ipam::metrics::Cause;
use dcenet_ipam::select::Node;
use dcenet_ipam::store::measured::MeasuredStore;
use dcenet_policy::enforcer::flows::prometheus::FlowMetrics;
use dcenet_policy::enforcer::{Enforcer, EnforcerConfig, PinnedDefault, PolicyConfig, Tools};
use dcenet_policy::target::Tc;
use dcenet_sriov::source::VfSource;
use prometheus_client::registry::Registry;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use self::owner::{LOOK, Owner};
use crate::config::Config;
use crate::fabric::{FabricMetrics, Following, check_mtu};
use crate::flows::Flows;
use crate::functions::Functions;
use crate::kubelet::Telling;
use crate::lock::RunLock;
use crate::metrics::{DaemonMetrics, Endpoint, Sources};
use crate::names::Names;
use crate::policies::Watcher;
use crate::reclaim::{Looking, Reclaim};
use crate::standing::Standing;
use crate::store::LateStore;
use crate::threads::Threads;
use crate::{server, systemd};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

/// Works until SIGTERM or SIGINT. The verdicts that are in force then stay.
///
/// # Errors
/// Where it cannot begin, or one of its threads has ended.
pub fn run(config: &Config, manager: Option<OsString>) -> Outcome {
    let signals = Signals::register()?;
    let _lock = RunLock::take(&config.run_dir)?;
    let mut registry = Registry::default();
    let daemon = DaemonMetrics::register(&mut registry);
    let addresses = open_addresses(config, &mut registry)?;

    let mut owner = config.policy.as_ref().map(|policy| Owner::open(config, policy, daemon.clone())).transpose()?;
    let most_rules = config.metrics.as_ref().map_or(0, |m| m.most_rules);
    let counted =
        owner.as_ref().map(|owner| (owner.enforcer.clone(), FlowMetrics::register(&mut registry, most_rules)));
    let issued = owner.as_ref().map(|owner| owner.issued.clone());
    let fabric = open_fabric(config, addresses.as_ref().map(|(ipam, _)| &**ipam))?;
    let fabric = fabric.map(|fabric| (fabric, FabricMetrics::register(&mut registry)));
    let engine = open_engine(config)?;
    if let Some(owner) = &mut owner {
        owner.adopt(&engine);
        owner.read();
    }
    let reclaim = addresses
        .as_ref()
        .map(|(ipam, metrics)| (Reclaim::new(engine, ipam.clone(), config.policy.is_some()), metrics.clone()));

    let flows = match &counted {
        Some((enforcer, metrics)) => {
            let (enforcer, metrics, reopen) = (enforcer.clone(), metrics.clone(), signals.reopen.clone());
            Some(Flows::start(enforcer, config.flows.as_ref(), metrics, reopen, &signals.threads)?)
        }
        None => None,
    };
    let stores = addresses.as_ref().map(|(_, metrics)| metrics.clone());
    let following = match (fabric, &addresses) {
        (Some((fabric, metrics)), Some((ipam, _))) => {
            Some(Following::start(fabric, Host(NetNs::of_this_thread()?), ipam, metrics, &signals.threads)?)
        }
        _ => None,
    };
    let functions = Functions::register(&mut registry, &config.state_dir, &config.run_dir);
    let learner = owner.as_ref().map(|owner| owner.enforcer.learner());
    let mut names = config.dns.as_ref().zip(learner).map(|(dns, learner)| Names::new(dns.proxy(), learner));
    let proxy = names.as_ref().map(Names::proxy);
    let sources = Sources { registry, daemon, addresses, functions, policy: counted, issued, proxy };
    let metrics = config.metrics.as_ref().map(|m| Endpoint::start(&m.listen, sources, &signals.threads)).transpose()?;
    let server = config.server.as_ref().map(|section| server::start(section, &config.run_dir, stores)).transpose()?;
    let telling =
        config.kubelet.as_ref().map(|section| Telling::start(config, section, &signals.threads)).transpose()?;
    if let Some(names) = &mut names {
        names.look()?;
    }
    let tell = |state: &str| {
        if let Err(error) = systemd::notify(manager.as_deref(), state) {
            tracing::warn!(%error, state, "the service manager cannot be told");
        }
    };
    tell("READY=1");
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");

    let looking = reclaim.map(|(reclaim, counted)| {
        let count = move |taken: &[AttachmentKey]| counted.count_reclaimed(Cause::Absence, taken.len());
        Looking::start(reclaim, config.reclaim.every.0, count, &signals.threads)
    });
    let looking = looking.transpose()?;
    while !signals.ends() {
        if let Some(name) = signals.threads.ended() {
            return Err(format!("the thread {name} has ended").into());
        }
        if let Some(owner) = &mut owner {
            owner.look();
        }
        if let Some(names) = &mut names {
            names.look()?;
        }
        let until = owner.as_ref().map_or(Instant::now() + LOOK, |owner| owner.due);
        signals.wait(owner.as_ref().and_then(|owner| owner.watcher.as_ref()), until)?;
    }
    tell("STOPPING=1");
    // In this order: nothing asks the owner any more when it goes.
    drop(telling);
    drop(names);
    drop(following);
    drop(looking);
    drop(server);
    drop(metrics);
    drop(flows);
    tracing::info!("stopped; verdicts stay as they are");
    Ok(())
}

/// Removes all policy and all routes to other nodes from the host, and has the other nodes forget it.
///
/// # Errors
/// Where a daemon runs, or something cannot be removed.
pub fn uninstall(config: &Config) -> Outcome {
    if config.policy.is_none() && config.fabric.is_none() {
        return Err("there is no section policy and none of fabric, so nothing is known to remove".into());
    }
    let _lock = RunLock::take(&config.run_dir)?;
    let fabric = open_fabric(config, None)?;
    if let Some(fabric) = &fabric {
        fabric.remove()?;
    }
    if let Some(policy) = &config.policy {
        open_enforcer(config, policy)?.uninstall()?;
        Standing::read(&config.state_dir).note(false)?;
    }
    // Last, for a node may be taken out when its store is gone.
    if let Some(fabric) = fabric {
        withdraw(config, &fabric)
            .map_err(|error| format!("the host is clean, but the other nodes have not been told: {error}"))?;
    }
    Ok(())
}

fn withdraw(config: &Config, fabric: &Fabric) -> Outcome {
    let Some((ipam, _)) = open_addresses(config, &mut Registry::default())? else { return Ok(()) };
    Ok(pollster::block_on(FabricFeed::new(ipam).withdraw(fabric.node()))?)
}

/// The node's routes to others, under the name under which it owns blocks. `ipam` is asked for what its pools say of links.
fn open_fabric(config: &Config, ipam: Option<&Ipam>) -> Outcome<Option<Fabric>> {
    let (Some(section), Some(addresses)) = (&config.fabric, &config.ipam) else { return Ok(None) };
    let node = addresses.owner().ok_or("ipam.node.name: the host name is no name of a node; give one")?.name;
    let fabric = Fabric::new(Host(NetNs::of_this_thread()?), section.clone(), &node.to_string(), &config.run_dir)?;
    if let Some(ipam) = ipam {
        // Where it cannot be said yet, the thread tells of pods that do not fit.
        let carried = fabric.carries().unwrap_or_default();
        let pools = ipam.layout().pools.iter().enumerate().filter(|(_, pool)| pool.node_blocks().is_some());
        check_mtu(pools.map(|(i, pool)| (i, pool.mtu.as_ref())), carried)?;
    }
    Ok(Some(fabric))
}

fn open_addresses(
    config: &Config,
    registry: &mut Registry,
) -> Outcome<Option<(Arc<Ipam>, dcenet_ipam::metrics::Metrics)>> {
    let (Some(section), Some(layout)) = (&config.ipam, config.layout()) else { return Ok(None) };
    let metrics = dcenet_ipam::metrics::Metrics::register(registry, &layout);
    let store = LateStore::new(&section.store, &config.state_dir).map_err(|e| format!("ipam.store: {e}"))?;
    let ipam = Ipam::new(section, Arc::new(MeasuredStore::new(Arc::new(store), &metrics)))?;
    let ipam = match section.owner() {
        Some(node) => ipam.on_node(node.name, node.labels),
        None => ipam,
    };
    Ok(Some((Arc::new(ipam), metrics)))
}

fn open_engine(config: &Config) -> Outcome<Engine> {
    let sink = config.policy.as_ref().map(|policy| PinnedDefault::new(policy, &config.run_dir));
    let sink = sink.map(|sink| Arc::new(sink) as Arc<dyn PolicySink>);
    let engine = Engine::new(Host(NetNs::of_this_thread()?), &config.run_dir, sink)?;
    // A function goes back to what it was, whatever the pools of its network.
    let functions = VfSource::of_this_machine(&config.state_dir, None, Some(Arc::new(Scrubber)));
    Ok(engine.lending_from(Arc::new(functions)))
}

fn open_enforcer(config: &Config, policy: &PolicyConfig) -> Outcome<Enforcer> {
    let tools = Tools {
        loader: Arc::new(AyaLoader),
        attacher: Arc::new(ClsactAttacher),
        lowering: Arc::new(Tc::for_kernel(Sizes::default(), &Features::probe()?)),
    };
    let host = Host(NetNs::of_this_thread()?);
    let node_addresses = match &config.node.addresses {
        Some(told) => told.clone(),
        None => addresses_of(&host)?,
    };
    let told = EnforcerConfig {
        node: node_name(config)?,
        node_addresses,
        run_dir: config.run_dir.clone(),
        pins: policy.pins.clone(),
    };
    Ok(Enforcer::open(host, told, tools)?)
}

fn node_name(config: &Config) -> Outcome<String> {
    match &config.node.name {
        Some(name) => Ok(name.clone()),
        None => {
            let node = Node::of_this_machine().ok_or("node.name: the host name is no name of a node; give one")?;
            Ok(node.name.to_string())
        }
    }
}

/// The addresses of the host's devices that are its own.
fn addresses_of(host: &Host) -> Outcome<BTreeSet<IpAddr>> {
    let mut socket = host.0.socket(Family::Route)?;
    // In this order: an address of a device that has come in between is left out until the next look.
    let links = socket.links()?;
    Ok(own_addresses(&links, &socket.addresses()?))
}

/// Without loopback's, which are every host's, and without those of dummy devices: on these, kube-proxy in the mode ipvs
/// puts the address of every Service (`kube-ipvs0`), and whoever is let in from the node would be let in to all of them.
fn own_addresses(links: &[LinkView], addresses: &[AddressView]) -> BTreeSet<IpAddr> {
    let is_own = |a: &&AddressView| {
        links.iter().find(|link| link.index == a.index).is_some_and(|link| link.kind.as_deref() != Some("dummy"))
    };
    let own = addresses.iter().filter(is_own).map(|a| a.address.addr());
    own.filter(|address| !address.is_loopback()).collect()
}

/// What the process is sent.
struct Signals {
    end: Arc<AtomicBool>,
    reopen: Arc<AtomicBool>,
    /// Readable when a signal came or a thread ended.
    wake: UnixStream,
    threads: Threads,
}

impl Signals {
    fn register() -> Outcome<Self> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let (end, reopen) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register(signal, end.clone())?;
            signal_hook::low_level::pipe::register(signal, waker.try_clone()?)?;
        }
        signal_hook::flag::register(SIGHUP, reopen.clone())?;
        Ok(Self { end, reopen, wake, threads: Threads::new(waker) })
    }

    fn ends(&self) -> bool {
        self.end.load(Ordering::Acquire)
    }

    /// Waits for a signal, a change of the directory, or the time.
    fn wait(&self, watcher: Option<&Watcher>, until: Instant) -> Outcome {
        let timeout = Timespec::try_from(until.saturating_duration_since(Instant::now()))?;
        let mut awaited = vec![PollFd::from_borrowed_fd(self.wake.as_fd(), PollFlags::IN)];
        awaited.extend(watcher.map(|watcher| PollFd::from_borrowed_fd(watcher.as_fd(), PollFlags::IN)));
        match poll(&mut awaited, Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use dcenet_core::model::IfIndex;

    use super::*;

    #[test]
    fn addresses_of_dummy_devices_and_of_loopback_are_not_the_nodes() {
        let index = |n| IfIndex::new(n).unwrap();
        let link = |n, name: &str, kind: Option<&str>| LinkView {
            index: index(n),
            name: name.to_owned(),
            kind: kind.map(str::to_owned),
            mac: None,
            mtu: 1500,
            flags: 0,
            alias: None,
            master: None,
            peer: None,
            peer_netns: None,
            tx_queue_len: 0,
            port: None,
            vlans: None,
            vlan: None,
        };
        let address =
            |n, address: &str| AddressView { index: index(n), address: address.parse().unwrap(), flags: 0, scope: 0 };
        let links = [
            link(1, "lo", None),
            link(2, "eth0", None),
            link(3, "dc0", Some("bridge")),
            link(4, "kube-ipvs0", Some("dummy")),
        ];
        let addresses = [
            address(1, "127.0.0.1/8"),
            address(1, "::1/128"),
            address(1, "192.0.2.9/32"),
            address(2, "192.0.2.1/24"),
            address(2, "2001:db8::1/64"),
            address(3, "10.20.0.1/24"),
            address(4, "10.96.0.1/32"),
            address(4, "2001:db8:96::1/128"),
            address(5, "192.0.2.77/24"),
        ];
        let expected = ["192.0.2.9", "192.0.2.1", "2001:db8::1", "10.20.0.1"].map(|a| a.parse().unwrap());
        assert_eq!(own_addresses(&links, &addresses), BTreeSet::from(expected));
    }
}
