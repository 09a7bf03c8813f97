//! What tests share.

pub mod conformance;
mod fixture;
mod flaky;
pub mod guest;
#[cfg(feature = "kubelet")]
pub mod kubelet;
mod model;

pub use fixture::{Port, Tree, VfOf};
pub use flaky::{Fault, FlakyKernel};
pub use model::{FunctionState, Model, Profile};
