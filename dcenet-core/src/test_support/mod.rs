//! What tests of every crate share. Only built with the feature `test-support`.

#![expect(clippy::print_stderr, reason = "a test talks to the person who runs it")]

mod rung;

pub use rung::{Rung, require, require_with};
