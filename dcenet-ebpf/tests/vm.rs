//! The VM by itself: what it traps, what it remembers, how fast it is.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Instant;

use dcenet_ebpf::asm::Asm;
use dcenet_ebpf::insn::{AtomicOp, Cond, Helper, Imm64, Insn, IsaLevel, Reg::*, Size};
use dcenet_ebpf::object::{MapFlags, MapSpec, Object, Program, ProgramKind};
use dcenet_ebpf::vm::{
    Environment, Map, MapError, Maps, Memory, Redirect, Run, Skb, TailTarget, Trap, TrapKind, Update, Vlan, Vm,
    VmError, Xdp,
};

/// A program with one map of each kind, and a VM for it.
struct Fixture {
    vm: Vm,
    maps: Maps,
    env: Environment,
}

fn fixture(write: impl FnOnce(&mut Asm)) -> Fixture {
    let mut asm = Asm::program("test", ProgramKind::Classifier);
    asm.isa(IsaLevel::V4);
    write(&mut asm);
    let mut callee = Asm::subprogram("callee");
    callee.mov(R0, R1).exit();
    let mut deeper = Asm::subprogram("deeper");
    deeper.call_function("deeper").exit();
    let mut object = Object::new();
    object.add_map(MapSpec::array("array", 12, 4)).unwrap();
    object.add_map(MapSpec::hash("hash", 4, 8, 2)).unwrap();
    object.add_map(MapSpec::lru_hash("lru", 4, 8, 2)).unwrap();
    object.add_map(MapSpec::ringbuf("ring", 4096)).unwrap();
    object.add_map(MapSpec::array("constants", 8, 1).with_flags(MapFlags::RDONLY_PROG)).unwrap();
    object.add_map(MapSpec::prog_array("jumps", 1)).unwrap();
    let mut jump = Asm::subprogram("jump");
    jump.call(Helper::TailCall).ret(0);
    for function in [asm, callee, deeper, jump] {
        object.add(function.finish().unwrap()).unwrap();
    }
    let vm = Vm::new(&object.link("test").unwrap()).unwrap();
    Fixture { vm, maps: Maps::new(object.maps()), env: Environment::default() }
}

impl Fixture {
    fn run(&mut self) -> Result<Run, Trap> {
        self.vm.run(&mut Skb::new([0; 64]), &mut self.maps, &mut self.env)
    }
}

/// The trap of a program that ends with "return 0".
fn trap(write: impl FnOnce(&mut Asm)) -> TrapKind {
    let result = fixture(|asm| {
        write(asm);
        asm.ret(0);
    })
    .run();
    result.expect_err("the program must trap").kind
}

fn lookup(asm: &mut Asm, map: &str) {
    let found = asm.label();
    asm.store(Size::W, R10, -4, 0).load_map(R1, map).mov(R2, R10).add(R2, -4).call(Helper::MapLookupElem);
    asm.jump_if(Cond::Ne, R0, 0, found).ret(-1).bind(found);
}

#[test]
fn what_was_never_written_cannot_be_read() {
    assert_eq!(
        trap(|a| {
            a.add(R3, 1);
        }),
        TrapKind::UninitRegister(R3)
    );
    assert_eq!(
        trap(|a| {
            a.mov(R1, 1).mov(R6, 1).call(Helper::KtimeGetNs).mov(R0, R1);
        }),
        TrapKind::UninitRegister(R1)
    );
    assert_eq!(
        trap(|a| {
            a.store(Size::W, R10, -8, 1).load(Size::Dw, R1, R10, -8);
        }),
        TrapKind::UninitStack(-4)
    );
    // The key of a lookup, too, and the callee's registers and stack.
    assert_eq!(
        trap(|a| {
            a.load_map(R1, "hash").mov(R2, R10).add(R2, -4).call(Helper::MapLookupElem);
        }),
        TrapKind::UninitStack(-4)
    );
    assert_eq!(
        trap(|a| {
            a.mov(R1, 0).exit();
        }),
        TrapKind::UninitRegister(R0)
    );
}

