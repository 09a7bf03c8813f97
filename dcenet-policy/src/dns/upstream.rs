//! Asking the server behind.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Instant;

use super::message::{self, Question};
use super::{MOST_BYTES, ProxyConfig};

/// By which transport a query came, and goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Udp,
    Tcp,
}

/// The answer of the first upstream that gives one, with the query's own number; none where none does in time. One that fails is
/// what counts where no other answers: a server that is starting, or is not for the name, says so.
pub(super) fn ask(config: &ProxyConfig, query: &[u8], question: &Question, way: Way) -> Option<Vec<u8>> {
    let mut failed = None;
    for upstream in &config.upstreams {
        let answered = match way {
            Way::Udp => ask_udp(config, *upstream, query, question),
            Way::Tcp => ask_tcp(config, *upstream, query, question),
        };
        match answered {
            Ok(mut answer) => {
                renumber(&mut answer, [query[0], query[1]]);
                if !message::is_failure(&answer) {
                    return Some(answer);
                }
                failed.get_or_insert(answer);
            }
            Err(error) => tracing::debug!(%upstream, %error, "no answer from the server behind"),
        }
    }
    failed
}

/// Each query has a socket of its own, and so a port that nobody else can guess, and a number likewise (RFC 5452, section 4).
fn ask_udp(config: &ProxyConfig, upstream: SocketAddr, query: &[u8], question: &Question) -> io::Result<Vec<u8>> {
    let any: IpAddr = if upstream.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(upstream)?;
    let (mut numbered, number) = numbered(query);
    message::keep_whole(&mut numbered);
    let until = Instant::now() + config.timeout;
    socket.send(&numbered)?;
    let mut buffer = vec![0; MOST_BYTES];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        let length = socket.recv(&mut buffer)?;
        let answer = &buffer[..length];
        // What does not answer the query may be forged, and the answer may still come.
        if question.is_answered_by(answer, number) {
            return Ok(answer.to_vec());
        }
    }
}

fn ask_tcp(config: &ProxyConfig, upstream: SocketAddr, query: &[u8], question: &Question) -> io::Result<Vec<u8>> {
    let until = Instant::now() + config.timeout;
    let mut stream = TcpStream::connect_timeout(&upstream, config.timeout)?;
    stream.set_write_timeout(Some(config.timeout))?;
    let (numbered, number) = numbered(query);
    stream.write_all(&framed(&numbered)?)?;
    let mut length = [0; 2];
    read_by(&mut stream, &mut length, until)?;
    let mut answer = vec![0; u16::from_be_bytes(length).into()];
    read_by(&mut stream, &mut answer, until)?;
    if question.is_answered_by(&answer, number) {
        Ok(answer)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "it answers another question"))
    }
}

/// Fills the buffer by then, however little comes at a time.
pub(super) fn read_by(stream: &mut TcpStream, buffer: &mut [u8], until: Instant) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// A message as it goes over TCP (RFC 1035, section 4.2.2).
pub(super) fn framed(message: &[u8]) -> io::Result<Vec<u8>> {
    let too_long = |_| io::Error::new(io::ErrorKind::InvalidData, "longer than a message may be");
    let length = u16::try_from(message.len()).map_err(too_long)?;
    Ok([&length.to_be_bytes(), message].concat())
}

fn numbered(query: &[u8]) -> (Vec<u8>, u16) {
    // Keyed anew for each call, with what the system drew at random.
    let number = RandomState::new().hash_one(query) as u16;
    let mut query = query.to_vec();
    renumber(&mut query, number.to_be_bytes());
    (query, number)
}

fn renumber(message: &mut [u8], number: [u8; 2]) {
    message[..2].copy_from_slice(&number);
}
