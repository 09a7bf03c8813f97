//! An Ethernet device and the sockets for it.

use std::collections::BTreeSet;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use super::frame::{self, Nonce, Said};
use super::judge::Judge;
use super::{Conflict, Timing, sys};
use crate::model::{IfIndex, MacAddr};

/// An Ethernet device of a network namespace, with a packet socket for each family of addresses that is needed. The
/// sockets stay in their namespace, whichever thread uses them. When it is dropped, a thread of its own closes each, and ends some ten
/// milliseconds later.
#[derive(Debug)]
pub struct Segment {
    mac: MacAddr,
    nonce: Nonce,
    arp: Option<File>,
    ipv6: Option<File>,
    /// Member of the groups of the IPv6 addresses: what others ask about them is received, and a switch that looks into
    /// group reports lets it through (RFC 4862, section 5.4.2).
    _groups: Option<UdpSocket>,
}

impl Drop for Segment {
    /// The kernel ends a packet socket in a grace period of RCU, some ten milliseconds (`packet_release` of
    /// `net/packet/af_packet.c`), for which nobody waits here.
    fn drop(&mut self) {
        for socket in [self.arp.take(), self.ipv6.take()].into_iter().flatten() {
            // Where there can be no thread, the socket is dropped with what it was to do.
            let _ = std::thread::Builder::new().name("dcenet-close".to_owned()).spawn(move || drop(socket));
        }
    }
}

/// A frame for one of the sockets.
#[derive(Debug)]
enum Frame {
    Arp(Vec<u8>),
    Ipv6(Vec<u8>),
}

impl Segment {
    /// Opens sockets in the calling thread's namespace, for a device that is up and these addresses. `mac` is the Ethernet
    /// address that the addresses are to have, and the device's: answers are sent to it. What is not about one of the
    /// addresses the kernel does not hand over, nor frames of virtual LANs on the same cable, which are another segment.
    ///
    /// # Errors
    /// Those of socket(2), bind(2) and setsockopt(2): without `CAP_NET_RAW`, without such a device, for IPv6 without
    /// IPv6.
    pub fn open(device: IfIndex, mac: MacAddr, addresses: &[IpAddr]) -> io::Result<Self> {
        let (mut arp, mut ipv6, mut groups) = (None, None, None);
        if addresses.iter().any(IpAddr::is_ipv4) {
            arp = Some(sys::open(frame::ARP, device, &sys::arp(device, addresses))?.into());
        }
        if addresses.iter().any(IpAddr::is_ipv6) {
            let udp = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
            let of = |a: &IpAddr| if let IpAddr::V6(a) = a { Some(frame::solicited_node(*a)) } else { None };
            for group in addresses.iter().filter_map(of).collect::<BTreeSet<_>>() {
                udp.join_multicast_v6(&group, device.get())?;
            }
            groups = Some(udp);
            ipv6 = Some(sys::open(frame::IPV6, device, &sys::neighbour_discovery(device, addresses))?.into());
        }
        Ok(Self { mac, nonce: nonce(), arp, ipv6, _groups: groups })
    }

    /// Asks whether somebody else has one of the addresses or is about to take it, and returns who; none where all are
    /// free. No device of the namespace may have them yet: the kernel would answer for itself.
    ///
    /// It takes the time of `timing` where nobody answers, and where somebody does no longer than until the next probe
    /// would be sent; also where a neighbour sends faster than can be read.
    ///
    /// # Errors
    /// Those of the sockets, `ENOBUFS` and `EAGAIN` only where no probe for an address could be sent: its silence proves
    /// nothing.
    pub fn conflicts(&self, addresses: &[IpAddr], timing: Timing) -> io::Result<Vec<Conflict>> {
        let judge = Judge { mac: self.mac, addresses, nonce: self.nonce };
        let probe = |address: &IpAddr| match *address {
            IpAddr::V4(a) => Frame::Arp(frame::arp_request(self.mac, Ipv4Addr::UNSPECIFIED, a)),
            IpAddr::V6(a) => Frame::Ipv6(frame::duplicate_detection(self.mac, a, self.nonce)),
        };
        let frames: Vec<Frame> = addresses.iter().map(probe).collect();
        let mut found: Vec<Conflict> = Vec::new();
        self.ask(&frames, timing, |frame| {
            let new = judge.judge(frame).filter(|new| found.iter().all(|old| old.address != new.address));
            found.extend(new);
            match found.len() {
                0 => Progress::Open,
                n if n < addresses.len() => Progress::Partial,
                _ => Progress::Done,
            }
        })?;
        Ok(found)
    }

