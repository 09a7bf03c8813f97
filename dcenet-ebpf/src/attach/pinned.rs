//! Links that pins hold: what links to devices and to cgroups have in common.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use crate::pin::{PinError, Pins};
use crate::program::Program;
use crate::sys::fault::gated;
use crate::sys::{self, LinkInfo, SysError};

/// The name of a pin: the kind of link, the place on its device or cgroup, the link's number, and what else is told. The
/// number makes it exact: while the pin is there the link is, and no other has the number.
pub(super) fn name(kind: &str, place: &str, link: u32, rest: &str) -> String {
    format!("{kind}-{place}-{link}-{rest}")
}

/// Reads what [`name`] has written; none for a name of another kind.
pub(super) fn parse<'a>(kind: &str, pin: &'a str) -> Option<(&'a str, u32, &'a str)> {
    let (place, rest) = pin.strip_prefix(kind)?.strip_prefix('-')?.split_once('-')?;
    let (link, rest) = rest.split_once('-')?;
    Some((place, link.parse().ok()?, rest))
}

/// Opens a pin; none where it is gone, or is no link of this type.
pub(super) fn open<E>(pins: &Pins, link_type: u32, pin: &str) -> Result<Option<(OwnedFd, LinkInfo)>, E>
where
    E: From<PinError> + From<SysError>,
{
    let Some(fd) = pins.get(pin)? else { return Ok(None) };
    let info = sys::link_info(fd.as_fd())?.filter(|info| info.kind == link_type);
    Ok(info.map(|info| (fd, info)))
}

/// Removes a pin and ends its link; `false` where there is none.
pub(super) fn take_off<E>(pins: &Pins, link_type: u32, pin: &str) -> Result<bool, E>
where
    E: From<PinError> + From<SysError>,
{
    let Some((link, _)) = open::<E>(pins, link_type, pin)? else { return Ok(false) };
    // In this order, for afterwards the link ends with its descriptor, however this goes on.
    pins.remove(pin)?;
    sys::detach_link(link.as_fd())?;
    Ok(true)
}

/// How a link took another program.
pub(super) enum Swap {
    Done,
    /// The link was detached, or its device or cgroup is no more.
    Gone,
    /// The chain has the program already.
    SameProgram,
    /// Somebody else has replaced the program at the same time.
    Raced,
}

/// Gives a link another program, and its pin the name that `fresh` makes of the link's number.
pub(super) fn swap<E>(
    pins: &Pins,
    link_type: u32,
    pin: &str,
    program: &Program,
    fresh: impl FnOnce(u32) -> Result<String, E>,
) -> Result<Swap, E>
where
    E: From<PinError> + From<SysError>,
{
    let Some((link, info)) = open::<E>(pins, link_type, pin)? else { return Ok(Swap::Gone) };
    let fresh = fresh(info.id)?;
    let same = info.program == program.info().id;
    let old = sys::program_by_id(info.program)?;
    if !same && let Err(e) = sys::update_link(link.as_fd(), program.as_fd(), old.as_fd()) {
        return match e.raw_os_error() {
            Some(libc::ENOLINK) => Ok(Swap::Gone),
            Some(libc::EEXIST) => Ok(Swap::SameProgram),
            // The caller may attach, or would not have come here: what is compared is meant.
            Some(libc::EPERM) => Ok(Swap::Raced),
            _ => Err(e.into()),
        };
    }
    if pin != fresh
        && let Err(error) = pins.rename(pin, &fresh)
    {
        if !same && let Err(left) = sys::update_link(link.as_fd(), old.as_fd(), program.as_fd()) {
            tracing::warn!(%pin, error = %left, "the new program stays under the old label");
        }
        return Err(error.into());
    }
    Ok(Swap::Done)
}

/// Keeps other processes with the same pins from changing links, until it is dropped. A process that dies loses it; one that
/// is stopped does not, so it is waited for no longer than [`PATIENCE`], and the errno is then `EWOULDBLOCK`.
pub(super) fn lock(pins: &Pins) -> Result<File, PinError> {
    lock_within(pins, PATIENCE)
}

fn lock_within(pins: &Pins, limit: Duration) -> Result<File, PinError> {
    let begun = Instant::now();
    let path = pins.directory();
    let file = |metadata: Metadata| (metadata.dev(), metadata.ino());
    let locked = gated("lock", || {
        for _ in 0..ATTEMPTS {
            let directory = File::open(path)?;
            let mut pause = SHORTEST_PAUSE;
            while let Err(error) = directory.try_lock() {
                match error {
                    TryLockError::WouldBlock if begun.elapsed() < limit => std::thread::sleep(pause),
                    TryLockError::WouldBlock => return Err(io::Error::from_raw_os_error(libc::EWOULDBLOCK)),
                    TryLockError::Error(error) => return Err(error),
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            // While this one waited, another bpffs may have been mounted here, which others lock.
            if file(directory.metadata()?) == file(std::fs::metadata(path)?) {
                return Ok(directory);
            }
        }
        Err(io::Error::from_raw_os_error(libc::ESTALE))
    });
    locked.map_err(|source| PinError::new("lock", path, source))
}

/// Whether a label can stand in the name of a pin.
pub(super) fn is_label(label: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    label.len() <= LABEL_BYTES && label.bytes().all(fits)
}

/// What [`is_label`] takes.
pub(super) const LABEL: &str = "at most 160 letters, digits, '-' and '_'";

pub(super) fn no_link() -> SysError {
    SysError { call: "BPF_LINK_CREATE", source: io::ErrorKind::InvalidData.into() }
}

/// Leaves room for the rest of a pin's name ([`Pins`] takes 200 bytes).
const LABEL_BYTES: usize = 160;
/// How long others are waited for who change links, of whom each needs some tens of milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);
const SHORTEST_PAUSE: Duration = Duration::from_micros(100);
const LONGEST_PAUSE: Duration = Duration::from_millis(5);
/// How often a chain is looked at again that others keep changing.
pub(super) const ATTEMPTS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_the_lock_is_not_waited_for_for_ever() {
        let directory = tempfile::tempdir().expect("a directory");
        let pins = Pins::at(directory.path());
        let held = lock(&pins).expect("nobody has it");
        let (said, heard) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let pins = &pins;
            scope.spawn(move || said.send(lock_within(pins, Duration::from_millis(20)).map(drop)));
            let waited = heard.recv_timeout(Duration::from_secs(60));
            // Ends a wait that has no limit.
            drop(held);
            let error = waited.expect("it waits without a limit").expect_err("it is held");
            assert_eq!(error.raw_os_error(), Some(libc::EWOULDBLOCK));
        });
        lock(&pins).expect("nobody has it");
    }
}
