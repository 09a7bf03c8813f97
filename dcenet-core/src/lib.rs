//! The foundation of dcenet: vocabulary, kernel plumbing, the attachment engine and the CNI protocol.
//!
//! This crate names no other dcenet crate. What it needs of them it states as traits in [`provider`].

#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod model;
pub mod provider;
#[cfg(feature = "test-support")]
pub mod test_support;
