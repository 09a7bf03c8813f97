//! Helpers on internet checksums (RFC 1071, RFC 1624), in the memory's byte order, as of a packet whose checksums are all
//! in the packet (`CHECKSUM_NONE`).

use super::helpers::{EFAULT, EINVAL, errno};
use super::machine::Machine;
use super::trap::TrapKind;
use super::value::Value;
use crate::insn::{Helper, Reg};

/// `BPF_F_HDR_FIELD_MASK`: the size of what changed; 0 where `to` is a difference already.
const FIELD_MASK: u64 = 0xf;
/// `BPF_F_PSEUDO_HDR` and `BPF_F_IPV6` concern `skb->csum` only, which no packet has here.
const PSEUDO_HDR: u64 = 1 << 4;
const MARK_MANGLED_0: u64 = 1 << 5;
const MARK_ENFORCE: u64 = 1 << 6;
const IPV6: u64 = 1 << 7;
/// What UDP sends for a sum of zero, which means "none" there.
const MANGLED_0: u16 = 0xffff;

impl Machine<'_, '_> {
    /// `bpf_l3_csum_replace(skb, offset, from, to, flags)`.
    pub(super) fn l3_csum_replace(&mut self) -> Result<u64, TrapKind> {
        self.csum_replace(Helper::L3CsumReplace, FIELD_MASK, |sum, from, to| {
            // Two bytes are added in 16 bits here, and in 32 for the transport (include/net/checksum.h); 0 and 0xffff differ.
            let (from, to) = (from as u16, to as u16);
            !add16(add16(!sum, !from), to)
        })
    }

    /// `bpf_l4_csum_replace(skb, offset, from, to, flags)`, with `BPF_F_IPV6`, which Linux has since 6.16; earlier ones but
    /// stable kernels that took it refuse it.
    pub(super) fn l4_csum_replace(&mut self) -> Result<u64, TrapKind> {
        let flags = FIELD_MASK | PSEUDO_HDR | MARK_MANGLED_0 | MARK_ENFORCE | IPV6;
        self.csum_replace(Helper::L4CsumReplace, flags, |sum, from, to| {
            replace4(sum, u32::from(from as u16), u32::from(to as u16))
        })
    }

    fn csum_replace(
        &mut self,
        helper: Helper,
        known_flags: u64,
        replace2: impl FnOnce(u16, u64, u64) -> u16,
    ) -> Result<u64, TrapKind> {
        self.context_argument()?;
        let offset = self.number(Reg::R2)? as u32 as usize;
        let (from, to, flags) = (self.number(Reg::R3)?, self.number(Reg::R4)?, self.number(Reg::R5)?);
        self.epoch += 1;
        if flags & !known_flags != 0 {
            return Ok(errno(EINVAL));
        }
        if offset > 0xffff || offset % 2 == 1 {
            return Ok(errno(EFAULT));
        }
        let skb = self.skb(helper)?;
        let Some(place) = skb.packet.get_mut(offset..offset + 2) else { return Ok(errno(EFAULT)) };
        skb.linear = skb.linear.max(offset + 2);
        let sum = u16::from_le_bytes([place[0], place[1]]);
        let mangled = flags & MARK_MANGLED_0 != 0;
        if mangled && flags & MARK_ENFORCE == 0 && sum == 0 {
            return Ok(0);
        }
        let mut new = match flags & FIELD_MASK {
            0 if from == 0 => fold(add32(to as u32, !u32::from(sum))),
            2 => replace2(sum, from, to),
            4 => replace4(sum, from as u32, to as u32),
            _ => return Ok(errno(EINVAL)),
        };
        if mangled && new == 0 {
            new = MANGLED_0;
        }
        place.copy_from_slice(&new.to_le_bytes());
        Ok(0)
    }

    /// `bpf_csum_diff(from, from_size, to, to_size, seed)`, as since Linux 6.13. Before, the kernel gives 32 bits of the
    /// same sum, and EINVAL for sizes that are no multiples of 4 or are more than 512 bytes together.
    pub(super) fn csum_diff(&mut self) -> Result<u64, TrapKind> {
        let from = self.words(Reg::R1, Reg::R2)?;
        let to = self.words(Reg::R3, Reg::R4)?;
        let seed = self.number(Reg::R5)? as u32;
        let sum = match (from.is_empty(), to.is_empty()) {
            (false, false) => add32(sum(&to, seed), !sum(&from, 0)),
            (_, false) => sum(&to, seed),
            (false, true) => !sum(&from, !seed),
            (true, true) => seed,
        };
        Ok(u64::from(!fold(sum)))
    }

    /// The words at an address, the last one filled up with zeros; an address may be null for none.
    fn words(&self, address: Reg, size: Reg) -> Result<Vec<u32>, TrapKind> {
        let len = self.number(size)?;
        if len == 0 && self.regs[address.index()] == Value::Number(0) {
            return Ok(Vec::new());
        }
        let len = if len == 0 { 0 } else { self.length(size)? };
        let bytes = self.bytes(self.address(address)?, len)?;
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
        Ok(bytes.chunks(4).map(word).collect())
    }
}

/// One's complement addition.
fn add32(a: u32, b: u32) -> u32 {
    let (sum, carry) = a.overflowing_add(b);
    sum.wrapping_add(u32::from(carry))
}

fn add16(a: u16, b: u16) -> u16 {
    let (sum, carry) = a.overflowing_add(b);
    sum.wrapping_add(u16::from(carry))
}

fn sum(words: &[u32], seed: u32) -> u32 {
    words.iter().fold(seed, |sum, word| add32(sum, *word))
}

/// The complement of the sum in 16 bits.
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

fn replace4(sum: u16, from: u32, to: u32) -> u16 {
    fold(add32(add32(!u32::from(sum), !from), to))
}
