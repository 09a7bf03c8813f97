//! What every [`Loader`] must do, as tests that a backend's author runs too.
//!
//! The functions need the rung `kernel` and panic where the backend fails. [`all`] runs every one.

use std::os::fd::AsFd;

use super::{LoadErrorClass, LoadRequest, Loader};
use crate::asm::Asm;
use crate::insn::Reg::*;
use crate::insn::{AtomicOp, Cond, Helper, Size};
use crate::maps::{Array, HashTable, Map, PerCpuArray, PerCpuHashTable, PrefixTable, ProgramArray, RingBuffer};
use crate::object::{MapSpec, Object, ProgramKind};
use crate::program::TestRun;

/// Runs the whole suite.
///
/// # Panics
/// At the first thing that the backend does not do.
pub fn all(loader: &dyn Loader) {
    a_program_runs_and_its_maps_are_seen(loader);
    every_kind_of_map_is_made_as_specified(loader);
    tail_calls_reach_what_the_array_holds(loader);
    every_kind_of_program_is_loaded(loader);
    a_shared_map_is_used_in_place_of_a_new_one(loader);
    a_load_after_a_shared_one_gets_maps_of_its_own(loader);
    a_map_that_the_object_lacks_is_refused(loader);
    nothing_is_pinned(loader);
    garbage_is_a_bad_object(loader);
    an_object_at_an_odd_address_is_taken(loader);
    a_refused_program_tells_why(loader);
    a_refused_map_tells_which(loader);
    loads_run_side_by_side(loader);
}

/// Offset of `data` in `struct __sk_buff`.
const SKB_DATA: i16 = 76;
const PACKET: [u8; 64] = [0x42; 64];

/// A classifier `count` that adds 1 to the first value of the array `hits` and returns its parameter.
fn counter(verdict: i32) -> Vec<u8> {
    let mut code = Asm::program("count", ProgramKind::Classifier);
    let done = code.label();
    code.store(Size::W, R10, -4, 0)
        .load_map(R1, "hits")
        .mov(R2, R10)
        .add(R2, -4)
        .call(Helper::MapLookupElem)
        .jump_if(Cond::Eq, R0, 0, done)
        .mov(R1, 1)
        .atomic(AtomicOp::Add, Size::Dw, R0, 0, R1)
        .bind(done)
        .ret(verdict);
    object(&[MapSpec::array("hits", 8, 4)], [code])
}

fn object(maps: &[MapSpec], programs: impl IntoIterator<Item = Asm>) -> Vec<u8> {
    let mut object = Object::new();
    for map in maps {
        object.add_map(map.clone()).expect("a sound map");
    }
    for program in programs {
        object.add(program.finish().expect("sound code")).expect("unique names");
    }
    object.to_elf().expect("an object")
}

fn returning(name: &str, kind: ProgramKind, value: i32) -> Asm {
    let mut code = Asm::program(name, kind);
    code.ret(value);
    code
}

fn a_program_runs_and_its_maps_are_seen(loader: &dyn Loader) {
    let mut loaded = loader.load(&counter(7), &LoadRequest::default()).expect("loads");
    let program = loaded.take_program("count").expect("the program by its name");
    let hits = Array::<u64>::new(loaded.take_map("hits").expect("the map by its name")).expect("as specified");
    assert!(loaded.programs.is_empty() && loaded.maps.is_empty(), "nothing else: {loaded:?}");
    let run = program.test_run(&TestRun { packet: &PACKET, context: &[], repeat: 5 }).expect("runs");
    assert_eq!((run.retval, run.packet.as_slice()), (7, PACKET.as_slice()));
    assert_eq!(hits.load(0).expect("reads"), 5);
    assert_eq!(program.info().name, "count");
    assert_eq!(program.info().maps, [hits.map().info().id]);
}

