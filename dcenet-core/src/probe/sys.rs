//! Packet sockets (packet(7)), which the standard library does not offer.

#![expect(unsafe_code, reason = "system calls")]

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::frame;
use crate::model::IfIndex;

/// Opens a packet socket for the frames of one EtherType on one device, headers included, that does not block. Of them it
/// gets those that `filter` lets through, and all where that is empty. What this host sends by the device it does not get.
pub(super) fn open(ether_type: u16, device: IfIndex, filter: &[libc::sock_filter]) -> io::Result<OwnedFd> {
    // Of no protocol until it is bound, so that it gets nothing past the filter or from other devices.
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: socket takes no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
    check(fd)?;
    // SAFETY: the descriptor was just opened and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if !filter.is_empty() {
        let length = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut() };
        let (option, size) = (&raw const program, size_of::<libc::sock_fprog>() as libc::socklen_t);
        // SAFETY: `option` points to a sock_fprog of `size` bytes, which points to as many instructions as it says; the
        // kernel copies and does not change them; both outlive the call; `socket` is open.
        check(unsafe {
            libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, option.cast(), size)
        })?;
    }
    let index = i32::try_from(device.get()).map_err(|_| io::Error::from_raw_os_error(libc::ENODEV))?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ether_type.to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointer is to a sockaddr_ll of `size` bytes that outlives the call; `socket` is open.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) })?;
    Ok(socket)
}

