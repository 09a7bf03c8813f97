//! Maps through their typed views, and pins, on the real kernel.

use std::collections::BTreeMap;
use std::time::Duration;

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::insn::Reg::*;
use dcenet_ebpf::insn::{Cond, Helper, Size};
use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};
use dcenet_ebpf::maps::{
    Array, HashTable, LpmKey, Map, MapError, PerCpuArray, PerCpuHashTable, Plain, PrefixTable, ProgramArray, Put,
    RingBuffer, cpus,
};
use dcenet_ebpf::object::{MapSpec, Object, ProgramKind};
use dcenet_ebpf::pin::Pins;
use dcenet_ebpf::program::{Program, TestRun, wait_for_running};
use dcenet_ebpf::test_support::{Fault, Faults};

/// An address and a port, with a hole that must be zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    address: [u8; 4],
    port: u16,
}

impl Plain for Key {
    const SIZE: usize = 8;

    fn write(&self, bytes: &mut [u8]) {
        bytes[..4].copy_from_slice(&self.address);
        bytes[4..6].copy_from_slice(&self.port.to_be_bytes());
    }

    fn read(bytes: &[u8]) -> Self {
        Self { address: Plain::read(&bytes[..4]), port: u16::from_be_bytes([bytes[4], bytes[5]]) }
    }
}

fn key(n: u32) -> Key {
    Key { address: n.to_be_bytes(), port: n as u16 }
}

#[test]
fn an_array_keeps_what_is_stored_and_refuses_what_is_beyond() {
    if !require(Rung::Kernel) {
        return;
    }
    let array = Array::<[u32; 3]>::new(Map::create(&MapSpec::array("a", 12, 10_000)).unwrap()).unwrap();
    assert_eq!((array.entries(), array.load(9_999).unwrap()), (10_000, [0; 3]));
    array.store(7, &[1, 2, 3]).unwrap();
    assert_eq!(array.load(7).unwrap(), [1, 2, 3]);
    assert!(matches!(array.load(10_000), Err(MapError::OutOfBounds { index: 10_000, entries: 10_000, .. })));
    assert!(matches!(array.store(10_000, &[0; 3]), Err(MapError::OutOfBounds { .. })));

    let many: Vec<[u32; 3]> = (0..9_000).map(|i| [i, i + 1, i + 2]).collect();
    array.store_all(1_000, &many).unwrap();
    for i in [0_u32, 4_095, 4_096, 8_999] {
        assert_eq!(array.load(1_000 + i).unwrap(), many[i as usize]);
    }
    assert_eq!(array.load(999).unwrap(), [0; 3]);
    assert!(matches!(array.store_all(1_001, &many), Err(MapError::OutOfBounds { index: 10_000, .. })));
    array.store_all(10_000, &[]).unwrap();
}