    /// Tells the segment who has these addresses now, so that nobody goes on sending to whoever had them before: an ARP
    /// announcement (RFC 5227, section 2.3), an unsolicited neighbour advertisement (RFC 4861, section 7.2.6).
    ///
    /// # Errors
    /// Those of the sockets, `ENOBUFS` and `EAGAIN` only where no frame about an address could be sent.
    pub fn announce(&self, addresses: &[IpAddr], times: u8) -> io::Result<()> {
        let announcement = |address: &IpAddr| match *address {
            IpAddr::V4(a) => Frame::Arp(frame::arp_request(self.mac, a, a)),
            IpAddr::V6(a) => Frame::Ipv6(frame::advertisement(self.mac, a)),
        };
        let frames: Vec<Frame> = addresses.iter().map(announcement).collect();
        let mut unsent = Unsent::of(&frames);
        (0..times).try_for_each(|_| self.send(&frames, &mut unsent))?;
        unsent.all_went()
    }

    /// Asks the gateways for their Ethernet addresses, each from an address of its family that the device has, and returns
    /// those gateways that do not answer. Pairs are of an own address and a gateway.
    ///
    /// # Errors
    /// Those of the sockets, `ENOBUFS` and `EAGAIN` only where no frame about an address could be sent.
    pub fn unreachable(&self, pairs: &[(IpAddr, IpAddr)], timing: Timing) -> io::Result<Vec<IpAddr>> {
        let question = |pair: &(IpAddr, IpAddr)| match *pair {
            (IpAddr::V4(own), IpAddr::V4(gateway)) => Some(Frame::Arp(frame::arp_request(self.mac, own, gateway))),
            (IpAddr::V6(own), IpAddr::V6(gateway)) => Some(Frame::Ipv6(frame::solicitation(self.mac, own, gateway))),
            // No such address can be asked for by that family.
            _ => None,
        };
        let frames: Vec<Frame> = pairs.iter().filter_map(question).collect();
        let mut silent: BTreeSet<IpAddr> = pairs.iter().map(|(_, gateway)| *gateway).collect();
        self.ask(&frames, timing, |frame| {
            if let Some(Said::Is { address, .. }) = frame::parse(frame) {
                silent.remove(&address);
            }
            if silent.is_empty() { Progress::Done } else { Progress::Open }
        })?;
        Ok(silent.into_iter().collect())
    }

    /// Sends all frames once for each probe, and hands over what comes, until the time is over or enough is known.
    fn ask(&self, frames: &[Frame], timing: Timing, mut see: impl FnMut(&[u8]) -> Progress) -> io::Result<()> {
        if frames.is_empty() {
            return Ok(());
        }
        let probes = timing.probes.max(1);
        let part = timing.within / u32::from(probes);
        let mut progress = Progress::Open;
        let mut unsent = Unsent::of(frames);
        for _ in 0..probes {
            self.send(frames, &mut unsent)?;
            // From now on, and not by a plan of all: however late this thread gets to it, an answer has this long.
            let deadline = Instant::now() + part;
            while self.wait(deadline)? {
                for socket in [&self.arp, &self.ipv6].into_iter().flatten() {
                    progress = progress.max(receive(socket, &mut see)?);
                    if progress == Progress::Done {
                        return Ok(());
                    }
                }
                // Others may keep the sockets readable for as long as they like.
                if Instant::now() >= deadline {
                    break;
                }
            }
            if progress == Progress::Partial {
                return Ok(());
            }
        }
        unsent.all_went()
    }

    fn send(&self, frames: &[Frame], unsent: &mut Unsent) -> io::Result<()> {
        for (at, frame) in frames.iter().enumerate() {
            let (socket, bytes) = match frame {
                Frame::Arp(bytes) => (&self.arp, bytes),
                Frame::Ipv6(bytes) => (&self.ipv6, bytes),
            };
            let mut socket = socket.as_ref().ok_or_else(|| {
                let reason = "no address of this family was named when the segment was opened";
                io::Error::new(io::ErrorKind::InvalidInput, reason)
            })?;
            // It goes as one frame or not at all, and again after a signal.
            match socket.write_all(bytes) {
                Err(error) if finds_no_room(&error) => unsent.last = Some(error),
                result => {
                    result?;
                    unsent.never[at] = false;
                }
            }
        }
        Ok(())
    }

    /// Whether there is something to receive before the deadline.
    fn wait(&self, deadline: Instant) -> io::Result<bool> {
        let left = deadline.saturating_duration_since(Instant::now());
        sys::wait_readable(self.arp.as_ref(), self.ipv6.as_ref(), left.max(Duration::ZERO))
    }
}

/// What was not sent, for a queue on the way was full each time.
struct Unsent {
    /// Whether each frame never was.
    never: Vec<bool>,
    last: Option<io::Error>,
}

impl Unsent {
    fn of(frames: &[Frame]) -> Self {
        Self { never: vec![true; frames.len()], last: None }
    }

    fn all_went(self) -> io::Result<()> {
        match self.last {
            Some(error) if self.never.contains(&true) => Err(error),
            _ => Ok(()),
        }
    }
}

/// Of the device's queue or of the socket's: `packet_snd` of `net/packet/af_packet.c`.
fn finds_no_room(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// How much is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Progress {
    /// Too little: go on to the end.
    Open,
    /// Enough, and more may come until the next probe is due.
    Partial,
    /// All.
    Done,
}

