//! Fragments: the head tells the ports, and those that follow it are judged by them.

use super::emitter::Emitter;
use super::frame;
use crate::abi::{self, Fragment, FragmentKey, Reason};
use crate::insn::{Cond, Helper, Reg::*, Size};

impl Emitter<'_> {
    /// Fills in the fragment's key but for the identification; `R8` is the protocol that it goes by. Uses `R1`.
    pub(super) fn fragment_key(&mut self, version: u8) {
        let key = frame::FRAGMENT_KEY;
        self.asm
            .load(Size::H, R1, R10, frame::SLOT)
            .store(Size::H, R10, key + FragmentKey::SLOT, R1)
            .store(Size::B, R10, key + FragmentKey::PROTOCOL, R8)
            .store(Size::B, R10, key + FragmentKey::KIND, i32::from(version << 4 | self.direction as u8));
        self.copy_address((R10, frame::PEER), key + FragmentKey::PEER);
    }

    /// A fragment that is not the head: takes ports and flags from what its head left behind.
    pub(super) fn later_fragment(&mut self) {
        let missing = self.drop(Reason::FragmentWithoutHead);
        let (lookup, judge) = (self.places.lookup, self.places.judge_packet);
        self.lookup(abi::FRAGMENTS, frame::FRAGMENT_KEY);
        self.asm
            .jump_if(Cond::Eq, R0, 0, missing)
            .mov(R7, R0)
            .call(Helper::KtimeGetCoarseNs)
            .load(Size::Dw, R1, R7, Fragment::SEEN)
            .sub(R0, R1)
            .load_imm64(R1, REASSEMBLY_NS)
            .jump_if(Cond::Sgt, R0, R1, missing)
            .load(Size::W, R1, R7, Fragment::POD_PORT)
            .store(Size::W, R10, frame::PORTS, R1)
            .load(Size::B, R1, R7, Fragment::PROTOCOL)
            .store(Size::B, R10, frame::PROTOCOL, R1)
            .load(Size::B, R1, R7, Fragment::VERSION)
            .store(Size::B, R10, frame::VERSION, R1)
            .load(Size::H, R1, R7, Fragment::ICMP)
            .store(Size::W, R10, frame::ICMP, R1)
            .load(Size::W, R1, R7, Fragment::FLAGS)
            .and(R1, frame::STATELESS | frame::NO_LOOKUP)
            .store(Size::W, R10, frame::FLAGS, R1)
            .jump_if(Cond::Set, R1, frame::NO_LOOKUP, judge)
            .jump(lookup);
    }

    /// Notes the head of a fragmented packet that passes. Where there is no room the rest will be dropped.
    pub(super) fn note_head(&mut self) {
        let [head, whole] = self.labels();
        let value = frame::FRAGMENT;
        self.if_flags(frame::HEAD, head);
        self.asm
            .jump(whole)
            .bind(head)
            .and(R1, frame::STATELESS | frame::NO_LOOKUP)
            .store(Size::W, R10, value + Fragment::FLAGS, R1)
            .store(Size::W, R10, value + Fragment::FLAGS + 4, 0)
            .load(Size::W, R1, R10, frame::PORTS)
            .store(Size::W, R10, value + Fragment::POD_PORT, R1)
            .load(Size::B, R1, R10, frame::PROTOCOL)
            .store(Size::B, R10, value + Fragment::PROTOCOL, R1)
            .load(Size::B, R1, R10, frame::VERSION)
            .store(Size::B, R10, value + Fragment::VERSION, R1)
            .load(Size::W, R1, R10, frame::ICMP)
            .store(Size::H, R10, value + Fragment::ICMP, R1)
            .call(Helper::KtimeGetCoarseNs)
            .store(Size::Dw, R10, value + Fragment::SEEN, R0);
        self.update(abi::FRAGMENTS, frame::FRAGMENT_KEY, value);
        self.asm.bind(whole);
    }
}

/// How long a receiver waits for fragments: 30 s in Linux for IPv4 (`IP_FRAG_TIME`, include/net/ip.h), 60 s for IPv6.
const REASSEMBLY_NS: u64 = 60_000_000_000;