fn every_kind_of_map_is_made_as_specified(loader: &dyn Loader) {
    let maps = [
        MapSpec::array("an_array", 12, 3),
        MapSpec::percpu_array("percpu", 16, 5),
        MapSpec::hash("a_hash", 8, 4, 100),
        MapSpec::lru_hash("lru", 4, 4, 200),
        MapSpec::ringbuf("ring", 65536),
        MapSpec::percpu_hash("percpu_hash", 8, 4, 50),
        MapSpec::lpm_trie("prefixes", 4, 8, 60),
        MapSpec::prog_array("programs", 3),
    ];
    // Loaders may leave out maps that no program names.
    let mut code = Asm::program("names_all", ProgramKind::Classifier);
    for map in &maps {
        code.load_map(R1, &map.name);
    }
    code.ret(0);
    let mut loaded = loader.load(&object(&maps, [code]), &LoadRequest::default()).expect("loads");
    let mut take = |name| loaded.take_map(name).expect("made");
    for spec in &maps {
        let map = take(&spec.name);
        let info = map.info();
        let made = (info.kind, info.key_size, info.value_size, info.max_entries);
        assert_eq!(made, (spec.kind.number(), spec.key_size, spec.value_size, spec.max_entries), "{}", spec.name);
        assert_eq!(info.name, spec.name);
        match spec.name.as_str() {
            "an_array" => drop(Array::<[u32; 3]>::new(map).expect("fits its view")),
            "percpu" => drop(PerCpuArray::<[u64; 2]>::new(map).expect("fits its view")),
            "a_hash" => drop(HashTable::<u64, u32>::new(map).expect("fits its view")),
            "lru" => drop(HashTable::<u32, u32>::new(map).expect("fits its view")),
            "percpu_hash" => drop(PerCpuHashTable::<u64, u32>::new(map).expect("fits its view")),
            "prefixes" => drop(PrefixTable::<4, u64>::new(map).expect("fits its view")),
            "programs" => drop(ProgramArray::new(map).expect("fits its view")),
            _ => drop(RingBuffer::new(map).expect("fits its view")),
        }
    }
}

fn tail_calls_reach_what_the_array_holds(loader: &dyn Loader) {
    let mut entry = Asm::program("entry", ProgramKind::Classifier);
    entry.load_map(R2, "targets").mov(R3, 1).call(Helper::TailCall).ret(5);
    let elf = object(&[MapSpec::prog_array("targets", 2)], [entry, returning("seven", ProgramKind::Classifier, 7)]);
    let mut loaded = loader.load(&elf, &LoadRequest::default()).expect("loads");
    let targets = ProgramArray::new(loaded.take_map("targets").expect("made")).expect("fits its view");
    let (entry, seven) = (loaded.take_program("entry").expect("loaded"), loaded.take_program("seven").expect("loaded"));
    let run = || entry.test_run(&TestRun { packet: &PACKET, context: &[], repeat: 1 }).expect("runs").retval;
    assert_eq!(run(), 5, "the place is empty");
    targets.set(1, &seven).expect("takes a program");
    assert_eq!(run(), 7);
    assert!(targets.clear(1).expect("was taken") && !targets.clear(1).expect("is empty"));
    assert_eq!(run(), 5);
    assert!(targets.set(2, &seven).is_err(), "beyond the array");
}

fn every_kind_of_program_is_loaded(loader: &dyn Loader) {
    for kind in ProgramKind::ALL {
        let elf = object(&[], [returning("only", kind, 1)]);
        let mut loaded = loader.load(&elf, &LoadRequest::default()).unwrap_or_else(|e| panic!("{kind:?}: {e}"));
        let program = loaded.take_program("only").expect("by its name");
        assert_eq!(program.info().kind, crate::program::number(kind), "{kind:?}");
    }
}

fn a_shared_map_is_used_in_place_of_a_new_one(loader: &dyn Loader) {
    let shared = Map::create(&MapSpec::array("elsewhere", 8, 4)).expect("made");
    let maps = [("hits", shared.as_fd())];
    let request = LoadRequest { maps: &maps };
    for expected in [1, 2] {
        let mut loaded = loader.load(&counter(0), &request).expect("loads");
        assert_eq!(loaded.take_map("hits").expect("handed back").info().id, shared.info().id);
        let program = loaded.take_program("count").expect("loaded");
        program.test_run(&TestRun { packet: &PACKET, context: &[], repeat: 1 }).expect("runs");
        let hits = Array::<u64>::new(shared.try_clone().expect("another descriptor")).expect("an array");
        assert_eq!(hits.load(0).expect("reads"), expected);
    }
}

fn a_load_after_a_shared_one_gets_maps_of_its_own(loader: &dyn Loader) {
    let shared = Map::create(&MapSpec::array("elsewhere", 8, 4)).expect("made");
    let maps = [("hits", shared.as_fd())];
    loader.load(&counter(0), &LoadRequest { maps: &maps }).expect("loads");
    let ids: Vec<u32> = (0..2)
        .map(|_| {
            let mut loaded = loader.load(&counter(0), &LoadRequest::default()).expect("loads");
            loaded.take_map("hits").expect("made").info().id
        })
        .collect();
    assert!(ids[0] != ids[1] && !ids.contains(&shared.info().id), "{ids:?}");
}

