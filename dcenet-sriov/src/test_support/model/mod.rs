//! A kernel with ports and virtual functions, in memory, with the quirks of real drivers.
//!
//! It has one namespace of the host's and those that a test makes, and behaves as Linux does where virtual functions meet
//! it: moves and names (net/core/dev.c), settings (net/core/rtnetlink.c), binding (drivers/base), counts
//! (drivers/pci/iov.c). Time passes by calls, and by waiting.

mod profile;
mod stage;
mod world;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dcenet_core::model::{IfIndex, IfName};
use dcenet_core::netns::NetNsId;

pub use profile::Profile;
pub use stage::FunctionState;
use world::{Device, HOST, Space, World};

use crate::address::{PciAddress, VfIndex};
use crate::kernel::{
    Attribute, DriverState, ErrorClass, IommuGroup, Kernel, KernelError, LinkCounters, Namespace, NetdevChange,
    NetdevState, VfChange, VfCount, VfState, VlanProtocol, Watch,
};

/// The modelled kernel. Cheap to make, and shared by reference.
#[derive(Debug)]
pub struct Model {
    world: Mutex<World>,
}

impl Model {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call: noted, and time passes.
    fn call(&self, operation: &str) -> MutexGuard<'_, World> {
        let mut world = self.world();
        world.calls.push(operation.to_owned());
        let now = world.clock + 1;
        world.advance(now);
        world
    }
}

fn space(world: &World, at: &Namespace, operation: &str) -> Result<Space, KernelError> {
    match at {
        Namespace::Host => Ok(HOST),
        Namespace::Path(path) => {
            let found = world.paths.get(path).copied();
            found.ok_or_else(|| KernelError::of_class(operation, ErrorClass::NamespaceGone))
        }
    }
}

fn device(world: &mut World, at: &Namespace, index: IfIndex, operation: &str) -> Result<usize, KernelError> {
    let space = space(world, at, operation)?;
    world.device(space, index).ok_or_else(|| KernelError::refused(operation, libc::ENODEV))
}

/// In the order of `do_setlink`; what was done before a refusal stays.
fn change_device(world: &mut World, at: usize, change: &NetdevChange, operation: &str) -> Result<(), KernelError> {
    let NetdevChange { name, alias, mac, mtu, promisc, all_multicast, up } = change;
    let refused = |errno| KernelError::refused(operation, errno);
    if let Some(mac) = *mac {
        if !mac.is_device_address() {
            return Err(refused(libc::EADDRNOTAVAIL).at(Attribute::EffectiveMac));
        }
        if let Some(function) = world.devices[at].function {
            world.change_mac(function, mac).map_err(|errno| refused(errno).at(Attribute::EffectiveMac))?;
        }
        match world.devices[at].function {
            Some(function) if world.late > 0 => {
                let due = world.clock.saturating_add(world.late);
                world.late_macs.push((due, function, mac));
            }
            _ => world.devices[at].state.mac = Some(mac),
        }
    }
    if let Some(mtu) = mtu {
        if mtu.get() > 9_216 {
            return Err(refused(libc::EINVAL).at(Attribute::Mtu));
        }
        world.devices[at].state.mtu = mtu.get();
    }
    if let Some(name) = name
        && *name != world.devices[at].state.name
    {
        // Before Linux 6.3, the harder case.
        if world.devices[at].state.up {
            return Err(refused(libc::EBUSY));
        }
        if world.is_taken(world.devices[at].space, name.as_str(), at)
            || world.devices[at].state.alternative_names.iter().any(|other| other == name.as_str())
        {
            return Err(refused(libc::EEXIST));
        }
        world.devices[at].state.name = name.clone();
    }
    let state = &mut world.devices[at].state;
    if let Some(alias) = alias {
        state.alias = Some(alias.clone()).filter(|alias| !alias.is_empty());
    }
    state.promisc = promisc.unwrap_or(state.promisc);
    state.all_multicast = all_multicast.unwrap_or(state.all_multicast);
    let was = state.up;
    state.up = up.unwrap_or(was);
    if state.up && !was {
        world.up(at);
    }
    Ok(())
}

