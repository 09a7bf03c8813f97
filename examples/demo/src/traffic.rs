//! Real traffic between namespaces.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dcenet_core::netns::NetNs;
use socket2::{Domain, Protocol, Socket, Type};

/// How long a probe waits before it counts as dropped: longer than the second after which a sender asks again for a
/// neighbour's address, which was asked for in vain while nothing passed.
const PATIENCE: Duration = Duration::from_millis(1500);

/// The port on which every pod's server listens.
pub const PORT: u16 = 8080;

/// What a probe sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A TCP connection with an echo over it.
    Tcp,
    /// A UDP datagram with its echo.
    Udp,
    /// An ICMP or ICMPv6 echo request with its reply.
    Icmp,
}

impl Kind {
    /// All.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Icmp];

    /// The protocol's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

/// Whether the target answered.
pub fn probe(from: &NetNs, kind: Kind, to: IpAddr) -> Result<bool, Box<dyn std::error::Error>> {
    let outcome = from.run(|| match kind {
        Kind::Tcp => tcp(to),
        Kind::Udp => udp(to),
        Kind::Icmp => icmp(to),
    })?;
    match outcome {
        Ok(()) => Ok(true),
        Err(error) => match error.kind() {
            io::ErrorKind::TimedOut
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable => Ok(false),
            _ => Err(error.into()),
        },
    }
}

fn tcp(to: IpAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to, PORT), PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"hello")?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer)
}

fn udp(to: IpAddr) -> io::Result<()> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((to, PORT))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"hello")?;
    socket.recv(&mut [0; 16]).map(drop)
}

fn icmp(to: IpAddr) -> io::Result<()> {
    // Raw sockets of one namespace see each other's replies.
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let (domain, protocol, question, answer) = match to {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128, 129),
    };
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(&SocketAddr::new(to, 0).into())?;
    let mut packet = [question, 0, 0, 0, id[0], id[1], 0, 1];
    if to.is_ipv4() {
        // The kernel fills in the checksum of ICMPv6 only.
        let sum: u32 = packet.chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    socket.send(&packet)?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let mut received = [0; 128];
        let length = (&socket).read(&mut received)?;
        // An IPv4 raw socket sees the IP header too.
        let header = if to.is_ipv4() { usize::from(received[0] & 15) * 4 } else { 0 };
        let message = received.get(header..length).unwrap_or_default();
        if message.first() == Some(&answer) && message.get(4..6) == Some(&id[..]) {
            return Ok(());
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// Echoes over TCP and UDP in a namespace until it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on [`PORT`] of the addresses: of each with a socket of its own, so that replies come from it.
    pub fn start(pod: &NetNs, addresses: &[IpAddr]) -> Result<Self, Box<dyn std::error::Error>> {
        let sockets = pod.run(|| {
            addresses
                .iter()
                .map(|address| {
                    let listener = TcpListener::bind((*address, PORT))?;
                    listener.set_nonblocking(true)?;
                    let socket = UdpSocket::bind((*address, PORT))?;
                    socket.set_read_timeout(Some(TICK))?;
                    Ok((listener, socket))
                })
                .collect::<io::Result<Vec<_>>>()
        })??;
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (listener, socket) in sockets {
            let (for_tcp, for_udp) = (stop.clone(), stop.clone());
            threads.push(std::thread::spawn(move || echo_tcp(&listener, &for_tcp)));
            threads.push(std::thread::spawn(move || echo_udp(&socket, &for_udp)));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic in there was printed by the panic itself; here is nobody to tell.
            let _ = thread.join();
        }
    }
}

/// How often a server looks whether it is to stop.
const TICK: Duration = Duration::from_millis(20);

fn echo_tcp(listener: &TcpListener, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                std::thread::spawn(move || echo_stream(stream));
            }
            Err(_) => std::thread::sleep(TICK),
        }
    }
}

/// Ends with the connection, or when nothing comes for a while.
fn echo_stream(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    let prepared = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(PATIENCE * 4)));
    if prepared.is_err() {
        return;
    }
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

fn echo_udp(socket: &UdpSocket, stop: &AtomicBool) {
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            // A reply that the client no longer waits for may fail.
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}
