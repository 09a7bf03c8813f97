//! Commands on programs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use super::fault::gated;
use super::{Attr, Command, SysError, array_at, length, object_info, text_at, u32_at, u64_at};

/// A program as bpf(2) takes it, without an object file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawProgram<'a> {
    /// A value of `enum bpf_prog_type`.
    pub(crate) kind: u32,
    /// A value of `enum bpf_attach_type`, or 0.
    pub(crate) attach_type: u32,
    /// Instructions in the kernel's form, 8 bytes each.
    pub(crate) code: &'a [u8],
    pub(crate) name: &'a str,
}

/// A program that the kernel refused.
#[derive(Debug)]
pub(crate) struct LoadFailure {
    pub(crate) error: SysError,
    /// What the verifier wrote, as far as it fits.
    pub(crate) log: String,
}

/// What the kernel says of a program (`struct bpf_prog_info`).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProgramInfo {
    /// The type: a value of `enum bpf_prog_type`.
    pub kind: u32,
    /// The number that the kernel gave it.
    pub id: u32,
    /// A hash of its instructions, without map addresses: the same for the same code.
    pub tag: [u8; 8],
    /// Bytes of machine code; 0 where it is interpreted.
    pub jited_bytes: u32,
    /// Bytes of eBPF after the verifier rewrote it.
    pub translated_bytes: u32,
    /// Time since boot at which it was loaded.
    pub loaded_at: Duration,
    /// The first 15 bytes of its name.
    pub name: String,
    /// Instructions that the verifier looked at, a path through a branch counted each time. Linux 5.16; 0 before.
    pub verified_instructions: u32,
    /// Maps that it uses, by their numbers.
    pub maps: Vec<u32>,
}

/// Loads a program. The verifier's log is only asked for after a refusal, for writing it costs time.
pub(crate) fn load_program(program: &RawProgram<'_>) -> Result<OwnedFd, LoadFailure> {
    let no_log = match attempt(program, &mut []) {
        Ok(fd) => return Ok(fd),
        Err(error) => error,
    };
    let mut log = vec![0; LOG_BYTES];
    match attempt(program, &mut log) {
        Ok(fd) => Ok(fd),
        // `ENOSPC` only says that the log did not fit; the first answer says why the program was refused.
        Err(second) => Err(LoadFailure {
            error: if second.is(libc::ENOSPC) { no_log } else { second },
            log: text_at(&log, 0, LOG_BYTES),
        }),
    }
}

fn attempt(program: &RawProgram<'_>, log: &mut [u8]) -> Result<OwnedFd, SysError> {
    if !program.code.len().is_multiple_of(8) {
        return Err(SysError { call: Command::PROG_LOAD.1, source: io::ErrorKind::InvalidInput.into() });
    }
    let mut attr = Attr::new()
        .u32(0, program.kind)
        .u32(4, length(program.code.len() / 8))
        .u64(8, program.code.as_ptr() as u64)
        .u64(16, LICENSE.as_ptr() as u64)
        .name(48, program.name)
        .u32(68, program.attach_type);
    if !log.is_empty() {
        attr = attr.u32(24, 1).u32(28, length(log.len())).u64(32, log.as_mut_ptr() as u64);
    }
    // SAFETY: the kernel reads as many whole instructions as `code` holds and a licence that ends in zero, and writes
    // at most `log.len()` bytes to the log; all live past the call. It returns a new descriptor.
    unsafe { attr.call_for_fd(Command::PROG_LOAD) }
}