impl Kernel for Model {
    fn vfs(&self, port: IfIndex) -> Result<Vec<(VfIndex, VfState)>, KernelError> {
        let operation = format!("list VFs of link {port}");
        let mut world = self.call(&operation);
        let port = world.port(port, &operation)?;
        let all = (0..).map(VfIndex).zip(&port.vfs);
        Ok(all.filter(|(_, vf)| !vf.withheld).map(|(index, vf)| (index, vf.state.clone())).collect())
    }

    fn vf_counters(&self, port: IfIndex) -> Result<Vec<(VfIndex, LinkCounters)>, KernelError> {
        let operation = format!("read counters of VFs of link {port}");
        let mut world = self.call(&operation);
        let port = world.port(port, &operation)?;
        let all = (0..).map(VfIndex).zip(&port.vfs);
        Ok(all.filter(|(_, vf)| !vf.withheld).map(|(index, vf)| (index, vf.counted)).collect())
    }

    fn netdev_counters(&self, at: &Namespace, function: PciAddress) -> Result<Option<LinkCounters>, KernelError> {
        let operation = format!("read counters of {function} in {at}");
        let world = self.call(&operation);
        let space = space(&world, at, &operation)?;
        let own = |device: &&Device| device.space == space && device.function == Some(function);
        Ok(world.devices.iter().find(own).map(|device| device.counted))
    }

    fn configure_vf(&self, port: IfIndex, index: VfIndex, change: &VfChange) -> Result<(), KernelError> {
        if change.is_empty() {
            return Ok(());
        }
        let operation = format!("configure VF {index} of link {port}");
        let mut world = self.call(&operation);
        let clock = world.clock;
        let port = world.port(port, &operation)?;
        if clock < port.busy_until {
            return Err(KernelError::refused(operation, libc::EAGAIN));
        }
        port.busy_until = clock.saturating_add(port.busy);
        let (profile, carrier) = (port.profile, port.carrier);
        let vf = port.vf(index, &operation)?;
        let outcome = set_vf(profile, carrier, vf, change);
        let (function, given) = (vf.address, vf.mac_given.then_some(vf.state.mac));
        if let Some(mac) = given.filter(|_| change.mac.is_some() && profile.mac_reaches_device_at_once)
            && let Some(device) = world.devices.iter_mut().find(|device| device.function == Some(function))
        {
            device.state.mac = Some(mac);
        }
        outcome.map_err(|(attribute, errno)| KernelError::refused(operation, errno).at(attribute))
    }

    fn netdevs(&self, at: &Namespace, function: PciAddress) -> Result<Vec<NetdevState>, KernelError> {
        let operation = format!("look for devices of {function} in {at}");
        let world = self.call(&operation);
        let space = space(&world, at, &operation)?;
        let own = |device: &&Device| device.space == space && device.function == Some(function);
        Ok(world.devices.iter().filter(own).map(|device| device.state.clone()).collect())
    }

    fn has_netdev(&self, function: PciAddress) -> Result<bool, KernelError> {
        let world = self.call(&format!("look for any device of {function}"));
        Ok(world.devices.iter().any(|device| device.function == Some(function)))
    }

    fn netdev(&self, at: &Namespace, index: IfIndex) -> Result<Option<NetdevState>, KernelError> {
        let operation = format!("look up link {index} in {at}");
        let mut world = self.call(&operation);
        let space = space(&world, at, &operation)?;
        Ok(world.device(space, index).map(|found| world.devices[found].state.clone()))
    }

    fn configure_netdev(&self, at: &Namespace, index: IfIndex, change: &NetdevChange) -> Result<(), KernelError> {
        if change.is_empty() {
            return Ok(());
        }
        let operation = format!("configure link {index} in {at}");
        let mut world = self.call(&operation);
        let found = device(&mut world, at, index, &operation)?;
        change_device(&mut world, found, change, &operation)
    }

