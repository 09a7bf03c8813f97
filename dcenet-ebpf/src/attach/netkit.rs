//! Classifiers on a netkit pair, in the host's hands: they run where a packet enters the pair, before it takes any queue.
//!
//! The pair's primary end, which lives on the host, holds the programs of both: the pod's end shows none and takes none
//! (drivers/net/netkit.c, `netkit_dev_fetch`), so nothing in the pod can remove them.
//!
//! When there are programs and none decides, the packet passes, also where the pair was made with the policy to drop: that
//! policy holds only while no program is attached (`netkit_xmit`, `netkit_run`).

use super::Via;
use super::links::LinkAttacher;
use super::mprog::{Chained, Kind};
use crate::sys;

/// Attaches to the primary end of a netkit pair.
///
/// As everywhere, [`Ingress`](super::Direction::Ingress) is what comes in from the pod, though the program runs when the
/// pod's end sends it (`BPF_NETKIT_PEER`), and [`Egress`](super::Direction::Egress) what goes to the pod
/// (`BPF_NETKIT_PRIMARY`).
///
/// # Minimum kernel version
/// 6.7, built with `CONFIG_NETKIT`. [`AttachError::Unsupported`](super::AttachError::Unsupported) elsewhere,
/// [`AttachError::WrongDevice`](super::AttachError::WrongDevice) for any device that is no primary end.
pub type NetkitAttacher = LinkAttacher<Netkit>;

/// The chains of netkit pairs.
#[derive(Debug, Clone, Copy)]
pub struct Netkit;

impl Chained for Netkit {
    const NAME: &'static str = "netkit";
    const LINK_TYPE: u32 = sys::LINK_TYPE_NETKIT;
    const KIND: Kind = Kind {
        missing: "netkit links (Linux 6.7 with CONFIG_NETKIT)",
        ingress: sys::NETKIT_PEER,
        egress: sys::NETKIT_PRIMARY,
        via: |link| Via::Netkit { link },
        device: "the primary end of a netkit pair",
    };
}