#[test]
fn memory_has_bounds() {
    let packet = |offset, size, len| TrapKind::OutOfBounds { memory: Memory::Packet, offset, size, len };
    assert_eq!(
        trap(|a| {
            a.load(Size::W, R2, R1, 76).load(Size::W, R3, R2, 61);
        }),
        packet(61, 4, 64)
    );
    assert_eq!(
        trap(|a| {
            a.load(Size::W, R2, R1, 76).store(Size::B, R2, -1, 0);
        }),
        packet(-1, 1, 64)
    );
    let value = |offset, size| TrapKind::OutOfBounds { memory: Memory::MapValue, offset, size, len: 12 };
    assert_eq!(
        trap(|a| {
            lookup(a, "array");
            a.load(Size::Dw, R1, R0, 8);
        }),
        value(8, 8)
    );
    assert_eq!(
        trap(|a| {
            a.mov(R1, R10).add(R1, -512).add(R1, -4).store(Size::W, R1, 0, 0);
        }),
        TrapKind::OutOfBounds { memory: Memory::Stack, offset: -516, size: 4, len: 512 }
    );
    assert_eq!(
        trap(|a| {
            a.load_map(R1, "array").load(Size::B, R2, R1, 0);
        }),
        TrapKind::OutOfBounds { memory: Memory::Opaque, offset: 0, size: 1, len: 0 }
    );
}

#[test]
fn the_context_is_read_and_written_as_the_kernel_allows() {
    let no = |offset, size| TrapKind::Context { offset, size };
    for (off, size) in [(1, Size::H), (84, Size::W), (76, Size::H), (46, Size::W), (-4, Size::W), (64, Size::Dw)] {
        assert_eq!(
            trap(|a| {
                a.load(size, R2, R1, off);
            }),
            no(off.into(), size.bytes())
        );
    }
    for (off, size) in [(0, Size::W), (16, Size::W), (8, Size::H), (76, Size::W), (40, Size::W)] {
        assert_eq!(
            trap(|a| {
                a.store(size, R1, off, 0);
            }),
            no(off.into(), size.bytes())
        );
    }
    let mut skb = Skb::new([0; 60]);
    skb.vlan = Some(Vlan { tci: 100, proto: 0x8100 });
    skb.protocol = 0x0800;
    let mut fixture = fixture(|a| {
        a.load(Size::W, R0, R1, 16)
            .load(Size::W, R2, R1, 24)
            .store(Size::W, R1, 8, R2)
            .store(Size::W, R1, 52, 9)
            .exit();
    });
    let run = fixture.vm.run(&mut skb, &mut fixture.maps, &mut fixture.env).unwrap();
    assert_eq!(run.value, u32::from(0x0800u16.to_be()));
    assert_eq!((skb.mark, skb.cb), (100, [0, 9, 0, 0, 0]));
}

#[test]
fn addresses_are_not_forged_and_do_not_leak() {
    assert_eq!(
        trap(|a| {
            a.load_imm64(R2, 0x1234).load(Size::B, R3, R2, 0);
        }),
        TrapKind::NotAPointer(R2)
    );
    for write in [
        |a: &mut Asm| {
            a.mov32(R2, R10);
        },
        |a: &mut Asm| {
            a.mov(R2, R10).mul(R2, 2);
        },
        |a: &mut Asm| {
            a.mov(R2, R10).sub(R2, R1);
        },
        |a: &mut Asm| {
            a.mov(R2, R10).add(R2, R1);
        },
        |a: &mut Asm| {
            a.load_map(R2, "hash").add(R2, 8);
        },
        |a: &mut Asm| {
            a.mov(R2, R10).neg(R2);
        },
    ] {
        assert_eq!(trap(write), TrapKind::PointerArithmetic);
    }
    assert_eq!(
        trap(|a| {
            lookup(a, "array");
            a.store(Size::Dw, R0, 0, R10);
        }),
        TrapKind::PointerLeak
    );
    assert_eq!(
        trap(|a| {
            a.mov(R0, R10).exit();
        }),
        TrapKind::PointerLeak
    );
    // Half of a spilled address is no number.
    assert!(matches!(
        trap(|a| {
            a.store(Size::Dw, R10, -8, R1).load(Size::W, R2, R10, -8);
        }),
        TrapKind::UninitStack(-8)
    ));
    let l = |a: &mut Asm, cond, src: i32| {
        let label = a.label();
        a.jump_if(cond, R10, src, label).bind(label);
    };
    assert_eq!(trap(|a| l(a, Cond::Gt, 0)), TrapKind::PointerComparison);
    assert_eq!(trap(|a| l(a, Cond::Eq, 5)), TrapKind::PointerComparison);
}

