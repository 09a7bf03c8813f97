//! Loads and stores.

use super::machine::Machine;
use super::packet::Field;
use super::trap::{Memory, TrapKind};
use super::value::{Address, Region, Value};
use crate::asm::STACK_BYTES;
use crate::insn::{Reg, Size};

const STACK: usize = STACK_BYTES as usize;

/// The memory of one call: bytes, which of them were written, and addresses spilled to it.
#[derive(Debug, Clone)]
pub(super) struct Stack {
    bytes: [u8; STACK],
    written: [u64; STACK / 64],
    spills: [Option<Address>; STACK / 8],
    /// Whether any spill was made, as clearing them all would cost more than most calls.
    spilled: bool,
    pub(super) serial: u32,
}

impl Stack {
    pub(super) const fn new() -> Self {
        Self { bytes: [0; STACK], written: [0; STACK / 64], spills: [None; STACK / 8], spilled: false, serial: 0 }
    }

    /// Forgets what an earlier call left.
    pub(super) fn enter(&mut self) {
        self.written = [0; STACK / 64];
        if std::mem::take(&mut self.spilled) {
            self.spills = [None; STACK / 8];
        }
        self.serial = self.serial.wrapping_add(1);
    }

    /// `at` counts from the lowest byte.
    fn is_written(&self, at: usize, len: usize) -> Result<(), TrapKind> {
        // Accesses of up to 8 bytes seldom cross a word of the bitmap.
        let (word, bit) = (at / 64, at % 64);
        if bit + len <= 64 {
            let mask = (u64::MAX >> (64 - len)) << bit;
            if self.written[word] & mask == mask {
                return Ok(());
            }
        }
        match (at..at + len).find(|byte| self.written[byte / 64] >> (byte % 64) & 1 == 0) {
            None => Ok(()),
            Some(byte) => Err(TrapKind::UninitStack(byte as i64 - STACK as i64)),
        }
    }

    fn mark(&mut self, at: usize, len: usize, written: bool) {
        for byte in at..at + len {
            let bit = 1 << (byte % 64);
            if written {
                self.written[byte / 64] |= bit;
            } else {
                self.written[byte / 64] &= !bit;
            }
        }
    }

    fn forget_spills(&mut self, at: usize, len: usize) {
        if self.spilled {
            for spill in &mut self.spills[at / 8..(at + len).div_ceil(8)] {
                *spill = None;
            }
        }
    }

    /// Bytes are about to be written: what was spilled under them is lost.
    fn overwrite(&mut self, at: usize, len: usize) -> &mut [u8] {
        self.forget_spills(at, len);
        let (word, bit) = (at / 64, at % 64);
        if len > 0 && bit + len <= 64 {
            self.written[word] |= (u64::MAX >> (64 - len)) << bit;
        } else {
            self.mark(at, len, true);
        }
        &mut self.bytes[at..at + len]
    }

    fn spill(&mut self, at: usize, address: Address) {
        self.mark(at, 8, false);
        self.spills[at / 8] = Some(address);
        self.spilled = true;
    }
}

impl Machine<'_, '_> {
    pub(super) fn load(&self, address: Address, size: Size) -> Result<Value, TrapKind> {
        let len = size.bytes();
        match address.region {
            Region::Context => self.load_context(address.offset, len),
            Region::Stack { depth, serial } if len == 8 => {
                let stack = self.stack(depth, serial)?;
                let at = stack_offset(address.offset, len)?;
                if stack.spilled
                    && at.is_multiple_of(8)
                    && let Some(spilled) = stack.spills[at / 8]
                {
                    return Ok(Value::Address(spilled));
                }
                self.bytes(address, len).map(little_endian)
            }
            _ => self.bytes(address, len).map(little_endian),
        }
    }

    pub(super) fn store(&mut self, address: Address, size: Size, value: Value, from: Reg) -> Result<(), TrapKind> {
        let len = size.bytes();
        let number = match value {
            Value::Nothing => return Err(TrapKind::UninitRegister(from)),
            Value::Number(number) => number,
            Value::Address(spilled) => {
                let Region::Stack { depth, serial } = address.region else { return Err(TrapKind::PointerLeak) };
                let at = stack_offset(address.offset, len)?;
                if len != 8 || !at.is_multiple_of(8) {
                    return Err(TrapKind::PointerLeak);
                }
                self.stack_mut(depth, serial)?.spill(at, spilled);
                return Ok(());
            }
        };
        let bytes = &number.to_le_bytes()[..len];
        if address.region == Region::Context {
            let at = usize::try_from(address.offset).ok().filter(|at| self.packet.is_writable(*at, len));
            let at = at.ok_or(TrapKind::Context { offset: address.offset, size: len })?;
            self.context[at..at + len].copy_from_slice(bytes);
        } else {
            self.bytes_mut(address, len)?.copy_from_slice(bytes);
        }
        Ok(())
    }