    fn move_netdev(
        &self,
        from: &Namespace,
        index: IfIndex,
        to: &Namespace,
        name: &IfName,
        change: &NetdevChange,
    ) -> Result<(), KernelError> {
        let operation = format!("move link {index} from {from} to {to} as {name}");
        let mut world = self.call(&operation);
        let target = space(&world, to, &operation)?;
        let found = device(&mut world, from, index, &operation)?;
        if let Some(errno) = world.refuses_moves {
            return Err(KernelError::refused(operation, errno));
        }
        if world.devices[found].space != target {
            let state = &world.devices[found].state;
            let mut own = state.name.clone();
            let exists = || KernelError::refused(&operation, libc::EEXIST);
            if world.is_taken(target, own.as_str(), found) {
                if world.is_taken(target, name.as_str(), found) {
                    return Err(exists());
                }
                own = name.clone();
            }
            if state.alternative_names.iter().any(|other| world.is_taken(target, other, found)) {
                return Err(exists());
            }
            let index = world.free_index(target, Some(state.index));
            let moved = &mut world.devices[found];
            moved.space = target;
            moved.state = NetdevState { index, name: own, up: false, ..moved.state.clone() };
        }
        let change = NetdevChange { name: Some(name.clone()), ..change.clone() };
        change_device(&mut world, found, &change, &operation)
    }

    fn add_alternative_name(&self, at: &Namespace, index: IfIndex, name: &str) -> Result<(), KernelError> {
        let operation = format!("add alternative name {name} to link {index} in {at}");
        let mut world = self.call(&operation);
        let found = device(&mut world, at, index, &operation)?;
        if name.is_empty() || name.len() > 127 {
            return Err(KernelError::refused(operation, libc::EINVAL));
        }
        if world.is_taken(world.devices[found].space, name, usize::MAX) {
            return Err(KernelError::refused(operation, libc::EEXIST));
        }
        let names = &mut world.devices[found].state.alternative_names;
        names.push(name.to_owned());
        names.sort_unstable();
        Ok(())
    }

    fn delete_alternative_name(&self, at: &Namespace, index: IfIndex, name: &str) -> Result<(), KernelError> {
        let operation = format!("delete alternative name {name} of link {index} in {at}");
        let mut world = self.call(&operation);
        let found = device(&mut world, at, index, &operation)?;
        let names = &mut world.devices[found].state.alternative_names;
        let before = names.len();
        names.retain(|other| other != name);
        if names.len() == before { Err(KernelError::refused(operation, libc::ENOENT)) } else { Ok(()) }
    }

    fn namespace_id(&self, at: &Namespace) -> Result<Option<NetNsId>, KernelError> {
        let world = self.call(&format!("identify {at}"));
        Ok(space(&world, at, "").ok().map(|inode| NetNsId { dev: 4, inode }))
    }

    fn driver(&self, function: PciAddress) -> Result<DriverState, KernelError> {
        let operation = format!("look up the driver of {function}");
        let mut world = self.call(&operation);
        if let Ok(port) = world.port_at(function, &operation) {
            return Ok(DriverState { driver: Some(port.profile.driver.to_owned()), driver_override: None });
        }
        let (_, vf) = world.function(function).ok_or_else(|| KernelError::refused(operation, libc::ENOENT))?;
        Ok(DriverState { driver: vf.driver.clone(), driver_override: vf.driver_override.clone() })
    }

    fn bind(&self, function: PciAddress, driver: &str) -> Result<(), KernelError> {
        let operation = format!("bind {function} to {driver}");
        let mut world = self.call(&operation);
        let known = world.drivers.contains(driver);
        let found = world.function(function).filter(|_| known);
        let (profile, vf) = found.ok_or_else(|| KernelError::refused(&operation, libc::ENOENT))?;
        let wanted = vf.driver_override.as_deref().unwrap_or(profile.vf_driver);
        if vf.driver.is_some() || wanted != driver {
            return Err(KernelError::refused(operation, libc::ENODEV));
        }
        world.take(function, driver);
        Ok(())
    }

