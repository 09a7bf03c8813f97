//! Arrays of programs.

use std::os::fd::{AsFd, AsRawFd};

use super::{Map, MapError, Put, expect};
use crate::object::MapKind;
use crate::program::Program;

/// Programs by index, for tail calls. All must be of one type; the first one decides which.
///
/// The kernel empties the array when its last descriptor and pin is gone, even while programs that use it run on
/// (`kernel/bpf/arraymap.c`, `prog_array_map_clear`): keep the map as long as the programs.
///
/// # Minimum kernel version
/// 4.2.
#[derive(Debug)]
pub struct ProgramArray {
    map: Map,
}

impl ProgramArray {
    /// Views a map.
    ///
    /// # Errors
    /// [`MapError::Mismatch`] where it is no array of programs.
    pub fn new(map: Map) -> Result<Self, MapError> {
        expect(&map, &[MapKind::ProgArray], 4, 4)?;
        Ok(Self { map })
    }

    /// How many places it has.
    pub fn entries(&self) -> u32 {
        self.map.info().max_entries
    }

    /// Puts a program at an index; calls from then on arrive there.
    ///
    /// # Errors
    /// [`MapError::OutOfBounds`]; `EINVAL` for a program of another type than those before.
    pub fn set(&self, index: u32, program: &Program) -> Result<(), MapError> {
        self.check(index)?;
        let fd = program.as_fd().as_raw_fd().to_ne_bytes();
        self.map.update(&index.to_ne_bytes(), &fd, Put::Any).map_err(|e| MapError::of(&self.map, e))
    }

    /// Empties a place; `false` where it was empty. A tail call to an empty place goes on behind itself.
    ///
    /// # Errors
    /// [`MapError::OutOfBounds`].
    pub fn clear(&self, index: u32) -> Result<bool, MapError> {
        self.check(index)?;
        self.map.delete(&index.to_ne_bytes()).map_err(|e| MapError::of(&self.map, e))
    }

    /// The map itself.
    pub fn map(&self) -> &Map {
        &self.map
    }

    fn check(&self, index: u32) -> Result<(), MapError> {
        if index < self.entries() {
            return Ok(());
        }
        let info = self.map.info();
        Err(MapError::OutOfBounds { name: info.name.clone(), index, entries: info.max_entries })
    }
}
