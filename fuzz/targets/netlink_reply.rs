//! Whatever the kernel, or who pretends to be it, answers: every reader refuses it or reads it.

#![no_main]

use dcenet_core::test_support::read_hostile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|datagram: &[u8]| read_hostile(datagram));
