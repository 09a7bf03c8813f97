//! System calls that neither the standard library nor `netlink-sys` offers. The only `unsafe` of this crate.

#![expect(unsafe_code, reason = "system calls")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::model::IfName;
use crate::plan::TapSpec;

/// Moves the calling thread into the network namespace behind `fd` (setns(2), `CLONE_NEWNET`).
pub(crate) fn enter_netns(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns takes no pointers; `fd` is open for the length of the call, because it is borrowed.
    check(unsafe { libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) })
}

/// Moves the calling thread into a new, empty network namespace (unshare(2), `CLONE_NEWNET`).
pub(crate) fn unshare_netns() -> io::Result<()> {
    // SAFETY: unshare takes no pointers; CLONE_NEWNET changes no memory that Rust code relies on.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })
}

/// Stops the process until it gets SIGCONT (raise(3), SIGSTOP).
#[cfg(feature = "fault-injection")]
pub(crate) fn stop_process() -> io::Result<()> {
    // SAFETY: raise takes no pointers, and no handler can run for SIGSTOP.
    check(unsafe { libc::raise(libc::SIGSTOP) })
}

/// Whether `fd` is a file of nsfs and stands for a network namespace (`NSFS_MAGIC`, and ioctl `NS_GET_NSTYPE`
/// since Linux 4.11).
pub(crate) fn is_netns(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `stat` points to writable memory of the size of the structure, and outlives the call; `fd` is borrowed.
    check(unsafe { libc::fstatfs(fd.as_raw_fd(), stat.as_mut_ptr()) })?;
    // SAFETY: all bytes were zero before the call and every bit pattern is a valid `statfs` of plain integers.
    let stat = unsafe { stat.assume_init() };
    if stat.f_type != libc::NSFS_MAGIC {
        return Ok(false);
    }
    // SAFETY: NS_GET_NSTYPE takes no argument; `fd` is borrowed and thus open.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    check(kind)?;
    Ok(kind == libc::CLONE_NEWNET)
}

/// Binds the file `from` over the existing file `to` (mount(2), `MS_BIND`).
pub(crate) fn bind_mount(from: &std::ffi::CStr, to: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: both paths are NUL-terminated and outlive the call; a bind mount reads neither type nor data.
    check(unsafe { libc::mount(from.as_ptr(), to.as_ptr(), std::ptr::null(), libc::MS_BIND, std::ptr::null()) })
}

/// Detaches the mount at `at` (umount2(2), `MNT_DETACH`).
pub(crate) fn unmount(at: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: the path is NUL-terminated and outlives the call.
    check(unsafe { libc::umount2(at.as_ptr(), libc::MNT_DETACH) })
}