#[test]
fn a_view_refuses_a_map_of_another_shape() {
    if !require(Rung::Kernel) {
        return;
    }
    let make = || Map::create(&MapSpec::hash("h", 4, 8, 1)).unwrap();
    let what = |outcome: Result<(), MapError>| match outcome {
        Err(MapError::Mismatch { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(what(Array::<u64>::new(make()).map(drop)), "type");
    assert_eq!(what(HashTable::<u64, u64>::new(make()).map(drop)), "key size");
    assert_eq!(what(HashTable::<u32, u32>::new(make()).map(drop)), "value size");
    assert_eq!(what(RingBuffer::new(make()).map(drop)), "type");
    let program = Program::load(ProgramKind::Classifier, "p", &[0xb7, 0, 0, 0, 0, 0, 0, 0, 0x95, 0, 0, 0, 0, 0, 0, 0]);
    Map::from_fd(program.unwrap().into()).expect_err("a program is no map");
    Program::from_fd(make().into()).expect_err("a map is no program");
}

#[test]
fn wrong_lengths_reach_no_kernel() {
    if !require(Rung::Kernel) {
        return;
    }
    let map = Map::create(&MapSpec::hash("h", 4, 8, 1)).unwrap();
    let faults = Faults::count();
    map.lookup(&[0; 4], &mut [0; 7]).unwrap_err();
    map.lookup(&[0; 3], &mut [0; 8]).unwrap_err();
    map.update(&[0; 4], &[0; 9], Put::Any).unwrap_err();
    map.delete(&[0; 5]).unwrap_err();
    map.next_key(Some(&[0; 4]), &mut [0; 3]).unwrap_err();
    assert_eq!(faults.calls(), 0);
}

#[test]
fn a_hash_table_behaves_as_a_map_does() {
    if !require(Rung::Kernel) {
        return;
    }
    const ENTRIES: u32 = 10_000;
    let table = HashTable::<Key, u64>::new(Map::create(&MapSpec::hash("h", 8, 8, ENTRIES)).unwrap()).unwrap();
    assert_eq!(table.entries().unwrap(), []);
    assert_eq!(table.load(&key(1)).unwrap(), None);
    table.store(&key(1), &10, Put::New).unwrap();
    assert_eq!(table.store(&key(1), &11, Put::New).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    assert_eq!(table.store(&key(2), &11, Put::Existing).unwrap_err().raw_os_error(), Some(libc::ENOENT));
    table.store(&key(1), &12, Put::Existing).unwrap();
    assert_eq!(table.load(&key(1)).unwrap(), Some(12));
    assert!(table.remove(&key(1)).unwrap());
    assert!(!table.remove(&key(1)).unwrap());

    let model: BTreeMap<Key, u64> = (0..ENTRIES).map(|n| (key(n), u64::from(n) * 3)).collect();
    let entries: Vec<_> = model.iter().map(|(k, v)| (*k, *v)).collect();
    table.store_all(&entries).unwrap();
    assert_eq!(table.entries().unwrap().into_iter().collect::<BTreeMap<_, _>>(), model);
    assert!(matches!(table.store(&key(ENTRIES), &0, Put::Any), Err(MapError::Full { entries: ENTRIES, .. })));

    // Every second of them is absent.
    let keys: Vec<Key> = (0..2_000).step_by(2).chain(ENTRIES..ENTRIES + 500).chain(2_000..2_100).map(key).collect();
    assert_eq!(table.remove_all(&keys).unwrap(), 1_100);
    assert_eq!(table.remove_all(&keys).unwrap(), 0);
    assert_eq!(table.entries().unwrap().len(), ENTRIES as usize - 1_100);
}

#[test]
fn batches_that_are_unknown_are_done_one_by_one() {
    if !require(Rung::Kernel) {
        return;
    }
    let table = HashTable::<u32, u32>::new(Map::create(&MapSpec::hash("h", 4, 4, 100)).unwrap()).unwrap();
    let entries: Vec<(u32, u32)> = (0..50).map(|n| (n, n + 1)).collect();
    let unknown = || Faults::at(0, Fault::Fail(libc::EINVAL));
    {
        let faults = unknown();
        table.store_all(&entries).unwrap();
        assert_eq!(faults.calls(), 51);
    }
    let mut read = {
        let _faults = unknown();
        table.entries().unwrap()
    };
    read.sort_unstable();
    assert_eq!(read, entries);
    let _faults = unknown();
    assert_eq!(table.remove_all(&(0..50).collect::<Vec<_>>()).unwrap(), 50);
    assert_eq!(table.entries().unwrap(), []);
}

#[test]
fn ranges_of_arrays_are_read_in_few_calls_or_one_by_one() {
    if !require(Rung::Kernel) {
        return;
    }
    let array = Array::<u64>::new(Map::create(&MapSpec::array("a", 8, 10_000)).unwrap()).unwrap();
    let values: Vec<u64> = (0..10_000).map(|n| n * 3).collect();
    array.store_all(0, &values).unwrap();
    // The array ends with a batch, within one, and before one.
    for (first, count, calls) in [(0, 10_000, 3), (1, 9_999, 3), (5_000, 4_096, 1), (9_999, 1, 1), (4_096, 0, 0)] {
        let faults = Faults::count();
        let read = array.load_range(first, count).unwrap();
        assert_eq!(faults.calls(), calls, "{first} {count}");
        assert_eq!(read, values[first as usize..(first + count) as usize], "{first} {count}");
    }
    assert_eq!(array.load_all().unwrap(), values);
    for (first, count, index) in [(0, 10_001, 10_000), (9_999, 2, 10_000), (u32::MAX, 1, u32::MAX)] {
        let refused = array.load_range(first, count);
        assert!(matches!(refused, Err(MapError::OutOfBounds { index: i, .. }) if i == index), "{refused:?}");
    }
    let unknown = Faults::at(0, Fault::Fail(libc::EINVAL));
    assert_eq!(array.load_range(100, 50).unwrap(), values[100..150]);
    assert_eq!(unknown.calls(), 51);
    drop(unknown);

    let counts = PerCpuArray::<[u64; 2]>::new(Map::create(&MapSpec::percpu_array("c", 16, 500)).unwrap()).unwrap();
    (0..500).for_each(|n| counts.store(n, &[n.into(), 1]).unwrap());
    let cpus = cpus().unwrap() as u64;
    let sums: Vec<[u64; 2]> = (0..500).map(|n| [n * cpus, cpus]).collect();
    let faults = Faults::count();
    assert_eq!(counts.sum_range(0, 500).unwrap(), sums);
    let calls = faults.calls();
    drop(faults);
    // Kernels before 5.13 know no batches of such a map.
    assert!((1..=500 / 16).contains(&calls) || calls == 501, "{calls}");
    assert_eq!(counts.sum_range(7, 3).unwrap(), sums[7..10]);
}

#[test]
fn per_cpu_counts_are_added_up() {
    if !require(Rung::Kernel) {
        return;
    }
    let counts = PerCpuArray::<[u64; 2]>::new(Map::create(&MapSpec::percpu_array("c", 16, 4)).unwrap()).unwrap();
    assert_eq!(counts.load(3).unwrap(), vec![[0, 0]; cpus().unwrap()]);
    counts.store(3, &[1, 10]).unwrap();
    let n = cpus().unwrap() as u64;
    assert_eq!(counts.sum(3).unwrap(), [n, 10 * n]);
    assert_eq!(counts.sum(2).unwrap(), [0, 0]);
    assert!(matches!(counts.sum(4), Err(MapError::OutOfBounds { index: 4, .. })));
    // A value whose size is no multiple of 8 lies on 8-byte borders all the same.
    let odd = PerCpuArray::<[u8; 5]>::new(Map::create(&MapSpec::percpu_array("o", 5, 1)).unwrap()).unwrap();
    odd.store(0, b"hello").unwrap();
    assert_eq!(odd.load(0).unwrap(), vec![*b"hello"; cpus().unwrap()]);
}

/// A classifier that puts the first `length` bytes of each packet, at most 64, into a ring, and returns what the kernel
/// answered to that.
fn eventer(length: i32, ring_bytes: u32, flags: i32) -> (Program, RingBuffer) {
    let mut code = Asm::program("event", ProgramKind::Classifier);
    for at in (-64..0).step_by(8) {
        code.store(Size::Dw, R10, at, 0);
    }
    code.mov(R2, 0)
        .mov(R3, R10)
        .add(R3, -64)
        .mov(R4, length)
        .call(Helper::SkbLoadBytes)
        .load_map(R1, "ring")
        .mov(R2, R10)
        .add(R2, -64)
        .mov(R3, length)
        .mov(R4, flags)
        .call(Helper::RingbufOutput)
        .exit();
    let mut object = Object::new();
    object.add_map(MapSpec::ringbuf("ring", ring_bytes)).unwrap();
    object.add(code.finish().unwrap()).unwrap();
    let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    let ring = RingBuffer::new(loaded.take_map("ring").unwrap()).unwrap();
    (loaded.take_program("event").unwrap(), ring)
}

const BPF_RB_NO_WAKEUP: i32 = 1;

fn run(program: &Program, packet: &[u8], repeat: u32) -> u32 {
    program.test_run(&TestRun { packet, context: &[], repeat }).unwrap().retval
}

#[test]
fn events_come_out_whole_in_order_and_once_however_the_ring_wraps() {
    if !require(Rung::Kernel) {
        return;
    }
    // 21 bytes take 32 with the header; 4096 is no multiple of what is written between two reads.
    let (program, mut ring) = eventer(21, 4096, BPF_RB_NO_WAKEUP);
    let mut sent = 0_u32;
    let mut seen = 0_u32;
    for round in 0..200 {
        let burst = 1 + round % 97;
        for _ in 0..burst {
            let mut packet = [0x5a; 64];
            packet[..4].copy_from_slice(&sent.to_ne_bytes());
            assert_eq!(run(&program, &packet, 1), 0);
            sent += 1;
        }
        assert_eq!(ring.pending(), 32 * burst as u64);
        let mut number = 0;
        while number < burst as usize {
            number += ring
                .drain(10, |event| {
                    assert_eq!((event.len(), &event[..4], &event[4..]), (21, &seen.to_ne_bytes()[..], &[0x5a; 17][..]));
                    seen += 1;
                })
                .unwrap();
        }
        assert_eq!(ring.drain(10, |e| panic!("one too many: {e:?}")).unwrap(), 0);
    }
    assert_eq!((seen, ring.pending()), (sent, 0));
}

#[test]
fn a_full_ring_refuses_events_and_takes_them_again_when_drained() {
    if !require(Rung::Kernel) {
        return;
    }
    let (program, mut ring) = eventer(56, 4096, BPF_RB_NO_WAKEUP);
    let answers: Vec<u32> = (0..100).map(|_| run(&program, &[1; 64], 1)).collect();
    let taken = answers.iter().filter(|a| **a == 0).count();
    assert!((60..64).contains(&taken), "{taken} of 64 bytes each in 4096");
    assert_eq!(*answers.last().unwrap(), (-libc::EAGAIN).cast_unsigned());
    assert_eq!(ring.drain(usize::MAX, |_| {}).unwrap(), taken);
    assert_eq!(run(&program, &[1; 64], 1), 0);
}

#[test]
fn a_waiting_consumer_is_woken() {
    if !require(Rung::Kernel) {
        return;
    }
    let (program, mut ring) = eventer(8, 4096, 0);
    assert!(!ring.wait(Duration::from_millis(1)).unwrap());
    let producer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        run(&program, &[7; 64], 1)
    });
    assert!(ring.wait(Duration::from_secs(20)).unwrap());
    assert_eq!(producer.join().unwrap(), 0);
    assert_eq!(ring.drain(usize::MAX, |e| assert_eq!(e, [7; 8])).unwrap(), 1);
    assert!(!ring.wait(Duration::from_millis(1)).unwrap());
}

/// A bpffs in a temporary directory, unmounted also when the test fails.
struct Mounted {
    pins: Pins,
    _above: tempfile::TempDir,
}

impl Mounted {
    fn new() -> Self {
        let above = tempfile::tempdir().unwrap();
        Self { pins: Pins::open(above.path().join("a/b")).unwrap(), _above: above }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.pins.clone().unmount();
    }
}

fn mounts_at(directory: &std::path::Path) -> usize {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap();
    table.lines().filter(|l| l.split(' ').nth(1) == directory.to_str()).count()
}

#[test]
fn what_is_pinned_is_found_again() {
    if !require(Rung::Kernel) {
        return;
    }
    let mounted = Mounted::new();
    let pins = &mounted.pins;
    assert_eq!(pins.list().unwrap(), Vec::<String>::new());
    assert!(pins.get("counts").unwrap().is_none());
    {
        let array = Array::<u64>::new(Map::create(&MapSpec::array("a", 8, 1)).unwrap()).unwrap();
        array.store(0, &99).unwrap();
        pins.pin("counts", array.map()).unwrap();
    }
    // Another process would open the same directory.
    let again = Pins::open(pins.directory()).unwrap();
    assert_eq!(mounts_at(pins.directory()), 1);
    let found = Map::from_fd(again.get("counts").unwrap().unwrap()).unwrap();
    assert_eq!(Array::<u64>::new(found).unwrap().load(0).unwrap(), 99);
    let other = Map::create(&MapSpec::array("b", 8, 1)).unwrap();
    assert_eq!(pins.pin("counts", &other).unwrap_err().raw_os_error(), Some(libc::EEXIST));
    pins.replace("counts", &other).unwrap();
    pins.replace("new", &other).unwrap();
    assert_eq!(Map::from_fd(pins.get("counts").unwrap().unwrap()).unwrap().info().id, other.info().id);
    assert_eq!(pins.list().unwrap(), ["counts", "new"]);
    assert!(pins.remove("counts").unwrap());
    assert!(!pins.remove("counts").unwrap());
    for bad in ["", "a.b", "../x", "a/b", "a,b", &"x".repeat(201)] {
        pins.pin(bad, &other).unwrap_err();
    }
    pins.clone().unmount().unwrap();
    assert!(!pins.directory().exists());
    pins.clone().unmount().unwrap();
}

#[test]
fn many_at_once_mount_one_file_system() {
    if !require(Rung::Kernel) {
        return;
    }
    for _ in 0..5 {
        let above = tempfile::tempdir().unwrap();
        let directory = above.path().join("bpf");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| Pins::open(&directory).unwrap());
            }
        });
        let count = mounts_at(&directory);
        Pins::open(&directory).unwrap().unmount().unwrap();
        assert_eq!((count, mounts_at(&directory)), (1, 0));
    }
}

