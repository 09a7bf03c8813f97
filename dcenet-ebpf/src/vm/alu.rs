//! Arithmetic and comparison of numbers (RFC 9669, sections 4.1 to 4.3).

use crate::insn::{AluOp, Cond, Order, Size, SwapWidth, Width};

/// `a op b`; at width 32 the operands are cut and the upper half of the result is zero.
pub(super) fn alu(width: Width, op: AluOp, a: u64, b: u64) -> u64 {
    match width {
        Width::W64 => match op {
            AluOp::Add => a.wrapping_add(b),
            AluOp::Sub => a.wrapping_sub(b),
            AluOp::Mul => a.wrapping_mul(b),
            AluOp::Div => a.checked_div(b).unwrap_or(0),
            AluOp::Or => a | b,
            AluOp::And => a & b,
            AluOp::Lsh => a.wrapping_shl(b as u32),
            AluOp::Rsh => a.wrapping_shr(b as u32),
            AluOp::Mod => a.checked_rem(b).unwrap_or(a),
            AluOp::Xor => a ^ b,
            AluOp::Mov => b,
            AluOp::Arsh => (a as i64).wrapping_shr(b as u32) as u64,
            AluOp::Sdiv if b == 0 => 0,
            AluOp::Sdiv => (a as i64).wrapping_div(b as i64) as u64,
            AluOp::Smod if b == 0 => a,
            AluOp::Smod => (a as i64).wrapping_rem(b as i64) as u64,
        },
        Width::W32 => {
            let (a, b) = (a as u32, b as u32);
            u64::from(match op {
                AluOp::Add => a.wrapping_add(b),
                AluOp::Sub => a.wrapping_sub(b),
                AluOp::Mul => a.wrapping_mul(b),
                AluOp::Div => a.checked_div(b).unwrap_or(0),
                AluOp::Or => a | b,
                AluOp::And => a & b,
                AluOp::Lsh => a.wrapping_shl(b),
                AluOp::Rsh => a.wrapping_shr(b),
                AluOp::Mod => a.checked_rem(b).unwrap_or(a),
                AluOp::Xor => a ^ b,
                AluOp::Mov => b,
                AluOp::Arsh => (a as i32).wrapping_shr(b) as u32,
                AluOp::Sdiv if b == 0 => 0,
                AluOp::Sdiv => (a as i32).wrapping_div(b as i32) as u32,
                AluOp::Smod if b == 0 => a,
                AluOp::Smod => (a as i32).wrapping_rem(b as i32) as u32,
            })
        }
    }
}

pub(super) fn compare(width: Width, cond: Cond, a: u64, b: u64) -> bool {
    // Sign extension keeps the order of both the signed and the unsigned 32-bit numbers.
    let (a, b) = match width {
        Width::W64 => (a, b),
        Width::W32 => (sign_extend(Size::W, a), sign_extend(Size::W, b)),
    };
    let (sa, sb) = (a as i64, b as i64);
    match cond {
        Cond::Eq => a == b,
        Cond::Ne => a != b,
        Cond::Gt => a > b,
        Cond::Ge => a >= b,
        Cond::Lt => a < b,
        Cond::Le => a <= b,
        Cond::Set => a & b != 0,
        Cond::Sgt => sa > sb,
        Cond::Sge => sa >= sb,
        Cond::Slt => sa < sb,
        Cond::Sle => sa <= sb,
    }
}

pub(super) fn sign_extend(from: Size, value: u64) -> u64 {
    match from {
        Size::B => value as i8 as u64,
        Size::H => value as i16 as u64,
        Size::W => value as i32 as u64,
        Size::Dw => value,
    }
}

/// As on a little-endian host, which is what the ELF files are for.
pub(super) fn swap(order: Order, bits: SwapWidth, value: u64) -> u64 {
    match (order, bits) {
        (Order::Le, SwapWidth::W16) => u64::from(value as u16),
        (Order::Le, SwapWidth::W32) => u64::from(value as u32),
        (Order::Le, SwapWidth::W64) => value,
        (_, SwapWidth::W16) => u64::from((value as u16).swap_bytes()),
        (_, SwapWidth::W32) => u64::from((value as u32).swap_bytes()),
        (_, SwapWidth::W64) => value.swap_bytes(),
    }
}