#[test]
fn a_spilled_address_comes_back_whole() {
    let mut fixture = fixture(|a| {
        a.store(Size::Dw, R10, -8, R1).load(Size::Dw, R2, R10, -8).load(Size::W, R0, R2, 0);
        // Overwritten, it is a number.
        a.store(Size::Dw, R10, -8, 36).load(Size::Dw, R3, R10, -8).add(R0, R3).exit();
    });
    assert_eq!(fixture.run().unwrap().value, 100);
}

#[test]
fn read_only_and_atomic_rules_hold() {
    assert_eq!(
        trap(|a| {
            lookup(a, "constants");
            a.store(Size::B, R0, 0, 1);
        }),
        TrapKind::ReadOnly(Memory::MapValue)
    );
    assert_eq!(
        trap(|a| {
            a.load(Size::W, R2, R1, 76).mov(R3, 1).atomic(AtomicOp::Add, Size::W, R2, 0, R3);
        }),
        TrapKind::NoAtomic(Memory::Packet)
    );
}

#[test]
fn an_address_in_a_packet_that_may_have_moved_is_stale() {
    assert_eq!(
        trap(|a| {
            a.load(Size::W, R7, R1, 76).mov(R2, 0).call(Helper::SkbPullData).load(Size::B, R0, R7, 0);
        }),
        TrapKind::StalePacket
    );
}

#[test]
fn a_tail_call_that_falls_through_leaves_no_packet_address_and_no_result() {
    let fall_through = |a: &mut Asm| {
        a.load(Size::W, R7, R1, 76).load_map(R2, "jumps").mov(R3, 0).call(Helper::TailCall);
    };
    assert_eq!(
        trap(|a| {
            fall_through(a);
            a.load(Size::B, R0, R7, 0);
        }),
        TrapKind::StalePacket
    );
    assert_eq!(
        trap(|a| {
            fall_through(a);
            a.mov(R1, R0);
        }),
        TrapKind::UninitRegister(R0)
    );
    let callback = trap(|a| {
        a.mov(R1, 1).load_function(R2, "jump").mov(R3, 0).mov(R4, 0).call(Helper::Loop);
    });
    assert_eq!(callback, TrapKind::TailCallInCallback);
}

#[test]
fn only_the_linear_part_is_in_reach_until_it_is_pulled() {
    let mut fixture = fixture(|a| {
        let short = a.label();
        a.mov(R6, R1).mov(R2, 50).call(Helper::SkbPullData);
        a.load(Size::W, R2, R6, 76).load(Size::W, R3, R6, 80).mov(R4, R2).add(R4, 50);
        a.jump_if(Cond::Gt, R4, R3, short).load(Size::B, R0, R2, 49).exit().bind(short).ret(-1);
    });
    let mut skb = Skb::new((0..64).collect::<Vec<u8>>());
    skb.linear = 14;
    assert_eq!(fixture.vm.run(&mut skb, &mut fixture.maps, &mut fixture.env).unwrap().value, 49);
    assert_eq!(skb.linear, 50);
}

#[test]
fn calls_have_a_depth_and_frames_end() {
    assert_eq!(
        trap(|a| {
            a.call_function("deeper");
        }),
        TrapKind::CallDepth
    );
    // The callee may read the caller's stack, and gets its own back clean.
    let mut fixture = fixture(|a| {
        a.mov(R6, 5).store(Size::Dw, R10, -8, 6).mov(R1, R10).call_function("callee");
        a.load(Size::Dw, R0, R0, -8).add(R0, R6).exit();
    });
    assert_eq!(fixture.run().unwrap().value, 11);
}

