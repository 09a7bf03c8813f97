//! Loaded programs: what the kernel says of them, and running one on a packet without a device.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use crate::loader::LoadError;
use crate::object::ProgramKind;
use crate::sys;
pub use crate::sys::ProgramInfo;
use crate::sys::SysError;

/// A loaded program. The kernel frees it when the last descriptor, pin and attachment is gone.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    info: ProgramInfo,
}

/// What a program is run on by [`Program::test_run`].
#[derive(Debug, Clone, Copy)]
pub struct TestRun<'a> {
    /// The packet from its Ethernet header on, at least 14 bytes.
    pub packet: &'a [u8],
    /// The context as the program sees it (`struct __sk_buff`, `struct xdp_md`), empty for the kernel's default. Fields
    /// that a test run cannot set must be zero.
    pub context: &'a [u8],
    /// How often the program runs, at least once; the time is averaged over all.
    pub repeat: u32,
}

/// What a test run gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TestOutcome {
    /// What the program returned: a verdict.
    pub retval: u32,
    /// The packet as the program left it.
    pub packet: Vec<u8>,
    /// The context as the program left it; empty where none was given.
    pub context: Vec<u8>,
    /// Mean time of one run; the kernel counts whole nanoseconds.
    pub duration: Duration,
}

impl Program {
    /// Loads instructions without an object file: 8 bytes each, in the machine's byte order, map descriptors filled in.
    ///
    /// # Errors
    /// As for [`crate::loader::Loader::load`].
    pub fn load(kind: ProgramKind, name: &str, code: &[u8]) -> Result<Self, LoadError> {
        let raw = sys::RawProgram { kind: number(kind), attach_type: attach_type(kind), code, name };
        let fd = sys::load_program(&raw).map_err(|f| LoadError::refused(name, f.error.source, &f.log))?;
        Self::from_fd(fd).map_err(|e| LoadError::refused(name, e.source, ""))
    }

    /// Takes an open program, such as one opened from a pin.
    ///
    /// # Errors
    /// The descriptor is not a program's.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, SysError> {
        let info = sys::program_info(fd.as_fd())?;
        Ok(Self { fd, info })
    }

    /// Opens a program by the number that the kernel gave it. Needs CAP_SYS_ADMIN.
    ///
    /// # Errors
    /// `ENOENT` where there is none.
    pub fn by_id(id: u32) -> Result<Self, SysError> {
        Self::from_fd(sys::program_by_id(id)?)
    }

    /// Every program that the kernel has now, by its number. Needs CAP_SYS_ADMIN.
    ///
    /// # Minimum kernel version
    /// 4.13 (`BPF_PROG_GET_NEXT_ID`).
    pub fn ids() -> Result<Vec<u32>, SysError> {
        let mut ids = Vec::new();
        while let Some(id) = sys::next_program_id(ids.last().copied().unwrap_or(0))? {
            ids.push(id);
        }
        Ok(ids)
    }

    /// What the kernel said of it when it was opened.
    pub fn info(&self) -> &ProgramInfo {
        &self.info
    }

    /// Runs the program on a packet, in the calling thread (`BPF_PROG_TEST_RUN`).
    ///
    /// # Errors
    /// `EINVAL` for a packet shorter than an Ethernet header or a context with fields that cannot be set; `ENOTSUPP`
    /// for a type that has no test run.
    ///
    /// # Minimum kernel version
    /// 4.12; with a context 5.2.
    pub fn test_run(&self, run: &TestRun<'_>) -> Result<TestOutcome, SysError> {
        let raw = sys::RawRun { data: run.packet, context: run.context, repeat: run.repeat.max(1) };
        let done = sys::test_run(self.fd.as_fd(), &raw)?;
        Ok(TestOutcome { retval: done.retval, packet: done.data, context: done.context, duration: done.duration })
    }
}

/// Waits until every program that runs on packets now has ended: afterwards none is left that a replaced filter still ran,
/// or that has read a map before what was stored into it last. Takes some milliseconds.
///
/// With one processor online there is nothing to wait for but programs that can be preempted: those of test runs, and those
/// of a kernel built with PREEMPT_RT. These are not waited for (kernel/sched/membarrier.c).
///
/// # Errors
/// `EINVAL` where the kernel runs with `nohz_full`, `ENOSYS` where it was built without membarrier(2); wait for a generous
/// time then.
///
/// # Minimum kernel version
/// 4.3 (membarrier(2), `MEMBARRIER_CMD_GLOBAL`, then called `MEMBARRIER_CMD_SHARED`).
pub fn wait_for_running() -> Result<(), SysError> {
    sys::grace_period()
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Program> for OwnedFd {
    fn from(program: Program) -> OwnedFd {
        program.fd
    }
}

/// The value of `enum bpf_prog_type`.
pub(crate) const fn number(kind: ProgramKind) -> u32 {
    match kind {
        ProgramKind::Classifier => 3,
        ProgramKind::Xdp => 6,
        ProgramKind::CgroupSkbIngress | ProgramKind::CgroupSkbEgress => 8,
        ProgramKind::Connect4 | ProgramKind::Connect6 | ProgramKind::SendMsg4 | ProgramKind::SendMsg6 => 18,
    }
}

/// The value of `enum bpf_attach_type` that the verifier is told, and a link to a cgroup; 0 where the type of program says it
/// all.
pub(crate) const fn attach_type(kind: ProgramKind) -> u32 {
    match kind {
        ProgramKind::Classifier | ProgramKind::CgroupSkbIngress => 0,
        ProgramKind::CgroupSkbEgress => 1,
        ProgramKind::Connect4 => 10,
        ProgramKind::Connect6 => 11,
        ProgramKind::SendMsg4 => 14,
        ProgramKind::SendMsg6 => 15,
        ProgramKind::Xdp => 37,
    }
}
