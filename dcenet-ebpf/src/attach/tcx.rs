//! Classifiers on tcx, held by links that are pinned: they outlive the process, and nobody takes them off by accident.
//!
//! A link holds its program on the device, and the pin holds the link. Unlike a filter of clsact it follows its device
//! into another namespace (net/core/dev.c, `__dev_change_net_namespace`, leaves tcx alone), is out of reach for a process
//! in the pod that has no bpffs of ours, and is not removed with a queueing discipline. When the device goes the kernel
//! detaches the link (kernel/bpf/tcx.c, `tcx_uninstall`), but the pin stays until [`TcxAttacher::remove_vanished`], or
//! [`TcxAttacher::release`].

use dcenet_core::model::IfIndex;

use super::mprog::{Kind, Links, PinnedLink, Placement};
use super::{AttachError, Attached, Attacher, Hook, Tag, Via};
use crate::pin::Pins;
use crate::program::Program;
use crate::sys;

/// Attaches by tcx links, each pinned under a name made of its direction, its number and the label.
///
/// Any number of processes may use the same pins at once; they wait for each other. To attach and to detach take 10 to 20
/// milliseconds, for the kernel waits for an RCU grace period under its RTNL lock; to replace takes 0.1 of one, and 0.4 among
/// 500 pins, which are looked through by name.
///
/// Labels have at most 160 letters, digits, `-` and `_`. A tag's class is refused, for the kernel has no place for one: a
/// program that must know its device reads `ifindex`, or holds a constant.
///
/// # After a restart
/// [`Attacher::attached`] asks the chain of the device that is meant, in the calling thread's namespace, for links that are
/// pinned here. A pin whose device has gone, or went into another namespace, is not taken for one of a device that has the
/// same index here. [`TcxAttacher::links`] tells of all pins.
///
/// # Privileges
/// CAP_BPF and CAP_NET_ADMIN, and CAP_SYS_ADMIN to look at programs by their numbers, all in the first user namespace.
///
/// # Minimum kernel version
/// 6.6. [`AttachError::Unsupported`] before; see [`for_kernel`](super::for_kernel).
#[derive(Debug, Clone)]
pub struct TcxAttacher {
    links: Links,
}

impl TcxAttacher {
    /// Pins links here, and puts programs ahead of those of others.
    pub fn new(pins: Pins) -> Self {
        Self::placed(pins, Placement::First)
    }

    /// As [`TcxAttacher::new`], with another place for what it attaches.
    pub fn placed(pins: Pins, placement: Placement) -> Self {
        Self { links: Links::new(&TCX, pins, placement) }
    }

    /// A number that each change of the hook's chain raises, whoever makes it; none where there is no such device. For one who
    /// watches whether others still are where they were: while it is the same and something of ours stays on the chain,
    /// [`Attacher::chain`] is the same. Once the chain was empty it counts from 1 again, so that the same number may tell of
    /// another chain.
    pub fn revision(&self, hook: Hook) -> Result<Option<u64>, AttachError> {
        self.links.revision(hook)
    }

    /// Every link that is pinned here, also those whose device has vanished or is in another namespace.
    pub fn links(&self) -> Result<Vec<PinnedLink>, AttachError> {
        self.links.links()
    }

    /// Takes off whatever has this label, in whichever namespace its device is, and its pins with it: for one who cleans up
    /// after a pod without entering it. Returns how many links there were.
    pub fn release(&self, label: &str) -> Result<usize, AttachError> {
        self.links.release(label)
    }

    /// Removes the pins of devices that have vanished, and tells which.
    pub fn remove_vanished(&self) -> Result<Vec<PinnedLink>, AttachError> {
        self.links.remove_vanished()
    }
}

impl Attacher for TcxAttacher {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        self.links.attach(hook, program, tag)
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        self.links.replace(hook, program, tag)
    }

    fn devices(&self) -> Result<Vec<IfIndex>, AttachError> {
        self.links.devices()
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        self.links.chain(hook)
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        self.links.detach(hook)
    }
}

pub(super) const TCX: Kind = Kind {
    name: "tcx",
    missing: "tcx (Linux 6.6)",
    ingress: sys::TCX_INGRESS,
    egress: sys::TCX_EGRESS,
    link_type: sys::LINK_TYPE_TCX,
    via: |link| Via::Tcx { link },
    device: "any",
};