#[test]
fn the_budget_ends_an_endless_loop() {
    let mut fixture = fixture(|a| {
        let again = a.label();
        a.mov(R0, 0).bind(again).add(R0, 1).jump(again);
    });
    fixture.vm.set_budget(1000);
    let trap = fixture.run().unwrap_err();
    assert_eq!((trap.slot, trap.kind), (2, TrapKind::Budget));
    assert_eq!(trap.to_string(), "program test, slot 2: `goto -2`: the budget of instructions is used up");
}

#[test]
fn records_are_submitted_or_the_run_traps() {
    let reserve = |a: &mut Asm, end: Option<Helper>| {
        let full = a.label();
        a.load_map(R1, "ring").mov(R2, 16).mov(R3, 0).call(Helper::RingbufReserve);
        a.jump_if(Cond::Eq, R0, 0, full).store(Size::Dw, R0, 8, 7);
        if let Some(helper) = end {
            a.mov(R1, R0).mov(R2, 0).call(helper);
        }
        a.bind(full);
    };
    assert_eq!(trap(|a| reserve(a, None)), TrapKind::UnreleasedRecord);
    let mut submitted = fixture(|a| {
        reserve(a, Some(Helper::RingbufSubmit));
        reserve(a, Some(Helper::RingbufDiscard));
        a.ret(0);
    });
    submitted.run().unwrap();
    let ring = submitted.maps.get_mut("ring").unwrap();
    assert_eq!(ring.drain(), [[0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]]);
    assert!(ring.is_empty());
    assert_eq!(
        trap(|a| {
            reserve(a, Some(Helper::RingbufSubmit));
            a.load_map(R1, "ring").mov(R2, R10).mov(R3, 8).mov(R4, 0).call(Helper::RingbufOutput);
        }),
        TrapKind::OutOfBounds { memory: Memory::Stack, offset: 0, size: 8, len: 512 }
    );
}

#[test]
fn the_end_of_a_record_has_no_result() {
    for helper in [Helper::RingbufSubmit, Helper::RingbufDiscard] {
        let kind = trap(|a| {
            let full = a.label();
            a.load_map(R1, "ring").mov(R2, 8).mov(R3, 0).call(Helper::RingbufReserve).jump_if(Cond::Eq, R0, 0, full);
            a.mov(R1, R0).mov(R2, 0).call(helper).mov(R1, R0).bind(full);
        });
        assert_eq!(kind, TrapKind::UninitRegister(R0), "{helper}");
    }
}

#[test]
fn clones_of_a_run_have_a_bound() {
    let mut fixture = fixture(|a| {
        let again = a.label();
        a.mov(R6, R1).bind(again).mov(R1, R6).mov(R2, 1).mov(R3, 0).call(Helper::CloneRedirect).jump(again);
    });
    let mut skb = Skb::new(vec![0; 16 << 20]);
    let trap = fixture.vm.run(&mut skb, &mut fixture.maps, &mut fixture.env).unwrap_err();
    assert_eq!((trap.kind, fixture.env.clones.len()), (TrapKind::Clones, 3));
}

#[test]
fn helpers_answer_from_the_environment() {
    let mut fixture = fixture(|a| {
        a.call(Helper::KtimeGetNs).mov(R6, R0).call(Helper::KtimeGetBootNs).add(R6, R0);
        a.call(Helper::KtimeGetCoarseNs).add(R6, R0).call(Helper::GetSmpProcessorId).add(R6, R0);
        a.call(Helper::Jiffies64).add(R6, R0);
        a.mov(R1, 9).mov(R2, 1).call(Helper::Redirect).add(R0, R6).exit();
    });
    fixture.env = Environment {
        ktime_ns: 1000,
        boottime_ns: 200,
        coarse_ns: 30,
        jiffies: 12_000_003,
        cpu: 4,
        random: 0,
        ..Environment::default()
    };
    let run = fixture.run().unwrap();
    assert_eq!(run.value, 12_000_003 + 1234 + 7);
    assert_eq!(run.redirect, Some(Redirect { ifindex: 9, ingress: true }));
    assert_eq!(
        trap(|a| {
            a.call(Helper::TracePrintk);
        }),
        TrapKind::Helper(Helper::TracePrintk)
    );
}