    /// Bytes to read, all of which hold numbers.
    pub(super) fn bytes(&self, address: Address, len: usize) -> Result<&[u8], TrapKind> {
        let Address { region, offset } = address;
        match region {
            Region::Packet { epoch } if epoch != self.epoch => Err(TrapKind::StalePacket),
            Region::Packet { .. } => self.packet.bytes(offset, len),
            Region::Stack { depth, serial } => {
                let at = stack_offset(offset, len)?;
                let stack = self.stack(depth, serial)?;
                if len > 0 {
                    stack.is_written(at, len)?;
                }
                Ok(&stack.bytes[at..at + len])
            }
            Region::MapValue { map, slot } => {
                let value = self.maps.at(map.into()).ok_or(TrapKind::WrongMaps)?.value(slot);
                let at = within(Memory::MapValue, offset, len, value.len())?;
                Ok(&value[at..at + len])
            }
            Region::Record { map, index } => {
                let map = self.maps.at(map.into()).ok_or(TrapKind::WrongMaps)?;
                let record = map.record(index).ok_or(TrapKind::Dangling)?;
                let at = within(Memory::Record, offset, len, record.len())?;
                Ok(&record[at..at + len])
            }
            Region::Context => Err(TrapKind::Context { offset, size: len }),
            Region::Map(_) | Region::Function(_) => out_of_bounds(Memory::Opaque, offset, len, 0),
        }
    }

    /// Bytes to write; on the stack they count as written from now on.
    pub(super) fn bytes_mut(&mut self, address: Address, len: usize) -> Result<&mut [u8], TrapKind> {
        let Address { region, offset } = address;
        match region {
            Region::Packet { epoch } if epoch != self.epoch => Err(TrapKind::StalePacket),
            Region::Packet { .. } => self.packet.bytes_mut(offset, len),
            Region::Stack { depth, serial } => {
                let at = stack_offset(offset, len)?;
                Ok(self.stack_mut(depth, serial)?.overwrite(at, len))
            }
            Region::MapValue { map, slot } => {
                let map = self.maps.at_mut(map.into()).ok_or(TrapKind::WrongMaps)?;
                if map.is_read_only() {
                    return Err(TrapKind::ReadOnly(Memory::MapValue));
                }
                let value = map.value_mut(slot);
                let at = within(Memory::MapValue, offset, len, value.len())?;
                Ok(&mut value[at..at + len])
            }
            Region::Record { map, index } => {
                let map = self.maps.at_mut(map.into()).ok_or(TrapKind::WrongMaps)?;
                let record = map.record_mut(index).ok_or(TrapKind::Dangling)?;
                let at = within(Memory::Record, offset, len, record.len())?;
                Ok(&mut record[at..at + len])
            }
            Region::Context => Err(TrapKind::Context { offset, size: len }),
            Region::Map(_) | Region::Function(_) => out_of_bounds(Memory::Opaque, offset, len, 0),
        }
    }

    /// Where a helper could have written but did not: bytes that held nothing go on so. The verifier, which does not know
    /// the outcome, forgets what was spilled there.
    pub(super) fn leave_as_is(&mut self, address: Address, len: usize) -> Result<(), TrapKind> {
        let Address { region: Region::Stack { depth, serial }, offset } = address else {
            return self.bytes_mut(address, len).map(drop);
        };
        let at = stack_offset(offset, len)?;
        self.stack_mut(depth, serial)?.forget_spills(at, len);
        Ok(())
    }

    fn load_context(&self, offset: i64, len: usize) -> Result<Value, TrapKind> {
        let error = TrapKind::Context { offset, size: len };
        let at = usize::try_from(offset).map_err(|_| error)?;
        Ok(match self.packet.field(at, len).ok_or(error)? {
            Field::Number => little_endian(&self.context[at..at + len]),
            Field::Address(offset) => Value::Address(Address::new(Region::Packet { epoch: self.epoch }, offset)),
        })
    }

    fn stack(&self, depth: u8, serial: u32) -> Result<&Stack, TrapKind> {
        let stack = &self.stacks[usize::from(depth)];
        if usize::from(depth) > self.depth() || stack.serial != serial {
            return Err(TrapKind::Dangling);
        }
        Ok(stack)
    }

    fn stack_mut(&mut self, depth: u8, serial: u32) -> Result<&mut Stack, TrapKind> {
        self.stack(depth, serial)?;
        Ok(&mut self.stacks[usize::from(depth)])
    }
}

fn little_endian(bytes: &[u8]) -> Value {
    Value::Number(match *bytes {
        [a] => u64::from(a),
        [a, b] => u64::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
        _ => bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)),
    })
}

/// From an offset below the frame pointer to one above the stack's lowest byte.
fn stack_offset(offset: i64, len: usize) -> Result<usize, TrapKind> {
    if offset < -(STACK as i64) || offset > -(len as i64) {
        return out_of_bounds(Memory::Stack, offset, len, STACK);
    }
    Ok((offset + STACK as i64) as usize)
}

fn within(memory: Memory, offset: i64, size: usize, len: usize) -> Result<usize, TrapKind> {
    match usize::try_from(offset) {
        Ok(at) if at <= len && size <= len - at => Ok(at),
        _ => out_of_bounds(memory, offset, size, len),
    }
}

fn out_of_bounds<T>(memory: Memory, offset: i64, size: usize, len: usize) -> Result<T, TrapKind> {
    Err(TrapKind::OutOfBounds { memory, offset, size, len })
}
