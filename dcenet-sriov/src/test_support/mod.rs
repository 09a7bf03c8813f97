//! What tests share.

mod fixture;

pub use fixture::{Port, Tree, VfOf};