#[test]
fn a_pin_is_replaced_or_as_before_whatever_call_fails() {
    if !require(Rung::Kernel) {
        return;
    }
    let mounted = Mounted::new();
    let pins = &mounted.pins;
    let old = Map::create(&MapSpec::array("old", 8, 1)).unwrap();
    let new = Map::create(&MapSpec::array("new", 8, 1)).unwrap();
    let id = || Map::from_fd(pins.get("it").unwrap().unwrap()).unwrap().info().id;
    let mut at = 0;
    loop {
        pins.replace("it", &old).unwrap();
        let (outcome, calls) = {
            let faults = Faults::at(at, Fault::Fail(libc::EIO));
            (pins.replace("it", &new), faults.calls())
        };
        if calls <= at {
            outcome.unwrap();
            break;
        }
        assert!(outcome.is_err(), "call {at} of {calls}");
        assert_eq!(id(), old.info().id, "call {at}");
        assert_eq!(pins.list().unwrap(), ["it"]);
        assert_eq!(
            std::fs::read_dir(pins.directory())
                .unwrap()
                .flatten()
                .filter(|e| e.file_name() != "it")
                .filter(|e| { !e.file_name().to_string_lossy().contains('.') })
                .count(),
            0,
            "a temporary pin after call {at}"
        );
        at += 1;
    }
    assert!(at >= 3, "{at} calls");
    assert_eq!(id(), new.info().id);
}

