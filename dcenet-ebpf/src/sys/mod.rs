//! bpf(2), mounts of bpffs and the ring buffer's shared memory: the only unsafe code of the crate.
//!
//! Every system call of the crate that changes or asks the kernel is made by [`fault::gated`], so a test can make the
//! n-th one fail or end the process. The one exception are loader backends of somebody else's, which have their own calls.
//!
//! The attributes of bpf(2) are laid out by hand as bytes at the offsets of `union bpf_attr`
//! (include/uapi/linux/bpf.h): the kernel accepts a longer attribute than it knows as long as the rest is zero, so one
//! size serves every kernel.

#![expect(unsafe_code, reason = "system calls that no safe crate offers")]

pub(crate) mod fault;
mod fs;
#[cfg(feature = "libbpf")]
pub(crate) mod libbpf;
mod link;
mod map;
mod netns;
mod prog;
mod ring;
#[cfg(feature = "aya")]
mod scratch;

pub(crate) use fs::{is_bpffs, is_cgroup2, mount_bpffs, unmount};
#[cfg(test)]
pub(crate) use link::attach_program;
pub(crate) use link::{
    AFTER, ALLOW_MULTI, Asked, BEFORE, Chain, LINK_TYPE_CGROUP, LINK_TYPE_NETKIT, LINK_TYPE_TCX, LINK_TYPE_XDP,
    LinkInfo, NETKIT_PEER, NETKIT_PRIMARY, Position, TCX_EGRESS, TCX_INGRESS, create_cgroup_link, create_link,
    create_xdp_link, detach_link, detach_program, device_link_known, is_for_cgroup_point, link_by_id, link_info,
    next_link_id, query_cgroup, query_chain, update_link,
};
pub use map::{Map, MapInfo, Put};
pub(crate) use netns::netns_cookie;
pub use prog::ProgramInfo;
pub(crate) use prog::{
    LoadFailure, RawProgram, RawRun, grace_period, load_program, next_program_id, program_by_id, program_info, test_run,
};
pub(crate) use ring::{Ring, page_size};
#[cfg(feature = "aya")]
pub(crate) use scratch::private_bpffs;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A system call that the kernel refused.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {source}")]
pub struct SysError {
    /// The call, such as `BPF_MAP_CREATE` or `mount`.
    pub call: &'static str,
    /// What the kernel answered.
    #[source]
    pub source: io::Error,
}

impl SysError {
    /// The errno behind the error.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    pub(crate) fn is(&self, errno: i32) -> bool {
        self.raw_os_error() == Some(errno)
    }
}

/// A command of bpf(2), with its number in `enum bpf_cmd`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Command(u32, &'static str);

impl Command {
    const MAP_CREATE: Self = Self(0, "BPF_MAP_CREATE");
    const MAP_LOOKUP_ELEM: Self = Self(1, "BPF_MAP_LOOKUP_ELEM");
    const MAP_UPDATE_ELEM: Self = Self(2, "BPF_MAP_UPDATE_ELEM");
    const MAP_DELETE_ELEM: Self = Self(3, "BPF_MAP_DELETE_ELEM");
    const MAP_GET_NEXT_KEY: Self = Self(4, "BPF_MAP_GET_NEXT_KEY");
    const PROG_LOAD: Self = Self(5, "BPF_PROG_LOAD");
    const OBJ_PIN: Self = Self(6, "BPF_OBJ_PIN");
    const OBJ_GET: Self = Self(7, "BPF_OBJ_GET");
    #[cfg(test)]
    const PROG_ATTACH: Self = Self(8, "BPF_PROG_ATTACH");
    const PROG_DETACH: Self = Self(9, "BPF_PROG_DETACH");
    const PROG_TEST_RUN: Self = Self(10, "BPF_PROG_TEST_RUN");
    const PROG_GET_NEXT_ID: Self = Self(11, "BPF_PROG_GET_NEXT_ID");
    const PROG_GET_FD_BY_ID: Self = Self(13, "BPF_PROG_GET_FD_BY_ID");
    const MAP_GET_FD_BY_ID: Self = Self(14, "BPF_MAP_GET_FD_BY_ID");
    const OBJ_GET_INFO_BY_FD: Self = Self(15, "BPF_OBJ_GET_INFO_BY_FD");
    const PROG_QUERY: Self = Self(16, "BPF_PROG_QUERY");
    const MAP_LOOKUP_BATCH: Self = Self(24, "BPF_MAP_LOOKUP_BATCH");
    const MAP_UPDATE_BATCH: Self = Self(26, "BPF_MAP_UPDATE_BATCH");
    const MAP_DELETE_BATCH: Self = Self(27, "BPF_MAP_DELETE_BATCH");
    const LINK_CREATE: Self = Self(28, "BPF_LINK_CREATE");
    const LINK_UPDATE: Self = Self(29, "BPF_LINK_UPDATE");
    const LINK_GET_FD_BY_ID: Self = Self(30, "BPF_LINK_GET_FD_BY_ID");
    const LINK_GET_NEXT_ID: Self = Self(31, "BPF_LINK_GET_NEXT_ID");
    const LINK_DETACH: Self = Self(34, "BPF_LINK_DETACH");
}

/// The attribute of bpf(2). Fields are set by their offset.
#[repr(C, align(8))]
struct Attr([u8; 152]);

impl Attr {
    fn new() -> Self {
        Self([0; 152])
    }

