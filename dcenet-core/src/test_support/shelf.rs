//! Devices that stand for those of an adapter.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::TestHost;
use crate::model::{AttachmentKey, IfName, MacAddr, NetworkName};
use crate::netlink::{Family, LinkChange, NetlinkError, Socket, move_link, set_link};
use crate::netns::{Host, NetNs, NetNsError};
use crate::plan::is_mark_of;
use crate::provider::{DeviceError, DeviceRequest, DeviceSource, DeviceWish, LentDevice};

/// Hands out the devices `shelf0`, `shelf1` and so on of a host: ends of veth pairs, whose other ends are ports of the
/// bridge `hub`. Who has which it keeps in memory, and one whose namespace ends is gone, as the kernel does with such pairs.
#[derive(Debug)]
pub struct Shelf {
    host: Host,
    homes: Vec<LentDevice>,
    lent: Mutex<BTreeMap<String, (AttachmentKey, PathBuf)>>,
}

impl Shelf {
    /// The pool that all of them are of.
    pub const POOL: &str = "shelf";

    /// Makes the devices.
    ///
    /// # Panics
    /// Where they cannot be made.
    pub fn new(host: &TestHost, count: usize) -> Self {
        let root = host.root();
        root.sh("ip link add hub type bridge; ip link set hub addrgenmode none; ip link set hub up");
        let home = |n: usize| {
            let (name, mac) = (format!("shelf{n}"), MacAddr::new([2, 0, 0, 0, 0xee, n as u8]));
            root.sh(&format!(
                "ip link add {name} address {mac} type veth peer name far{n}; ip link set {name} addrgenmode none; \
                 ip link set far{n} addrgenmode none; ip link set far{n} master hub; ip link set far{n} up"
            ));
            let index = root.link(&name).expect("the device was just made").index;
            LentDevice { id: name.clone(), name: name.parse().expect("an interface name"), index, mac }
        };
        Self { host: host.host(), homes: (0..count).map(home).collect(), lent: Mutex::default() }
    }

    /// Another source with the same devices, which knows of no pod.
    pub fn stranger(&self, host: &TestHost) -> Self {
        Self { host: host.host(), homes: self.homes.clone(), lent: Mutex::default() }
    }

    fn who(&self) -> MutexGuard<'_, BTreeMap<String, (AttachmentKey, PathBuf)>> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn socket(&self) -> Result<Socket, DeviceError> {
        self.host.0.socket(Family::Route).map_err(failed_netns)
    }

    /// Makes it what it is on the shelf.
    fn restore(&self, home: &LentDevice) -> Result<(), DeviceError> {
        let mut socket = self.socket()?;
        let Some(link) = socket.link(&home.name).map_err(failed)? else { return Ok(()) };
        let change = LinkChange { up: Some(false), mac: Some(home.mac), mtu: Some(MTU), ..LinkChange::default() };
        socket.request(&set_link(&home.name, link.index, &change)).map(drop).map_err(failed)
    }
}

impl DeviceSource for Shelf {
    fn lend(&self, request: &DeviceRequest) -> Result<LentDevice, DeviceError> {
        if request.wish.pool.as_deref().is_some_and(|pool| pool != Self::POOL) {
            let reason = format!("{:?} is not {:?}", request.wish.pool, Self::POOL);
            return Err(DeviceError::Invalid { field: "link.pool".to_owned(), reason });
        }
        self.release(&request.attachment)?;
        let wished = |home: &&LentDevice| request.wish.device.as_ref().is_none_or(|device| *device == home.id);
        let home = {
            let mut lent = self.who();
            let free = self.homes.iter().filter(wished).find(|home| !lent.contains_key(&home.id));
            let home = free.ok_or_else(|| DeviceError::Unavailable("the shelf is empty".into()))?;
            lent.insert(home.id.clone(), (request.attachment.clone(), request.netns.clone()));
            home
        };
        let make = || {
            let mtu = request.wish.mtu.map(|mtu| mtu.get());
            let change = LinkChange { mac: Some(request.mac), mtu, ..LinkChange::default() };
            let mut socket = self.socket()?;
            let link = socket.link(&home.name).map_err(failed)?;
            let link = link.ok_or_else(|| DeviceError::Failed(format!("{} is gone", home.id).into()))?;
            socket.request(&set_link(&home.name, link.index, &change)).map_err(failed)?;
            Ok(LentDevice { index: link.index, mac: request.mac, ..home.clone() })
        };
        make().inspect_err(|_| drop(self.release(&request.attachment)))
    }

    fn is_lent(&self, attachment: &AttachmentKey) -> Result<bool, DeviceError> {
        Ok(self.who().values().any(|(owner, _)| owner == attachment))
    }

    fn missing(&self, attachment: &AttachmentKey, device: &LentDevice) -> Result<Vec<String>, DeviceError> {
        let lent = self.who().get(&device.id).is_some_and(|(owner, _)| owner == attachment);
        Ok(if lent { Vec::new() } else { vec!["it is back on the shelf".to_owned()] })
    }

    fn release(&self, attachment: &AttachmentKey) -> Result<(), DeviceError> {
        let of = |(id, (owner, path)): (&String, &(AttachmentKey, PathBuf))| {
            (owner == attachment).then(|| (id.clone(), path.clone()))
        };
        let all: Vec<(String, PathBuf)> = self.who().iter().filter_map(of).collect();
        for (id, path) in all {
            let Some(home) = self.homes.iter().find(|home| home.id == id) else { continue };
            match NetNs::open(&path) {
                Ok(there) => bring_home(&there, &self.host, attachment, &home.name)?,
                Err(error) if error.is_gone() => {}
                Err(error) => return Err(failed_netns(error)),
            }
            self.restore(home)?;
            self.who().remove(&id);
        }
        Ok(())
    }

    fn lent(&self, network: &NetworkName) -> Result<Vec<AttachmentKey>, DeviceError> {
        let owners = self.who().values().map(|(owner, _)| owner.clone()).collect::<BTreeSet<_>>();
        Ok(owners.into_iter().filter(|key| key.network == *network).collect())
    }

    fn ready(&self, _: Option<&DeviceWish>) -> Result<(), DeviceError> {
        Ok(())
    }
}

fn bring_home(there: &NetNs, host: &Host, attachment: &AttachmentKey, name: &IfName) -> Result<(), DeviceError> {
    let mut socket = there.socket(Family::Route).map_err(failed_netns)?;
    // Moved and not renamed, where the pod has a device of its name.
    for called in [&attachment.ifname, name] {
        let Some(link) = socket.link(called).map_err(failed)? else { continue };
        if called == name || link.alias.as_deref().is_some_and(|alias| is_mark_of(attachment, alias)) {
            let change = LinkChange { alias: Some(""), ..LinkChange::default() };
            let moved = socket.request(&move_link(&link.name, link.index, &host.0, Some(name), &change));
            moved.map_err(failed)?;
        }
    }
    Ok(())
}

fn failed(error: NetlinkError) -> DeviceError {
    DeviceError::Failed(Box::new(error))
}

fn failed_netns(error: NetNsError) -> DeviceError {
    DeviceError::Failed(Box::new(error))
}

const MTU: u32 = 1500;