#[test]
fn programs_that_run_are_waited_for() {
    if !require(Rung::Kernel) {
        return;
    }
    // Writes 1, takes its time, and writes 2.
    let mut asm = Asm::program("long", ProgramKind::Classifier);
    let none = asm.label();
    asm.store(Size::W, R10, -4, 0)
        .load_map(R1, "stage")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, none)
        .mov(R6, R0)
        .store(Size::Dw, R6, 0, 1)
        .mov(R1, 8_000_000)
        .load_function(R2, "pass")
        .mov(R3, 0)
        .mov(R4, 0)
        .call(Helper::Loop)
        .store(Size::Dw, R6, 0, 2)
        .bind(none)
        .ret(0);
    let mut pass = Asm::subprogram("pass");
    pass.ret(0);
    let mut object = Object::new();
    object.add_map(MapSpec::array("stage", 8, 1)).unwrap();
    object.add(asm.finish().unwrap()).unwrap();
    object.add(pass.finish().unwrap()).unwrap();
    let mut loaded = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).unwrap();
    let stage = Array::<u64>::new(loaded.take_map("stage").unwrap()).unwrap();
    let program = loaded.take_program("long").unwrap();

    // The stage at which a program that has begun is found, at once or after waiting.
    let found = |wait: bool| {
        stage.store(0, &0).unwrap();
        std::thread::scope(|scope| {
            let run = scope.spawn(|| program.test_run(&TestRun { packet: &[0; 64], context: &[], repeat: 1 }).unwrap());
            while stage.load(0).unwrap() == 0 {
                assert!(!run.is_finished() || stage.load(0).unwrap() > 0, "it ended before it began");
                std::hint::spin_loop();
            }
            if wait {
                wait_for_running().unwrap();
            }
            stage.load(0).unwrap()
        })
    };
    assert!((0..20).all(|_| found(true) == 2));
    // The twin may be late itself, but not each time.
    assert!((0..20).any(|_| found(false) == 1));
}

