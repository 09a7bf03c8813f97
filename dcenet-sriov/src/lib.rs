//! Virtual functions of network adapters (SR-IOV) that always come back clean.
//!
//! ```text
//!   inventory   what there is                      reads sysfs below a root
//!   pool        which of it is handed out           configuration against an inventory
//!   allocate    which functions somebody gets       pure
//!   config      what somebody wants of a function    checked before anything is written
//!   count       how many functions a port has         waits until they are there
//!   kernel      settings, devices and drivers       netlink and sysfs, or a model of them
//!   lease       who has which, and that it comes back as it was
//!   source      all of it, as core's engine asks for devices
//!   kubelet     what there is, as a resource of Kubernetes (a feature)
//! ```
//!
//! An embedder brings its own tree by [`sysfs::Sysfs`], and its own kernel by [`kernel::Kernel`].
//!
//! # What was tried where
//! Every public function names its bed:
//! - *igb*: QEMU's igb with Linux's igb and igbvf, in a guest of `make vm-test`;
//! - *netdevsim*: the kernel's simulated device, in such a guest;
//! - *fixture*: a tree of files that looks like sysfs;
//! - *modelled*: only a model of the kernel, for want of the adapter.

#![forbid(unsafe_code)]
// A library neither prints nor panics on its caller's input.
#![warn(unreachable_pub, clippy::print_stderr, clippy::print_stdout, clippy::unwrap_used)]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod address;
pub mod allocate;
pub mod config;
pub mod count;
pub mod inventory;
pub mod kernel;
#[cfg(feature = "kubelet")]
#[cfg_attr(docsrs, doc(cfg(feature = "kubelet")))]
pub mod kubelet;
pub mod lease;
pub mod pool;
pub mod source;
pub mod sysfs;
#[cfg(feature = "test-support")]
#[cfg_attr(docsrs, doc(cfg(feature = "test-support")))]
pub mod test_support;

pub use address::{Distance, Location, PciAddress, PciIds, VfIndex};