fn a_map_that_the_object_lacks_is_refused(loader: &dyn Loader) {
    let shared = Map::create(&MapSpec::array("elsewhere", 8, 4)).expect("made");
    let maps = [("nowhere", shared.as_fd())];
    let error = loader.load(&counter(0), &LoadRequest { maps: &maps }).expect_err("no such map");
    assert_eq!((error.class(), error.subject()), (LoadErrorClass::BadObject, "nowhere"));
}

fn nothing_is_pinned(loader: &dyn Loader) {
    let elf = || {
        let mut code = Asm::program("uses", ProgramKind::Classifier);
        code.load_map(R1, "wants_pin").ret(0);
        object(&[MapSpec::array("wants_pin", 8, 1).pinned()], [code])
    };
    let ids: Vec<u32> = (0..2)
        .map(|_| {
            let mut loaded = loader.load(&elf(), &LoadRequest::default()).expect("loads");
            loaded.take_map("wants_pin").expect("made").info().id
        })
        .collect();
    assert_ne!(ids[0], ids[1], "the second load found a pin of the first");
}

fn garbage_is_a_bad_object(loader: &dyn Loader) {
    let mut cut = counter(0);
    cut.truncate(100);
    for garbage in [&[][..], &[0; 64], b"\x7fELF", &cut] {
        let error = loader.load(garbage, &LoadRequest::default()).expect_err("garbage");
        assert_eq!(error.class(), LoadErrorClass::BadObject, "{error}");
    }
}

fn an_object_at_an_odd_address_is_taken(loader: &dyn Loader) {
    let elf = counter(0);
    let mut shifted = vec![0; elf.len() + 9];
    for start in 1..9 {
        shifted[start..start + elf.len()].copy_from_slice(&elf);
        loader.load(&shifted[start..start + elf.len()], &LoadRequest::default()).expect("loads");
    }
}

fn a_refused_program_tells_why(loader: &dyn Loader) {
    let mut code = Asm::program("reads_past", ProgramKind::Classifier);
    code.load(Size::W, R2, R1, SKB_DATA).load(Size::Dw, R0, R2, 0).exit();
    let error = loader.load(&object(&[], [code]), &LoadRequest::default()).expect_err("does not compare with the end");
    assert_eq!((error.class(), error.subject()), (LoadErrorClass::Verifier, "reads_past"), "{error}");
    assert!(error.raw_os_error().is_some());
    assert!(error.log().contains("packet"), "the verifier's log: {:?}", error.log());
    assert!(error.to_string().contains("packet"), "{error}");
}

fn a_refused_map_tells_which(loader: &dyn Loader) {
    // Values of more than 2 GiB are refused before memory is asked for (kernel/bpf/arraymap.c, `array_map_alloc_check`).
    let mut code = Asm::program("uses", ProgramKind::Classifier);
    code.load_map(R1, "fits").load_map(R1, "too_large").ret(0);
    let elf = object(&[MapSpec::array("fits", 8, 1), MapSpec::array("too_large", 1 << 31, 1)], [code]);
    let error = loader.load(&elf, &LoadRequest::default()).expect_err("no such map can be made");
    assert_eq!((error.subject(), error.raw_os_error()), ("too_large", Some(libc::E2BIG)), "{error}");
    assert_eq!(error.log(), "");
}

fn loads_run_side_by_side(loader: &dyn Loader) {
    let shared = Map::create(&MapSpec::array("elsewhere", 8, 4)).expect("made");
    std::thread::scope(|scope| {
        for number in 0..4 {
            let shared = &shared;
            scope.spawn(move || {
                for round in 0..5 {
                    let maps = [("hits", shared.as_fd())];
                    let request = LoadRequest { maps: if number % 2 == 0 { &maps } else { &[] } };
                    let mut loaded = loader.load(&counter(number), &request).expect("loads");
                    let own = loaded.take_map("hits").expect("made").info().id;
                    assert_eq!(own == shared.info().id, number % 2 == 0, "thread {number} round {round}");
                    let program = loaded.take_program("count").expect("loaded");
                    let run = program.test_run(&TestRun { packet: &PACKET, context: &[], repeat: 1 }).expect("runs");
                    assert_eq!(run.retval, number as u32);
                }
            });
        }
    });
}
