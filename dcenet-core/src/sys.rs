//! System calls that neither the standard library nor `netlink-sys` offers. The only `unsafe` of this crate.

#![expect(unsafe_code, reason = "system calls")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
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
pub(crate) fn ping_socket(ipv6: bool) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    let (family, protocol) =
        if ipv6 { (libc::AF_INET6, libc::IPPROTO_ICMPV6) } else { (libc::AF_INET, libc::IPPROTO_ICMP) };
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, protocol) };
    check(fd)?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `_IO(0xb7, 3)` of `include/uapi/linux/nsfs.h`.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