#[test]
fn a_prefix_table_answers_with_the_longest_prefix() {
    if !require(Rung::Kernel) {
        return;
    }
    let table = PrefixTable::<4, u32>::new(Map::create(&MapSpec::lpm_trie("t", 4, 4, 2)).unwrap()).unwrap();
    let prefix = |prefix_len, data| LpmKey { prefix_len, data };
    table.store(&prefix(8, [10, 0, 0, 0]), &1, Put::New).unwrap();
    table.store(&prefix(24, [10, 1, 2, 0]), &2, Put::Any).unwrap();
    let host = |data| table.load(&prefix(32, data)).unwrap();
    assert_eq!((host([10, 1, 2, 3]), host([10, 1, 3, 3]), host([11, 1, 2, 3])), (Some(2), Some(1), None));
    let full = table.store(&prefix(0, [0; 4]), &3, Put::Any).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    let long = table.store(&prefix(33, [0; 4]), &3, Put::Any).unwrap_err();
    assert_eq!(long.raw_os_error(), Some(libc::EINVAL));
    assert_eq!(table.entries().unwrap(), [(prefix(24, [10, 1, 2, 0]), 2), (prefix(8, [10, 0, 0, 0]), 1)]);
    assert!(table.remove(&prefix(24, [10, 1, 2, 9])).unwrap());
    assert!(!table.remove(&prefix(24, [10, 1, 2, 9])).unwrap());
    assert_eq!(host([10, 1, 2, 3]), Some(1));
    assert!(PrefixTable::<16, u32>::new(table.map().try_clone().unwrap()).is_err(), "another length of data");
}

