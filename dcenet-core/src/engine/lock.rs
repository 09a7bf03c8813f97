//! The lock on what attachments of a host share: bridges and their addresses.
//!
//! It is a lock (flock) on the file that stands for the host's namespace, so that every process of the host meets it
//! whatever its run directory, no file is made for it, and a kill ends it.

use std::fs::File;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::netns::{Host, NetNsError};

/// The lock. The threads of one engine share a descriptor and so the kernel's lock; among them a lock of the language
/// decides.
#[derive(Debug, Default)]
pub(super) struct SharedState {
    threads: RwLock<()>,
    readers: Mutex<usize>,
}

/// Holds the lock until it is dropped.
#[derive(Debug)]
pub(super) enum Held<'a> {
    /// Shared devices may be relied on.
    Using(&'a SharedState, &'a File, #[expect(dead_code, reason = "held for its lock")] RwLockReadGuard<'a, ()>),
    /// Shared devices may be made and removed.
    Changing(&'a File, #[expect(dead_code, reason = "held for its lock")] RwLockWriteGuard<'a, ()>),
}

impl SharedState {
    /// Waits until nobody changes what is shared.
    pub(super) fn relying<'a>(&'a self, host: &'a Host) -> Result<Held<'a>, NetNsError> {
        // The guarded value is (), which no panic can spoil.
        let guard = self.threads.read().unwrap_or_else(PoisonError::into_inner);
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if *readers == 0 {
            host.0.file().lock_shared().map_err(NetNsError::Lock)?;
        }
        *readers += 1;
        Ok(Held::Using(self, host.0.file(), guard))
    }

    /// Waits until nobody uses or changes what is shared.
    pub(super) fn changing<'a>(&'a self, host: &'a Host) -> Result<Held<'a>, NetNsError> {
        let guard = self.threads.write().unwrap_or_else(PoisonError::into_inner);
        host.0.file().lock().map_err(NetNsError::Lock)?;
        Ok(Held::Changing(host.0.file(), guard))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        match self {
            Self::Using(state, file, _) => {
                let mut readers = state.readers.lock().unwrap_or_else(PoisonError::into_inner);
                *readers -= 1;
                if *readers == 0 {
                    unlock(file);
                }
            }
            Self::Changing(file, _) => unlock(file),
        }
    }
}

fn unlock(file: &File) {
    if let Err(error) = file.unlock() {
        tracing::warn!(%error, "cannot unlock the host's namespace");
    }
}