    fn unbind(&self, function: PciAddress) -> Result<(), KernelError> {
        let operation = format!("unbind {function}");
        let mut world = self.call(&operation);
        if world.open.contains(&function) {
            return Err(KernelError::refused(operation, libc::EBUSY));
        }
        let found = world.function(function).and_then(|(_, vf)| vf.driver.take());
        if found.is_none() {
            return Err(KernelError::refused(operation, libc::ENOENT));
        }
        world.drop_device(function);
        Ok(())
    }

    fn set_driver_override(&self, function: PciAddress, driver: Option<&str>) -> Result<(), KernelError> {
        let operation = format!("set the driver override of {function}");
        let mut world = self.call(&operation);
        let (_, vf) = world.function(function).ok_or_else(|| KernelError::refused(operation, libc::ENOENT))?;
        vf.driver_override = driver.map(str::to_owned);
        Ok(())
    }

    fn iommu_group(&self, function: PciAddress) -> Result<Option<IommuGroup>, KernelError> {
        let operation = format!("look up the IOMMU group of {function}");
        let world = self.call(&operation);
        let all = world.ports.iter().flat_map(|port| &port.vfs).map(|vf| vf.address);
        // Those of their own are numbered behind those that a test chooses.
        let numbered = all.zip(1_000..).map(|(vf, own)| (vf, world.groups.get(&vf).copied().unwrap_or(Some(own))));
        let numbered: Vec<(PciAddress, Option<u32>)> = numbered.collect();
        let Some((_, number)) = numbered.iter().find(|(vf, _)| *vf == function) else {
            return Err(KernelError::refused(operation, libc::ENOENT));
        };
        let Some(number) = *number else { return Ok(None) };
        let functions = numbered.iter().filter(|(_, group)| *group == Some(number)).map(|(vf, _)| *vf).collect();
        Ok(Some(IommuGroup { number, functions }))
    }

    fn vf_count(&self, port: PciAddress) -> Result<VfCount, KernelError> {
        let operation = format!("look up the VF count of {port}");
        let mut world = self.call(&operation);
        let port = world.port_at(port, &operation)?;
        let now = u16::try_from(port.vfs.len()).unwrap_or(u16::MAX);
        Ok(VfCount { total: port.profile.total_vfs, now, autoprobe: port.autoprobe })
    }

    fn write_vf_count(&self, port: PciAddress, count: u16) -> Result<(), KernelError> {
        let operation = format!("set the VF count of {port} to {count}");
        let mut world = self.call(&operation);
        let refused = |errno| Err(KernelError::refused(&operation, errno));
        let port = world.port_at(port, &operation)?;
        // In the order of `sriov_numvfs_store` in drivers/pci/iov.c.
        if count > port.profile.total_vfs {
            return refused(libc::ERANGE);
        }
        if usize::from(count) == port.vfs.len() {
            return Ok(());
        }
        if !port.bound {
            return refused(libc::ENOENT);
        }
        if count == 0 {
            let gone: Vec<_> = port.vfs.drain(..).map(|vf| vf.address).collect();
            gone.into_iter().for_each(|function| world.drop_device(function));
            return Ok(());
        }
        if !port.vfs.is_empty() {
            return refused(libc::EBUSY);
        }
        if let Some((_, errno)) = port.refuses_count.filter(|(most, _)| count > *most) {
            return refused(errno);
        }
        let (address, count) = (port.address, port.grants.map_or(count, |most| most.min(count)));
        world.populate(address, count);
        Ok(())
    }

    fn write_autoprobe(&self, port: PciAddress, autoprobe: bool) -> Result<(), KernelError> {
        let operation = format!("set autoprobe of {port}");
        let mut world = self.call(&operation);
        let port = world.port_at(port, &operation)?;
        if let Some(errno) = port.refuses_autoprobe {
            return Err(KernelError::refused(operation, errno));
        }
        port.autoprobe = autoprobe;
        Ok(())
    }

    fn vf_addresses(&self, port: PciAddress) -> Result<Vec<(VfIndex, PciAddress)>, KernelError> {
        let operation = format!("list the VFs of {port}");
        let mut world = self.call(&operation);
        let port = world.port_at(port, &operation)?;
        Ok((0..).map(VfIndex).zip(port.vfs.iter().map(|vf| vf.address)).collect())
    }

