//! Mounts of bpffs, and what file system a path is in.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use super::fault::gated;
use super::{SysError, c_path, done};

/// Whether the path is inside a mounted bpffs.
pub(crate) fn is_bpffs(path: &Path) -> Result<bool, SysError> {
    Ok(file_system(path)? == libc::BPF_FS_MAGIC)
}

/// Whether the directory is in a cgroup hierarchy of version 2.
pub(crate) fn is_cgroup2(directory: BorrowedFd<'_>) -> Result<bool, SysError> {
    gated("fstatfs", || {
        let mut about = std::mem::MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: the descriptor is open, and there is room for the one structure that the call fills.
        done(unsafe { libc::fstatfs(directory.as_raw_fd(), about.as_mut_ptr()) })?;
        // SAFETY: the call succeeded, so it has filled the structure.
        let about = unsafe { about.assume_init() };
        Ok(about.f_type == libc::CGROUP2_SUPER_MAGIC)
    })
}

fn file_system(path: &Path) -> Result<libc::__fsword_t, SysError> {
    const CALL: &str = "statfs";
    let path = c_path(path, CALL)?;
    gated(CALL, || {
        let mut about = std::mem::MaybeUninit::<libc::statfs>::uninit();
        // SAFETY: the path ends in zero, and there is room for the one structure that the call fills.
        done(unsafe { libc::statfs(path.as_ptr(), about.as_mut_ptr()) })?;
        // SAFETY: the call succeeded, so it has filled the structure.
        let about = unsafe { about.assume_init() };
        Ok(about.f_type)
    })
}

/// Mounts a new bpffs over the directory, readable by root only.
pub(crate) fn mount_bpffs(directory: &Path) -> Result<(), SysError> {
    const CALL: &str = "mount";
    let directory = c_path(directory, CALL)?;
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    gated(CALL, || {
        // SAFETY: all four strings end in zero and live past the call.
        done(unsafe {
            libc::mount(c"dcenet".as_ptr(), directory.as_ptr(), c"bpf".as_ptr(), flags, c"mode=0700".as_ptr().cast())
        })
    })
}

/// Takes the topmost mount off the directory, also while files in it are open.
pub(crate) fn unmount(directory: &Path) -> Result<(), SysError> {
    const CALL: &str = "umount2";
    let directory = c_path(directory, CALL)?;
    gated(CALL, || {
        // SAFETY: the string ends in zero and lives past the call.
        done(unsafe { libc::umount2(directory.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) })
    })
}
