//! Making a host what its plan says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::fence::Fence;
use super::host::Lists;
use super::settings::{self, Settings, SettingsError};
use super::{FabricConfig, Hop, HostFacts, MARK, METRIC, Wanted, plan};
use crate::model::{IfIndex, IfName, MacAddr, Mtu};
use crate::netlink::{
    self, CreateLinkError, FABRIC_PROTOCOL, FabricRoute, Family, LinkChange, LinkKind, LinkView, Message, NetlinkError,
    NewLink, NextHop, RouteView, Socket, VxlanSpec,
};
use crate::netns::{Host, NetNsError};
use crate::provider::{FabricNode, FabricTable, Vtep};

/// The routes of one node to all others.
///
/// It keeps nothing of the host in memory but which addresses it told last: each call of [`apply`](Fabric::apply) looks at what
/// is there.
#[derive(Debug)]
pub struct Fabric {
    host: Host,
    config: FabricConfig,
    node: String,
    run_dir: PathBuf,
    /// The node's addresses that were told last: of several those stay.
    announced: Mutex<Vec<IpAddr>>,
}

/// What a call of [`Fabric::apply`] found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Routes that are wanted.
    pub wanted: usize,
    /// Those of them that are there now.
    pub installed: usize,
    /// Entries that were added, changed or removed: routes, neighbours, forwarding, who may send, settings, the device.
    pub changed: usize,
    /// The largest packet that VXLAN carries on this host, in bytes: pods' links must not have more. Another node's underlay
    /// may carry less. `None` without VXLAN.
    pub mtu: Option<u32>,
    /// What cannot be, why, and what to do about it.
    pub problems: Vec<String>,
    /// What the kernel refused. The same call may succeed later.
    pub failures: Vec<String>,
}

/// What the host was like at one moment.
#[derive(Debug)]
pub struct Look {
    /// How others reach this node. It has no addresses inside: who has leased some
    /// ([`lease_inside`](crate::provider::FabricSource::lease_inside)) adds them.
    pub local: FabricNode,
    lists: Lists,
}

