//! What tests of this and other crates share. Only built with the feature `test-support`.

pub mod packet;
pub mod traffic;

pub use crate::sys::fault::{Fault, Faults};
