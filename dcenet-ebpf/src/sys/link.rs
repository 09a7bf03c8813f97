//! Commands on links, and on the chains of programs in which they stand (kernel/bpf/mprog.c).

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use super::{Attr, Command, SysError, object_info, u32_at, u64_at};

/// Where a new program goes in its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// [`BEFORE`] or [`AFTER`].
    pub(crate) side: u32,
    /// The program next to it, by its number; none for an end of the chain.
    pub(crate) relative: Option<u32>,
}

/// What the kernel says of a link (`struct bpf_link_info`); what is of no meaning to its kind is anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinkInfo {
    /// A value of `enum bpf_link_type`.
    pub(crate) kind: u32,
    pub(crate) id: u32,
    pub(crate) program: u32,
    /// The device's index in whichever namespace it is; 0 once the link is detached, also by the end of its device.
    pub(crate) device: u32,
    /// A value of `enum bpf_attach_type`.
    pub(crate) attach_type: u32,
    /// Of a link to a cgroup, the number of the cgroup; 0 once it is detached, also by the end of the cgroup.
    pub(crate) cgroup: u64,
    /// Of a link to a cgroup, as `attach_type`.
    pub(crate) cgroup_attach_type: u32,
}

/// A chain, in the order in which it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Raised by each change.
    pub(crate) revision: u64,
    /// The programs' numbers, each with that of its link; 0 for a program attached without one.
    pub(crate) programs: Vec<(u32, u32)>,
}

/// Attaches a program to a device of the calling thread's network namespace, for as long as the link lives.
pub(crate) fn create_link(
    program: BorrowedFd<'_>,
    device: u32,
    attach_type: u32,
    position: Position,
) -> Result<OwnedFd, SysError> {
    let flags = position.side | if position.relative.is_some() { ID } else { 0 };
    let mut attr = Attr::new()
        .fd(0, program)
        .u32(4, device)
        .u32(8, attach_type)
        .u32(12, flags)
        .u32(16, position.relative.unwrap_or(0));
    // SAFETY: the attribute holds no pointer; the command returns a new descriptor.
    unsafe { attr.call_for_fd(Command::LINK_CREATE) }
}

/// Attaches an XDP program to a device of the calling thread's network namespace, in the mode of the `XDP_FLAGS_*_MODE`
/// given, for as long as the link lives. Linux 5.9.
pub(crate) fn create_xdp_link(program: BorrowedFd<'_>, device: u32, mode: u32) -> Result<OwnedFd, SysError> {
    let mut attr = Attr::new().fd(0, program).u32(4, device).u32(8, XDP).u32(12, mode);
    // SAFETY: the attribute holds no pointer; the command returns a new descriptor.
    unsafe { attr.call_for_fd(Command::LINK_CREATE) }
}

/// Attaches a program to a cgroup, beside those of others, for as long as the link lives. Linux 5.7.
pub(crate) fn create_cgroup_link(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> Result<OwnedFd, SysError> {
    let mut attr = Attr::new().fd(0, program).fd(4, cgroup).u32(8, attach_type);
    // SAFETY: the attribute holds no pointer; the command returns a new descriptor.
    unsafe { attr.call_for_fd(Command::LINK_CREATE) }
}

/// Whether the program was loaded for this point of a cgroup: the kernel compares before it looks for the cgroup
/// (kernel/bpf/syscall.c, `link_create`), and here there is none.
pub(crate) fn is_for_cgroup_point(program: BorrowedFd<'_>, attach_type: u32) -> Result<bool, SysError> {
    match create_cgroup_link(program, program, attach_type) {
        Err(e) if e.is(libc::EBADF) => Ok(true),
        Err(e) if e.is(libc::EINVAL) => Ok(false),
        Err(e) => Err(e),
        Ok(_) => Err(SysError { call: Command::LINK_CREATE.1, source: std::io::ErrorKind::InvalidData.into() }),
    }
}

/// Which programs of a cgroup are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Those that are attached to it.
    Own,
    /// Those that run for it, also from above.
    Effective,
}

