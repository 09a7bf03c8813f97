//! Encoding, decoding and text of instructions.

use dcenet_ebpf::insn::{
    AluOp, AtomicOp, Cond, DecodeError, Helper, Imm64, Insn, IsaLevel, Order, ParseErrorKind, Reg, Reg::*, Size, Src,
    SwapWidth, Width, decode, disassemble, encode, parse,
};
use proptest::prelude::*;
use proptest::sample::select;

fn reg() -> impl Strategy<Value = Reg> {
    select(Reg::ALL.to_vec())
}

fn src() -> impl Strategy<Value = Src> {
    prop_oneof![reg().prop_map(Src::Reg), any::<i32>().prop_map(Src::Imm)]
}

fn width() -> impl Strategy<Value = Width> {
    select(vec![Width::W32, Width::W64])
}

fn size() -> impl Strategy<Value = Size> {
    select(vec![Size::B, Size::H, Size::W, Size::Dw])
}

fn insn() -> impl Strategy<Value = Insn> {
    let alu = (width(), select(AluOp::ALL.to_vec()), reg(), src()).prop_map(|(width, op, dst, src)| Insn::Alu {
        width,
        op,
        dst,
        src,
    });
    let neg = (width(), reg()).prop_map(|(width, dst)| Insn::Neg { width, dst });
    let movsx = (
        select(vec![
            (Width::W32, Size::B),
            (Width::W32, Size::H),
            (Width::W64, Size::B),
            (Width::W64, Size::H),
            (Width::W64, Size::W),
        ]),
        reg(),
        reg(),
    )
        .prop_map(|((width, from), dst, src)| Insn::MovSx { width, from, dst, src });
    let swap = (
        select(vec![Order::Le, Order::Be, Order::Reverse]),
        select(vec![SwapWidth::W16, SwapWidth::W32, SwapWidth::W64]),
        reg(),
    )
        .prop_map(|(order, bits, dst)| Insn::Swap { order, bits, dst });
    let load =
        (size(), reg(), reg(), any::<i16>()).prop_map(|(size, dst, base, off)| Insn::Load { size, dst, base, off });
    let load_sx = (select(vec![Size::B, Size::H, Size::W]), reg(), reg(), any::<i16>())
        .prop_map(|(size, dst, base, off)| Insn::LoadSx { size, dst, base, off });
    let store =
        (size(), reg(), any::<i16>(), src()).prop_map(|(size, base, off, src)| Insn::Store { size, base, off, src });
    let atomic = (select(AtomicOp::ALL.to_vec()), select(vec![Size::W, Size::Dw]), reg(), any::<i16>(), reg())
        .prop_map(|(op, size, base, off, src)| Insn::Atomic { op, size, base, off, src });
    let imm64 = prop_oneof![
        any::<u64>().prop_map(Imm64::Value),
        any::<i32>().prop_map(Imm64::MapFd),
        any::<(i32, u32)>().prop_map(|(fd, offset)| Imm64::MapValue { fd, offset }),
        any::<i32>().prop_map(Imm64::Func),
    ];
    let load_imm64 = (reg(), imm64).prop_map(|(dst, value)| Insn::LoadImm64 { dst, value });
    let jump_if = (width(), select(Cond::ALL.to_vec()), reg(), src(), any::<i16>())
        .prop_map(|(width, cond, dst, src, off)| Insn::JumpIf { width, cond, dst, src, off });
    prop_oneof![
        alu,
        neg,
        movsx,
        swap,
        load,
        load_sx,
        store,
        atomic,
        load_imm64,
        jump_if,
        any::<i16>().prop_map(|off| Insn::Jump { off }),
        any::<i32>().prop_map(|off| Insn::JumpLong { off }),
        any::<i32>().prop_map(|off| Insn::CallLocal { off }),
        select(Helper::ALL.to_vec()).prop_map(|helper| Insn::Call { helper }),
        Just(Insn::Exit),
    ]
}

