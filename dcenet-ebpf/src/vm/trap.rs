//! Why a run stopped.

use crate::insn::{Helper, Insn, Reg};

/// The instruction that cannot go on, and why. The verifier would have refused the program, or the VM does not simulate
/// what it asks for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("program {program}, slot {slot}: `{insn}`: {kind}")]
pub struct Trap {
    /// The name of the program, which after a tail call is not the one that was entered.
    pub program: String,
    /// Where, in slots of 8 bytes.
    pub slot: usize,
    /// The instruction.
    pub insn: Insn,
    /// Why.
    pub kind: TrapKind,
}

/// What an instruction must not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TrapKind {
    /// Reads a register that nothing was written to, or that a call has clobbered.
    #[error("{0} holds nothing")]
    UninitRegister(Reg),
    /// Reads a byte of the stack that nothing was written to, or half of a pointer.
    #[error("the stack byte at r10{0:+} holds nothing, or part of a pointer")]
    UninitStack(i64),
    /// Reaches outside a piece of memory.
    #[error("{size} bytes at offset {offset} of {memory}, which has {len}")]
    OutOfBounds {
        /// Which memory.
        memory: Memory,
        /// Offset of the access.
        offset: i64,
        /// Its size in bytes.
        size: usize,
        /// Size of the memory in bytes.
        len: usize,
    },
    /// Writes to what programs may only read.
    #[error("{0} is read-only")]
    ReadOnly(Memory),
    /// A field of the context that does not exist, is not simulated, or not at this size, or cannot be written.
    #[error("no {size}-byte access at offset {offset} of the context")]
    Context {
        /// Offset of the access.
        offset: i64,
        /// Its size in bytes.
        size: usize,
    },
    /// Reads or writes through a number.
    #[error("{0} holds a number, not an address")]
    NotAPointer(Reg),
    /// Computes with an address as with a number.
    #[error("no such operation on an address")]
    PointerArithmetic,
    /// Compares an address with a number or with an address in other memory.
    #[error("addresses of different memory have no order")]
    PointerComparison,
    /// Would let an address out of the program: to a map, a packet, or as a result.
    #[error("an address would leave the program")]
    PointerLeak,
    /// An address in the packet from before a helper that may have moved the packet.
    #[error("the packet may have moved since this address was taken")]
    StalePacket,
    /// An address in a frame that has returned, or of a record that was submitted.
    #[error("this address is of memory that is gone")]
    Dangling,
    /// Atomic operation elsewhere than on stack, map values and records.
    #[error("no atomic operation on {0}")]
    NoAtomic(Memory),
    /// A helper that the VM does not simulate, or that programs of this kind do not have.
    #[error("the VM does not simulate {0} for this kind of program")]
    Helper(Helper),
    /// An argument that the helper does not take.
    #[error("argument {argument}: {reason}")]
    Argument {
        /// Its number, from 1.
        argument: u8,
        /// What would be accepted.
        reason: &'static str,
    },
    /// Too many instructions ran.
    #[error("the budget of instructions is used up")]
    Budget,
    /// Control leaves the program, or enters the middle of an instruction.
    #[error("control leaves the program")]
    Outside,
    /// More than 8 calls within one another.
    #[error("more than 8 frames")]
    CallDepth,
    /// A reserved record was neither submitted nor discarded.
    #[error("a reserved record is neither submitted nor discarded")]
    UnreleasedRecord,
    /// Takes the address of a value without a lookup, of a map that is no array of one entry.
    #[error("only an array of one entry has a value whose address needs no lookup")]
    DirectValue,
    /// An array of programs holds a program of another VM.
    #[error("the array of programs holds one that this VM does not have; take targets from its own Vm::add")]
    UnknownProgram,
    /// A tail call in what `bpf_loop` calls, of which the verifier says "cannot tail call within callback".
    #[error("no tail call within a callback")]
    TailCallInCallback,
    /// More bytes than one run may clone: 64 MiB.
    #[error("bpf_clone_redirect has sent 64 MiB in one run")]
    Clones,
    /// Headroom, metadata, frame and tailroom are more than 1 MiB together.
    #[error("headroom, metadata, frame and tailroom are more than 1 MiB together; the kernel has a page")]
    FrameSize,
    /// A classifier was given a frame of XDP, or the other way round.
    #[error("classifiers run by Vm::run, XDP programs by Vm::run_xdp")]
    WrongContext,
    /// The run was given other maps than the program has.
    #[error("the maps are not those of the program; make them with Maps::new from the same object")]
    WrongMaps,
}

/// A kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Memory {
    /// The context.
    Context,
    /// The linear part of the packet.
    Packet,
    /// A stack frame.
    Stack,
    /// A value of a map.
    MapValue,
    /// A reserved record of a ring buffer.
    Record,
    /// What has no bytes: a map or function.
    Opaque,
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Context => "the context",
            Self::Packet => "the packet",
            Self::Stack => "the stack",
            Self::MapValue => "a map value",
            Self::Record => "a ring buffer record",
            Self::Opaque => "a map or function",
        })
    }
}
