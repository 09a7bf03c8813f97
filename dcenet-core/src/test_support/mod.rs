//! What tests of every crate share. Only built with the feature `test-support`.

#![expect(clippy::print_stderr, reason = "a test talks to the person who runs it")]

mod host;
mod rng;
mod rung;
mod shelf;
mod snapshot;
mod traffic;

pub use crate::journal::read_hostile_record;
pub use crate::netlink::read_hostile;
#[cfg(feature = "fault-injection")]
pub use crate::netlink::{Fault, Injection, through_gate, with_fault};
pub use host::{TestHost, TestNetNs};
pub use rng::Rng;
pub use rung::{Rung, effort, kernel_is_before, require, require_with};
pub use shelf::Shelf;
pub use snapshot::HostState;
pub use traffic::{ping, tcp_echo, udp_echo};