proptest! {
    #[test]
    fn what_is_encoded_decodes_to_the_same(insns in prop::collection::vec(insn(), 0..20)) {
        let code = encode(&insns);
        prop_assert_eq!(code.len(), insns.iter().map(Insn::slots).sum::<usize>() * 8);
        prop_assert_eq!(decode(&code).unwrap(), insns);
    }

    #[test]
    fn a_listing_parses_back(insns in prop::collection::vec(insn(), 0..20)) {
        let text = disassemble(&insns);
        prop_assert_eq!(parse(&text).map_err(|e| e.to_string()), Ok(insns.clone()), "{}", text);
        for insn in insns {
            prop_assert_eq!(insn.to_string().parse::<Insn>(), Ok(insn));
        }
    }

    /// A character lost or changed: an error with a place in the text, or code that the text says.
    #[test]
    fn a_damaged_listing_is_refused_in_place_or_means_what_it_says(
        insns in prop::collection::vec(insn(), 1..6),
        at in any::<prop::sample::Index>(),
        with in "[ -~\n\u{e4}]{0,2}",
    ) {
        let text = disassemble(&insns);
        let at = at.index(text.len());
        let damaged = format!("{}{with}{}", &text[..at], &text[at + 1..]);
        match parse(&damaged) {
            Ok(code) => prop_assert_eq!(parse(&disassemble(&code)), Ok(code)),
            Err(error) => {
                let line = damaged.lines().nth(error.line - 1).expect("a line of the text");
                prop_assert!(error.column >= 1 && error.column <= line.chars().count() + 1, "{}", error);
            }
        }
    }

    #[test]
    fn what_decodes_encodes_to_the_same_bytes(code in prop::collection::vec(any::<u8>(), 16)) {
        if let Ok(insns) = decode(&code) {
            prop_assert_eq!(encode(&insns), code);
        }
    }
}