/// Why a fabric cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FabricError {
    /// The configuration cannot be.
    #[error("fabric.{field}: {value}: {reason}")]
    Invalid {
        /// The field.
        field: String,
        /// Its value.
        value: String,
        /// Why it is refused, and what would be accepted.
        reason: String,
    },
    /// It is not told at which address the node is.
    #[error("fabric.addresses: none is told, and no default route tells which the node's own is; give one")]
    NoAddress,
    /// A link of the device's name is somebody else's.
    #[error(
        "fabric.device: link {0} is there, and it is not the fabric's (its alias is not {MARK}); remove it, or give another name"
    )]
    Foreign(IfName),
    /// Nothing can keep strangers from sending into the VXLAN device.
    #[error(
        "fabric.mode: VXLAN needs nftables, or anybody could send for any pod: {0}; use a kernel with CONFIG_NF_TABLES_INET \
         and CONFIG_NFT_FIB_INET, or mode route"
    )]
    NoFence(#[source] NetlinkError),
    /// The device cannot be made.
    #[error(transparent)]
    Create(#[from] CreateLinkError),
    /// The host cannot be read or changed.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The host's namespace cannot be entered.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// A setting of the host cannot be changed, or what it was not be written down.
    #[error("{0}")]
    Setting(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<SettingsError> for FabricError {
    fn from(error: SettingsError) -> Self {
        Self::Setting(Box::new(error))
    }
}

impl Fabric {
    /// The fabric of a node by its name in the cluster. `run_dir` is where settings are noted that it changes.
    ///
    /// # Errors
    /// [`FabricError::Invalid`].
    pub fn new(host: Host, config: FabricConfig, node: &str, run_dir: &Path) -> Result<Self, FabricError> {
        config.check()?;
        let announced = Mutex::default();
        Ok(Self { host, config, node: node.to_owned(), run_dir: run_dir.to_owned(), announced })
    }

    /// How others reach this node, by what its host is like now. It has no addresses inside: who has leased some
    /// ([`lease_inside`](crate::provider::FabricSource::lease_inside)) adds them.
    ///
    /// # Errors
    /// [`FabricError::Invalid`] where an address is told that the host has not; [`FabricError::NoAddress`].
    pub fn local(&self) -> Result<FabricNode, FabricError> {
        Ok(self.look()?.local)
    }

    /// Looks at the host, once for [`local`](Fabric::local) and [`apply_seen`](Fabric::apply_seen) together.
    ///
    /// # Errors
    /// As [`local`](Fabric::local).
    pub fn look(&self) -> Result<Look, FabricError> {
        let mut socket = self.host.0.socket(Family::Route)?;
        let lists = Lists::read(&mut socket)?;
        let device = socket.vxlan(&self.config.device)?.filter(|(link, _)| self.is_own(link));
        let mut announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        // By a process before this one.
        announced.extend(device.and_then(|(_, spec)| spec).map(|spec| spec.local));
        let local = self.local_of(&lists, &announced)?;
        announced.clone_from(&local.addresses);
        drop(announced);
        Ok(Look { local, lists })
    }

    /// `announced` are addresses that others know already.
    fn local_of(&self, lists: &Lists, announced: &[IpAddr]) -> Result<FabricNode, FabricError> {
        let Lists { addresses: found, routes, links: _ } = lists;
        let mut addresses = self.config.addresses.clone();
        for (i, address) in addresses.iter().enumerate() {
            if !found.iter().any(|a| a.address.addr() == *address) {
                return Err(FabricError::Invalid {
                    field: format!("addresses[{i}]"),
                    value: address.to_string(),
                    reason: "no device of this host has it; give one of the host's own".to_owned(),
                });
            }
        }
        if addresses.is_empty() {
            addresses = HostFacts::addresses_of_default_routes(found, routes, announced);
        }
        let first = *addresses.first().ok_or(FabricError::NoAddress)?;
        let FabricConfig { vni, port, .. } = self.config;
        let mtu = lists.facts(&self.config.device).carried_from(first);
        let vtep = Vtep { address: first, mac: mac_of(&self.node), vni, port, mtu };
        let vtep = self.config.mode.has_vxlan().then_some(vtep);
        Ok(FabricNode { name: self.node.clone(), addresses, vtep, inside: Vec::new() })
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The largest packet that VXLAN carries on this host as it is now, in bytes; `None` without VXLAN.
    ///
    /// # Errors
    /// As [`local`](Fabric::local).
    pub fn carries(&self) -> Result<Option<u32>, FabricError> {
        let Look { local, lists } = self.look()?;
        Ok(plan(&FabricTable::default(), &local, &lists.facts(&self.config.device), &self.config).mtu)
    }

    /// Makes the host what the table says. What is right stays untouched, so that repeating it changes nothing. `local` is
    /// what [`local`](Fabric::local) told.
    ///
    /// # Errors
    /// Where nothing can be done; what the kernel refuses of single entries is in [`Report::failures`].
    pub fn apply(&self, local: &FabricNode, table: &FabricTable) -> Result<Report, FabricError> {
        let mut socket = self.host.0.socket(Family::Route)?;
        let lists = Lists::read(&mut socket)?;
        self.apply_to(lists, &mut socket, local, table)
    }

    /// As [`apply`](Fabric::apply), by what a look has just found: what changed since may be refused, and is found by the next.
    ///
    /// # Errors
    /// As [`apply`](Fabric::apply).
    pub fn apply_seen(&self, look: Look, table: &FabricTable) -> Result<Report, FabricError> {
        let Look { local, lists } = look;
        self.apply_to(lists, &mut self.host.0.socket(Family::Route)?, &local, table)
    }

    fn apply_to(
        &self,
        lists: Lists,
        socket: &mut Socket,
        local: &FabricNode,
        table: &FabricTable,
    ) -> Result<Report, FabricError> {
        let device = &self.config.device;
        let wanted = plan(table, local, &lists.facts(device), &self.config);
        let Lists { links, mut routes, .. } = lists;
        let mut report = Report { mtu: wanted.mtu, problems: wanted.problems.clone(), ..Report::default() };
        match self.set(&wanted, table, &links) {
            Ok(changed) => report.changed += changed,
            // Routes are of use without it: somebody else may have made the host forward, or will.
            Err(FabricError::Setting(error)) => report.failures.push(error.to_string()),
            Err(error) => return Err(error),
        }
        // Another mode or name was told before.
        let stays = local.vtep.is_some().then_some(device);
        report.changed += self.remove_devices(socket, &links, stays, &mut routes)?;
        let mut index = None;
        let mut fence = None;
        if let Some(vtep) = &local.vtep {
            report.changed += self.remove_other_network(socket, vtep, &mut routes)?;
            let (raised, changed) = Fence::widen(&self.host, vtep, &wanted)?;
            fence = Some(raised);
            report.changed += changed;
            let (found, changed) = self.ensure_device(socket, vtep, wanted.mtu, &mut routes)?;
            report.changed += changed;
            index = Some(found);
            if self.address(socket, found, &wanted, table, &mut report)? {
                // With its last address a link loses its IPv4 routes, and its neighbours of whom nothing is read yet
                // (`fib_disable_ip` of `net/ipv4/fib_frontend.c`).
                routes = socket.routes()?;
            }
        }
        let mut work = Work { index, report, first: Vec::new(), last: Vec::new() };
        if let Some(index) = index {
            work.forward(&wanted, socket, index, device)?;
        }
        work.route(&wanted, &routes);
        work.run(socket);
        let mut report = work.report;
        let narrowed = match &mut fence {
            Some(fence) => fence.narrow().map_err(FabricError::from),
            None => Fence::remove(&self.host).map(usize::from),
        };
        match narrowed {
            Ok(changed) => report.changed += changed,
            Err(error) => report.failures.push(error.to_string()),
        }
        Ok(report)
    }

    /// Removes all that is the fabric's from the host, and makes its settings what they were: those that it changed, where
    /// they still are as it made them. Who came to rely on them meanwhile must set them anew. Nothing happens where there is
    /// nothing.
    ///
    /// # Errors
    /// The first thing that stays; repeating it goes on.
    pub fn remove(&self) -> Result<(), FabricError> {
        let mut socket = self.host.0.socket(Family::Route)?;
        let mut routes = socket.routes()?;
        let ours: Vec<_> = routes.iter().filter(|r| is_ours(r)).map(netlink::delete_listed_route).collect();
        for message in ours.chunks(AT_ONCE) {
            for outcome in socket.batch(message) {
                match outcome {
                    Err(error) if error.errno() != Some(libc::ESRCH) => return Err(error.into()),
                    _ => {}
                }
            }
        }
        let links = socket.links()?;
        self.remove_devices(&mut socket, &links, None, &mut routes)?;
        Fence::remove(&self.host)?;
        Ok(Settings::open(&self.run_dir)?.restore(&self.host)?)
    }

    /// Has the host forward what comes from other nodes.
    fn set(&self, wanted: &Wanted, table: &FabricTable, links: &[LinkView]) -> Result<usize, FabricError> {
        let mut names = BTreeSet::new();
        if table.pools.iter().any(|pool| pool.addr().is_ipv4()) {
            // Link by link, for a router in between may be no business of ours.
            let underlay = links.iter().filter(|link| wanted.underlay.contains(&link.index));
            names.extend(underlay.map(|link| format!("ipv4/conf/{}/forwarding", link.name)));
        }
        let ipv6 = table.pools.iter().any(|pool| pool.addr().is_ipv6());
        if names.is_empty() && !ipv6 {
            return Ok(0);
        }
        let mut settings = Settings::open(&self.run_dir)?;
        let mut changed = 0;
        for name in names {
            changed += usize::from(settings.set(&self.host, &name, "1")?);
        }
        if ipv6 {
            let ours = |link: &&LinkView| {
                link.flags & libc::IFF_LOOPBACK as u32 != 0
                    || link.alias.as_deref().is_some_and(|alias| alias.starts_with("dcenet:"))
            };
            let others = links.iter().filter(|link| !ours(link)).map(|link| link.name.as_str());
            changed += settings.forward_ipv6(&self.host, others)?;
        }
        Ok(changed)
    }

    /// Removes the device of another network, for it would be without a fence when this one's is raised. Returns how many
    /// there were.
    fn remove_other_network(
        &self,
        socket: &mut Socket,
        vtep: &Vtep,
        routes: &mut Vec<RouteView>,
    ) -> Result<usize, FabricError> {
        match socket.vxlan(&self.config.device)? {
            Some((link, Some(found)))
                if link.alias.as_deref() == Some(MARK) && (found.port, found.vni) != (vtep.port, vtep.vni) =>
            {
                socket.delete_link(&link)?;
                routes.retain(|route| route.link != Some(link.index));
                Ok(1)
            }
            _ => Ok(0),
        }
    }

    /// The index of the device, and how many changes that took. Routes over one that had to go are taken from `routes`.
    fn ensure_device(
        &self,
        socket: &mut Socket,
        vtep: &Vtep,
        mtu: Option<u32>,
        routes: &mut Vec<RouteView>,
    ) -> Result<(IfIndex, usize), FabricError> {
        let name = &self.config.device;
        let Vtep { address, mac, vni, port, mtu: _ } = *vtep;
        let spec = VxlanSpec { vni, port, local: address, learning: false };
        let mut changed = 0;
        if let Some((link, found)) = socket.vxlan(name)? {
            let same = found == Some(spec) && link.mac == Some(mac);
            if !self.is_own(&link) {
                return Err(FabricError::Foreign(name.clone()));
            }
            if same {
                let lets_in = |setting: &str, value| {
                    Ok::<_, FabricError>(settings::read(&self.host, &format!("ipv4/conf/{name}/{setting}"))? == value)
                };
                let fits = mtu.is_none_or(|mtu| mtu == link.mtu);
                let marked = link.alias.as_deref() == Some(MARK);
                if !(marked && fits && link.is_up() && lets_in("forwarding", "1")? && lets_in("rp_filter", "2")?) {
                    self.set_up_device(socket, link.index, mtu)?;
                    changed = 1;
                }
                return Ok((link.index, changed));
            }
            socket.delete_link(&link)?;
            routes.retain(|route| route.link != Some(link.index));
            changed = 1;
        }
        // An MTU out of its range cannot be told; the kernel's default then stands.
        let mtu = mtu.and_then(|mtu| Mtu::try_from(mtu).ok());
        let kind = LinkKind::Vxlan(spec);
        let index = socket.create_link(&NewLink { name, kind, mac: Some(mac), mtu, netns: None })?;
        self.set_up_device(socket, index, None)?;
        Ok((index, changed + 1))
    }

    /// Makes the addresses of the device what they should be, and returns whether some had to go. Of those in routed pools
    /// none is anybody else's.
    fn address(
        &self,
        socket: &mut Socket,
        index: IfIndex,
        wanted: &Wanted,
        table: &FabricTable,
        report: &mut Report,
    ) -> Result<bool, NetlinkError> {
        let name = self.config.device.as_str();
        let mut here = BTreeSet::new();
        let mut messages = Vec::new();
        for found in socket.addresses()?.into_iter().filter(|a| a.index == index) {
            let address = found.address.addr();
            if wanted.inside.contains(&address) {
                here.insert(address);
            } else if table.pools.iter().any(|pool| pool.contains(&address)) {
                messages.push(netlink::delete_address(name, index, found.address));
            }
        }
        let removes = !messages.is_empty();
        let missing = wanted.inside.difference(&here);
        messages.extend(missing.map(|address| netlink::add_address(name, index, IpNet::from(*address))));
        if messages.is_empty() {
            return Ok(false);
        }
        for outcome in socket.batch(&messages) {
            match outcome {
                Ok(_) => report.changed += 1,
                Err(error) if is_gone(&error) => {}
                Err(error) => report.failures.push(error.to_string()),
            }
        }
        Ok(removes)
    }

    /// Set up last, for one request that does both sets up first.
    fn set_up_device(&self, socket: &mut Socket, index: IfIndex, mtu: Option<u32>) -> Result<(), NetlinkError> {
        let name = &self.config.device;
        // The MTU by itself, for it decides whether there is IPv6.
        socket.request(&netlink::mark_vxlan(name, index, MARK, mtu))?;
        match socket.request(&netlink::no_addresses_of_its_own(name, index)) {
            Err(error) if error.errno() == Some(libc::EAFNOSUPPORT) => {}
            outcome => drop(outcome?),
        }
        let up = LinkChange { up: Some(true), ..Default::default() };
        socket.request(&netlink::set_link(name, index, &up)).map(drop)
    }

    /// One that was made a moment before its maker died bears no mark yet, but the node's Ethernet address.
    fn is_own(&self, link: &LinkView) -> bool {
        let marked = match link.alias.as_deref() {
            Some(alias) => alias == MARK,
            None => link.mac == Some(mac_of(&self.node)),
        };
        marked && link.kind.as_deref() == Some("vxlan")
    }

    /// Removes devices of the fabric but for that of a name, and returns how many there were: another name may have been
    /// told before, and a host has one device of a VNI and port.
    fn remove_devices(
        &self,
        socket: &mut Socket,
        links: &[LinkView],
        but: Option<&IfName>,
        routes: &mut Vec<RouteView>,
    ) -> Result<usize, FabricError> {
        let mut removed = 0;
        for link in links.iter().filter(|link| self.is_own(link) && but.is_none_or(|name| link.name != name.as_str())) {
            socket.delete_link(link)?;
            routes.retain(|route| route.link != Some(link.index));
            removed += 1;
        }
        Ok(removed)
    }
}

/// Messages, in the order in which nothing leads where nobody is: what a route needs is there before it, and goes after it.
struct Work {
    index: Option<IfIndex>,
    report: Report,
    first: Vec<(Message, Step)>,
    last: Vec<(Message, Step)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// A route comes that is wanted.
    Route,
    /// Anything else.
    Other,
}

impl Work {
    /// Neighbours and forwarding on the device.
    fn forward(
        &mut self,
        wanted: &Wanted,
        socket: &mut Socket,
        index: IfIndex,
        device: &IfName,
    ) -> Result<(), NetlinkError> {
        let name = device.as_str();
        let mut hosts: BTreeMap<MacAddr, IpAddr> = BTreeMap::new();
        for entry in socket.forwarding(index)? {
            if is_fabric_mac(entry.mac) && entry.state & libc::NUD_PERMANENT != 0 {
                match wanted.forwarding.get(&entry.mac) {
                    None => {
                        self.last.push((netlink::delete_forwarding(index, entry.mac, entry.host), Step::Other));
                    }
                    Some(_) => drop(hosts.insert(entry.mac, entry.host)),
                }
            }
        }
        for (mac, host) in &wanted.forwarding {
            if hosts.get(mac) != Some(host) {
                self.first.push((netlink::set_forwarding(index, *mac, *host), Step::Other));
            }
        }
        let mut found = BTreeMap::new();
        for n in socket.neighbours()?.into_iter().filter(|n| n.index == index && n.is_permanent()) {
            if n.protocol == FABRIC_PROTOCOL && !wanted.neighbours.contains_key(&n.address) {
                self.last.push((netlink::delete_neighbour(name, index, n.address), Step::Other));
            }
            found.insert(n.address, (n.mac, n.protocol));
        }
        for (address, mac) in &wanted.neighbours {
            match found.get(address) {
                Some((known, _)) if *known == Some(*mac) => {}
                Some((known, protocol)) if *protocol != FABRIC_PROTOCOL => self.report.problems.push(format!(
                    "neighbour {address} on {name}: somebody entered it at {known:?}, and it is {mac}; remove theirs"
                )),
                _ => self.first.push((netlink::add_fabric_neighbour(name, index, *address, *mac), Step::Other)),
            }
        }
        Ok(())
    }

    fn route(&mut self, wanted: &Wanted, routes: &[RouteView]) {
        let here: BTreeMap<IpNet, &RouteView> =
            routes.iter().filter(|r| is_ours(r) && r.metric == METRIC).map(|r| (r.destination, r)).collect();
        let theirs: BTreeSet<IpNet> = routes
            .iter()
            .filter(|r| r.table == MAIN && r.protocol != FABRIC_PROTOCOL && r.metric == METRIC)
            .map(|r| r.destination)
            .collect();
        self.report.wanted = wanted.routes.len();
        for (destination, hop) in &wanted.routes {
            let hop = match *hop {
                Hop::Unreachable => None,
                Hop::Direct { link, gateway } => Some(NextHop { link, gateway, on_link: false, mtu: None }),
                Hop::Vxlan { gateway, mtu } => match self.index {
                    Some(link) => Some(NextHop { link, gateway, on_link: gateway.is_ipv4(), mtu }),
                    None => continue,
                },
            };
            let route = FabricRoute { destination: *destination, metric: METRIC, hop };
            if theirs.contains(destination) {
                let text =
                    format!("route {destination} with metric {METRIC} is somebody else's, and stays; remove theirs");
                self.report.problems.push(text);
                continue;
            }
            match here.get(destination) {
                Some(found) if is_as(found, &route) => self.report.installed += 1,
                found => self.first.push((netlink::fabric_route(&route, found.is_some()), Step::Route)),
            }
        }
        for route in routes.iter().filter(|r| is_ours(r)) {
            if route.metric != METRIC || !wanted.routes.contains_key(&route.destination) {
                self.last.push((netlink::delete_listed_route(route), Step::Other));
            }
        }
        // Routes before what they need.
        self.last.reverse();
    }

    fn run(&mut self, socket: &mut Socket) {
        let steps: Vec<_> = std::mem::take(&mut self.first).into_iter().chain(std::mem::take(&mut self.last)).collect();
        let (messages, steps): (Vec<Message>, Vec<Step>) = steps.into_iter().unzip();
        for (messages, steps) in messages.chunks(AT_ONCE).zip(steps.chunks(AT_ONCE)) {
            for (outcome, step) in socket.batch(messages).into_iter().zip(steps) {
                match outcome {
                    Ok(_) => {
                        self.report.changed += 1;
                        self.report.installed += usize::from(*step == Step::Route);
                    }
                    // What was to go is gone.
                    Err(error) if is_gone(&error) && *step == Step::Other => {}
                    Err(error) => self.report.failures.push(error.to_string()),
                }
            }
        }
    }
}

fn is_gone(error: &NetlinkError) -> bool {
    matches!(error.errno(), Some(libc::ESRCH | libc::ENOENT | libc::EADDRNOTAVAIL))
}

fn is_ours(route: &RouteView) -> bool {
    route.protocol == FABRIC_PROTOCOL && route.table == MAIN
}

/// Whether a route that is there is the one that is wanted.
fn is_as(found: &RouteView, route: &FabricRoute) -> bool {
    match route.hop {
        // The kernel says that those of IPv6 lead over the loopback device.
        None => found.kind == libc::RTN_UNREACHABLE,
        Some(NextHop { link, gateway, on_link: _, mtu }) => {
            let leads = found.kind == libc::RTN_UNICAST && found.link == Some(link) && found.gateway == Some(gateway);
            leads && found.metrics.mtu == mtu
        }
    }
}

/// The Ethernet address of a node's end, the same wherever and whenever it is asked: 32 bits of its name's hash.
fn mac_of(node: &str) -> MacAddr {
    let hash = Sha256::digest(format!("dcenet fabric {node}"));
    MacAddr::new([OUI[0], OUI[1], hash[0], hash[1], hash[2], hash[3]])
}

/// Whether an Ethernet address is of a node's end: what else is in the forwarding database is somebody else's.
pub(super) fn is_fabric_mac(mac: MacAddr) -> bool {
    mac.bytes()[..2] == OUI
}

/// Locally administered.
const OUI: [u8; 2] = [0x02, 0xdc];
const MAIN: u32 = libc::RT_TABLE_MAIN as u32;
/// All answers of a batch must fit the socket's buffer of 208 KiB (`net.core.rmem_default`), where each takes 1 KiB or less.
const AT_ONCE: usize = 128;