#[test]
fn a_tick_comes_every_four_milliseconds() {
    let mut env = Environment { coarse_ns: 3_999_999, jiffies: 7, ..Environment::default() };
    for (ns, ticks, time) in [(1, 8, 4_000_000), (3_999_999, 8, 7_999_999), (8_000_001, 11, 16_000_000)] {
        env.advance(ns);
        assert_eq!((env.jiffies, env.coarse_ns), (ticks, time));
    }
}

#[test]
fn random_numbers_repeat_with_the_seed() {
    let mut fixture = fixture(|a| {
        a.call(Helper::GetPrandomU32).exit();
    });
    let first: Vec<u32> = (0..3).map(|_| fixture.run().unwrap().value).collect();
    fixture.env = Environment::default();
    let again: Vec<u32> = (0..3).map(|_| fixture.run().unwrap().value).collect();
    assert_eq!(first, again);
    assert!(first[0] != first[1] && first[1] != first[2]);
}

#[test]
fn coverage_names_what_did_not_run() {
    let mut fixture = fixture(|a| {
        let big = a.label();
        a.load(Size::W, R2, R1, 0).load_imm64(R0, 7).jump_if(Cond::Gt, R2, 100, big).exit().bind(big).ret(2);
    });
    fixture.run().unwrap();
    assert_eq!(fixture.vm.missed().collect::<Vec<_>>(), [5, 6]);
    fixture.vm.run(&mut Skb::new([0; 200]), &mut fixture.maps, &mut fixture.env).unwrap();
    assert_eq!(fixture.vm.missed().count(), 0);
    assert!(fixture.vm.has_run(5) && !fixture.vm.has_run(2));
    fixture.vm.reset_coverage();
    assert_eq!(fixture.vm.missed().count(), 6);
}

#[test]
fn maps_keep_the_kernels_rules() {
    let mut maps = fixture(|a| {
        a.ret(0);
    })
    .maps;
    let key = |k: u32| k.to_le_bytes();
    let value = |v: u64| v.to_le_bytes();
    let array = maps.get_mut("array").unwrap();
    assert_eq!(array.update(&key(4), &[0; 12], Update::Any), Err(MapError::Full));
    assert_eq!(array.update(&key(0), &[0; 8], Update::Any), Err(MapError::Invalid));
    assert_eq!(array.delete(&key(0)), Err(MapError::Invalid));
    let hash = maps.get_mut("hash").unwrap();
    for k in [1, 2] {
        hash.update(&key(k), &value(k.into()), Update::Create).unwrap();
    }
    assert_eq!(hash.update(&key(3), &value(3), Update::Any), Err(MapError::Full));
    hash.delete(&key(1)).unwrap();
    hash.update(&key(3), &value(3), Update::Any).unwrap();
    assert_eq!(hash.len(), 2);
    assert_eq!(hash.lookup(&key(3)), Some(&value(3)[..]));
    assert_eq!(hash.lookup(&key(1)), None);
    assert_eq!(hash.entries().count(), 2);
}

#[test]
fn an_lru_map_drops_what_was_used_least_recently() {
    let mut fixture = fixture(|a| {
        lookup(a, "lru");
        a.ret(0);
    });
    let update = |map: &mut Map, k: u32| map.update(&k.to_le_bytes(), &[0; 8], Update::Any).unwrap();
    let lru = fixture.maps.get_mut("lru").unwrap();
    update(lru, 0);
    update(lru, 1);
    // The program uses key 0, so key 1 is the one to go.
    assert_eq!(fixture.run().unwrap().value, 0);
    let lru = fixture.maps.get_mut("lru").unwrap();
    update(lru, 2);
    let mut keys: Vec<_> = lru.entries().map(|(key, _)| key[0]).collect();
    keys.sort_unstable();
    assert_eq!(keys, [0, 2]);
    // Many rounds leave the books in order.
    for round in 0..100 {
        update(lru, round % 5);
        if round % 3 == 0 {
            let _ = lru.delete(&(round % 4).to_le_bytes());
        }
        assert!(lru.len() <= 2);
    }
}

