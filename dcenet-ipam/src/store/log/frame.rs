//! Records of the log: how they are laid out and when one is believed.
//!
//! ```text
//! header of the file, 64 bytes: magic 8, generation 8, base revision 8, zero 36, CRC-32 of these 4
//! frame, 8-byte aligned:        length 4 (of what follows this header), CRC-32 4, revision 8, durable 8,
//!                               request id 16, operations
//! operation:                    kind 1 (1 delete, 2 put), key length 2, value length 4, key, value
//! ```
//!
//! Numbers are little-endian. The checksum also covers generation and offset, so that bytes of another file or place
//! never pass. `durable` is an offset below which the writer knew the log to be flushed: a hole below the `durable` of a
//! later frame is damage, while a hole above it is what a loss of power leaves of writes that nobody acknowledged.

use crate::store::{Batch, Write};

pub(super) const HEADER: u64 = 64;
const MAGIC: &[u8; 8] = b"dcelog1\n";
const FIXED: usize = 24;

/// A frame that passed its checks.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) revision: u64,
    pub(super) durable: u64,
    pub(super) request_id: u128,
    pub(super) writes: Vec<Write>,
    /// Bytes that it occupies.
    pub(super) size: usize,
}

pub(super) fn header(generation: u64, revision: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER as usize);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&generation.to_le_bytes());
    bytes.extend_from_slice(&revision.to_le_bytes());
    bytes.resize(HEADER as usize - 4, 0);
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// Generation and base revision of a log that begins with these bytes.
pub(super) fn parse_header(bytes: &[u8]) -> Option<(u64, u64)> {
    let bytes = bytes.get(..HEADER as usize)?;
    let (body, crc) = bytes.split_at(HEADER as usize - 4);
    let sound = body.starts_with(MAGIC) && crc == crc32fast::hash(body).to_le_bytes();
    sound.then(|| (u64_at(body, 8), u64_at(body, 16)))
}

pub(super) fn encode(generation: u64, offset: u64, revision: u64, durable: u64, batch: &Batch) -> Vec<u8> {
    let mut bytes = vec![0; 8];
    bytes.extend_from_slice(&revision.to_le_bytes());
    bytes.extend_from_slice(&durable.to_le_bytes());
    bytes.extend_from_slice(&batch.request_id.to_le_bytes());
    for write in &batch.writes {
        let (kind, key, value) = match write {
            Write::Delete(key) => (1, key, [].as_slice()),
            Write::Put(key, value) => (2, key, value.as_slice()),
        };
        bytes.push(kind);
        // `check` bounds both lengths before a batch comes here.
        bytes.extend_from_slice(&(key.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&(value.len() as u32).to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
    }
    let length = (bytes.len() - FIXED) as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    let crc = checksum(generation, offset, &bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// The frame at the start of `bytes`, which lie at `offset` of the log; `None` if there is no sound one.
pub(super) fn decode(generation: u64, offset: u64, bytes: &[u8]) -> Option<Frame> {
    let fixed = bytes.get(..FIXED)?;
    let length = u32_at(fixed, 0) as usize;
    if length < 16 {
        return None;
    }
    let whole = bytes.get(..FIXED.checked_add(length)?)?;
    if u32_at(fixed, 4) != checksum(generation, offset, whole) {
        return None;
    }
    let (request, mut rest) = whole[FIXED..].split_at(16);
    let mut writes = Vec::new();
    while !rest.is_empty() {
        let head = rest.get(..7)?;
        let (key, value) = (usize::from(u16::from_le_bytes([head[1], head[2]])), u32_at(head, 3) as usize);
        let body = rest.get(7..7 + key + value)?;
        let key_bytes = body[..key].to_vec();
        writes.push(match head[0] {
            1 => Write::Delete(key_bytes),
            2 => Write::Put(key_bytes, body[key..].to_vec()),
            _ => return None,
        });
        rest = &rest[7 + key + value..];
    }
    Some(Frame {
        revision: u64_at(fixed, 8),
        durable: u64_at(fixed, 16),
        request_id: u128::from_le_bytes(request.try_into().ok()?),
        writes,
        size: whole.len().next_multiple_of(8),
    })
}

fn checksum(generation: u64, offset: u64, frame: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&generation.to_le_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.update(&frame[..4]);
    hasher.update(&frame[8..]);
    hasher.finalize()
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut b = [0; 4];
    b.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(b)
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(b)
}
