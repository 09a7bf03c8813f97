//! Pins that go with their benchmark.

use std::path::PathBuf;

use dcenet_ebpf::pin::{PinError, Pins};

use crate::say;

/// A bpffs, which is unmounted when this is dropped: also where a benchmark fails. To be dropped before the directory that
/// it is mounted in is removed.
#[derive(Debug)]
pub struct Mounted(Pins);

impl Mounted {
    /// Makes the directory, and mounts a bpffs at it.
    ///
    /// # Errors
    /// As [`Pins::open`].
    pub fn open(directory: impl Into<PathBuf>) -> Result<Self, PinError> {
        Pins::open(directory).map(Self)
    }

    /// The pins in it.
    pub fn pins(&self) -> &Pins {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = self.0.clone().unmount() {
            say(format_args!("{} stays mounted: {error}", self.0.directory().display()));
        }
    }
}
