//! What processes tell each other through the file `lock`. None of it is ever flushed.
//!
//! "Durable up to" is only written after it has become true, so it is also true after a loss of power, if older. The end
//! of the log is only believed by those who have themselves written it since.

use std::fs::File;

use super::LOCK;
use super::disk::Disk;
use super::frame::u64_at;
use crate::store::StoreError;

/// The notes as they were read.
#[derive(Debug, Default)]
pub(super) struct Hints {
    pub(super) end_generation: u64,
    pub(super) end: u64,
    pub(super) durable_generation: u64,
    pub(super) durable: u64,
    /// The generation whose flush has failed; 0 for none.
    pub(super) distrusted: u64,
}

impl Hints {
    pub(super) fn read(disk: &Disk, lock: &File) -> Result<Self, StoreError> {
        let mut bytes = disk.read_at(lock, LOCK, 0, 96)?;
        bytes.resize(96, 0);
        // Each pair carries a checksum, for a torn one must count as none.
        let pair = |at: usize| {
            let pair = &bytes[at..at + 32];
            let sound = u64_at(pair, 16) == u64::from(crc32fast::hash(&pair[..16]));
            if sound { (u64_at(pair, 0), u64_at(pair, 8)) } else { (0, 0) }
        };
        let ((end_generation, end), (durable_generation, durable), (distrusted, _)) = (pair(0), pair(32), pair(64));
        Ok(Self { end_generation, end, durable_generation, durable, distrusted })
    }

    pub(super) fn durable_of(&self, generation: u64) -> u64 {
        if self.durable_generation == generation { self.durable } else { 0 }
    }

    pub(super) fn write_end(disk: &Disk, lock: &File, generation: u64, end: u64) -> Result<(), StoreError> {
        Self::write(disk, lock, 0, generation, end)
    }

    pub(super) fn write_durable(disk: &Disk, lock: &File, generation: u64, durable: u64) -> Result<(), StoreError> {
        Self::write(disk, lock, 32, generation, durable)
    }

    pub(super) fn write_distrusted(disk: &Disk, lock: &File, generation: u64) -> Result<(), StoreError> {
        Self::write(disk, lock, 64, generation, 0)
    }

    fn write(disk: &Disk, lock: &File, at: u64, generation: u64, number: u64) -> Result<(), StoreError> {
        let mut bytes = Vec::with_capacity(24);
        bytes.extend_from_slice(&generation.to_le_bytes());
        bytes.extend_from_slice(&number.to_le_bytes());
        let crc = u64::from(crc32fast::hash(&bytes));
        bytes.extend_from_slice(&crc.to_le_bytes());
        disk.write_at(lock, LOCK, &bytes, at)
    }
}
