//! What the datapath asks of a policy: code that judges a new flow.

use std::cell::Cell;
use std::ops::Range;

use crate::asm::{Asm, Function, Label};
use crate::insn::Reg;
use crate::object::MapSpec;

/// Writes the code that judges new flows of one direction.
///
/// The code is placed in both programs of an endpoint, for each of them may meet a flow that the other direction
/// admitted, so `emit` is called more than once and must write the same each time.
pub trait EmitClassifier {
    /// Writes the code. Control enters at its first instruction and leaves only by the labels of `exits`.
    ///
    /// On entry:
    /// - [`Exits::LOCAL_ID`]: the policy set's number of the peer's class, 0 for a peer that it does not know;
    /// - [`Exits::PROTOCOL`]: the IP protocol;
    /// - [`Exits::VALUE`]: the port that the flow goes to (TCP, UDP, SCTP), `type << 8 | code` (ICMP on IPv4, ICMPv6 on
    ///   IPv6), or 0.
    ///
    /// On exit [`Exits::RULE`] holds the id of the rule that decided. The code may use [`Exits::SCRATCH`], the three
    /// registers of its input and the stack in [`Exits::STACK`]; it must leave `R6`, `R9` and the rest of the stack
    /// alone. It may call helpers, which change neither `R6` to `R9` nor the stack.
    ///
    /// A label that the code does not use it must not ask for: the verifier refuses code that nothing leads to.
    fn emit(&self, asm: &mut Asm, exits: &Exits);

    /// Maps that the code refers to, added to the object once. Their names must differ from those of [`crate::abi`]
    /// and, where two classifiers are not the same, from each other's.
    fn maps(&self) -> Vec<MapSpec> {
        Vec::new()
    }

    /// Subprograms that the code calls, added to the object once.
    fn functions(&self) -> Vec<Function> {
        Vec::new()
    }
}

/// Where a classifier's code goes when it has decided, and what it can use.
#[derive(Debug)]
pub struct Exits {
    allow: Label,
    deny: Label,
    allow_used: Cell<bool>,
    deny_used: Cell<bool>,
}

impl Exits {
    /// Holds the peer's local id on entry, 0 to 65,535.
    pub const LOCAL_ID: Reg = Reg::R1;
    /// Holds the IP protocol on entry, 0 to 255.
    pub const PROTOCOL: Reg = Reg::R2;
    /// Holds the port or ICMP type and code on entry, 0 to 65,535.
    pub const VALUE: Reg = Reg::R3;
    /// Holds the rule's id on exit; the lower 32 bits count.
    pub const RULE: Reg = Reg::R0;
    /// Free for the code. The last two are kept over calls.
    pub const SCRATCH: [Reg; 4] = [Reg::R4, Reg::R5, Reg::R7, Reg::R8];
    /// Offsets from `R10` that are free for the code.
    pub const STACK: Range<i16> = -512..-super::frame::BYTES;

    pub(super) fn new(asm: &mut Asm) -> Self {
        Self { allow: asm.label(), deny: asm.label(), allow_used: Cell::new(false), deny_used: Cell::new(false) }
    }

    /// Where flows go that are allowed.
    pub fn allow(&self) -> Label {
        self.allow_used.set(true);
        self.allow
    }

    /// Where flows go that are denied.
    pub fn deny(&self) -> Label {
        self.deny_used.set(true);
        self.deny
    }

    pub(super) fn allow_used(&self) -> bool {
        self.allow_used.get()
    }

    pub(super) fn deny_used(&self) -> bool {
        self.deny_used.get()
    }
}

/// Allows everything, by one rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowAll {
    /// The rule's id.
    pub rule: u32,
}

impl EmitClassifier for AllowAll {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        asm.mov32(Exits::RULE, self.rule.cast_signed()).jump(exits.allow());
    }
}

/// Denies everything, by one rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DenyAll {
    /// The rule's id.
    pub rule: u32,
}

impl EmitClassifier for DenyAll {
    fn emit(&self, asm: &mut Asm, exits: &Exits) {
        asm.mov32(Exits::RULE, self.rule.cast_signed()).jump(exits.deny());
    }
}
