//! One daemon for each run directory.

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Held for as long as the daemon works.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

/// A child has a copy of the lock from fork to exec: so long a daemon that is gone may seem to hold it.
const INHERITED: Duration = Duration::from_secs(1);

impl RunLock {
    /// Makes sure that no other daemon uses the directory, which is made where it is missing. The file stays: who removed it
    /// would take it from whoever has just opened it.
    ///
    /// # Errors
    /// Where another does, or the file cannot be made.
    pub fn take(run_dir: &Path) -> Result<Self, String> {
        let path = run_dir.join("dcenetd.lock");
        let failed = |error: io::Error| format!("runDir: {}: {error}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(run_dir).map_err(failed)?;
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        let until = Instant::now() + INHERITED;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(10))
                }
                Err(TryLockError::WouldBlock) => {
                    let path = path.display();
                    return Err(format!("runDir: another daemon holds {path}; stop it, or give each a directory"));
                }
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }
}
