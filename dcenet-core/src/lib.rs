//! The foundation of dcenet: vocabulary, kernel plumbing, the attachment engine and the CNI protocol.
//!
//! This crate names no other dcenet crate. What it needs of them it states as traits in [`provider`].

// A library neither prints nor panics on its caller's input.
#![warn(unreachable_pub, clippy::print_stderr, clippy::print_stdout, clippy::unwrap_used)]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod bandwidth;
pub mod cni;
pub mod engine;
pub mod fabric;
pub mod journal;
pub mod link;
pub mod model;
pub mod nat;
pub mod netlink;
pub mod netns;
pub mod plan;
pub mod probe;
mod proc_sys;
pub mod provider;
pub mod section;
mod sys;
pub mod sysctl;
#[cfg(feature = "test-support")]
pub mod test_support;