    fn u32(mut self, offset: usize, value: u32) -> Self {
        self.0[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, offset: usize, value: u64) -> Self {
        self.0[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn fd(self, offset: usize, fd: BorrowedFd<'_>) -> Self {
        self.u32(offset, fd.as_raw_fd().cast_unsigned())
    }

    /// Up to 15 bytes of a name; the kernel wants the sixteenth to be zero.
    fn name(mut self, offset: usize, name: &str) -> Self {
        for (slot, byte) in self.0[offset..offset + 15].iter_mut().zip(object_name(name)) {
            *slot = byte;
        }
        self
    }

    fn read_u32(&self, offset: usize) -> u32 {
        u32_at(&self.0, offset)
    }

    /// # Safety
    /// Every pointer in the attribute must be valid for what `command` does with it, for as long as the call lasts.
    unsafe fn call(&mut self, command: Command) -> Result<i64, SysError> {
        // The verifier and a test run give up with EAGAIN and EINTR when a signal is pending (kernel/bpf/verifier.c
        // `do_check`, net/bpf/test_run.c `bpf_test_timer_continue`) and leave nothing behind. A batch is not repeated:
        // the kernel has overwritten its count.
        let repeatable = command.0 == Command::PROG_LOAD.0 || command.0 == Command::PROG_TEST_RUN.0;
        fault::gated(command.1, || {
            let mut attempts = 0;
            loop {
                // SAFETY: the attribute is 152 initialised bytes and aligned to 8; what it points to is the caller's
                // duty.
                let done = unsafe { libc::syscall(libc::SYS_bpf, command.0, &raw mut self.0, size_of::<Self>()) };
                if done >= 0 {
                    return Ok(done);
                }
                let error = io::Error::last_os_error();
                attempts += 1;
                let interrupted = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN));
                if !repeatable || attempts == INTERRUPTED_ATTEMPTS || !interrupted {
                    return Err(error);
                }
            }
        })
    }

    /// As [`Attr::call`], for a command that answers with a descriptor.
    ///
    /// # Safety
    /// As for [`Attr::call`], and `command` must be one that returns a new descriptor.
    unsafe fn call_for_fd(&mut self, command: Command) -> Result<OwnedFd, SysError> {
        // SAFETY: as the caller promises.
        let fd = unsafe { self.call(command) }?;
        let fd =
            i32::try_from(fd).map_err(|_| SysError { call: command.1, source: io::ErrorKind::InvalidData.into() })?;
        // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// Pins a program, map or link at a path inside a bpffs. The name must be free.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> Result<(), SysError> {
    let path = c_path(path, Command::OBJ_PIN.1)?;
    let mut attr = Attr::new().u64(0, path.as_ptr() as u64).fd(8, fd);
    // SAFETY: `path` is a string that ends in zero and lives past the call.
    unsafe { attr.call(Command::OBJ_PIN) }.map(drop)
}

/// Opens what is pinned at a path.
pub(crate) fn open_pin(path: &Path) -> Result<OwnedFd, SysError> {
    let path = c_path(path, Command::OBJ_GET.1)?;
    let mut attr = Attr::new().u64(0, path.as_ptr() as u64);
    // SAFETY: `path` is a string that ends in zero and lives past the call; the command returns a new descriptor.
    unsafe { attr.call_for_fd(Command::OBJ_GET) }
}

/// The kernel's description of a program, map or link: as many bytes of `info` as this kernel fills.
fn object_info(fd: BorrowedFd<'_>, info: &mut [u8]) -> Result<usize, SysError> {
    let mut attr = Attr::new().fd(0, fd).u32(4, length(info.len())).u64(8, info.as_mut_ptr() as u64);
    // SAFETY: `info` is exclusively ours, and the kernel writes at most `info.len()` bytes. Pointers inside it are zero,
    // so the kernel follows none.
    unsafe { attr.call(Command::OBJ_GET_INFO_BY_FD) }?;
    Ok(attr.read_u32(4) as usize)
}

/// The number of possible CPUs: how many values a per-CPU map has for each key.
pub(crate) fn possible_cpus() -> Result<usize, SysError> {
    const CALL: &str = "read /sys/devices/system/cpu/possible";
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")
        .map_err(|source| SysError { call: CALL, source })?;
    // A list such as `0-3` or `0,2-5`: the kernel sizes per-CPU values by the highest number.
    text.trim()
        .split([',', '-'])
        .filter_map(|n| n.parse::<usize>().ok())
        .max()
        .map(|highest| highest + 1)
        .ok_or(SysError { call: CALL, source: io::ErrorKind::InvalidData.into() })
}

/// The bytes of a name that the kernel accepts for programs and maps: letters, digits, `_` and `.`, at most 15
/// (kernel/bpf/syscall.c, `bpf_obj_name_cpy`). Others become `_`.
fn object_name(name: &str) -> impl Iterator<Item = u8> {
    name.bytes().take(15).map(|b| if b.is_ascii_alphanumeric() || b == b'_' || b == b'.' { b } else { b'_' })
}

fn c_path(path: &Path, call: &'static str) -> Result<CString, SysError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| SysError { call, source: e.into() })
}

/// A length as the kernel takes it. Nothing that we hand over comes near 4 GiB; what does is refused by the kernel.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// What a call of the C library says by 0 or -1.
fn done(answer: libc::c_int) -> io::Result<()> {
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(array_at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(array_at(bytes, offset))
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[offset..offset + N]);
    array
}

/// How often a call is made that signals keep interrupting: a profiler's timer may hit every one.
const INTERRUPTED_ATTEMPTS: u32 = 20;

fn text_at(bytes: &[u8], offset: usize, longest: usize) -> String {
    let field = &bytes[offset..offset + longest];
    let end = field.iter().position(|&b| b == 0).unwrap_or(longest);
    String::from_utf8_lossy(&field[..end]).into_owned()
}
