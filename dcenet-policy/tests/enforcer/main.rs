//! The owner of a node's policy state and its clients, on a real kernel, with real traffic.

#![cfg(feature = "yaml")]

mod ahead;
mod changes;
mod costs;
mod escapes;
mod faults;
mod isolation;
mod restart;
mod streams;
mod vanished;
mod verdicts;
mod world;
