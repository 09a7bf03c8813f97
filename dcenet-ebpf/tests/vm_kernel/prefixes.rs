//! Longest-prefix tries: by programs, and by user space in random order.

use std::collections::BTreeSet;

use dcenet_core::test_support::{Rung, effort, kernel_is_before, require};
use dcenet_ebpf::insn::{Cond, Helper, Reg::*, Size};
use dcenet_ebpf::maps::{Map, Put};
use dcenet_ebpf::object::MapSpec;
use dcenet_ebpf::vm::{Map as VmMap, Maps, Update};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::{OPERANDS, PACKET, Place, begin, by_kernel, by_vm, object};

fn address(text: &str) -> i32 {
    let address: std::net::Ipv4Addr = text.parse().unwrap();
    i32::from_le_bytes(address.octets())
}

/// Whether tries honour `BPF_NOEXIST`, as those of the VM do: since Linux 6.13 and the stable kernels of December 2024.
/// There is nothing to compare with others.
fn tries_honour_flags() -> bool {
    let map = Map::create(&MapSpec::lpm_trie("trie", 8, 1, 2)).unwrap();
    map.update(&[0; 12], &[1], Put::New).unwrap();
    let honoured = map.update(&[0; 12], &[2], Put::New).is_err();
    assert!(honoured || kernel_is_before(6, 13), "this kernel is new enough");
    if !honoured {
        eprintln!("SKIP: tries of this kernel take no notice of BPF_NOEXIST");
    }
    honoured
}

#[test]
fn tries_and_their_errors_agree_with_the_kernel() {
    if !require(Rung::Kernel) || !tries_honour_flags() {
        return;
    }
    let mut asm = begin();
    let mut place = Place(0);
    let any = Some(0);
    // Looked up after each step: inside of all, inside of some, outside, with a short prefix, with one that is too long.
    let probes =
        [(32, "10.1.2.3"), (32, "10.1.9.9"), (32, "10.9.9.9"), (32, "11.0.0.0"), (12, "10.1.2.3"), (33, "10.1.2.3")];
    let steps = [
        (any, 8, "10.0.0.0", 1),
        (Some(1), 8, "10.255.0.0", 2), // there already, as bits beyond the prefix do not count: EEXIST
        (Some(2), 8, "10.255.0.0", 3),
        (Some(2), 16, "10.1.0.0", 4), // ENOENT
        (Some(1), 16, "10.1.0.0", 5),
        (any, 33, "10.1.2.3", 6),     // EINVAL
        (Some(7), 16, "10.1.0.0", 7), // EINVAL
        (any, 32, "10.1.2.3", 8),
        (any, 0, "0.0.0.0", 9),    // ENOSPC, beyond three entries
        (any, 32, "10.1.2.3", 10), // replaces all the same
        (None, 24, "10.1.2.0", 0), // ENOENT: within an entry, but none
        (None, 33, "10.1.2.3", 0), // EINVAL
        (None, 16, "10.1.77.77", 0),
        (any, 0, "255.255.255.255", 11),
        (None, 0, "0.0.0.0", 0),
    ];
    for (flags, length, data, value) in steps {
        asm.store(Size::W, R10, -8, length).store(Size::W, R10, -4, address(data)).store(Size::Dw, R10, -16, value);
        asm.load_map(R1, "trie").mov(R2, R10).add(R2, -8);
        if let Some(flags) = flags {
            asm.mov(R3, R10).add(R3, -16).mov(R4, flags).call(Helper::MapUpdateElem);
        } else {
            asm.call(Helper::MapDeleteElem);
        }
        // Errors have 32 bits before Linux 6.4.
        asm.mov32(R0, R0).store(Size::Dw, R9, place.next(), R0);
        for (length, data) in probes {
            let (absent, at) = (asm.label(), place.next());
            asm.store(Size::W, R10, -8, length).store(Size::W, R10, -4, address(data));
            asm.load_map(R1, "trie").mov(R2, R10).add(R2, -8).call(Helper::MapLookupElem);
            asm.mov(R1, -1).jump_if(Cond::Eq, R0, 0, absent).load(Size::Dw, R1, R0, 0).bind(absent);
            asm.store(Size::Dw, R9, at, R1);
        }
    }
    asm.ret(0);
    let mut object = object(asm);
    object.add_map(MapSpec::lpm_trie("trie", 4, 8, 3)).unwrap();
    assert_eq!(by_kernel(&object, &OPERANDS, &PACKET), by_vm(&object, &OPERANDS, &PACKET, None));
}

