//! Classifiers on tcx, held by links that are pinned: they outlive the process, and nobody takes them off by accident.
//!
//! A link holds its program on the device, and the pin holds the link. Unlike a filter of clsact it follows its device
//! into another namespace (net/core/dev.c, `__dev_change_net_namespace`, leaves tcx alone), is out of reach for a process
//! in the pod that has no bpffs of ours, and is not removed with a queueing discipline. When the device goes the kernel
//! detaches the link (kernel/bpf/tcx.c, `tcx_uninstall`), but the pin stays until [`LinkAttacher::remove_vanished`], or
//! [`LinkAttacher::release`].

use super::Via;
use super::links::LinkAttacher;
use super::mprog::{Chained, Kind};
use crate::sys;

/// Attaches to the tcx chains of any device.
///
/// # Minimum kernel version
/// 6.6. [`AttachError::Unsupported`](super::AttachError::Unsupported) before; see [`for_kernel`](super::for_kernel).
pub type TcxAttacher = LinkAttacher<Tcx>;

/// The chains of tcx.
#[derive(Debug, Clone, Copy)]
pub struct Tcx;

impl Chained for Tcx {
    const NAME: &'static str = "tcx";
    const LINK_TYPE: u32 = sys::LINK_TYPE_TCX;
    const KIND: Kind = Kind {
        missing: "tcx (Linux 6.6)",
        ingress: sys::TCX_INGRESS,
        egress: sys::TCX_EGRESS,
        via: |link| Via::Tcx { link },
        device: "any",
    };
}