#[test]
fn wrong_maps_and_kinds_are_refused() {
    let mut fixture = fixture(|a| {
        a.ret(0);
    });
    fixture.maps = Maps::new(&[]);
    assert_eq!(fixture.run().unwrap_err().kind, TrapKind::WrongMaps);
    let mut object = Object::new();
    for (name, kind) in [("cgroup", ProgramKind::CgroupSkbIngress), ("xdp", ProgramKind::Xdp)] {
        let mut asm = Asm::program(name, kind);
        asm.ret(2);
        object.add(asm.finish().unwrap()).unwrap();
    }
    let cgroup = Vm::new(&object.link("cgroup").unwrap());
    assert!(matches!(cgroup, Err(VmError::Kind { kind: ProgramKind::CgroupSkbIngress, .. })));
    let mut xdp = Vm::new(&object.link("xdp").unwrap()).unwrap();
    let (mut maps, mut env) = (Maps::new(&[]), Environment::default());
    let trap = xdp.run(&mut Skb::new([0; 60]), &mut maps, &mut env).unwrap_err();
    assert_eq!(trap.kind, TrapKind::WrongContext);
    assert_eq!(xdp.run_xdp(&mut Xdp::new([0; 60]), &mut maps, &mut env).unwrap().value, 2);
}

/// A decision tree over the mark, a leaf per value.
fn tree(asm: &mut Asm, low: i32, high: i32) {
    if high - low == 1 {
        asm.ret(low);
        return;
    }
    let (middle, above) = (low + (high - low) / 2, asm.label());
    asm.jump_if(Cond::Ge, R6, middle, above);
    tree(asm, low, middle);
    asm.bind(above);
    tree(asm, middle, high);
}

#[test]
fn every_leaf_of_a_large_tree_is_reached_at_both_levels() {
    const LEAVES: i32 = 20_000;
    for isa in [IsaLevel::V3, IsaLevel::V4] {
        let mut fixture = fixture(|a| {
            a.isa(isa).load(Size::W, R6, R1, 8);
            tree(a, 0, LEAVES);
        });
        let mut skb = Skb::new([0; 64]);
        for leaf in 0..LEAVES as u32 {
            skb.mark = leaf;
            let run = fixture.vm.run(&mut skb, &mut fixture.maps, &mut fixture.env).unwrap();
            assert_eq!(run.value, leaf, "{isa:?}");
        }
        assert_eq!(fixture.vm.missed().count(), 0, "{isa:?}");
    }
}

/// A loop of arithmetic, stack, map value and packet accesses. The bound is loose for a busy machine; the figure printed
/// is the one to read.
#[test]
fn it_runs_millions_of_instructions_a_second() {
    let mut fixture = fixture(|a| {
        let again = a.label();
        a.load(Size::W, R7, R1, 76);
        lookup(a, "array");
        a.mov(R6, 0).bind(again);
        a.load(Size::B, R1, R7, 13).add(R1, R6).store(Size::Dw, R10, -16, R1).load(Size::Dw, R2, R10, -16);
        a.xor(R2, 0x55).and(R2, 0xff).store(Size::W, R0, 4, R2).add(R6, 1);
        a.jump_if(Cond::Lt, R6, 50_000, again).ret(0);
    });
    let mut best = 0.0f64;
    for _ in 0..20 {
        let start = Instant::now();
        let run = fixture.run().unwrap();
        best = best.max(run.insns as f64 / start.elapsed().as_secs_f64() / 1e6);
    }
    eprintln!("{best:.0} M instructions/s");
    assert!(best > if cfg!(debug_assertions) { 5.0 } else { 20.0 }, "{best:.1} M instructions/s");
}

/// Found by fuzzing: a hash map of no entries has no first value whose address could be taken.
#[test]
fn only_an_array_of_one_entry_has_a_direct_value() {
    let maps = [
        MapSpec::array("one", 8, 1),
        MapSpec::array("many", 8, 2),
        MapSpec::hash("hash", 4, 8, 2),
        MapSpec::ringbuf("ring", 4096),
    ];
    let run = |value: Imm64| {
        let code =
            [Insn::LoadImm64 { dst: R1, value }, Insn::Load { size: Size::Dw, dst: R0, base: R1, off: 0 }, Insn::Exit];
        let program = Program::from_insns("direct", ProgramKind::Classifier, code.to_vec(), maps.to_vec());
        let run = Vm::new(&program).unwrap().run(&mut Skb::new([]), &mut Maps::new(&maps), &mut Environment::default());
        run.map(|run| run.value).map_err(|trap| trap.kind)
    };
    assert_eq!(run(Imm64::MapValue { fd: 0, offset: 0 }), Ok(0));
    for fd in 1..4 {
        assert_eq!(run(Imm64::MapValue { fd, offset: 0 }), Err(TrapKind::DirectValue), "map {fd}");
    }
    for fd in [-1, 4, 65_536] {
        assert_eq!(run(Imm64::MapValue { fd, offset: 0 }), Err(TrapKind::WrongMaps), "map {fd}");
        assert_eq!(run(Imm64::MapFd(fd)), Err(TrapKind::WrongMaps), "map {fd}");
    }
}