#[derive(Debug, Clone)]
enum Operation {
    Update(Vec<u8>, u8, Put),
    Delete(Vec<u8>),
    Lookup(Vec<u8>),
}

/// Keys of so few values that they meet; some prefixes are too long.
fn key(data: usize) -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![Just(0u8), Just(0x80), Just(0xff), Just(0b1010_0000), Just(0b1010_1000)];
    (0..=8 * data as u32 + 1, prop::collection::vec(byte, data)).prop_map(|(length, data)| {
        let mut key = length.to_le_bytes().to_vec();
        key.extend(data);
        key
    })
}

fn operation(data: usize) -> impl Strategy<Value = Operation> {
    let put = prop_oneof![2 => Just(Put::Any), 1 => Just(Put::New), 1 => Just(Put::Existing)];
    prop_oneof![
        3 => (key(data), any::<u8>(), put).prop_map(|(key, value, put)| Operation::Update(key, value, put)),
        1 => key(data).prop_map(Operation::Delete),
        4 => key(data).prop_map(Operation::Lookup),
    ]
}

/// What an operation gave: an errno, or what was found.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Done,
    Refused(i32),
    Found(Vec<u8>),
    Absent,
}

fn kernel(map: &Map, operation: &Operation) -> Outcome {
    let refused = |error: dcenet_ebpf::maps::SysError| Outcome::Refused(error.raw_os_error().unwrap());
    match operation {
        Operation::Update(key, value, put) => map.update(key, &[*value], *put).map_or_else(refused, |()| Outcome::Done),
        Operation::Delete(key) => match map.delete(key) {
            Ok(true) => Outcome::Done,
            // The view turns this errno into an answer.
            Ok(false) => Outcome::Refused(libc::ENOENT),
            Err(error) => refused(error),
        },
        Operation::Lookup(key) => {
            let mut value = [0];
            if map.lookup(key, &mut value).unwrap() { Outcome::Found(value.to_vec()) } else { Outcome::Absent }
        }
    }
}

fn vm(map: &mut VmMap, operation: &Operation) -> Outcome {
    let done = |result: Result<(), dcenet_ebpf::vm::MapError>| match result {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Refused(error.errno()),
    };
    match operation {
        Operation::Update(key, value, put) => {
            let mode = match put {
                Put::Any => Update::Any,
                Put::New => Update::Create,
                Put::Existing => Update::Replace,
            };
            done(map.update(key, &[*value], mode))
        }
        Operation::Delete(key) => done(map.delete(key)),
        Operation::Lookup(key) => map.lookup(key).map_or(Outcome::Absent, |value| Outcome::Found(value.to_vec())),
    }
}

#[test]
fn random_operations_on_tries_agree_with_the_kernel() {
    if !require(Rung::Kernel) || !tries_honour_flags() {
        return;
    }
    let mut runner = TestRunner::deterministic();
    let mut seen = BTreeSet::new();
    for data in [1, 2, 4, 16] {
        let spec = MapSpec::lpm_trie("trie", data as u32, 1, 12);
        for _ in 0..effort(3, 50, 1_000) {
            let operations = prop::collection::vec(operation(data), 100).new_tree(&mut runner).unwrap().current();
            let (real, mut maps) = (Map::create(&spec).unwrap(), Maps::new(std::slice::from_ref(&spec)));
            let simulated = maps.get_mut("trie").unwrap();
            for (at, operation) in operations.iter().enumerate() {
                let expected = kernel(&real, operation);
                assert_eq!(vm(simulated, operation), expected, "operation {at} of {operations:?}");
                seen.insert(match expected {
                    Outcome::Found(_) => Outcome::Found(Vec::new()),
                    other => other,
                });
            }
        }
    }
    let refusals = [libc::ENOENT, libc::EEXIST, libc::EINVAL, libc::ENOSPC].map(Outcome::Refused);
    let all: BTreeSet<_> =
        [Outcome::Done, Outcome::Found(Vec::new()), Outcome::Absent].into_iter().chain(refusals).collect();
    assert_eq!(seen, all, "every outcome was met");
}
