//! The owner of a node's policy state and its clients, on a real kernel, with real traffic.

#![cfg(feature = "yaml")]

mod ahead;
mod answers;
mod audit;
mod changes;
mod costs;
mod escapes;
mod faults;
mod frames;
mod inside;
mod isolation;
mod names;
mod packets;
mod rejected;
mod resolved;
mod restart;
mod schedules;
mod services;
mod shared;
mod streams;
mod sys;
mod vanished;
mod verdicts;
mod world;
