//! Making a host what its plan says.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use sha2::{Digest, Sha256};

use super::settings::{self, Settings, SettingsError};
use super::{FabricConfig, Hop, HostFacts, MARK, METRIC, Wanted, plan};
use crate::model::{IfIndex, IfName, MacAddr, Mtu};
use crate::netlink::{
    self, CreateLinkError, FABRIC_PROTOCOL, FabricRoute, Family, LinkKind, LinkView, Message, NetlinkError, NewLink,
    NextHop, RouteView, Socket, VxlanSpec,
};
use crate::netns::{Host, NetNsError};
use crate::provider::{FabricNode, FabricTable, Vtep};

/// The routes of one node to all others.
///
/// It keeps nothing of the host in memory: each call of [`apply`](Fabric::apply) looks at what is there.
#[derive(Debug)]
pub struct Fabric {
    host: Host,
    config: FabricConfig,
    node: String,
    run_dir: PathBuf,
}

/// What a call of [`Fabric::apply`] found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Routes that are wanted.
    pub wanted: usize,
    /// Those of them that are there now.
    pub installed: usize,
    /// Entries that were added, changed or removed: routes, neighbours, forwarding, settings, the device.
    pub changed: usize,
    /// The largest packet that reaches every node, in bytes: pods' links must not have more. `None` without VXLAN.
    pub mtu: Option<u32>,
    /// What cannot be, why, and what to do about it.
    pub problems: Vec<String>,
    /// What the kernel refused. The same call may succeed later.
    pub failures: Vec<String>,
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
        Ok(Self { host, config, node: node.to_owned(), run_dir: run_dir.to_owned() })
    }

    /// How others reach this node, by what its host is like now.
    ///
    /// # Errors
    /// [`FabricError::Invalid`] where an address is told that the host has not; [`FabricError::NoAddress`].
    pub fn local(&self) -> Result<FabricNode, FabricError> {
        let mut socket = self.host.0.socket(Family::Route)?;
        let (found, routes) = (socket.addresses()?, socket.routes()?);
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
            addresses = HostFacts::addresses_of_default_routes(&found, &routes);
        }
        let first = *addresses.first().ok_or(FabricError::NoAddress)?;
        let FabricConfig { vni, port, .. } = self.config;
        let vtep = Vtep { address: first, mac: mac_of(&self.node), vni, port };
        let vtep = self.config.mode.has_vxlan().then_some(vtep);
        Ok(FabricNode { name: self.node.clone(), addresses, vtep })
    }

    /// Makes the host what the table says. What is right stays untouched, so that repeating it changes nothing. `local` is
    /// what [`local`](Fabric::local) told.
    ///
    /// # Errors
    /// Where nothing can be done; what the kernel refuses of single entries is in [`Report::failures`].
    pub fn apply(&self, local: &FabricNode, table: &FabricTable) -> Result<Report, FabricError> {
        let mut socket = self.host.0.socket(Family::Route)?;
        let device = &self.config.device;
        let (facts, mut routes, links) = HostFacts::read(&mut socket, device)?;
        let wanted = plan(table, local, &facts, &self.config);
        let mut report = Report { mtu: wanted.mtu, problems: wanted.problems.clone(), ..Report::default() };
        report.changed += self.set(&wanted, table, &links)?;
        let mut index = None;
        match &local.vtep {
            Some(vtep) => {
                let (found, changed) = self.ensure_device(&mut socket, vtep, wanted.mtu, &mut routes)?;
                report.changed += changed;
                index = Some(found);
            }
            // Another mode was told before.
            None => report.changed += usize::from(self.remove_device(&mut socket, &mut routes)?),
        }
        let mut work = Work { index, report, first: Vec::new(), last: Vec::new() };
        if let Some(index) = index {
            work.forward(&wanted, &mut socket, index, device)?;
        }
        work.route(&wanted, &routes);
        work.run(&mut socket);
        Ok(work.report)
    }

    /// Removes all that is the fabric's from the host, and makes its settings what they were. Nothing happens where there
    /// is nothing.
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
        self.remove_device(&mut socket, &mut routes)?;
        let mut settings = Settings::open(&self.run_dir).map_err(|e| FabricError::Setting(Box::new(e)))?;
        Ok(settings.restore(&self.host)?)
    }

    /// Has the host forward what comes from other nodes.
    fn set(&self, wanted: &Wanted, table: &FabricTable, links: &[LinkView]) -> Result<usize, FabricError> {
        let mut names = BTreeSet::new();
        if table.pools.iter().any(|pool| pool.addr().is_ipv4()) {
            // Link by link, for a router in between may be no business of ours.
            let underlay = links.iter().filter(|link| wanted.underlay.contains(&link.index));
            names.extend(underlay.map(|link| format!("ipv4/conf/{}/forwarding", link.name)));
        }
        if table.pools.iter().any(|pool| pool.addr().is_ipv6()) {
            names.insert("ipv6/conf/all/forwarding".to_owned());
        }
        if names.is_empty() {
            return Ok(0);
        }
        let mut settings = Settings::open(&self.run_dir).map_err(|e| FabricError::Setting(Box::new(e)))?;
        let mut changed = 0;
        for name in names {
            changed += usize::from(settings.set(&self.host, &name, "1")?);
        }
        Ok(changed)
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
        let Vtep { address, mac, vni, port } = *vtep;
        let spec = VxlanSpec { vni, port, local: address, learning: false };
        let mut changed = 0;
        if let Some((link, found)) = socket.vxlan(name)? {
            let same = found == Some(spec) && link.mac == Some(mac);
            // One that was made a moment before its maker died bears no mark yet.
            if link.alias.as_deref() != Some(MARK) && !same {
                return Err(FabricError::Foreign(name.clone()));
            }
            if same {
                let lets_in = |setting: &str, value| {
                    Ok::<_, FabricError>(settings::read(&self.host, &format!("ipv4/conf/{name}/{setting}"))? == value)
                };
                let fits = mtu.is_none_or(|mtu| mtu == link.mtu);
                let marked = link.alias.as_deref() == Some(MARK);
                if !(marked && fits && link.is_up() && lets_in("forwarding", "1")? && lets_in("rp_filter", "2")?) {
                    socket.request(&netlink::set_up_vxlan(name, link.index, MARK, mtu))?;
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
        socket.request(&netlink::set_up_vxlan(name, index, MARK, None))?;
        Ok((index, changed + 1))
    }

    /// Removes the device if it is the fabric's, and returns whether it was.
    fn remove_device(&self, socket: &mut Socket, routes: &mut Vec<RouteView>) -> Result<bool, FabricError> {
        let Some((link, _)) = socket.vxlan(&self.config.device)? else { return Ok(false) };
        if link.alias.as_deref() != Some(MARK) {
            return Ok(false);
        }
        socket.delete_link(&link)?;
        routes.retain(|route| route.link != Some(link.index));
        Ok(true)
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
                Hop::Direct { link, gateway } => Some(NextHop { link, gateway, on_link: false }),
                Hop::Vxlan { gateway } => match self.index {
                    Some(link) => Some(NextHop { link, gateway, on_link: gateway.is_ipv4() }),
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
                    Err(error) if matches!(error.errno(), Some(libc::ESRCH | libc::ENOENT)) && *step == Step::Other => {
                    }
                    Err(error) => self.report.failures.push(error.to_string()),
                }
            }
        }
    }
}

fn is_ours(route: &RouteView) -> bool {
    route.protocol == FABRIC_PROTOCOL && route.table == MAIN
}

/// Whether a route that is there is the one that is wanted.
fn is_as(found: &RouteView, route: &FabricRoute) -> bool {
    match route.hop {
        // The kernel says that those of IPv6 lead over the loopback device.
        None => found.kind == libc::RTN_UNREACHABLE,
        Some(NextHop { link, gateway, on_link: _ }) => {
            found.kind == libc::RTN_UNICAST && found.link == Some(link) && found.gateway == Some(gateway)
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
