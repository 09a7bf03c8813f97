//! Packet sockets (packet(7)) and options of sockets, which the standard library does not offer.

#![expect(unsafe_code, reason = "system calls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// A socket for whole frames of a device in the calling thread's namespace, which takes and gives them by write(2) and
/// read(2) and does not block. What it sends goes past the device's queueing discipline, and so past its tc programs, where
/// `bypass` says so (`PACKET_QDISC_BYPASS`).
pub fn packet_socket(device: u32, bypass: bool) -> io::Result<File> {
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(every_protocol)) };
    check(fd)?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if bypass {
        let (on, size) = (1_i32, size_of::<i32>() as libc::socklen_t);
        let (level, option) = (libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS);
        // SAFETY: the pointer is to an int of `size` bytes that outlives the call; `socket` is open.
        check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const on).cast(), size) })?;
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: every_protocol,
        sll_ifindex: i32::try_from(device).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointer is to a sockaddr_ll of `size` bytes that outlives the call; `socket` is open.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    Ok(socket.into())
}

/// Sets an option of a socket (setsockopt(2)) that is bytes.
pub fn set_option(socket: &impl AsFd, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    let size = libc::socklen_t::try_from(value.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: the pointer is to `size` bytes that outlive the call; `socket` is open.
    check(unsafe { libc::setsockopt(fd, level, option, value.as_ptr().cast(), size) })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
