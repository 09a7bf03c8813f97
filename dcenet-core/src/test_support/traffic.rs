//! Real traffic between two namespaces.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::TestNetNs;
use crate::sys;

/// Connects from `client` to a server in `server` that listens on `address`, sends a few bytes and reads them back.
///
/// # Errors
/// What the client met; `TimedOut` or `WouldBlock` where nothing came within `limit`.
pub fn tcp_echo(client: &TestNetNs, server: &TestNetNs, address: IpAddr, limit: Duration) -> io::Result<()> {
    let listener = server.run(|| TcpListener::bind(SocketAddr::new(address, 0)))?;
    let to = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    std::thread::scope(|scope| {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            // Accepting ends when the client is done, whether or not it ever arrived.
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                if let Ok((stream, _)) = listener.accept()
                    && let Err(error) = answer(stream, limit)
                {
                    // The client reports what it sees of this.
                    eprintln!("the server's end: {error}");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let result = client.run(|| {
            let mut stream = TcpStream::connect_timeout(&to, limit)?;
            stream.set_read_timeout(Some(limit))?;
            stream.write_all(b"hello")?;
            let mut bytes = [0; 5];
            stream.read_exact(&mut bytes)?;
            if &bytes == b"hello" { Ok(()) } else { Err(io::Error::other("other bytes came back")) }
        });
        drop(stop);
        result
    })
}

fn answer(mut stream: TcpStream, limit: Duration) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(limit))?;
    let mut bytes = [0; 5];
    stream.read_exact(&mut bytes)?;
    stream.write_all(&bytes)
}

/// Sends a datagram from `client` to a socket in `server` on `address`, which answers.
///
/// # Errors
/// As [`tcp_echo`].
pub fn udp_echo(client: &TestNetNs, server: &TestNetNs, address: IpAddr, limit: Duration) -> io::Result<()> {
    let socket = server.run(|| UdpSocket::bind(SocketAddr::new(address, 0)))?;
    socket.set_read_timeout(Some(limit))?;
    let to = socket.local_addr()?;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut bytes = [0; 5];
            if let Ok((len, from)) = socket.recv_from(&mut bytes)
                && let Err(error) = socket.send_to(&bytes[..len], from)
            {
                eprintln!("the server's end: {error}");
            }
        });
        client.run(|| {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
            socket.set_read_timeout(Some(limit))?;
            socket.connect(to)?;
            socket.send(b"hello")?;
            let mut bytes = [0; 5];
            let len = socket.recv(&mut bytes)?;
            if &bytes[..len] == b"hello" { Ok(()) } else { Err(io::Error::other("other bytes came back")) }
        })
    })
}

/// Sends one ICMP echo request of the address's family from `client` and waits for the reply.
///
/// # Errors
/// As [`tcp_echo`].
pub fn ping(client: &TestNetNs, address: IpAddr, limit: Duration) -> io::Result<()> {
    client.sysctl("ipv4/ping_group_range", "0 2147483647");
    client.run(|| {
        let socket = UdpSocket::from(sys::ping_socket(address.is_ipv6())?);
        socket.set_read_timeout(Some(limit))?;
        socket.connect(SocketAddr::new(address, 0))?;
        let request = [if address.is_ipv6() { ICMPV6_ECHO } else { ICMP_ECHO }, 0, 0, 0, 0, 0, 0, 1];
        socket.send(&request)?;
        let mut bytes = [0; 64];
        let len = socket.recv(&mut bytes)?;
        if len == request.len() { Ok(()) } else { Err(io::Error::other("something else came back")) }
    })
}

const ICMP_ECHO: u8 = 8;
const ICMPV6_ECHO: u8 = 128;
