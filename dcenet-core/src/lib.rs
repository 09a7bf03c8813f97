//! The foundation of dcenet: vocabulary, kernel plumbing, the attachment engine and the CNI protocol.
//!
//! This crate names no other dcenet crate. What it needs of them it states as traits in [`provider`].

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod cni;
pub mod model;
pub mod provider;
pub mod section;
#[cfg(feature = "test-support")]
pub mod test_support;
