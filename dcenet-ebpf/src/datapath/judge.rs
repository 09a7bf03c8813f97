//! From a peer's address to what the classifiers are asked.

use super::emitter::{Emitter, ICMP, ICMPV6};
use super::icmp::{ECHO_V4, ECHO_V6};
use super::{Exits, frame};
use crate::abi::{self, BLOCK_ENTRIES, ClassId, Direction, MEMBER_USED, MemberV6, NodeV6, PROBES_V6};
use crate::asm::Label;
use crate::insn::{Cond, Reg::*, Size, SwapWidth};

impl Emitter<'_> {
    /// Fills the classifiers' registers from the key and [`frame::JUDGE`]. Uses every register but `R6` and `R9`.
    pub(super) fn classify(&mut self, members_v6_bits: u32) {
        let [v6, unknown, known] = self.labels();
        self.asm.load(Size::B, R1, R10, frame::VERSION).and(R1, 0x0f).jump_if(Cond::Ne, R1, 4, v6);
        self.class_v4(unknown, known);
        self.asm.bind(v6);
        self.class_v6(members_v6_bits, unknown, known);
        self.asm.bind(unknown).mov(R0, 0).bind(known);
        self.local_id();
        self.question();
    }

    /// `R0 =` the class of the key's IPv4 peer.
    fn class_v4(&mut self, unknown: Label, known: Label) {
        self.asm.load(Size::W, R7, R10, frame::PEER_V4).be(SwapWidth::W32, R7).mov(R8, R7).rsh(R8, 16);
        for shift in [Some(8), Some(0), None] {
            self.asm.mov(R1, R8).rsh(R1, 1);
            self.lookup_index(abi::CLASS_V4, R1);
            self.asm
                .jump_if(Cond::Eq, R0, 0, unknown)
                .and(R8, 1)
                .lsh(R8, 2)
                .add(R0, R8)
                .load(Size::W, R0, R0, 0)
                .jump_if32(Cond::Sge, R0, 0, known);
            match shift {
                Some(by) => {
                    self.asm
                        .and(R0, CHILD_NUMBER)
                        .mov(R8, R0)
                        .lsh(R8, BLOCK_BITS)
                        .mov(R1, R7)
                        .rsh(R1, by)
                        .and(R1, BLOCK_ENTRIES as i32 - 1)
                        .or(R8, R1);
                }
                // A child where there can be none.
                None => {
                    self.asm.jump(unknown);
                }
            }
        }
    }

    /// `R0 =` the class of the key's IPv6 peer: that of the single address, else of the longest prefix.
    fn class_v6(&mut self, members_bits: u32, unknown: Label, known: Label) {
        let [trie, probe, next] = self.labels();
        self.asm
            .load(Size::Dw, R7, R10, frame::PEER)
            .be(SwapWidth::W64, R7)
            .load(Size::Dw, R8, R10, frame::PEER + 8)
            .be(SwapWidth::W64, R8)
            .load_imm64(R2, abi::HASH_HIGH)
            .mov(R1, R7)
            .mul(R1, R2)
            .xor(R1, R8)
            .load_imm64(R2, abi::HASH_LOW)
            .mul(R1, R2)
            .rsh(R1, 32);
        match members_bits {
            32 => {}
            0 => {
                self.asm.mov(R1, 0);
            }
            bits => {
                self.asm.rsh(R1, 32 - bits as i32);
            }
        }
        self.asm.store(Size::Dw, R10, frame::COUNT, 0).bind(probe);
        self.lookup_index(abi::MEMBERS_V6, R1);
        self.asm
            .jump_if(Cond::Eq, R0, 0, trie)
            .load(Size::W, R1, R0, MemberV6::TAG)
            .jump_if(Cond::Eq, R1, 0, trie)
            .jump_if32(Cond::Sge, R1, 0, next)
            .load(Size::Dw, R2, R0, MemberV6::ADDRESS)
            .load(Size::Dw, R3, R10, frame::PEER)
            .xor(R2, R3)
            .load(Size::Dw, R3, R0, MemberV6::ADDRESS + 8)
            .load(Size::Dw, R4, R10, frame::PEER + 8)
            .xor(R3, R4)
            .or(R2, R3)
            .jump_if(Cond::Ne, R2, 0, next)
            .and(R1, (MEMBER_USED - 1) as i32)
            .mov(R0, R1)
            .jump(known)
            .bind(next)
            .load(Size::Dw, R1, R10, frame::COUNT)
            .add(R1, 1)
            .jump_if(Cond::Ge, R1, PROBES_V6 as i32, trie)
            .store(Size::Dw, R10, frame::COUNT, R1)
            .load(Size::W, R1, R10, frame::INDEX)
            .add(R1, 1)
            .and(R1, ((1u64 << members_bits) - 1) as i32)
            .jump(probe)
            .bind(trie);
        self.trie_v6(unknown, known);
    }

    /// `R7` and `R8` are the halves of the address as numbers.
    fn trie_v6(&mut self, unknown: Label, known: Label) {
        let [next, elsewhere] = self.labels();
        self.asm.mov(R1, 0);
        self.lookup_index(abi::NODES_V6, R1);
        self.asm
            .jump_if(Cond::Eq, R0, 0, unknown)
            .load(Size::W, R0, R0, NodeV6::ENTRY)
            .store(Size::Dw, R10, frame::COUNT, 0)
            .bind(next)
            .jump_if32(Cond::Sge, R0, 0, known)
            .and(R0, CHILD_NUMBER)
            .mov(R1, R0)
            .lsh(R1, BLOCK_BITS)
            .store(Size::W, R10, frame::ENTRY, R1);
        self.lookup_index(abi::NODES_V6, R0);
        self.asm
            .jump_if(Cond::Eq, R0, 0, unknown)
            // One branch for both halves: the verifier looks at each anew for every node on the way.
            .load(Size::Dw, R1, R0, NodeV6::MASK_HIGH)
            .and(R1, R7)
            .load(Size::Dw, R2, R0, NodeV6::PREFIX_HIGH)
            .xor(R1, R2)
            .load(Size::Dw, R2, R0, NodeV6::MASK_LOW)
            .and(R2, R8)
            .load(Size::Dw, R3, R0, NodeV6::PREFIX_LOW)
            .xor(R2, R3)
            .or(R1, R2)
            .jump_if(Cond::Ne, R1, 0, elsewhere)
            // R2 = R7 where the shift has the bit of 64, else R8, without a branch, by a mask of that bit's value.
            .load(Size::W, R3, R0, NodeV6::SHIFT)
            .mov(R4, R3)
            .lsh(R4, 57)
            .arsh(R4, 63)
            .mov(R2, R7)
            .xor(R2, R8)
            .and(R2, R4)
            .xor(R2, R8)
            .and(R3, 63)
            .rsh(R2, R3)
            .and(R2, BLOCK_ENTRIES as i32 - 1)
            .load(Size::W, R1, R10, frame::ENTRY)
            .or(R1, R2)
            .store(Size::W, R10, frame::ENTRY, R1)
            .rsh(R1, 1);
        self.lookup_index(abi::CLASS_V6, R1);
        self.asm
            .jump_if(Cond::Eq, R0, 0, unknown)
            .load(Size::W, R1, R10, frame::ENTRY)
            .and(R1, 1)
            .lsh(R1, 2)
            .add(R0, R1)
            .load(Size::W, R0, R0, 0)
            .load(Size::Dw, R1, R10, frame::COUNT)
            .add(R1, 1)
            .store(Size::Dw, R10, frame::COUNT, R1)
            .jump_if(Cond::Le, R1, ADDRESS_BYTES, next)
            // More blocks than an address has bytes: no trie of ours.
            .jump(unknown)
            .bind(elsewhere)
            .load(Size::W, R0, R0, NodeV6::ENTRY)
            .jump_if32(Cond::Slt, R0, 0, unknown)
            .jump(known);
    }

    /// `R7 =` the id of class `R0` in the policy set of the direction in [`frame::JUDGE`].
    fn local_id(&mut self) {
        let [absent, known, ingress, found] = self.labels();
        self.asm.mov(R7, R0).and(R7, 3).lsh(R7, 1).mov(R1, R0).rsh(R1, 2);
        self.asm.load(Size::W, R2, R10, frame::JUDGE).jump_if(Cond::Ne, R2, Direction::Egress as i32, ingress);
        self.lookup_index(abi::LOCAL_IDS_EGRESS, R1);
        self.asm.jump(found).bind(ingress);
        self.lookup_index(abi::LOCAL_IDS_INGRESS, R1);
        self.asm
            .bind(found)
            .jump_if(Cond::Eq, R0, 0, absent)
            .add(R0, R7)
            .load(Size::H, R7, R0, 0)
            .jump(known)
            .bind(absent)
            .mov(R7, 0)
            .bind(known);
    }

    /// Local id, protocol and port or ICMP type of the question.
    fn question(&mut self) {
        let [icmp_v4, icmp_v6, packet, ports, by_ingress, swap, asked] = self.labels();
        let (local, protocol, value) = (Exits::LOCAL_ID, Exits::PROTOCOL, Exits::VALUE);
        self.asm
            .load(Size::B, protocol, R10, frame::PROTOCOL)
            .load(Size::B, R4, R10, frame::VERSION)
            .and(R4, 0x0f)
            .load(Size::W, R5, R10, frame::FLAGS)
            .and(R5, frame::STALE)
            .jump_if(Cond::Eq, protocol, ICMP, icmp_v4)
            .jump_if(Cond::Eq, protocol, ICMPV6, icmp_v6)
            .bind(ports)
            .load(Size::W, R4, R10, frame::JUDGE)
            .jump_if(Cond::Ne, R4, Direction::Egress as i32, by_ingress)
            .load(Size::H, value, R10, frame::PEER_PORT)
            .jump(swap)
            .bind(by_ingress)
            .load(Size::H, value, R10, frame::POD_PORT)
            .bind(swap)
            .be(SwapWidth::W16, value)
            .jump(asked);
        // A flow of ICMP is echo, and its classifier hears of the question, whichever packet brought us here.
        for (label, version, echo) in [(icmp_v4, 4, ECHO_V4), (icmp_v6, 6, ECHO_V6)] {
            self.asm
                .bind(label)
                .jump_if(Cond::Ne, R4, version, ports)
                .jump_if(Cond::Eq, R5, 0, packet)
                .mov(value, echo)
                .jump(asked);
        }
        self.asm.bind(packet).load(Size::W, value, R10, frame::ICMP).and(value, 0xffff).bind(asked).mov(local, R7);
    }
}

/// The part of an entry that is a block's number.
const CHILD_NUMBER: i32 = (abi::CHILD - 1) as i32;

const BLOCK_BITS: i32 = BLOCK_ENTRIES.trailing_zeros() as i32;

const ADDRESS_BYTES: i32 = 16;

const _: () = assert!(MEMBER_USED == 1 << 31 && size_of::<ClassId>() == 4);
