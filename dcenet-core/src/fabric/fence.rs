//! Who may send into the VXLAN device: known nodes, by links of the underlay.
//!
//! A VXLAN device takes in what comes to its port, whoever sent it, and what it takes in passes for a packet of whichever
//! pod its inner header names. Therefore the fence is there before the device is up and goes after it; a node gets in before
//! its routes come and is shut out when they are gone.

use std::collections::BTreeSet;

use super::{FabricError, Wanted};
use crate::netlink::nft::{self, fence};
use crate::netlink::{Family, NetlinkError, Socket};
use crate::netns::{Host, NetNsError};
use crate::provider::Vtep;

/// The fence around a host's device.
#[derive(Debug)]
pub(super) struct Fence {
    socket: Socket,
    port: u16,
    vni: u32,
    entries: fence::Entries,
    /// Somebody was found in it who is wanted no more.
    stale: bool,
}

impl Fence {
    /// Shuts out all but who is wanted or was let in before, and returns how many changes that took.
    ///
    /// # Errors
    /// [`FabricError::NoFence`], and what the kernel refuses.
    pub(super) fn widen(host: &Host, vtep: &Vtep, wanted: &Wanted) -> Result<(Self, usize), FabricError> {
        let socket = open(host)?.map_err(FabricError::NoFence)?;
        let entries = fence::entries(&wanted.vteps, &wanted.entrances);
        let mut fence = Self { socket, port: vtep.port, vni: vtep.vni, entries, stale: false };
        let changed = fence.reconcile(false)?;
        Ok((fence, changed))
    }

    /// Shuts out who is wanted no more, and returns how many changes that took.
    pub(super) fn narrow(&mut self) -> Result<usize, NetlinkError> {
        if self.stale { self.reconcile(true) } else { Ok(0) }
    }

    /// Removes the fence, and returns whether there was one.
    pub(super) fn remove(host: &Host) -> Result<bool, FabricError> {
        let Ok(mut socket) = open(host)? else { return Ok(false) };
        let mut removed = false;
        nft::change(&mut socket, "remove the fence", |socket| {
            let found = socket.request(&fence::get_table());
            removed = !matches!(&found, Err(error) if error.errno() == Some(libc::ENOENT));
            if removed {
                found?;
            }
            Ok::<_, NetlinkError>(if removed { vec![fence::delete_table()] } else { Vec::new() })
        })?;
        Ok(removed)
    }

    fn reconcile(&mut self, narrow: bool) -> Result<usize, NetlinkError> {
        let Self { socket, port, vni, entries, stale } = self;
        let (mut changed, mut more) = (0, true);
        while more {
            let mut now = 0;
            nft::change(socket, "fence the VXLAN device", |socket| {
                let mut messages = Vec::new();
                let rules = socket.dump(&fence::rule_dump())?;
                let mut there: Vec<_> = rules.iter().filter_map(|reply| fence::parse_rule(&reply.payload)).collect();
                let mut wanted = fence::rules_of(*port, *vni);
                there.sort();
                wanted.sort();
                if there != wanted {
                    messages.extend(fence::layout());
                    messages.extend(fence::rules(*port, *vni));
                }
                now = usize::from(there != wanted);
                let mut room = AT_ONCE;
                more = false;
                for (set, keys) in &*entries {
                    let found: BTreeSet<_> = nft::list(socket, fence::TABLE, set)?.into_iter().map(|e| e.key).collect();
                    *stale |= found.difference(keys).next().is_some();
                    let leaving = found.difference(keys).filter(|_| narrow);
                    for (enter, keys) in [(true, keys.difference(&found).collect()), (false, Vec::from_iter(leaving))] {
                        let some = &keys[..keys.len().min(room)];
                        messages.extend(fence::change_entries(set, some, enter));
                        more |= some.len() < keys.len();
                        room -= some.len();
                        now += some.len();
                    }
                }
                Ok::<_, NetlinkError>(messages)
            })?;
            changed += now;
        }
        Ok(changed)
    }
}

/// A socket; within it, why the kernel has no nftables.
fn open(host: &Host) -> Result<Result<Socket, NetlinkError>, FabricError> {
    let mut socket = match host.0.socket(Family::Netfilter) {
        Err(NetNsError::Socket(error)) if nft::lacks_subsystem(&error) => return Ok(Err(error)),
        opened => opened?,
    };
    match socket.request(&nft::get_generation()) {
        Err(error) if nft::lacks_subsystem(&error) => Ok(Err(error)),
        Err(error) => Err(error.into()),
        Ok(_) => Ok(Ok(socket)),
    }
}

/// Entries of one transaction, which is one datagram and must fit the socket's buffer of 208 KiB (`net.core.wmem_default`):
/// each takes 28 bytes at most.
const AT_ONCE: usize = 4000;
