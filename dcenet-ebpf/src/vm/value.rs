//! What a register holds: nothing, a number, or an address that cannot be forged.

use super::trap::TrapKind;
use crate::insn::Reg;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    Nothing,
    Number(u64),
    Address(Address),
}

impl Value {
    pub(super) fn number(self, reg: Reg) -> Result<u64, TrapKind> {
        match self {
            Self::Number(number) => Ok(number),
            Self::Nothing => Err(TrapKind::UninitRegister(reg)),
            Self::Address(_) => Err(TrapKind::PointerArithmetic),
        }
    }

    pub(super) fn address(self, reg: Reg) -> Result<Address, TrapKind> {
        match self {
            Self::Address(address) => Ok(address),
            Self::Nothing => Err(TrapKind::UninitRegister(reg)),
            Self::Number(_) => Err(TrapKind::NotAPointer(reg)),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) region: Region,
    pub(super) offset: i64,
}

impl Address {
    pub(super) const fn new(region: Region, offset: i64) -> Self {
        Self { region, offset }
    }

    pub(super) const fn plus(self, by: i64) -> Self {
        Self { region: self.region, offset: self.offset.wrapping_add(by) }
    }
}

/// The memory that an address is in. Two addresses can be compared only in the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Region {
    Context,
    /// The packet; helpers that may move it raise the epoch.
    Packet {
        epoch: u32,
    },
    /// A frame's stack; offsets are negative, from the frame pointer. A later frame at the same depth has another serial.
    Stack {
        depth: u8,
        serial: u32,
    },
    MapValue {
        map: u16,
        slot: u32,
    },
    Record {
        map: u16,
        index: u32,
    },
    /// A map itself, for helpers.
    Map(u16),
    /// A function, for helpers: its first slot.
    Function(u32),
}