/// Bytes written by hand from RFC 9669: code, registers (source high), offset, constant.
#[test]
fn encodings_are_those_of_the_rfc() {
    let cases: &[(Insn, &[u8])] = &[
        // ADD|K|ALU64 = 0x00|0x00|0x07
        (
            Insn::Alu { width: Width::W64, op: AluOp::Add, dst: R1, src: Src::Imm(-2) },
            &[0x07, 0x01, 0, 0, 0xfe, 0xff, 0xff, 0xff],
        ),
        // SDIV|X|ALU = 0x30|0x08|0x04, offset 1
        (Insn::Alu { width: Width::W32, op: AluOp::Sdiv, dst: R2, src: Src::Reg(R3) }, &[0x3c, 0x32, 1, 0, 0, 0, 0, 0]),
        // MOV|X|ALU64 with offset 16: MOVSX from 16 bits
        (Insn::MovSx { width: Width::W64, from: Size::H, dst: R4, src: R5 }, &[0xbf, 0x54, 16, 0, 0, 0, 0, 0]),
        // NEG|ALU64
        (Insn::Neg { width: Width::W64, dst: R9 }, &[0x87, 0x09, 0, 0, 0, 0, 0, 0]),
        // END|TO_BE|ALU = 0xd0|0x08|0x04
        (Insn::Swap { order: Order::Be, bits: SwapWidth::W16, dst: R0 }, &[0xdc, 0x00, 0, 0, 16, 0, 0, 0]),
        // END|ALU64: unconditional swap
        (Insn::Swap { order: Order::Reverse, bits: SwapWidth::W64, dst: R0 }, &[0xd7, 0x00, 0, 0, 64, 0, 0, 0]),
        // MEM|W|LDX = 0x60|0x00|0x01
        (Insn::Load { size: Size::W, dst: R1, base: R10, off: -4 }, &[0x61, 0xa1, 0xfc, 0xff, 0, 0, 0, 0]),
        // MEMSX|B|LDX = 0x80|0x10|0x01
        (Insn::LoadSx { size: Size::B, dst: R1, base: R2, off: 3 }, &[0x91, 0x21, 3, 0, 0, 0, 0, 0]),
        // MEM|DW|ST = 0x60|0x18|0x02
        (Insn::Store { size: Size::Dw, base: R10, off: -8, src: Src::Imm(7) }, &[0x7a, 0x0a, 0xf8, 0xff, 7, 0, 0, 0]),
        // MEM|H|STX = 0x60|0x08|0x03
        (Insn::Store { size: Size::H, base: R6, off: 2, src: Src::Reg(R7) }, &[0x6b, 0x76, 2, 0, 0, 0, 0, 0]),
        // ATOMIC|DW|STX = 0xc0|0x18|0x03; ADD|FETCH = 1
        (
            Insn::Atomic { op: AtomicOp::FetchAdd, size: Size::Dw, base: R1, off: 8, src: R2 },
            &[0xdb, 0x21, 8, 0, 1, 0, 0, 0],
        ),
        // CMPXCHG = 0xf0|FETCH
        (
            Insn::Atomic { op: AtomicOp::Cmpxchg, size: Size::W, base: R1, off: 0, src: R2 },
            &[0xc3, 0x21, 0, 0, 0xf1, 0, 0, 0],
        ),
        // IMM|DW|LD = 0x18, low word, high word
        (
            Insn::LoadImm64 { dst: R1, value: Imm64::Value(0x1122_3344_5566_7788) },
            &[0x18, 0x01, 0, 0, 0x88, 0x77, 0x66, 0x55, 0, 0, 0, 0, 0x44, 0x33, 0x22, 0x11],
        ),
        // source 1: map by file descriptor; source 2: map value
        (Insn::LoadImm64 { dst: R1, value: Imm64::MapFd(5) }, &[0x18, 0x11, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (
            Insn::LoadImm64 { dst: R1, value: Imm64::MapValue { fd: 5, offset: 9 } },
            &[0x18, 0x21, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0],
        ),
        // JA|JMP, JA|JMP32 with the distance in the constant
        (Insn::Jump { off: -1 }, &[0x05, 0x00, 0xff, 0xff, 0, 0, 0, 0]),
        (Insn::JumpLong { off: 0x1_0000 }, &[0x06, 0x00, 0, 0, 0, 0, 1, 0]),
        // JSLE|X|JMP32 = 0xd0|0x08|0x06
        (
            Insn::JumpIf { width: Width::W32, cond: Cond::Sle, dst: R1, src: Src::Reg(R2), off: 4 },
            &[0xde, 0x21, 4, 0, 0, 0, 0, 0],
        ),
        // JSET|K|JMP = 0x40|0x05
        (
            Insn::JumpIf { width: Width::W64, cond: Cond::Set, dst: R3, src: Src::Imm(0x80), off: 1 },
            &[0x45, 0x03, 1, 0, 0x80, 0, 0, 0],
        ),
        // CALL|JMP of helper 1, of the next function (source 1); EXIT|JMP
        (Insn::Call { helper: Helper::MapLookupElem }, &[0x85, 0x00, 0, 0, 1, 0, 0, 0]),
        (Insn::CallLocal { off: 2 }, &[0x85, 0x10, 0, 0, 2, 0, 0, 0]),
        (Insn::Exit, &[0x95, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (insn, bytes) in cases {
        assert_eq!(encode(&[*insn]), *bytes, "{insn}");
    }
}

#[test]
fn reserved_fields_and_broken_code_are_refused() {
    let invalid: &[&[u8]] = &[
        &[0x95, 0x01, 0, 0, 0, 0, 0, 0],                         // exit with a register
        &[0x07, 0x21, 0, 0, 1, 0, 0, 0],                         // add constant, with a source register
        &[0x0f, 0x21, 0, 0, 1, 0, 0, 0],                         // add register, with a constant
        &[0x0f, 0x21, 1, 0, 0, 0, 0, 0],                         // add with the offset of signed division
        &[0x07, 0x0b, 0, 0, 1, 0, 0, 0],                         // register 11
        &[0xd3, 0x21, 0, 0, 0, 0, 0, 0],                         // atomic of one byte
        &[0xdc, 0x00, 0, 0, 8, 0, 0, 0],                         // byte swap of 8 bits
        &[0x99, 0x21, 0, 0, 0, 0, 0, 0],                         // sign-extending load of 8 bytes
        &[0x18, 0x71, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // pseudo source 7
        &[0x20, 0x00, 0, 0, 0, 0, 0, 0],                         // legacy packet access
    ];
    for bytes in invalid {
        assert!(matches!(decode(bytes), Err(DecodeError::Invalid { slot: 0, .. })), "{bytes:02x?}");
    }
    let exit = [0x95, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(decode(&exit[..5]), Err(DecodeError::Truncated { slot: 0 }));
    let half = [exit, [0x18, 1, 0, 0, 0, 0, 0, 0]].concat();
    assert_eq!(decode(&half), Err(DecodeError::Truncated { slot: 1 }));
    let unknown = [0x85, 0, 0, 0, 0xff, 0xff, 0, 0];
    assert_eq!(decode(&unknown), Err(DecodeError::UnknownHelper { slot: 0, id: 0xffff }));
}

#[test]
fn text_is_the_verifiers() {
    let insns = [
        Insn::Alu { width: Width::W64, op: AluOp::Mov, dst: R6, src: Src::Reg(R1) },
        Insn::Alu { width: Width::W32, op: AluOp::Arsh, dst: R6, src: Src::Imm(3) },
        Insn::MovSx { width: Width::W32, from: Size::B, dst: R6, src: R1 },
        Insn::Neg { width: Width::W32, dst: R2 },
        Insn::Swap { order: Order::Be, bits: SwapWidth::W16, dst: R2 },
        Insn::Load { size: Size::H, dst: R2, base: R6, off: 12 },
        Insn::LoadSx { size: Size::W, dst: R2, base: R6, off: -12 },
        Insn::Store { size: Size::Dw, base: R10, off: -8, src: Src::Reg(R2) },
        Insn::LoadImm64 { dst: R1, value: Imm64::MapFd(2) },
        Insn::LoadImm64 { dst: R1, value: Imm64::Value(1 << 40) },
        Insn::Atomic { op: AtomicOp::Add, size: Size::Dw, base: R0, off: 0, src: R1 },
        Insn::Atomic { op: AtomicOp::Cmpxchg, size: Size::W, base: R3, off: 4, src: R1 },
        Insn::JumpIf { width: Width::W32, cond: Cond::Sgt, dst: R1, src: Src::Reg(R2), off: 2 },
        Insn::JumpIf { width: Width::W64, cond: Cond::Set, dst: R1, src: Src::Imm(16), off: -2 },
        Insn::Jump { off: 1 },
        Insn::JumpLong { off: 70_000 },
        Insn::Call { helper: Helper::RingbufOutput },
        Insn::CallLocal { off: 5 },
        Insn::Exit,
    ];
    let golden = "   0: r6 = r1
   1: w6 s>>= 3
   2: w6 = (s8)w1
   3: w2 = -w2
   4: r2 = be16 r2
   5: r2 = *(u16 *)(r6 +12)
   6: r2 = *(s32 *)(r6 -12)
   7: *(u64 *)(r10 -8) = r2
   8: r1 = map[2]
  10: r1 = 0x10000000000 ll
  12: lock *(u64 *)(r0 +0) += r1
  13: r0 = atomic_cmpxchg((u32 *)(r3 +4), r0, r1)
  14: if w1 s> w2 goto +2
  15: if r1 & 16 goto -2
  16: goto +1
  17: gotol +70000
  18: call ringbuf_output#130
  19: call pc+5
  20: exit
";
    assert_eq!(disassemble(&insns), golden);
}

#[test]
fn levels_are_those_that_brought_the_instruction() {
    let branch = |width, cond| Insn::JumpIf { width, cond, dst: R1, src: Src::Imm(0), off: 0 };
    assert_eq!(branch(Width::W64, Cond::Gt).isa_level(), IsaLevel::V1);
    assert_eq!(branch(Width::W64, Cond::Lt).isa_level(), IsaLevel::V2);
    assert_eq!(branch(Width::W32, Cond::Eq).isa_level(), IsaLevel::V3);
    assert_eq!(Insn::JumpLong { off: 0 }.isa_level(), IsaLevel::V4);
}

#[test]
fn mistakes_in_a_listing_are_named_with_their_place() {
    let cases = [
        ("r0 = 1\n  r0 += r11", "line 2, column 9: \"r11\" stands where a register from r0 to r10 is due"),
        ("r0 = w1", "line 1, column 6: \"w1\" stands where a 64-bit register is due"),
        ("r0 =", "line 1, column 5: \"\" stands where a number is due"),
        ("r0 = 4294967296", "line 1, column 6: 4294967296 does not fit into a constant's 32 bits"),
        ("goto +40000", "line 1, column 6: 40000 does not fit into a jump's 16 bits"),
        ("goto 5", "line 1, column 6: \"5\" stands where a number with its sign is due"),
        (
            "   0: r0 = 1\n   2: exit",
            "line 2, column 4: the instruction has slot 1, not 2; leave slots out, or number them all",
        ),
        ("call map_lookup_elem#2", "line 1, column 6: dcenet_ebpf::insn::Helper knows no map_lookup_elem#2"),
        ("r1 = be16 r2", "line 1, column 11: r2 stands where r1 is due once more"),
        ("r1 = 0x12345678901234567 ll", "line 1, column 6: 0x12345678901234567 does not fit into 64 bits"),
        ("exit 1", "line 1, column 6: \"1\" stands where the end of the line is due"),
        (
            "*(u8 *)(r1 +0) = r2 ; fine\nlock *(u8 *)(r1 +0) += r2",
            "line 2, column 8: \"u8 *)(r1 +0) += r2\" stands where u32 or u64 is due",
        ),
        ("w1 = *(u8 *)(r1 +0)", "line 1, column 1: \"w1 = *(u8 *)(r1 +0)\" stands where a 64-bit register is due"),
        (
            "r1 = atomic64_xchg((u32 *)(r2 +0), r1)",
            "line 1, column 12: \"64_xchg((u32 *)(r2 +0), r1)\" stands where 64 for u64, and nothing for u32 is due",
        ),
        ("\u{e4}", "line 1, column 1: \"\u{e4}\" stands where an instruction is due"),
    ];
    for (text, expected) in cases {
        assert_eq!(parse(text).expect_err(text).to_string(), expected, "{text}");
    }
    let error = parse("call nothing#1").expect_err("no such helper");
    assert_eq!(error.kind, ParseErrorKind::Helper { name: "nothing".to_owned(), id: 1 });
    assert_eq!(parse("\n ; only words\n"), Ok(Vec::new()));
}