/// Short programs are what a comparison of many packets runs: setting a run up must be cheap too.
#[test]
fn it_runs_short_programs_many_times_a_second() {
    let mut fixture = fixture(|a| {
        lookup(a, "hash");
        a.ret(0);
    });
    let mut skb = Skb::new([0; 64]);
    let mut best = 0.0f64;
    for _ in 0..20 {
        const RUNS: u32 = 2_000;
        let start = Instant::now();
        for _ in 0..RUNS {
            fixture.vm.run(&mut skb, &mut fixture.maps, &mut fixture.env).unwrap();
        }
        best = best.max(f64::from(RUNS) / start.elapsed().as_secs_f64() / 1e6);
    }
    eprintln!("{best:.2} M runs/s");
    assert!(best > 0.2, "{best:.2} M runs/s");
}

/// The result of an XDP program on 64 bytes with 8 of metadata.
fn xdp(write: impl FnOnce(&mut Asm)) -> Result<Run, TrapKind> {
    let mut asm = Asm::program("test", ProgramKind::Xdp);
    write(&mut asm);
    asm.ret(2);
    let mut object = Object::new();
    object.add(asm.finish().unwrap()).unwrap();
    let mut vm = Vm::new(&object.link("test").unwrap()).unwrap();
    let mut frame = Xdp { meta: vec![5; 8], ..Xdp::new([0; 64]) };
    vm.run_xdp(&mut frame, &mut Maps::new(&[]), &mut Environment::default()).map_err(|trap| trap.kind)
}

#[test]
fn a_frame_of_xdp_has_bounds_and_its_context_is_read_only() {
    const DATA: i16 = 0;
    const DATA_META: i16 = 8;
    let packet = |offset, size| Err(TrapKind::OutOfBounds { memory: Memory::Packet, offset, size, len: 64 });
    let load = |field, size, off| {
        xdp(|a| {
            a.load(Size::W, R2, R1, field).load(size, R3, R2, off);
        })
    };
    assert!(load(DATA, Size::Dw, 56).is_ok() && load(DATA_META, Size::Dw, 0).is_ok());
    assert_eq!(load(DATA, Size::Dw, 57), packet(57, 8));
    assert_eq!(load(DATA, Size::B, -9), packet(-9, 1));
    assert_eq!(load(DATA_META, Size::B, -1), packet(-9, 1));
    for (off, size) in [(DATA, Size::Dw), (DATA, Size::H), (20, Size::W), (24, Size::W), (2, Size::W)] {
        let read = xdp(|a| {
            a.load(size, R2, R1, off);
        });
        assert_eq!(read, Err(TrapKind::Context { offset: off.into(), size: size.bytes() }));
    }
    let write = xdp(|a| {
        a.store(Size::W, R1, 16, 3);
    });
    assert_eq!(write, Err(TrapKind::Context { offset: 16, size: 4 }));
    let stale = xdp(|a| {
        a.mov(R6, R1).load(Size::W, R7, R1, DATA).mov(R2, -4).call(Helper::XdpAdjustHead).load(Size::B, R3, R7, 0);
    });
    assert_eq!(stale, Err(TrapKind::StalePacket));
    let skb = xdp(|a| {
        a.mov(R2, 4).call(Helper::SkbPullData);
    });
    assert_eq!(skb, Err(TrapKind::Helper(Helper::SkbPullData)));
}

