//! The assembler: jumps of every length, and what it refuses.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use dcenet_core::test_support::{Rung, require};
use dcenet_ebpf::asm::{Asm, AsmError, Function, SAFE_SPAN, UnsetRead};
use dcenet_ebpf::insn::{AtomicOp, Cond, Helper, Insn, IsaLevel, Reg, Reg::*, Size, disassemble, parse};
use dcenet_ebpf::object::{CallChain, MapSpec, Object, ObjectError, ProgramKind};
use proptest::prelude::*;

fn program() -> Asm {
    Asm::program("test", ProgramKind::Classifier)
}

/// Follows jumps as the kernel would and gives the constants moved to `R0`, in order. A conditional jump is taken if its
/// constant is odd.
fn walk(function: &Function) -> Vec<i32> {
    let mut at_slot = vec![None; function.slots()];
    let mut slot = 0;
    for insn in function.insns() {
        at_slot[slot] = Some(*insn);
        slot += insn.slots();
    }
    let (mut pc, mut seen) = (0i64, Vec::new());
    for _ in 0..1_000_000 {
        let insn = at_slot[pc as usize].expect("a jump went into the middle of an instruction");
        pc += insn.slots() as i64;
        match insn {
            Insn::Exit => return seen,
            Insn::Jump { off } => pc += i64::from(off),
            Insn::JumpLong { off } => pc += i64::from(off),
            Insn::JumpIf { cond, src: dcenet_ebpf::insn::Src::Imm(imm), off, .. } => {
                let odd = imm & 1 == 1;
                let taken = if matches!(cond, Cond::Eq | Cond::Set) { odd } else { !odd };
                if taken {
                    pc += i64::from(off);
                }
            }
            Insn::Alu { dst: R0, src: dcenet_ebpf::insn::Src::Imm(imm), .. } => seen.push(imm),
            _ => {}
        }
    }
    panic!("the program does not end");
}

fn fill(asm: &mut Asm, count: usize) {
    for _ in 0..count {
        asm.mov(R1, 0);
    }
}

#[test]
fn a_jump_of_the_safe_span_is_short_and_one_more_is_long() {
    for (span, long) in [(SAFE_SPAN, false), (SAFE_SPAN + 1, true)] {
        let mut asm = program();
        let end = asm.label();
        asm.isa(IsaLevel::V4).jump_if(Cond::Eq, R1, 1, end);
        fill(&mut asm, span);
        asm.bind(end).exit();
        let function = asm.finish().unwrap();
        assert_eq!(function.insns().iter().any(|i| matches!(i, Insn::JumpLong { .. })), long, "span {span}");
        if long {
            assert!(matches!(function.insns()[0], Insn::JumpIf { cond: Cond::Ne, off: 1, .. }));
            assert_eq!(function.insns()[1], Insn::JumpLong { off: span as i32 });
        } else {
            assert!(matches!(function.insns()[0], Insn::JumpIf { cond: Cond::Eq, off, .. } if off as usize == span));
        }
    }
}

#[test]
fn a_bit_test_has_no_inverse_and_jumps_far_all_the_same() {
    let mut asm = program();
    let end = asm.label();
    asm.isa(IsaLevel::V4).short_span(10).jump_if(Cond::Set, R1, 1, end).ret(1);
    fill(&mut asm, 20);
    asm.bind(end).ret(2);
    assert_eq!(walk(&asm.finish().unwrap()), [2]);
}

#[test]
fn at_level_3_far_jumps_go_over_islands_both_ways() {
    let mut asm = program();
    let (far, back, end) = (asm.label(), asm.label(), asm.label());
    asm.mov(R0, 1).jump(far).bind(back).mov(R0, 3).jump(end);
    fill(&mut asm, 100_000);
    asm.bind(far).mov(R0, 2).jump(back);
    fill(&mut asm, 40_000);
    asm.bind(end).exit();
    let function = asm.finish().unwrap();
    assert_eq!(walk(&function), [1, 2, 3]);
    let lint = function.lint();
    assert!(lint.longest_short_jump <= SAFE_SPAN, "{}", lint.longest_short_jump);
    assert_eq!(lint.isa, IsaLevel::V1);
    // 100,000 slots at 10,900 a jump, and the way back and onward: some dozens of slots, not thousands.
    assert!(function.slots() < 140_000 + 100, "{}", function.slots());
}

