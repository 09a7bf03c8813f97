//! The datapath's programs on the real kernel, packet by packet (`BPF_PROG_TEST_RUN`) and on devices, and in the VM.
//! Expected verdicts are written by hand.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod answers;
mod attached;
mod classes;
mod conntrack;
mod costs;
mod events;
mod fragments;
mod guarded;
mod harness;
mod loads;
mod pressure;
mod related;
mod settled;
mod swaps;
mod traffic;
mod verdicts;