    fn watch(&self) -> Result<Box<dyn Watch + '_>, KernelError> {
        drop(self.call("watch"));
        Ok(Box::new(ModelWatch(self)))
    }

    /// Here: the model has no threads.
    fn in_host(&self, work: &mut (dyn FnMut() + Send)) -> Result<(), KernelError> {
        drop(self.call("work in the host's namespace"));
        work();
        Ok(())
    }
}

struct ModelWatch<'a>(&'a Model);

impl Watch for ModelWatch<'_> {
    fn wait(&mut self, limit: Duration) -> Result<bool, KernelError> {
        let mut world = self.0.world();
        if world.deaf {
            drop(world);
            std::thread::sleep(limit);
            return Ok(false);
        }
        if let Some(next) = world.coming.iter().map(|(when, _)| *when).filter(|when| *when < u64::MAX).min() {
            return Ok(world.advance(next));
        }
        drop(world);
        // Nothing will ever come: the caller's clock has to run out.
        std::thread::sleep(limit.min(Duration::from_millis(5)));
        Ok(false)
    }
}

/// In the order of `do_setvfinfo`; what was done before a refusal stays.
fn set_vf(profile: Profile, carrier: bool, vf: &mut world::Vf, change: &VfChange) -> Result<(), (Attribute, i32)> {
    let VfChange { mac, vlan, rate, spoofchk, link_state, rss_query, trust, node_guid, port_guid } = *change;
    if let Some(mac) = mac {
        let zero = mac.bytes() == [0; 6];
        if mac.bytes()[0] & 1 != 0 || (zero && profile.refuses_zero_mac) {
            return Err((Attribute::Mac, libc::EINVAL));
        }
        (vf.state.mac, vf.mac_given) = (mac, !zero);
    }
    if let Some(vlan) = vlan {
        if vlan.qos > 7 {
            return Err((Attribute::Qos, libc::EINVAL));
        }
        if vlan.protocol == VlanProtocol::Dot1Ad && profile.refuses_service_tags {
            return Err((Attribute::Protocol, libc::EPROTONOSUPPORT));
        }
        vf.state.vlan = vlan;
    }
    if let Some(rate) = rate {
        if profile.no_rate {
            let attribute = if rate.min == 0 { Attribute::MaxRate } else { Attribute::MinRate };
            return Err((attribute, libc::EOPNOTSUPP));
        }
        if (rate.max != 0 && rate.min > rate.max) || (rate.min != 0 && profile.refuses_min_rate) {
            return Err((Attribute::MinRate, libc::EINVAL));
        }
        if profile.rate_needs_carrier && !carrier {
            return Err((Attribute::MaxRate, libc::EINVAL));
        }
        vf.state.rate = rate;
    }
    if spoofchk.is_some() {
        if !profile.has_spoofchk {
            return Err((Attribute::Spoofchk, libc::EOPNOTSUPP));
        }
        vf.state.spoofchk = spoofchk;
    }
    if let Some(link_state) = link_state {
        if profile.no_link_state {
            return Err((Attribute::LinkState, libc::EOPNOTSUPP));
        }
        vf.state.link_state = link_state;
    }
    if rss_query.is_some() {
        if !profile.has_rss_query {
            return Err((Attribute::RssQuery, libc::EOPNOTSUPP));
        }
        vf.state.rss_query = rss_query;
    }
    if trust.is_some() {
        if !profile.has_trust {
            return Err((Attribute::Trust, libc::EOPNOTSUPP));
        }
        vf.state.trust = trust;
    }
    // All are Ethernet adapters.
    match (node_guid, port_guid) {
        (Some(_), _) => Err((Attribute::NodeGuid, libc::EOPNOTSUPP)),
        (None, Some(_)) => Err((Attribute::PortGuid, libc::EOPNOTSUPP)),
        (None, None) => Ok(()),
    }
}