/// The numbers of a cgroup's programs, and the flags that its own were attached with.
pub(crate) fn query_cgroup(
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
    asked: Asked,
) -> Result<(Vec<u32>, u32), SysError> {
    let mut programs = [0_u32; MOST_OF_A_CGROUP];
    let mut attr = Attr::new()
        .fd(0, cgroup)
        .u32(4, attach_type)
        .u32(8, if asked == Asked::Effective { QUERY_EFFECTIVE } else { 0 })
        .u64(16, programs.as_mut_ptr() as u64)
        .u32(24, MOST_OF_A_CGROUP as u32);
    // SAFETY: the pointer leads to room for as many numbers as the count behind it says, exclusively ours, and lives past
    // the call.
    unsafe { attr.call(Command::PROG_QUERY) }?;
    let flags = attr.read_u32(12);
    Ok((programs.into_iter().take(attr.read_u32(24) as usize).collect(), flags))
}

/// Puts `new` in the place of `old`, and fails with `EPERM` where the link holds another by now.
pub(crate) fn update_link(link: BorrowedFd<'_>, new: BorrowedFd<'_>, old: BorrowedFd<'_>) -> Result<(), SysError> {
    let mut attr = Attr::new().fd(0, link).fd(4, new).u32(8, REPLACE).fd(12, old);
    // SAFETY: the attribute holds no pointer.
    unsafe { attr.call(Command::LINK_UPDATE) }.map(drop)
}

/// Takes the link's program off its device. The link stays, without one.
pub(crate) fn detach_link(link: BorrowedFd<'_>) -> Result<(), SysError> {
    let mut attr = Attr::new().fd(0, link);
    // SAFETY: the attribute holds no pointer.
    unsafe { attr.call(Command::LINK_DETACH) }.map(drop)
}

pub(crate) fn link_by_id(id: u32) -> Result<OwnedFd, SysError> {
    let mut attr = Attr::new().u32(0, id);
    // SAFETY: the attribute holds no pointer; the command returns a new descriptor.
    unsafe { attr.call_for_fd(Command::LINK_GET_FD_BY_ID) }
}

