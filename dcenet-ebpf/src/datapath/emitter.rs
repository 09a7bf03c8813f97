//! What all parts of the emitter share.

use std::collections::BTreeMap;

use super::{Judgement, Slot, frame};
use crate::abi::{Direction, Reason};
use crate::asm::{Asm, Label};
use crate::insn::{AtomicOp, Cond, Helper, Reg, Reg::*, Size};
use crate::object::ProgramKind;

/// Writes one program. `R6` holds the context throughout, `R9` the endpoint.
pub(super) struct Emitter<'a> {
    pub(super) asm: Asm,
    pub(super) direction: Direction,
    pub(super) slot: Slot,
    pub(super) judgement: Judgement<'a>,
    pub(super) places: Places,
    /// The code that sends an event, if any part asked for it.
    pub(super) event: Option<Label>,
    /// Where a drop ends, if any part asked for it.
    pub(super) told: Option<Label>,
    drops: BTreeMap<Reason, Label>,
    passes: BTreeMap<Reason, Label>,
}

/// Places that several parts jump to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Places {
    /// Parses whatever the fast path leaves, by copying headers.
    pub(super) slow: Label,
    /// As [`Places::slow`], of a packet for which the stack is not cleared yet; `R8` is the slot.
    pub(super) uncommon: Label,
    /// The fast path's key is complete, the rest of the stack is not cleared yet: find the flow.
    pub(super) common: Label,
    /// The key is complete: find the flow.
    pub(super) lookup: Label,
    /// The packet has no flow: judge it.
    pub(super) judge_packet: Label,
}

impl<'a> Emitter<'a> {
    pub(super) fn new(name: &str, direction: Direction, slot: Slot, judgement: Judgement<'a>) -> Self {
        let mut asm = Asm::program(name, ProgramKind::Classifier);
        let places = Places {
            slow: asm.label(),
            uncommon: asm.label(),
            common: asm.label(),
            lookup: asm.label(),
            judge_packet: asm.label(),
        };
        Self {
            asm,
            direction,
            slot,
            judgement,
            places,
            event: None,
            told: None,
            drops: BTreeMap::new(),
            passes: BTreeMap::new(),
        }
    }

    pub(super) fn labels<const N: usize>(&mut self) -> [Label; N] {
        std::array::from_fn(|_| self.asm.label())
    }

    /// Whether a policy is known.
    pub(super) fn enforces(&self) -> bool {
        matches!(self.judgement, Judgement::Classifiers { .. })
    }

    /// Where packets go that are dropped for this reason.
    pub(super) fn drop(&mut self, reason: Reason) -> Label {
        debug_assert!(!reason.passes());
        *self.drops.entry(reason).or_insert_with(|| self.asm.label())
    }

    /// Where packets go that pass for this reason without more ado.
    pub(super) fn pass(&mut self, reason: Reason) -> Label {
        debug_assert!(reason.passes());
        *self.passes.entry(reason).or_insert_with(|| self.asm.label())
    }

    /// The places asked for by [`Emitter::drop`], in order.
    pub(super) fn take_drops(&mut self) -> BTreeMap<Reason, Label> {
        std::mem::take(&mut self.drops)
    }

    /// The places asked for by [`Emitter::pass`], in order.
    pub(super) fn take_passes(&mut self) -> BTreeMap<Reason, Label> {
        std::mem::take(&mut self.passes)
    }

    /// `R0 =` the value of the map at the key that lies at `key`, or null.
    pub(super) fn lookup(&mut self, map: &str, key: i16) {
        self.asm.load_map(R1, map).mov(R2, R10).add(R2, i32::from(key)).call(Helper::MapLookupElem);
    }

    /// As [`Emitter::lookup`] of an array, by the number in `index`.
    pub(super) fn lookup_index(&mut self, map: &str, index: Reg) {
        self.asm.store(Size::W, R10, frame::INDEX, index);
        self.lookup(map, frame::INDEX);
    }

