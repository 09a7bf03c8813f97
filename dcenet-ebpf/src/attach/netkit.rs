//! Classifiers on a netkit pair, in the host's hands: they run where a packet enters the pair, before it takes any queue.
//!
//! The pair's primary end, which lives on the host, holds the programs of both: the pod's end shows none and takes none
//! (drivers/net/netkit.c, `netkit_dev_fetch`), so nothing in the pod can remove them.
//!
//! When there are programs and none decides, the packet passes, also where the pair was made with the policy to drop: that
//! policy holds only while no program is attached (`netkit_xmit`, `netkit_run`).

use dcenet_core::model::IfIndex;

use super::mprog::{Kind, Links, PinnedLink, Placement};
use super::{AttachError, Attached, Attacher, Hook, Tag, Via};
use crate::pin::Pins;
use crate::program::Program;
use crate::sys;

/// Attaches by netkit links to the primary end of a pair, each pinned as [`TcxAttacher`](super::TcxAttacher) does.
///
/// As everywhere, [`Ingress`](super::Direction::Ingress) is what comes in from the pod, though the program runs when the
/// pod's end sends it (`BPF_NETKIT_PEER`), and [`Egress`](super::Direction::Egress) what goes to the pod
/// (`BPF_NETKIT_PRIMARY`). Labels, classes, locks and privileges are those of [`TcxAttacher`](super::TcxAttacher).
///
/// # Minimum kernel version
/// 6.7, built with `CONFIG_NETKIT`. [`AttachError::Unsupported`] elsewhere, [`AttachError::WrongDevice`] for any device that
/// is no primary end.
#[derive(Debug, Clone)]
pub struct NetkitAttacher {
    links: Links,
}

impl NetkitAttacher {
    /// Pins links here, and puts programs ahead of those of others.
    pub fn new(pins: Pins) -> Self {
        Self::placed(pins, Placement::First)
    }

    /// As [`NetkitAttacher::new`], with another place for what it attaches.
    pub fn placed(pins: Pins, placement: Placement) -> Self {
        Self { links: Links::new(&NETKIT, pins, placement) }
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

    /// Takes off whatever has this label, and its pins with it. Returns how many links there were.
    pub fn release(&self, label: &str) -> Result<usize, AttachError> {
        self.links.release(label)
    }

    /// Removes the pins of devices that have vanished, and tells which.
    pub fn remove_vanished(&self) -> Result<Vec<PinnedLink>, AttachError> {
        self.links.remove_vanished()
    }
}

impl Attacher for NetkitAttacher {
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

pub(super) const NETKIT: Kind = Kind {
    name: "netkit",
    missing: "netkit links (Linux 6.7 with CONFIG_NETKIT)",
    ingress: sys::NETKIT_PEER,
    egress: sys::NETKIT_PRIMARY,
    link_type: sys::LINK_TYPE_NETKIT,
    via: |link| Via::Netkit { link },
    device: "the primary end of a netkit pair",
};