#[test]
fn a_per_cpu_hash_table_has_a_value_for_each_cpu() {
    if !require(Rung::Kernel) {
        return;
    }
    let spec = MapSpec::percpu_hash("t", 8, 12, 2);
    let table = PerCpuHashTable::<u64, [u32; 3]>::new(Map::create(&spec).unwrap()).unwrap();
    assert_eq!(table.load(&7).unwrap(), None);
    table.store(&7, &[1, 2, 3], Put::New).unwrap();
    assert_eq!(table.load(&7).unwrap(), Some(vec![[1, 2, 3]; cpus().unwrap()]));
    let twice = table.store(&7, &[1, 2, 3], Put::New).unwrap_err();
    assert_eq!(twice.raw_os_error(), Some(libc::EEXIST));
    table.store(&8, &[4; 3], Put::Any).unwrap();
    assert!(matches!(table.store(&9, &[4; 3], Put::Any), Err(MapError::Full { entries: 2, .. })));
    let mut keys = table.keys().unwrap();
    keys.sort_unstable();
    assert_eq!(keys, [7, 8]);
    assert!(table.remove(&7).unwrap() && !table.remove(&7).unwrap());
}

#[test]
fn an_array_of_programs_holds_one_type() {
    if !require(Rung::Kernel) {
        return;
    }
    let array = ProgramArray::new(Map::create(&MapSpec::prog_array("p", 2)).unwrap()).unwrap();
    let program = |kind| {
        let mut asm = Asm::program("one", kind);
        asm.ret(0);
        let code = dcenet_ebpf::insn::encode(asm.finish().unwrap().insns());
        Program::load(kind, "one", &code).unwrap()
    };
    array.set(0, &program(ProgramKind::Classifier)).unwrap();
    let other = array.set(1, &program(ProgramKind::Xdp)).unwrap_err();
    assert_eq!(other.raw_os_error(), Some(libc::EINVAL));
    assert!(matches!(array.clear(2), Err(MapError::OutOfBounds { index: 2, entries: 2, .. })));
    assert!(array.clear(0).unwrap() && !array.clear(0).unwrap());
}