/// Hands over what was received, up to what a full socket holds: more may come all the time.
fn receive(mut socket: &File, mut see: impl FnMut(&[u8]) -> Progress) -> io::Result<Progress> {
    let mut buffer = [0; FRAME];
    let mut progress = Progress::Open;
    for _ in 0..BATCH {
        match socket.read(&mut buffer) {
            Ok(length) => progress = progress.max(see(&buffer[..length])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if progress == Progress::Done {
            break;
        }
    }
    Ok(progress)
}

/// 48 bits that nobody guesses.
fn nonce() -> Nonce {
    let [a, b, c, d, e, f, ..] = RandomState::new().build_hasher().finish().to_ne_bytes();
    [a, b, c, d, e, f]
}

/// Longer frames are cut off here; what is looked for is shorter.
const FRAME: usize = 1514;
/// More frames than a socket holds: 212,992 bytes by default (`net.core.rmem_default`), of which the shortest takes 512 and
/// more.
const BATCH: usize = 512;

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// A segment whose other end the test has in hand.
    fn segment() -> (Segment, UnixDatagram) {
        let (own, other) = UnixDatagram::pair().unwrap();
        own.set_nonblocking(true).unwrap();
        other.set_nonblocking(true).unwrap();
        let arp = Some(File::from(OwnedFd::from(own)));
        (Segment { mac: MacAddr::new([2, 0, 0, 0, 0, 7]), nonce: nonce(), arp, ipv6: None, _groups: None }, other)
    }

    /// Each frame that is read is followed by another, so that there is always one to read.
    #[test]
    fn who_sends_without_end_is_heard_to_the_limit_only() {
        let (segment, other) = segment();
        let timing = Timing { probes: 2, within: Duration::from_millis(40) };
        let (mut seen, mut drained) = (0u64, [0; FRAME]);
        other.send(b"noise").unwrap();
        segment
            .ask(&[Frame::Arp(vec![1])], timing, |_| {
                seen += 1;
                other.send(b"noise").unwrap();
                Progress::Open
            })
            .unwrap();
        assert!(seen >= 2, "{seen}");
        assert_eq!((0..3).filter(|_| other.recv(&mut drained).is_ok()).count(), 2, "both probes were sent");
        // One call reads so many, and would read without end else: the guard removed.
        let socket = segment.arp.as_ref().unwrap();
        let feed = |count: &mut u64| {
            *count += 1;
            other.send(b"noise").unwrap();
            Progress::Open
        };
        let (mut bounded, mut unbounded, mut buffer) = (0, 0, [0; FRAME]);
        receive(socket, |_| feed(&mut bounded)).unwrap();
        assert_eq!(bounded, BATCH as u64);
        let mut reader = socket;
        while unbounded < 100 * BATCH as u64 && reader.read(&mut buffer).is_ok() {
            feed(&mut unbounded);
        }
        assert_eq!(unbounded, 100 * BATCH as u64);
    }

    #[test]
    fn who_knows_all_reads_no_more() {
        let (segment, other) = segment();
        for _ in 0..3 {
            other.send(b"answer").unwrap();
        }
        let mut seen = 0;
        let timing = Timing { probes: 1, within: Duration::from_secs(60) };
        segment
            .ask(&[Frame::Arp(vec![1])], timing, |_| {
                seen += 1;
                Progress::Done
            })
            .unwrap();
        assert_eq!(seen, 1);
    }

    /// Sends until there is no room any more.
    fn fill(segment: &Segment) -> usize {
        let mut socket = segment.arp.as_ref().unwrap();
        std::iter::from_fn(|| socket.write(b"old").ok()).count()
    }

    fn received(other: &UnixDatagram) -> Vec<Vec<u8>> {
        let mut buffer = [0; FRAME];
        std::iter::from_fn(|| other.recv(&mut buffer).ok().map(|n| buffer[..n].to_vec())).collect()
    }

    #[test]
    fn a_probe_that_finds_no_room_is_a_lost_one() {
        let (segment, other) = segment();
        let (probe, timing) = ([Frame::Arp(vec![1])], Timing { probes: 2, within: Duration::from_millis(100) });
        let before = fill(&segment);
        assert!(before > 0);
        // The other end makes room after the first.
        other.send(b"noise").unwrap();
        let mut old = 0;
        segment
            .ask(&probe, timing, |_| {
                old += received(&other).len();
                Progress::Open
            })
            .unwrap();
        assert_eq!((old, received(&other)), (before, vec![vec![1]]));
        // Nobody does: neither probes nor announcements went.
        fill(&segment);
        let error = segment.ask(&probe, timing, |_| Progress::Open).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(segment.announce(&[Ipv4Addr::new(192, 0, 2, 7).into()], 2).is_err());
        // What others say counts all the same.
        other.send(b"answer").unwrap();
        segment.ask(&probe, timing, |_| Progress::Partial).unwrap();
    }
}