#[test]
fn a_failed_load_from_a_frame_writes_nothing() {
    const SECRET: i32 = 0x5ec7;
    let mut asm = Asm::program("test", ProgramKind::Xdp);
    let second = asm.label();
    asm.mov(R6, R1).load(Size::W, R2, R1, 16).jump_if(Cond::Ne, R2, 0, second);
    asm.store(Size::Dw, R10, -8, SECRET).ret(2).bind(second);
    asm.mov(R2, 9999).mov(R3, R10).add(R3, -8).mov(R4, 8).call(Helper::XdpLoadBytes);
    asm.load(Size::Dw, R0, R10, -8).exit();
    let mut object = Object::new();
    object.add(asm.finish().unwrap()).unwrap();
    let mut vm = Vm::new(&object.link("test").unwrap()).unwrap();
    let mut run = |queue| {
        let mut frame = Xdp { rx_queue_index: queue, ..Xdp::new([0; 64]) };
        vm.run_xdp(&mut frame, &mut Maps::new(&[]), &mut Environment::default()).map_err(|trap| trap.kind)
    };
    assert_eq!(run(0).unwrap().value, 2);
    assert_eq!(run(2), Err(TrapKind::UninitStack(-8)));

    // What the program wrote itself it still has, but no address.
    let load = |a: &mut Asm| {
        a.mov(R1, R6).mov(R2, 9999).mov(R3, R10).add(R3, -8).mov(R4, 8).call(Helper::XdpLoadBytes);
        a.load(Size::Dw, R0, R10, -8).exit();
    };
    let number = xdp(|a| {
        a.mov(R6, R1).store(Size::Dw, R10, -8, 7);
        load(a);
    });
    assert_eq!(number.unwrap().value, 7);
    let address = xdp(|a| {
        a.mov(R6, R1).store(Size::Dw, R10, -8, R1);
        load(a);
    });
    assert_eq!(address, Err(TrapKind::UninitStack(-8)));
}

#[test]
fn packet_addresses_are_no_arguments_of_helpers_that_write_frames() {
    let from_packet = xdp(|a| {
        a.load(Size::W, R3, R1, 0).mov(R2, 0).mov(R4, 4).call(Helper::XdpStoreBytes);
    });
    assert!(matches!(from_packet, Err(TrapKind::Argument { argument: 3, .. })), "{from_packet:?}");
    let params = xdp(|a| {
        a.load(Size::W, R2, R1, 0).mov(R3, 64).mov(R4, 0).call(Helper::FibLookup);
    });
    assert!(matches!(params, Err(TrapKind::Argument { argument: 2, .. })), "{params:?}");
}

#[test]
fn a_frame_larger_than_any_is_refused() {
    let mut asm = Asm::program("test", ProgramKind::Xdp);
    asm.ret(2);
    let mut object = Object::new();
    object.add(asm.finish().unwrap()).unwrap();
    let mut vm = Vm::new(&object.link("test").unwrap()).unwrap();
    let mut kind = |headroom, tailroom| {
        let mut frame = Xdp { headroom, tailroom, ..Xdp::new([0; 64]) };
        let run = vm.run_xdp(&mut frame, &mut Maps::new(&[]), &mut Environment::default());
        run.map(|run| run.value).map_err(|trap| trap.kind)
    };
    const ALL: usize = 1 << 20;
    assert_eq!(kind(ALL - 64, 0), Ok(2));
    for (headroom, tailroom) in [(ALL - 63, 0), (0, ALL), (usize::MAX, 0), (0, usize::MAX), (usize::MAX, usize::MAX)] {
        assert_eq!(kind(headroom, tailroom), Err(TrapKind::FrameSize));
    }
}

#[test]
fn an_array_of_programs_has_room_for_any_index() {
    let mut maps = Maps::new(&[MapSpec::prog_array("jumps", u32::MAX)]);
    let jumps = maps.get_mut("jumps").unwrap();
    jumps.set_program(u32::MAX - 1, Some(TailTarget::ENTRY)).unwrap();
    assert_eq!(jumps.len(), 1);
    jumps.set_program(u32::MAX - 1, None).unwrap();
    assert!(jumps.is_empty());
    assert_eq!(jumps.set_program(u32::MAX, None), Err(MapError::Full));
}