/// An island that falls between a return and the code of a label must not catch the jumps to that label.
#[test]
fn an_island_after_a_return_is_stepped_over_by_those_who_jump_there() {
    for padding in 0..60 {
        let mut asm = program();
        let (far, here) = (asm.label(), asm.label());
        asm.short_span(40).jump_if(Cond::Eq, R1, 2, far).jump(here);
        fill(&mut asm, padding);
        asm.ret(1).bind(here).load_imm64(R3, 7).ret(2);
        fill(&mut asm, 60);
        asm.bind(far).ret(3);
        assert_eq!(walk(&asm.finish().unwrap()), [2], "padding {padding}");
    }
}

#[test]
fn more_far_jumps_than_islands_carry_are_refused_below_level_4_only() {
    for (isa, fits) in [(IsaLevel::V3, false), (IsaLevel::V4, true)] {
        let mut asm = program();
        let labels: Vec<_> = (0..8_000).map(|_| asm.label()).collect();
        asm.isa(isa);
        for label in &labels {
            asm.jump_if(Cond::Eq, R1, 1, *label);
        }
        asm.ret(0);
        fill(&mut asm, 9_000);
        for label in &labels {
            asm.bind(*label).ret(1);
        }
        let result = asm.finish();
        if fits {
            assert_eq!(walk(&result.unwrap()), [1]);
        } else {
            assert!(matches!(result, Err(AsmError::JumpTooFar { pending: 1.., .. })), "{result:?}");
        }
    }
}

/// A program of random blocks: block `i` moves `i` to `R0` and goes on, each jump forward and back being decided by an odd
/// or even constant. `also` writes more into each block.
fn write_blocks(asm: &mut Asm, plan: &[(u8, usize, bool)], also: impl Fn(&mut Asm, usize)) {
    let count = plan.len();
    let labels: Vec<_> = (0..=count).map(|_| asm.label()).collect();
    // An order of the blocks in memory that differs from the order in which they run.
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by_key(|block| (plan[*block].1 * 7919) % (count + 3));
    asm.jump(labels[0]);
    for block in &order {
        let (padding, _, bit_test) = plan[*block];
        asm.bind(labels[*block]).mov(R0, *block as i32);
        also(asm, *block);
        fill(asm, usize::from(padding));
        let cond = if bit_test { Cond::Set } else { Cond::Eq };
        asm.jump_if(cond, R1, 2, labels[0]).jump_if(cond, R1, 1, labels[block + 1]).ret(-1);
    }
    asm.bind(labels[count]).exit();
}