/// Waits until one of the sockets can be read, at most for `limit`, and returns whether one can (poll(2)). A signal does
/// not end it.
pub(super) fn wait_readable(first: Option<&File>, second: Option<&File>, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    // Entries without a descriptor, which is -1, are skipped.
    let entry = |file: Option<&File>| libc::pollfd {
        fd: file.map_or(-1, AsRawFd::as_raw_fd),
        events: libc::POLLIN,
        revents: 0,
    };
    let mut entries = [entry(first), entry(second)];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = libc::timespec { tv_sec: left.as_secs() as libc::time_t, tv_nsec: left.subsec_nanos().into() };
        let (count, signals) = (entries.len() as libc::nfds_t, std::ptr::null());
        // SAFETY: `entries` are as many writable pollfds as `count` says, and `left` a timespec; both outlive the call. A
        // null signal mask changes none. The descriptors are borrowed and thus open.
        match check(unsafe { libc::ppoll(entries.as_mut_ptr(), count, &raw const left, signals) }) {
            Ok(()) => return Ok(entries.iter().any(|e| e.revents != 0)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets ARP through that may be about one of the addresses: it is the sender's, or the target's. Gateways answer to them.
pub(super) fn arp(device: IfIndex, addresses: &[IpAddr]) -> Vec<libc::sock_filter> {
    let words: Vec<u32> =
        addresses.iter().filter_map(|a| if let IpAddr::V4(a) = a { Some((*a).into()) } else { None }).collect();
    let mut program = of_the_segment(device);
    about(&words, [ETHERNET + 14, ETHERNET + 24], &mut program);
    program
}

/// Lets neighbour solicitations and advertisements through that follow the IPv6 header straight, for others are not valid
/// (RFC 6980), and that may be about one of the addresses: the last word of the target is its, or that of the destination.
pub(super) fn neighbour_discovery(device: IfIndex, addresses: &[IpAddr]) -> Vec<libc::sock_filter> {
    let last = |a: &IpAddr| if let IpAddr::V6(a) = a { Some(u128::from(*a) as u32) } else { None };
    let words: Vec<u32> = addresses.iter().filter_map(last).collect();
    let mut program = of_the_segment(device);
    program.extend([
        instruction(LOAD_BYTE, 0, 0, ETHERNET + 6),
        instruction(IF_EQUAL, 1, 0, frame::ICMPV6.into()),
        instruction(RETURN, 0, 0, 0),
        instruction(LOAD_BYTE, 0, 0, ETHERNET + IPV6),
        instruction(IF_EQUAL, 2, 0, frame::SOLICITATION.into()),
        instruction(IF_EQUAL, 1, 0, frame::ADVERTISEMENT.into()),
        instruction(RETURN, 0, 0, 0),
    ]);
    about(&words, [ETHERNET + IPV6 + 8 + 12, ETHERNET + 24 + 12], &mut program);
    program
}

/// Drops what is of a virtual LAN on the same cable, whose tag the kernel took off: the frame is another device's where
/// there is one for the tag, and counts as for another host where there is none (`__netif_receive_skb_core` of
/// `net/core/dev.c`). Tag 0 is a priority, and no network (IEEE 802.1Q, section 9.6).
fn of_the_segment(device: IfIndex) -> Vec<libc::sock_filter> {
    let beside = |what: libc::c_int| instruction(LOAD_WORD, 0, 0, (libc::SKF_AD_OFF + what) as u32);
    vec![
        beside(libc::SKF_AD_PKTTYPE),
        instruction(IF_EQUAL, 0, 1, libc::PACKET_OTHERHOST.into()),
        instruction(RETURN, 0, 0, 0),
        beside(libc::SKF_AD_IFINDEX),
        instruction(IF_EQUAL, 1, 0, device.get()),
        instruction(RETURN, 0, 0, 0),
        beside(libc::SKF_AD_VLAN_TAG_PRESENT),
        instruction(IF_EQUAL, 4, 0, 0),
        beside(libc::SKF_AD_VLAN_TAG),
        instruction(AND, 0, 0, 0xfff),
        instruction(IF_EQUAL, 1, 0, 0),
        instruction(RETURN, 0, 0, 0),
    ]
}

/// Ends a program: what has one of the words at one of the places is let through. All is where they are too many.
fn about(words: &[u32], places: [u32; 2], program: &mut Vec<libc::sock_filter>) {
    if words.len() > MOST_WORDS {
        return program.push(instruction(RETURN, 0, 0, u32::MAX));
    }
    for place in places {
        program.push(instruction(LOAD_WORD, 0, 0, place));
        for word in words {
            program.extend([instruction(IF_EQUAL, 0, 1, *word), instruction(RETURN, 0, 0, u32::MAX)]);
        }
    }
    program.push(instruction(RETURN, 0, 0, 0));
}

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
/// Lengths of headers.
const ETHERNET: u32 = 14;
const IPV6: u32 = 40;
/// A program has 4096 instructions at most (`BPF_MAXINSNS`), of which each word takes four.
const MOST_WORDS: usize = 1000;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::os::unix::thread::JoinHandleExt;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    static CAUGHT: AtomicU64 = AtomicU64::new(0);

    extern "C" fn catch(_: libc::c_int) {
        CAUGHT.fetch_add(1, Ordering::Relaxed);
    }

    /// `ppoll` ends with EINTR at each signal, whatever the handler's flags (signal(7)).
    #[test]
    fn a_signal_neither_ends_the_waiting_nor_is_something_to_read() {
        let handler: extern "C" fn(libc::c_int) = catch;
        // SAFETY: the handler does nothing but add to an atomic, which is safe at any moment.
        let before = unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
        assert_ne!(before, libc::SIG_ERR);
        let (silent, _peer) = UnixStream::pair().unwrap();
        let silent = File::from(OwnedFd::from(silent));
        let limit = Duration::from_millis(300);
        let waiter = std::thread::spawn(move || {
            let began = Instant::now();
            (wait_readable(Some(&silent), None, limit).unwrap(), began.elapsed())
        });
        while !waiter.is_finished() {
            // SAFETY: the thread is not joined yet, so that its handle is valid.
            unsafe { libc::pthread_kill(waiter.as_pthread_t(), libc::SIGUSR1) };
            std::thread::sleep(Duration::from_millis(5));
        }
        let (readable, waited) = waiter.join().unwrap();
        assert!(!readable);
        assert!(waited >= limit, "{waited:?}");
        assert!(CAUGHT.load(Ordering::Relaxed) > 1);
    }
}
