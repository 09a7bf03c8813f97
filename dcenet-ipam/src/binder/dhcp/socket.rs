//! UDP on one device, before it has an address.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::{Duration, Instant};

use dcenet_core::model::IfName;
use socket2::{Domain, Protocol, Socket, Type};

use super::message::{Answer, Client, Kind};
use crate::ipam::random_id;

/// Ports of servers and clients (RFC 2131, section 4.1).
const SERVER: u16 = 67;
const CLIENT: u16 = 68;

/// DISCOVER, OFFER, REQUEST and ACK bear one `xid` (RFC 2131, section 4.4.1), and the REQUEST the `secs` of the DISCOVER
/// that was answered (section 3.1, item 3).
#[derive(Debug)]
pub(super) struct Exchange {
    xid: u32,
    began: Instant,
    secs: u16,
}

impl Exchange {
    pub(super) fn new() -> Self {
        Self { xid: random_id() as u32, began: Instant::now(), secs: 0 }
    }

    /// The `secs` of a message.
    fn secs(&mut self, kind: &Kind) -> u16 {
        if !matches!(kind, Kind::Select { .. }) {
            self.secs = u16::try_from(self.began.elapsed().as_secs()).unwrap_or(u16::MAX);
        }
        self.secs
    }
}

pub(super) struct Link {
    socket: UdpSocket,
}

impl Link {
    /// On the device, in the namespace of the calling thread. With an address it gets what is sent to that alone, and
    /// fails if the namespace does not have it.
    pub(super) fn open(device: &IfName, address: Option<Ipv4Addr>) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        // Other clients of the host have the port too; each gets its copy of a broadcast.
        socket.set_reuse_address(true)?;
        socket.set_broadcast(true)?;
        socket.bind_device(Some(device.as_str().as_bytes()))?;
        socket.bind(&SocketAddrV4::new(address.unwrap_or(Ipv4Addr::UNSPECIFIED), CLIENT).into())?;
        Ok(Self { socket: socket.into() })
    }

    /// Sends a message that has no answer, to a server alone where the device has an address to send it from: the
    /// kernel drops what comes to one of its addresses from 0.0.0.0 (`ip_route_input_slow` in `net/ipv4/route.c`). The
    /// message names the server that it is for.
    pub(super) fn tell(self, client: &Client, kind: &Kind, to: Option<Ipv4Addr>) -> io::Result<()> {
        let bytes = kind.encode(client, random_id() as u32, 0).map_err(io::Error::other)?;
        if let Some(to) = to
            && self.socket.connect(SocketAddrV4::new(to, SERVER)).is_ok()
            && self.socket.local_addr().is_ok_and(|own| !own.ip().is_unspecified())
            && self.socket.send(&bytes).is_ok()
        {
            return Ok(());
        }
        self.socket.connect(SocketAddrV4::new(Ipv4Addr::BROADCAST, SERVER))?;
        self.socket.send(&bytes).map(drop)
    }

    /// Sends a message up to so many times, and waits for its answer `first` long, then twice as long each time, a tenth
    /// more or less (RFC 2131, section 4.1).
    pub(super) fn ask(
        &mut self,
        exchange: &mut Exchange,
        client: &Client,
        kind: &Kind,
        to: Ipv4Addr,
        first: Duration,
        tries: u32,
    ) -> io::Result<Option<Answer>> {
        let xid = exchange.xid;
        let mut buffer = [0; 2048];
        for attempt in 0..tries {
            let bytes = kind.encode(client, xid, exchange.secs(kind)).map_err(io::Error::other)?;
            self.socket.send_to(&bytes, SocketAddrV4::new(to, SERVER))?;
            let jitter = 90 + random_id() as u32 % 21;
            let deadline = Instant::now() + first * (1 << attempt) * jitter / 100;
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                self.socket.set_read_timeout(Some(left))?;
                match self.socket.recv(&mut buffer) {
                    Ok(length) => {
                        if let Some(answer) = Answer::decode(&buffer[..length], kind, client, xid) {
                            return Ok(Some(answer));
                        }
                    }
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
                        ) => {}
                    // What an earlier packet found out, as that nobody has the port.
                    Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(None)
    }
}
