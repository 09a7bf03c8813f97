//! A bpffs of the process's own.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use super::SysError;
use super::fault::gated;

/// Makes a bpffs that no directory shows and that vanishes with its descriptor. Linux 5.2.
///
/// Files in it are reached as `/proc/self/fd/N/name`.
pub(crate) fn private_bpffs() -> Result<OwnedFd, SysError> {
    let context = new_fd("fsopen", || {
        // SAFETY: the name ends in zero; the call returns a new descriptor.
        unsafe { libc::syscall(libc::SYS_fsopen, c"bpf".as_ptr(), FSOPEN_CLOEXEC) }
    })?;
    gated("fsconfig", || {
        // SAFETY: the command to create takes neither a key nor a value, and both are null.
        let done = unsafe {
            libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                FSCONFIG_CMD_CREATE,
                ptr::null::<libc::c_char>(),
                ptr::null::<libc::c_void>(),
                0,
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    })?;
    new_fd("fsmount", || {
        // SAFETY: the arguments are numbers; the call returns a new descriptor.
        unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) }
    })
}

fn new_fd(call: &'static str, make: impl FnOnce() -> libc::c_long) -> Result<OwnedFd, SysError> {
    let fd = gated(call, || {
        let fd = make();
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(fd) }
    })?;
    let fd = i32::try_from(fd).map_err(|_| SysError { call, source: io::ErrorKind::InvalidData.into() })?;
    // SAFETY: both callers make a descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

const FSOPEN_CLOEXEC: libc::c_uint = 1;
const FSMOUNT_CLOEXEC: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