/// Waits until `fd` can be read, at most for `limit`, and returns whether it can (poll(2)). A signal does not end it.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let left = deadline.saturating_duration_since(Instant::now()).as_millis();
        // Rounded up, lest the last millisecond is spent in a loop.
        let left = libc::c_int::try_from(left + 1).unwrap_or(libc::c_int::MAX);
        // SAFETY: `entry` is one writable pollfd, as the count says, and outlives the call; `fd` is borrowed and thus open.
        match check(unsafe { libc::poll(&raw mut entry, 1, left) }) {
            Ok(()) => return Ok(entry.revents != 0),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits until anything of what is asked for has come to one of the descriptors, at most for `limit`, and returns for each
/// whether it has (poll(2)). A signal, like the end of the time, returns that nothing has.
pub(crate) fn wait_any(watched: &[(BorrowedFd<'_>, libc::c_short)], limit: Duration) -> io::Result<Vec<bool>> {
    let entry = |(fd, events): &(BorrowedFd<'_>, libc::c_short)| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: *events,
        revents: 0,
    };
    let mut entries: Vec<_> = watched.iter().map(entry).collect();
    let left = libc::c_int::try_from(limit.as_millis() + 1).unwrap_or(libc::c_int::MAX);
    let count = entries.len() as libc::nfds_t;
    // SAFETY: `entries` holds as many writable entries as `count` says, and outlives the call; the descriptors are
    // borrowed and thus open.
    match check(unsafe { libc::poll(entries.as_mut_ptr(), count, left) }) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(entries.iter().map(|entry| entry.revents != 0).collect()),
    }
}

/// Has reads and writes of a descriptor return at once (fcntl(2), `O_NONBLOCK`).
pub(crate) fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: F_GETFL takes no argument; `fd` is borrowed and thus open.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    check(flags)?;
    // SAFETY: F_SETFL takes a number and no pointer; `fd` is borrowed and thus open.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

/// A descriptor that can be read when the child has ended (pidfd_open(2); Linux 5.3). `pid` is of a child that was not
/// waited for.
pub(crate) fn process_fd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers and no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
    let fd = libc::c_int::try_from(fd).map_err(io::Error::other)?;
    check(fd)?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills the process group of a child that leads one and was not waited for (kill(2)).
pub(crate) fn kill_group(pid: u32) -> io::Result<()> {
    let group = libc::pid_t::try_from(pid).ok().filter(|pid| *pid > 1).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: kill takes two numbers and no pointer.
    check(unsafe { libc::kill(-group, libc::SIGKILL) })
}

/// Has the program of the command killed when the thread that starts it ends (prctl(2), `PR_SET_PDEATHSIG`).
pub(crate) fn die_with_this_thread(command: &mut Command) {
    let parent = std::process::id();
    let arrange = move || {
        // SAFETY: PR_SET_PDEATHSIG takes a number and no pointer.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        // SAFETY: getppid takes nothing and cannot fail.
        let now = unsafe { libc::getppid() };
        // Whoever ended before the arrangement sends no signal.
        if u32::try_from(now) == Ok(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec `arrange` makes two system calls and neither allocates nor locks: errors are a
    // number or a kind.
    unsafe { command.pre_exec(arrange) };
}

/// Creates a TAP or TUN device in the calling thread's namespace, which stays when the descriptor is closed (tun(4),
/// `Documentation/networking/tuntap.rst`).
pub(crate) fn create_tap(name: &IfName, tap: &TapSpec) -> io::Result<()> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let TapSpec { ethernet, owner, group, multi_queue } = tap;
    let mut flags = libc::IFF_NO_PI | libc::IFF_TUN_EXCL | if *ethernet { libc::IFF_TAP } else { libc::IFF_TUN };
    if *multi_queue {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    // The flags fit the field's 16 bits, the highest of which is IFF_TUN_EXCL.
    let mut request = IfReq { name: [0; libc::IFNAMSIZ], flags: flags as u16, rest: [0; 22] };
    for (to, from) in request.name.iter_mut().zip(name.as_str().bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from;
    }
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq` of 40 bytes, which `request` is, and which outlives the call;
    // `tun` is open.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    for (command, value) in [(libc::TUNSETOWNER, *owner), (libc::TUNSETGROUP, *group), (libc::TUNSETPERSIST, Some(1))] {
        if let Some(value) = value {
            set_tap(tun.as_fd(), command, value)?;
        }
    }
    Ok(())
}

fn set_tap(tun: BorrowedFd<'_>, command: libc::Ioctl, value: u32) -> io::Result<()> {
    // SAFETY: these commands take a number and no pointer; `tun` is borrowed and thus open.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), command, libc::c_ulong::from(value)) })
}

/// `struct ifreq` of `include/uapi/linux/if.h`, with its flags.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<IfReq>() == 40);

/// Opens a socket that sends ICMP echo requests and receives their replies (icmp(7), "Ping sockets").
#[cfg(any(test, feature = "test-support"))]
pub(crate) fn ping_socket(ipv6: bool) -> io::Result<OwnedFd> {
    let (family, protocol) =
        if ipv6 { (libc::AF_INET6, libc::IPPROTO_ICMPV6) } else { (libc::AF_INET, libc::IPPROTO_ICMP) };
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol) };
    check(fd)?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `_IO(0xb7, 3)` of `include/uapi/linux/nsfs.h`.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