/// The lowest number of a program above `after`.
pub(crate) fn next_program_id(after: u32) -> Result<Option<u32>, SysError> {
    let mut attr = Attr::new().u32(0, after);
    // SAFETY: the attribute holds no pointer; the kernel writes the number into it.
    match unsafe { attr.call(Command::PROG_GET_NEXT_ID) } {
        Ok(_) => Ok(Some(attr.read_u32(4))),
        Err(error) if error.is(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn program_by_id(id: u32) -> Result<OwnedFd, SysError> {
    let mut attr = Attr::new().u32(0, id);
    // SAFETY: the attribute holds no pointer; the command returns a new descriptor.
    unsafe { attr.call_for_fd(Command::PROG_GET_FD_BY_ID) }
}

pub(crate) fn program_info(fd: BorrowedFd<'_>) -> Result<ProgramInfo, SysError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    // A map answers the same command with a description of its own, which would be misread.
    if link.is_ok_and(|l| l.as_os_str() != "anon_inode:bpf-prog") {
        return Err(SysError { call: Command::OBJ_GET_INFO_BY_FD.1, source: io::ErrorKind::InvalidInput.into() });
    }
    let mut info = [0; INFO_BYTES];
    object_info(fd, &mut info)?;
    let map_count = u32_at(&info, 52) as usize;
    let mut maps = vec![0_u32; map_count];
    if map_count > 0 {
        let mut again = [0; INFO_BYTES];
        again[52..56].copy_from_slice(&length(map_count).to_ne_bytes());
        again[56..64].copy_from_slice(&(maps.as_mut_ptr() as u64).to_ne_bytes());
        let mut attr = Attr::new().fd(0, fd).u32(4, length(INFO_BYTES)).u64(8, again.as_mut_ptr() as u64);
        // SAFETY: `again` is ours and as long as stated; the one pointer in it leads to room for `map_count` numbers,
        // and the kernel writes no more than the count that stands before it.
        unsafe { attr.call(Command::OBJ_GET_INFO_BY_FD) }?;
    }
    Ok(ProgramInfo {
        kind: u32_at(&info, 0),
        id: u32_at(&info, 4),
        tag: array_at(&info, 8),
        jited_bytes: u32_at(&info, 16),
        translated_bytes: u32_at(&info, 20),
        loaded_at: Duration::from_nanos(u64_at(&info, 40)),
        name: text_at(&info, 64, 16),
        verified_instructions: u32_at(&info, 216),
        maps,
    })
}

/// What a test run gets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawRun<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) context: &'a [u8],
    pub(crate) repeat: u32,
}

/// What a test run gave.
#[derive(Debug, Clone)]
pub(crate) struct RawRunOutcome {
    pub(crate) retval: u32,
    pub(crate) data: Vec<u8>,
    pub(crate) context: Vec<u8>,
    pub(crate) duration: Duration,
}

pub(crate) fn test_run(program: BorrowedFd<'_>, run: &RawRun<'_>) -> Result<RawRunOutcome, SysError> {
    // Helpers may grow the packet at both ends; what the kernel gives a test run of one buffer is a page
    // (net/bpf/test_run.c), and a packet that needs more has no room to grow but in front.
    let mut data = vec![0; (run.data.len() + 256).max(PAGE)];
    let mut context = vec![0; run.context.len()];
    let mut attr = Attr::new()
        .fd(0, program)
        .u32(8, length(run.data.len()))
        .u32(12, length(data.len()))
        .u64(16, run.data.as_ptr() as u64)
        .u64(24, data.as_mut_ptr() as u64)
        .u32(32, run.repeat);
    if !run.context.is_empty() {
        attr = attr
            .u32(40, length(run.context.len()))
            .u32(44, length(context.len()))
            .u64(48, run.context.as_ptr() as u64)
            .u64(56, context.as_mut_ptr() as u64);
    }
    // SAFETY: each pointer stands beside the length of its slice, inputs are only read, outputs are exclusively ours,
    // and all live past the call.
    unsafe { attr.call(Command::PROG_TEST_RUN) }?;
    data.truncate(attr.read_u32(12) as usize);
    context.truncate(attr.read_u32(44) as usize);
    Ok(RawRunOutcome {
        retval: attr.read_u32(4),
        data,
        context,
        duration: Duration::from_nanos(attr.read_u32(36).into()),
    })
}

/// What the crate's programs are under; helpers marked `gpl_only` ask for it.
const LICENSE: &[u8; 13] = b"Dual MIT/GPL\0";
const PAGE: usize = 4096;
const LOG_BYTES: usize = 256 * 1024;
const INFO_BYTES: usize = 232;

/// Waits for an RCU grace period: `MEMBARRIER_CMD_GLOBAL` calls synchronize_rcu() (kernel/sched/membarrier.c).
pub(crate) fn grace_period() -> Result<(), SysError> {
    // include/uapi/linux/membarrier.h
    const GLOBAL: libc::c_int = 1;
    gated("MEMBARRIER_CMD_GLOBAL", || {
        // SAFETY: the call takes three numbers and touches no memory of the caller.
        match unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })
}
