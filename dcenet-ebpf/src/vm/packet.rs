//! The packet of a run, whatever the kind of program.

use super::skb::{self, Skb};
use super::trap::{Memory, TrapKind};
use super::xdp::{self, Buffer};

/// What a program of a kind gets. Offsets count from the packet's first byte.
#[derive(Debug)]
pub(super) enum Packet<'a> {
    Skb(&'a mut Skb),
    Xdp(Buffer),
}

/// What a read of the context gives.
pub(super) enum Field {
    Number,
    /// An address in the packet, at this offset.
    Address(i64),
}

impl Packet<'_> {
    /// Bytes that can be reached by address.
    pub(super) fn bytes(&self, offset: i64, len: usize) -> Result<&[u8], TrapKind> {
        match self {
            Self::Skb(skb) => {
                let at = within(offset, len, skb.linear_len())?;
                Ok(&skb.packet[at..at + len])
            }
            Self::Xdp(buffer) => buffer.bytes(offset, len),
        }
    }

    pub(super) fn bytes_mut(&mut self, offset: i64, len: usize) -> Result<&mut [u8], TrapKind> {
        match self {
            Self::Skb(skb) => {
                let at = within(offset, len, skb.linear_len())?;
                Ok(&mut skb.packet[at..at + len])
            }
            Self::Xdp(buffer) => buffer.bytes_mut(offset, len),
        }
    }

    pub(super) fn field(&self, offset: usize, size: usize) -> Option<Field> {
        match self {
            Self::Skb(skb) => Some(match skb::readable(offset, size)? {
                skb::Field::Number => Field::Number,
                skb::Field::Data => Field::Address(0),
                skb::Field::DataEnd => Field::Address(skb.linear_len() as i64),
            }),
            Self::Xdp(buffer) => Some(match xdp::readable(offset, size)? {
                xdp::Field::Number => Field::Number,
                xdp::Field::Data => Field::Address(0),
                xdp::Field::DataEnd => Field::Address(buffer.len() as i64),
                xdp::Field::DataMeta => Field::Address(-(buffer.meta_len() as i64)),
            }),
        }
    }

    /// Whether a program may write this field of the context; of XDP's it may write none.
    pub(super) fn is_writable(&self, offset: usize, size: usize) -> bool {
        matches!(self, Self::Skb(_)) && skb::writable(offset, size)
    }
}

fn within(offset: i64, size: usize, len: usize) -> Result<usize, TrapKind> {
    match usize::try_from(offset) {
        Ok(at) if at <= len && size <= len - at => Ok(at),
        _ => Err(TrapKind::OutOfBounds { memory: Memory::Packet, offset, size, len }),
    }
}
