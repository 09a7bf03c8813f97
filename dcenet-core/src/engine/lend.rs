//! Bringing back a device of the host that a pod had.

use std::time::{Duration, Instant};

use super::Engine;
use super::apply::{gone_is_fine, look_up};
use super::error::TeardownError;
use crate::model::IfName;
use crate::netlink::{self, LinkChange, LinkView, NetlinkError, Socket};
use crate::netns::NetNs;
use crate::plan::Lent;

impl Engine {
    /// Moves the device out of the pod's namespace, or finds it where the kernel put it when that ended, and makes it what
    /// it was. A device that is nowhere is gone for good, and is no error.
    pub(super) fn return_link(&self, lent: &Lent, pod: Option<&NetNs>) -> Result<(), TeardownError> {
        let mut host = self.host_socket()?;
        if let Some(pod) = pod {
            let mut there = self.pod_socket(pod)?;
            if let Some(link) = self.lent_link(&mut there, lent)? {
                let change = LinkChange { alias: Some(lent.alias.as_deref().unwrap_or("")), ..Default::default() };
                let name = Some(&lent.end.name);
                there.request(&netlink::move_link(&link.name, link.index, &self.host.0, name, &change))?;
                return restore(&mut host, &lent.end.name, lent);
            }
        }
        let deadline = Instant::now() + if pod.is_none() && lent.physical { RETURN_LIMIT } else { Duration::ZERO };
        if let Some(link) = host.await_link(deadline, |link| link.alias.as_deref() == Some(&lent.mark))? {
            let Ok(name) = link.name.parse() else { return Ok(()) };
            let change = LinkChange {
                rename: Some(&lent.end.name).filter(|n| **n != name),
                alias: Some(lent.alias.as_deref().unwrap_or("")),
                ..Default::default()
            };
            let down = netlink::set_link(&name, link.index, &LinkChange { up: Some(false), ..Default::default() });
            host.request(&down)?;
            host.request(&netlink::set_link(&name, link.index, &change))?;
            return restore(&mut host, &lent.end.name, lent);
        }
        match look_up(&mut host, &lent.end.name)? {
            // It never left, or was brought back by a call that was stopped before it had finished.
            Some(link) if link.mac == Some(lent.end.mac) => restore(&mut host, &lent.end.name, lent),
            _ => {
                tracing::warn!(device = %lent.end.name, "a device that a pod had is gone");
                Ok(())
            }
        }
    }

    /// The device in the pod, by its mark, or by its address where it was moved and not yet marked.
    fn lent_link(&self, pod: &mut Socket, lent: &Lent) -> Result<Option<LinkView>, NetlinkError> {
        for name in [&lent.pod_name, &lent.end.name] {
            let found = look_up(pod, name)?;
            let ours = |l: &LinkView| l.alias.as_deref() == Some(&lent.mark) || l.mac == Some(lent.end.mac);
            if let Some(link) = found.filter(ours) {
                return Ok(Some(link));
            }
        }
        Ok(None)
    }
}

/// Gives a device of the host its MTU, its state and its addresses again. What it has already is left.
fn restore(host: &mut Socket, name: &IfName, lent: &Lent) -> Result<(), TeardownError> {
    let Some(link) = look_up(host, name)? else { return Ok(()) };
    let change = LinkChange {
        mtu: (link.mtu != lent.mtu).then_some(lent.mtu),
        tx_queue_len: (link.tx_queue_len != lent.tx_queue_len).then_some(lent.tx_queue_len),
        up: Some(lent.up),
        promisc: Some(lent.promisc),
        allmulti: Some(lent.allmulti),
        ..Default::default()
    };
    let mut messages = vec![netlink::set_link(name, link.index, &change)];
    messages.extend(lent.addresses.iter().map(|a| netlink::add_address(name.as_str(), link.index, *a)));
    for outcome in host.batch(&messages) {
        gone_is_fine(outcome.map(drop), &[libc::EEXIST])?;
    }
    Ok(())
}

/// How long a device may take to come back when its pod's namespace has ended: the kernel ends namespaces one after the
/// other.
const RETURN_LIMIT: Duration = Duration::from_secs(10);