    /// Stores the value at `value` under the key at `key`; `R0` is 0 or an error.
    pub(super) fn update(&mut self, map: &str, key: i16, value: i16) {
        self.asm
            .load_map(R1, map)
            .mov(R2, R10)
            .add(R2, i32::from(key))
            .mov(R3, R10)
            .add(R3, i32::from(value))
            .mov(R4, BPF_ANY)
            .call(Helper::MapUpdateElem);
    }

    /// Copies packet bytes from the offset in `offset` to the stack, also where the packet is not linear.
    pub(super) fn copy(&mut self, offset: Reg, to: i16, bytes: i32, fail: Label) {
        self.asm
            .mov(R1, R6)
            .mov(R2, offset)
            .mov(R3, R10)
            .add(R3, i32::from(to))
            .mov(R4, bytes)
            .call(Helper::SkbLoadBytes)
            .jump_if(Cond::Ne, R0, 0, fail);
    }

    /// Adds a packet to the counters of type [`crate::abi::Traffic`] at the number in `index`.
    pub(super) fn count(&mut self, map: &str, index: Reg) {
        let absent = self.asm.label();
        self.lookup_index(map, index);
        self.asm.jump_if(Cond::Eq, R0, 0, absent);
        self.add_packet(R0, 0, 8);
        self.asm.bind(absent);
    }

    /// Adds the packet to counters of 8 bytes. Uses `R1`.
    pub(super) fn add_packet(&mut self, base: Reg, packets: i16, bytes: i16) {
        self.asm
            .load(Size::Dw, R1, base, packets)
            .add(R1, 1)
            .store(Size::Dw, base, packets, R1)
            .load(Size::W, R1, R6, SKB_LEN)
            .load(Size::Dw, R2, base, bytes)
            .add(R2, R1)
            .store(Size::Dw, base, bytes, R2);
    }

    /// Adds 1 to a shared counter. Uses `R1`.
    pub(super) fn count_atomic(&mut self, base: Reg, offset: i16) {
        self.asm.mov(R1, 1).atomic(AtomicOp::Add, Size::Dw, base, offset, R1);
    }

    /// Copies 16 bytes, aligned to 8. Uses `R1`.
    pub(super) fn copy_address(&mut self, from: (Reg, i16), to: i16) {
        for half in [0, 8] {
            self.asm.load(Size::Dw, R1, from.0, from.1 + half).store(Size::Dw, R10, to + half, R1);
        }
    }

    /// Sets flags of the packet. Uses `R1`.
    pub(super) fn set_flags(&mut self, flags: i32) {
        self.asm.load(Size::W, R1, R10, frame::FLAGS).or(R1, flags).store(Size::W, R10, frame::FLAGS, R1);
    }

    /// Jumps if one of the flags is set. Uses `R1`.
    pub(super) fn if_flags(&mut self, flags: i32, to: Label) {
        self.asm.load(Size::W, R1, R10, frame::FLAGS).jump_if(Cond::Set, R1, flags, to);
    }
}

/// A 16-bit number as a load from the packet sees it.
pub(super) const fn be16(number: u16) -> i32 {
    number.to_be() as i32
}

// Offsets in struct __sk_buff (include/uapi/linux/bpf.h).
pub(super) const SKB_LEN: i16 = 0;
pub(super) const SKB_VLAN_PRESENT: i16 = 20;
pub(super) const SKB_IFINDEX: i16 = 40;
pub(super) const SKB_TC_CLASSID: i16 = 72;
pub(super) const SKB_DATA: i16 = 76;
pub(super) const SKB_DATA_END: i16 = 80;
pub(super) const SKB_GSO_SIZE: i16 = 176;

// Verdicts (include/uapi/linux/pkt_cls.h). The first leaves the packet to the next filter.
pub(super) const TC_ACT_UNSPEC: i32 = -1;
pub(super) const TC_ACT_SHOT: i32 = 2;

const BPF_ANY: i32 = 0;

// IP protocols (IANA).
pub(super) const ICMP: i32 = 1;
pub(super) const TCP: i32 = 6;
pub(super) const UDP: i32 = 17;
pub(super) const ICMPV6: i32 = 58;
pub(super) const SCTP: i32 = 132;