/// The number of the first link after `id`; none after the last.
pub(crate) fn next_link_id(id: u32) -> Result<Option<u32>, SysError> {
    let mut attr = Attr::new().u32(0, id);
    // SAFETY: the attribute holds no pointer.
    match unsafe { attr.call(Command::LINK_GET_NEXT_ID) } {
        Ok(_) => Ok(Some(attr.read_u32(4))),
        Err(e) if e.is(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Describes a link; none where the descriptor is that of a program or map.
pub(crate) fn link_info(fd: BorrowedFd<'_>) -> Result<Option<LinkInfo>, SysError> {
    let object = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_err(|source| SysError { call: "readlink", source })?;
    // Programs and maps answer the same command with descriptions of their own, which would be misread. A link that was
    // just made has one name, one that was opened another (kernel/bpf/syscall.c, `bpf_link_prime`, `bpf_link_new_fd`).
    if !["anon_inode:bpf_link", "anon_inode:bpf-link"].iter().any(|name| object.as_os_str() == *name) {
        return Ok(None);
    }
    let mut info = [0; LINK_INFO_BYTES];
    object_info(fd, &mut info)?;
    Ok(Some(LinkInfo {
        kind: u32_at(&info, 0),
        id: u32_at(&info, 4),
        program: u32_at(&info, 8),
        device: u32_at(&info, 16),
        attach_type: u32_at(&info, 20),
        cgroup: u64_at(&info, 16),
        cgroup_attach_type: u32_at(&info, 24),
    }))
}

/// What is attached to a device of the calling thread's network namespace. Linux 6.6 for devices; `EINVAL` before.
pub(crate) fn query_chain(device: u32, attach_type: u32) -> Result<Chain, SysError> {
    let (mut programs, mut links) = ([0_u32; LONGEST_CHAIN], [0_u32; LONGEST_CHAIN]);
    let mut attr = Attr::new()
        .u32(0, device)
        .u32(4, attach_type)
        .u64(16, programs.as_mut_ptr() as u64)
        .u32(24, LONGEST_CHAIN as u32)
        .u64(40, links.as_mut_ptr() as u64);
    // SAFETY: both pointers lead to room for as many numbers as the count between them says, exclusively ours, and live
    // past the call.
    unsafe { attr.call(Command::PROG_QUERY) }?;
    let count = attr.read_u32(24) as usize;
    let programs = programs.into_iter().zip(links).take(count).collect();
    Ok(Chain { revision: u64::from(attr.read_u32(56)) | u64::from(attr.read_u32(60)) << 32, programs })
}

/// Takes a program that no link holds off a device, if the chain is still the one of this revision; `ESTALE` otherwise.
pub(crate) fn detach_program(
    program: BorrowedFd<'_>,
    device: u32,
    attach_type: u32,
    revision: u64,
) -> Result<(), SysError> {
    let mut attr = Attr::new().u32(0, device).fd(4, program).u32(8, attach_type).u64(24, revision);
    // SAFETY: the attribute holds no pointer.
    unsafe { attr.call(Command::PROG_DETACH) }.map(drop)
}

/// Attaches a program to a device without a link, as older agents do: it stays until somebody takes it off.
#[cfg(test)]
pub(crate) fn attach_program(program: BorrowedFd<'_>, device: u32, attach_type: u32) -> Result<(), SysError> {
    let mut attr = Attr::new().u32(0, device).fd(4, program).u32(8, attach_type);
    // SAFETY: the attribute holds no pointer.
    unsafe { attr.call(Command::PROG_ATTACH) }.map(drop)
}

/// Whether the kernel knows links of this attach type: it is asked for one on a device that cannot exist (index 0), and a
/// kernel that knows them misses the device (kernel/bpf/tcx.c, `tcx_link_attach`; drivers/net/netkit.c,
/// `netkit_link_attach`), where an older one, or one that was built without, does not know the type.
pub(crate) fn device_link_known(program: BorrowedFd<'_>, attach_type: u32) -> Result<bool, SysError> {
    match create_link(program, 0, attach_type, Position { side: 0, relative: None }) {
        Ok(_) => Ok(true),
        Err(e) if e.is(libc::ENODEV) => Ok(true),
        Err(e) if e.is(libc::EINVAL) => Ok(false),
        Err(e) => Err(e),
    }
}

/// `enum bpf_attach_type`.
pub(crate) const TCX_INGRESS: u32 = 46;
/// `enum bpf_attach_type`.
pub(crate) const TCX_EGRESS: u32 = 47;
/// `enum bpf_attach_type`: what netkit's primary end sends.
pub(crate) const NETKIT_PRIMARY: u32 = 54;
/// `enum bpf_attach_type`: what the other end sends.
pub(crate) const NETKIT_PEER: u32 = 55;
/// `enum bpf_attach_type`.
const XDP: u32 = 37;
/// `enum bpf_link_type`.
pub(crate) const LINK_TYPE_CGROUP: u32 = 3;
/// `enum bpf_link_type`.
pub(crate) const LINK_TYPE_XDP: u32 = 6;
/// `enum bpf_link_type`.
pub(crate) const LINK_TYPE_TCX: u32 = 11;
/// `enum bpf_link_type`.
pub(crate) const LINK_TYPE_NETKIT: u32 = 13;
/// `BPF_F_BEFORE`; without a relative the head of the chain.
pub(crate) const BEFORE: u32 = 1 << 3;
/// `BPF_F_AFTER`; without a relative the end of the chain.
pub(crate) const AFTER: u32 = 1 << 4;
/// `BPF_F_REPLACE`: the old program is given, to be compared.
const REPLACE: u32 = 1 << 2;
/// `BPF_F_ID`: the relative is a number and no descriptor.
const ID: u32 = 1 << 5;
/// `BPF_MPROG_MAX` (include/linux/bpf_mprog.h).
const LONGEST_CHAIN: usize = 64;
/// More than 64 (`BPF_CGROUP_MAX_PROGS`) for each of the cgroups above.
const MOST_OF_A_CGROUP: usize = 1024;
/// `BPF_F_QUERY_EFFECTIVE`.
const QUERY_EFFECTIVE: u32 = 1;
/// `BPF_F_ALLOW_MULTI`.
pub(crate) const ALLOW_MULTI: u32 = 1 << 1;
const LINK_INFO_BYTES: usize = 64;