fn blocks(isa: IsaLevel, span: u16, plan: &[(u8, usize, bool)]) -> (Function, Vec<i32>) {
    let mut asm = program();
    asm.isa(isa).short_span(span);
    write_blocks(&mut asm, plan, |_, _| {});
    (asm.finish().unwrap(), (0..plan.len() as i32).collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn jumps_arrive_whatever_their_length(
        plan in prop::collection::vec((any::<u8>(), any::<u16>().prop_map(usize::from), any::<bool>()), 1..30),
        span in 200u16..2_000,
    ) {
        for isa in [IsaLevel::V3, IsaLevel::V4] {
            let (function, expected) = blocks(isa, span, &plan);
            prop_assert_eq!(walk(&function), expected);
            prop_assert!(function.lint().longest_short_jump <= usize::from(span));
        }
    }

    /// With labels near and far, islands, maps, helpers, local calls and addresses of functions.
    #[test]
    fn a_linked_program_parses_back_from_its_listing(
        plan in prop::collection::vec((any::<u8>(), any::<u16>().prop_map(usize::from), any::<bool>()), 1..30),
        span in 200u16..2_000,
    ) {
        for isa in [IsaLevel::V1, IsaLevel::V2, IsaLevel::V3, IsaLevel::V4] {
            let mut asm = program();
            asm.isa(isa).short_span(span);
            write_blocks(&mut asm, &plan, |asm, block| {
                match block % 4 {
                    0 => asm.load_map(R1, "first"),
                    1 => asm.load_map(R1, "second").call(Helper::MapLookupElem),
                    2 => asm.call_function("callee"),
                    _ => asm.load_function(R2, "callee"),
                };
            });
            let mut callee = Asm::subprogram("callee");
            callee.ret(1);
            let mut object = Object::new();
            object.add_map(MapSpec::array("first", 4, 1)).unwrap();
            object.add_map(MapSpec::hash("second", 4, 4, 1)).unwrap();
            object.add(asm.finish().unwrap()).unwrap().add(callee.finish().unwrap()).unwrap();
            let linked = object.link("test").unwrap();
            let text = disassemble(linked.insns());
            prop_assert_eq!(parse(&text).map_err(|e| e.to_string()), Ok(linked.insns().to_vec()));
        }
    }
}

#[test]
fn mistakes_are_named() {
    let mut asm = program();
    let label = asm.label();
    asm.jump(label).exit();
    assert!(matches!(asm.finish(), Err(AsmError::UnboundLabel { label: l, .. }) if l == label));

    let mut asm = program();
    let label = asm.label();
    asm.bind(label).bind(label).exit();
    assert!(matches!(asm.finish(), Err(AsmError::LabelBoundTwice { .. })));

    let foreign = program().label();
    let mut asm = program();
    asm.bind(foreign).exit();
    assert!(matches!(asm.finish(), Err(AsmError::ForeignLabel { .. })));

    let refused = |write: &dyn Fn(&mut Asm)| {
        let mut asm = program();
        write(&mut asm);
        asm.exit();
        asm.finish().unwrap_err()
    };
    assert!(matches!(
        refused(&|a| {
            a.mov(R1, 1).add(R10, 8);
        }),
        AsmError::WritesFramePointer { slot: 1, .. }
    ));
    for off in [-516, -2, 0] {
        assert!(matches!(
            refused(&|a| {
                a.store(Size::W, R10, off, 0);
            }),
            AsmError::OutsideStack { slot: 0, .. }
        ));
    }
    for off in [-516, 8] {
        assert!(matches!(
            refused(&|a| {
                a.mov(R2, R10).add(R2, off);
            }),
            AsmError::OutsideStack { slot: 1, .. }
        ));
    }
    assert!(matches!(
        refused(&|a| {
            a.atomic(AtomicOp::Add, Size::H, R1, 0, R2);
        }),
        AsmError::NoSuchInsn { .. }
    ));
    assert!(matches!(
        refused(&|a| {
            a.div(R1, 0);
        }),
        AsmError::NoSuchInsn { .. }
    ));
    assert!(matches!(
        refused(&|a| {
            a.lsh32(R1, 32);
        }),
        AsmError::NoSuchInsn { .. }
    ));
    assert!(matches!(
        refused(&|a| {
            a.isa(IsaLevel::V2).atomic(AtomicOp::Xchg, Size::Dw, R1, 0, R2);
        }),
        AsmError::IsaLevel { needs: IsaLevel::V3, level: IsaLevel::V2, .. }
    ));
    assert!(matches!(
        refused(&|a| {
            a.insn(Insn::Jump { off: 0 });
        }),
        AsmError::RawDistance { .. }
    ));
    let mut asm = program();
    asm.mov(R0, 0);
    assert!(matches!(asm.finish(), Err(AsmError::FallsOffEnd { .. })));
    assert!(matches!(program().finish(), Err(AsmError::FallsOffEnd { .. })));
}

#[test]
fn errors_say_where_and_what() {
    let mut asm = program();
    asm.store(Size::Dw, R10, -520, 1).exit();
    assert_eq!(
        asm.finish().unwrap_err().to_string(),
        "function test, slot 0: `*(u64 *)(r10 -520) = 1` is outside the stack, r10-512 up to r10"
    );
}

#[test]
fn lint_finds_dead_code_stack_and_level() {
    let mut asm = program();
    let end = asm.label();
    asm.load_imm64(R3, 1).mov(R2, R10).add(R2, -40).store(Size::W, R10, -8, 0).jump(end);
    asm.load_imm64(R1, 2).mov(R1, 1);
    asm.bind(end).jump_if32(Cond::Lt, R3, 5, end).ret(0);
    let lint = asm.finish().unwrap().lint();
    assert_eq!(lint.slots, 12);
    assert_eq!(lint.unreachable.as_slice(), std::slice::from_ref(&(6..9)));
    assert_eq!(lint.stack_bytes, 40);
    assert_eq!(lint.isa, IsaLevel::V3);
}

#[test]
fn a_listing_reads_as_written() {
    let mut asm = program();
    let miss = asm.label();
    asm.load_map(R1, "seen").mov(R2, Reg::R10).add(R2, -4).call(Helper::MapLookupElem);
    asm.jump_if(Cond::Eq, R0, 0, miss).load(Size::Dw, R0, R0, 8).bind(miss).exit();
    assert_eq!(
        disassemble(asm.finish().unwrap().insns()),
        "   0: r1 = map[0]
   2: r2 = r10
   3: r2 += -4
   4: call map_lookup_elem#1
   5: if r0 == 0 goto +1
   6: r0 = *(u64 *)(r0 +8)
   7: exit
"
    );
}

/// What the verifier says of a program `test` with these functions beside it; nothing where it takes all.
#[cfg(feature = "aya")]
fn verifier(functions: impl IntoIterator<Item = Function>) -> Option<String> {
    use dcenet_ebpf::loader::{AyaLoader, LoadRequest, Loader};

    let mut object = Object::new();
    object.add_map(MapSpec::hash("seen", 4, 8, 1)).unwrap().add_map(MapSpec::prog_array("jumps", 1)).unwrap();
    object.add_map(MapSpec::ringbuf("ring", 4096)).unwrap();
    for function in functions {
        object.add(function).unwrap();
    }
    let error = AyaLoader.load(&object.to_elf().unwrap(), &LoadRequest::default()).err()?;
    Some(error.log().to_owned())
}

#[cfg(not(feature = "aya"))]
fn verifier(_: impl IntoIterator<Item = Function>) -> Option<String> {
    unreachable!("there is a verifier only with a loader")
}

/// Whether [`verifier`] can be asked.
fn has_verifier() -> bool {
    cfg!(feature = "aya") && require(Rung::Kernel)
}

#[test]
fn registers_that_hold_nothing_are_found_as_by_the_verifier() {
    type Write = fn(&mut Asm);
    let unset = |slot, reg| Some(UnsetRead { slot, reg, after_call: false });
    let lost = |slot, reg| Some(UnsetRead { slot, reg, after_call: true });
    let cases: [(&str, Write, Option<UnsetRead>); 16] = [
        (
            "sum of nothing",
            |a| {
                a.add(R2, 1).ret(0);
            },
            unset(0, R2),
        ),
        (
            "second operand",
            |a| {
                a.mov(R2, 1).add(R2, R3).ret(0);
            },
            unset(1, R3),
        ),
        (
            "move of nothing",
            |a| {
                a.mov(R2, R7).ret(0);
            },
            unset(0, R7),
        ),
        (
            "store of nothing",
            |a| {
                a.store(Size::Dw, R10, -8, R4).ret(0);
            },
            unset(0, R4),
        ),
        (
            "no result",
            |a| {
                a.mov(R2, 0).exit();
            },
            unset(1, R0),
        ),
        (
            "argument lost",
            |a| {
                a.mov(R2, 1).call(Helper::KtimeGetNs).mov(R0, R2).exit();
            },
            lost(2, R2),
        ),
        (
            "context lost",
            |a| {
                a.call(Helper::KtimeGetNs).load(Size::W, R0, R1, 0).exit();
            },
            lost(1, R1),
        ),
        (
            "lost to a function",
            |a| {
                a.call_function("callee").mov(R0, R1).exit();
            },
            lost(1, R1),
        ),
        (
            "kept over a call",
            |a| {
                a.mov(R6, R1).call(Helper::KtimeGetNs).load(Size::W, R0, R6, 0).exit();
            },
            None,
        ),
        (
            "missing argument",
            |a| {
                a.load_map(R1, "seen").call(Helper::MapLookupElem).ret(0);
            },
            unset(2, R2),
        ),
        (
            "a tail call has no result",
            |a| {
                a.mov(R0, 1).load_map(R2, "jumps").mov(R3, 0).call(Helper::TailCall).exit();
            },
            lost(5, R0),
        ),
        (
            "the end of a record has no result",
            |a| {
                let full = a.label();
                a.load_map(R1, "ring").mov(R2, 8).mov(R3, 0).call(Helper::RingbufReserve);
                a.jump_if(Cond::Eq, R0, 0, full).mov(R1, R0).mov(R2, 0).call(Helper::RingbufSubmit).bind(full).exit();
            },
            lost(9, R0),
        ),
        (
            "nor has that of a record thrown away",
            |a| {
                let full = a.label();
                a.load_map(R1, "ring").mov(R2, 8).mov(R3, 0).call(Helper::RingbufReserve);
                a.jump_if(Cond::Eq, R0, 0, full).mov(R1, R0).mov(R2, 0).call(Helper::RingbufDiscard).bind(full).exit();
            },
            lost(9, R0),
        ),
        (
            "set on one of two ways",
            |a| {
                let end = a.label();
                a.load(Size::W, R2, R1, 0).jump_if(Cond::Gt, R2, 60, end).mov(R3, 1).bind(end).mov(R0, R3).exit();
            },
            unset(3, R3),
        ),
        (
            "set on both",
            |a| {
                let (other, end) = (a.label(), a.label());
                a.load(Size::W, R2, R1, 0).jump_if(Cond::Gt, R2, 60, other).mov(R3, 1).jump(end);
                a.bind(other).mov(R3, 2).bind(end).mov(R0, R3).exit();
            },
            None,
        ),
        (
            "compare and exchange reads R0",
            |a| {
                a.store(Size::Dw, R10, -8, 0).mov(R2, 1).atomic(AtomicOp::Cmpxchg, Size::Dw, R10, -8, R2).ret(0);
            },
            unset(2, R0),
        ),
    ];
    let kernel = has_verifier();
    for (name, write, expected) in cases {
        let mut asm = program();
        write(&mut asm);
        let mut callee = Asm::subprogram("callee");
        callee.ret(0);
        let (function, callee) = (asm.finish().unwrap(), callee.finish().unwrap());
        assert_eq!(function.lint().unset_reads, Vec::from_iter(expected), "{name}");
        if kernel {
            let log = verifier([function, callee]);
            match expected {
                Some(UnsetRead { reg, .. }) => {
                    let log = log.unwrap_or_else(|| panic!("{name}: the verifier takes it"));
                    let reason = format!("R{} !read_ok", reg.index());
                    assert!(log.contains(&reason), "{name}: {log}");
                }
                None => assert_eq!(log, None, "{name}"),
            }
        }
    }
}

#[test]
fn arguments_are_set_as_far_as_the_role_says() {
    let sum = |mut asm: Asm| {
        asm.mov(R0, R1).add(R0, R3).exit();
        asm.finish().unwrap().lint().unset_reads
    };
    let r3 = [UnsetRead { slot: 1, reg: R3, after_call: false }];
    assert_eq!(sum(program()), r3);
    assert_eq!(sum(Asm::global("f", 2)), r3);
    assert_eq!(sum(Asm::global("f", 3)), []);
    assert_eq!(sum(Asm::subprogram("f")), []);
}

/// A program that calls `f1`, which calls `f2`, and so on; each takes so many bytes of stack.
fn chain(stacks: &[i16]) -> Vec<Function> {
    let name = |at: usize| format!("f{at}");
    let functions = stacks.iter().enumerate().map(|(at, bytes)| {
        let mut asm = if at == 0 { program() } else { Asm::subprogram(name(at)) };
        if *bytes > 0 {
            asm.store(Size::B, R10, -bytes, 1);
        }
        if at + 1 < stacks.len() {
            asm.call_function(name(at + 1));
        }
        asm.ret(0);
        asm.finish().unwrap()
    });
    functions.collect()
}

#[test]
fn the_stack_of_a_chain_of_calls_is_added_up_as_by_the_verifier() {
    // All false ones are so however the kernel rounds.
    let cases: [(&[i16], u32, bool, &str); 6] = [
        (&[512], 512, true, ""),
        (&[256, 256], 512, true, ""),
        (&[256, 128, 300], 256 + 128 + 320, false, "combined stack size"),
        (&[500, 1, 20], 512 + 32 + 32, false, "combined stack size"),
        (&[0; 8], 8 * 32, true, ""),
        (&[0; 9], 9 * 32, false, "the call stack of 9 frames is too deep"),
    ];
    let kernel = has_verifier();
    for (stacks, bytes, fits, reason) in cases {
        let functions = chain(stacks);
        let mut object = Object::new();
        for function in &functions {
            object.add(function.clone()).unwrap();
        }
        let chain = object.deepest_chain("test").unwrap();
        let names: Vec<_> = functions.iter().map(|function| function.name().to_owned()).collect();
        assert_eq!(
            chain,
            CallChain { functions: names, stack_bytes: bytes, frames: stacks.len(), above_tail_calls: 0 }
        );
        assert_eq!(chain.fits(), fits, "{stacks:?}");
        if kernel {
            match verifier(functions) {
                None => assert!(fits, "the verifier takes {stacks:?}"),
                Some(log) => assert!(!fits && log.contains(reason), "{stacks:?}: {log}"),
            }
        }
    }
}

/// Kernels that round to 16 take it, others do not.
#[test]
fn a_chain_that_fits_only_when_rounded_to_16_is_not_said_to_fit() {
    let functions = chain(&[240, 240, 16]);
    let mut object = Object::new();
    for function in &functions {
        object.add(function.clone()).unwrap();
    }
    let chain = object.deepest_chain("test").unwrap();
    assert_eq!((chain.stack_bytes, chain.fits()), (256 + 256 + 32, false));
    if has_verifier() {
        let log = verifier(functions);
        assert!(log.is_none_or(|log| log.contains("combined stack size")), "nothing else is wrong with it");
    }
}

#[test]
fn tail_calls_below_much_stack_do_not_fit() {
    let kernel = has_verifier();
    // Bytes of the program and of a function between, and whether the lowest one makes a tail call.
    for (stacks, tail_call, above, fits) in [
        ([224, 0], true, 256, false),
        ([192, 0], true, 224, true),
        ([256, 64], true, 320, false),
        ([256, 64], false, 0, true),
        ([128, 200], true, 352, false),
    ] {
        let mut main = program();
        main.store(Size::B, R10, -stacks[0], 1).call_function("between").ret(0);
        let mut between = Asm::subprogram("between");
        if stacks[1] > 0 {
            between.store(Size::B, R10, -stacks[1], 1);
        }
        between.call_function("lowest").ret(0);
        let mut lowest = Asm::subprogram("lowest");
        if tail_call {
            lowest.load_map(R2, "jumps").mov(R3, 0).call(Helper::TailCall);
        }
        lowest.ret(0);
        let functions = [main, between, lowest].map(|asm| asm.finish().unwrap());
        let mut object = Object::new();
        object.add_map(MapSpec::prog_array("jumps", 1)).unwrap();
        for function in &functions {
            object.add(function.clone()).unwrap();
        }
        let chain = object.deepest_chain("test").unwrap();
        assert_eq!((chain.above_tail_calls, chain.fits()), (above, fits), "{stacks:?}");
        if !kernel {
            continue;
        }
        match verifier(functions) {
            // Rounded to 16, what is between takes less.
            None => assert!(fits || stacks == [224, 0], "the verifier takes {stacks:?}"),
            Some(log) => assert!(!fits && log.contains("tail_calls are not allowed"), "{stacks:?}: {log}"),
        }
    }
}

#[test]
fn the_deepest_of_several_chains_is_told_and_recursion_refused() {
    let mut main = program();
    main.store(Size::B, R10, -8, 1).call_function("shallow").call_function("deep").ret(0);
    let mut shallow = Asm::subprogram("shallow");
    shallow.store(Size::B, R10, -100, 1).ret(0);
    let mut deep = Asm::subprogram("deep");
    deep.store(Size::B, R10, -64, 1).load_function(R2, "shallow").mov(R1, 3).mov(R3, 0).mov(R4, 0).call(Helper::Loop);
    deep.ret(0);
    let mut object = Object::new();
    for asm in [main, shallow, deep] {
        object.add(asm.finish().unwrap()).unwrap();
    }
    let deepest = object.deepest_chain("test").unwrap();
    assert_eq!((deepest.stack_bytes, deepest.frames), (32 + 64 + 128, 3));
    assert_eq!(deepest.functions, ["test", "deep", "shallow"]);
    assert!(matches!(object.deepest_chain("deep"), Err(ObjectError::NoProgram { .. })));

    let mut main = program();
    main.call_function("one").ret(0);
    let (mut one, mut two) = (Asm::subprogram("one"), Asm::subprogram("two"));
    one.call_function("two").ret(0);
    two.call_function("one").ret(0);
    let mut object = Object::new();
    for asm in [main, one, two] {
        object.add(asm.finish().unwrap()).unwrap();
    }
    assert!(matches!(object.deepest_chain("test"), Err(ObjectError::Recursion { function }) if function == "one"));
}
