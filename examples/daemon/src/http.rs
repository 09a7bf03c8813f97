//! As much of an HTTP/1.1 server (RFC 9112) as Prometheus needs: a request, an answer, the end of the connection.
//!
//! Whoever asks is trusted with nothing. One thread serves all connections and waits for none of them; how many there are,
//! how long each may stay and how many bytes it may make the server keep is bounded by [`Limits`]. Nothing is kept of a
//! request's body, whatever length it claims. Where all places are taken a new connection gets that of the oldest, so that
//! connections that do nothing keep nobody out.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use httparse::{EMPTY_HEADER, Request, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read};
use rustix::net::{SendFlags, Shutdown, SocketFlags, accept_with, send, shutdown};

/// What connections may use.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How many there are at a time.
    pub connections: usize,
    /// The most bytes of a request's line and header fields.
    pub head: usize,
    /// How long these may take to come, and from then on how long the answer may take to be read.
    pub time: Duration,
    /// How long a connection has its place for sure.
    pub grace: Duration,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Code and phrase, such as `200 OK`.
    pub status: &'static str,
    /// The body's media type.
    pub kind: &'static str,
    /// The body.
    pub body: String,
}

impl Answer {
    /// A line for people.
    pub fn plain(status: &'static str, line: &str) -> Self {
        Self { status, kind: "text/plain; charset=utf-8", body: format!("{line}\n") }
    }

    fn bytes(&self) -> Vec<u8> {
        let Self { status, kind, body } = self;
        // RFC 9110, section 15.5.6, wants to know there which methods are right.
        let allow = if status.starts_with("405") { "Allow: GET\r\n" } else { "" };
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\n{allow}Content-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}

/// How long no connection is accepted after the system had no room for one.
const REST: Duration = Duration::from_secs(1);

/// Answers GET requests that come to a listening, non-blocking socket, by the path that they name, until there is something
/// to read on `stop` or its other end is gone.
///
/// # Errors
/// What poll(2) refuses.
pub fn serve(
    listener: impl AsFd,
    stop: impl AsFd,
    limits: Limits,
    mut answer: impl FnMut(&str) -> Answer,
) -> io::Result<()> {
    let mut connections: VecDeque<Connection> = VecDeque::new();
    let mut rests_until = None;
    loop {
        let now = Instant::now();
        let oldest = connections.front().filter(|_| connections.len() >= limits.connections);
        let admits_at = rests_until.max(oldest.map(|oldest| oldest.begun + limits.grace)).filter(|at| *at > now);
        let until = connections.iter().map(|connection| connection.ends).chain(admits_at).min();
        let timeout = until.map(|until| Timespec::try_from(until.saturating_duration_since(now)));
        let timeout = timeout.transpose().map_err(io::Error::other)?;

        let mut awaited = vec![PollFd::new(&stop, PollFlags::IN)];
        awaited.extend(connections.iter().map(|one| PollFd::new(&one.socket, one.wants())));
        if admits_at.is_none() {
            awaited.push(PollFd::new(&listener, PollFlags::IN));
        }
        match poll(&mut awaited, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = awaited.iter().map(|one| !one.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        if ready.next() == Some(true) {
            return Ok(());
        }
        // In the order in which they were awaited, the listener last. Time is that of before the wait, so that nobody's runs
        // out while another one's answer is made.
        connections.retain_mut(|one| match ready.next() {
            Some(true) => one.step(now, limits, &mut answer),
            _ => now < one.ends,
        });
        if ready.next() == Some(true) {
            match accept_with(&listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(socket) => {
                    if connections.len() >= limits.connections {
                        connections.pop_front();
                    }
                    connections.push_back(Connection::new(socket, limits));
                }
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!(%error, "connections to the metrics are not accepted for a while");
                    rests_until = Some(Instant::now() + REST);
                }
            }
        }
    }
}

/// Somebody who asks.
struct Connection {
    socket: OwnedFd,
    begun: Instant,
    /// When it is over at the latest.
    ends: Instant,
    state: State,
}

enum State {
    /// What has come of the request.
    Asking(Vec<u8>),
    /// An answer, and how much of it is sent.
    Answering(Vec<u8>, usize),
    /// It has its answer, and may still be sending. To close over what was not read would reset the connection, and take
    /// from the client what it has not read (RFC 9112, section 9.6).
    Leaving,
}

impl Connection {
    fn new(socket: OwnedFd, limits: Limits) -> Self {
        let begun = Instant::now();
        Self { socket, begun, ends: begun + limits.time, state: State::Asking(Vec::new()) }
    }

    fn wants(&self) -> PollFlags {
        match self.state {
            State::Asking(_) | State::Leaving => PollFlags::IN,
            State::Answering(..) => PollFlags::OUT,
        }
    }

    /// Does what can be done without waiting. `false` when it is over.
    fn step(&mut self, now: Instant, limits: Limits, answer: &mut impl FnMut(&str) -> Answer) -> bool {
        match self.try_step(limits, answer) {
            Ok(goes_on) => goes_on && now < self.ends,
            Err(error) => matches!(error, Errno::AGAIN | Errno::INTR) && now < self.ends,
        }
    }

    fn try_step(&mut self, limits: Limits, answer: &mut impl FnMut(&str) -> Answer) -> Result<bool, Errno> {
        let mut chunk = [0; 4096];
        match &mut self.state {
            State::Asking(head) => {
                let length = read(&self.socket, &mut chunk)?;
                head.extend(&chunk[..length]);
                if let Some(answer) = answer_to(head, limits.head, answer) {
                    self.state = State::Answering(answer.bytes(), 0);
                    self.ends = Instant::now() + limits.time;
                    return Ok(true);
                }
                Ok(length > 0)
            }
            State::Answering(bytes, sent) => {
                *sent += send(&self.socket, &bytes[*sent..], SendFlags::NOSIGNAL)?;
                if *sent == bytes.len() {
                    shutdown(&self.socket, Shutdown::Write)?;
                    self.state = State::Leaving;
                }
                Ok(true)
            }
            State::Leaving => Ok(read(&self.socket, &mut chunk)? > 0),
        }
    }
}

/// `None` while the request is not whole.
fn answer_to(request: &[u8], most: usize, answer: &mut impl FnMut(&str) -> Answer) -> Option<Answer> {
    let mut fields = [EMPTY_HEADER; 64];
    let mut parsed = Request::new(&mut fields);
    let whole = parsed.parse(&request[..request.len().min(most)]);
    Some(match (whole, parsed.method, parsed.path) {
        (Ok(Status::Partial), ..) if request.len() < most => return None,
        (Ok(Status::Partial) | Err(httparse::Error::TooManyHeaders), ..) => {
            Answer::plain("431 Request Header Fields Too Large", "send fewer header fields")
        }
        (Err(_), ..) => Answer::plain("400 Bad Request", "send a request of HTTP/1.1"),
        (Ok(Status::Complete(_)), Some("GET"), Some(target)) => answer(target.split('?').next().unwrap_or_default()),
        (Ok(Status::Complete(_)), ..) => Answer::plain("405 Method Not Allowed", "only GET is answered"),
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;

    use super::*;

    /// Nothing in these tests waits so long where all is well.
    const PATIENCE: Duration = Duration::from_secs(60);
    const LIMITS: Limits = Limits { connections: 4, head: 1000, time: PATIENCE, grace: Duration::ZERO };

    struct Server {
        address: SocketAddr,
        stop: UnixStream,
        thread: JoinHandle<usize>,
    }

    impl Server {
        /// Answers with the path, so many times.
        fn start(limits: Limits, times: usize) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            let (address, (stop, stopped)) = (listener.local_addr().unwrap(), UnixStream::pair().unwrap());
            let thread = std::thread::spawn(move || {
                let mut asked = 0;
                let answer = |path: &str| {
                    asked += 1;
                    Answer::plain("200 OK", &path.repeat(times))
                };
                serve(listener, stopped, limits, answer).unwrap();
                asked
            });
            Self { address, stop, thread }
        }

        fn connect(&self) -> TcpStream {
            let stream = TcpStream::connect(self.address).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream
        }

        /// All that it answers.
        fn ask(&self, request: &[u8]) -> String {
            let mut stream = self.connect();
            stream.write_all(request).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        }

        /// How often it was asked for a path.
        fn stop(self) -> usize {
            drop(self.stop);
            self.thread.join().unwrap()
        }
    }

    const GET: &[u8] = b"GET /metrics?x=1 HTTP/1.1\r\nHost: node\r\n\r\n";

    #[test]
    fn requests_are_answered_by_their_path_and_the_connection_ends() {
        let server = Server::start(LIMITS, 1);
        let answer = server.ask(GET);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("\r\nContent-Length: 9"), "{head}");
        assert_eq!(body, "/metrics\n");
        // In pieces.
        let mut stream = server.connect();
        for byte in GET {
            stream.write_all(&[*byte]).unwrap();
        }
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, answer);
        for (request, status) in [
            (&b"POST /metrics HTTP/1.1\r\n\r\n"[..], "405 Method Not Allowed\r\nAllow: GET\r\n"),
            (b"\x16\x03\x01\x02\x00", "400 Bad Request"),
            (b"GET /metrics SPDY/3\r\n\r\n", "400 Bad Request"),
            (&[b"GET / HTTP/1.1\r\n".as_slice(), &b"a: b\r\n".repeat(65), b"\r\n"].concat(), "431 Request Header"),
            (&[b"GET / HTTP/1.1\r\na: ".as_slice(), &[b'b'; 2000]].concat(), "431 Request Header"),
        ] {
            let answer = server.ask(request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
        }
        assert_eq!(server.stop(), 2);
    }

    /// Lengths that no memory holds, and as many bytes as a client cares to send, are nothing to keep.
    #[test]
    fn a_body_is_neither_awaited_nor_kept() {
        let server = Server::start(LIMITS, 1);
        for length in ["9000000000000000000", "18446744073709551616", "-1"] {
            let request = format!("GET /a HTTP/1.1\r\nContent-Length: {length}\r\nExpect: 100-continue\r\n\r\n");
            assert!(server.ask(request.as_bytes()).starts_with("HTTP/1.1 200 OK"));
        }
        let request = b"GET /b HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice();
        let mut stream = server.connect();
        stream.write_all(&[request, &vec![b'x'; 1 << 20]].concat()).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("\r\n\r\n/b\n"), "what was not read takes nothing from the answer: {text}");
        assert_eq!(server.stop(), 4);
    }

    /// Clients that say nothing, that never end, and that do not read, more than there are places.
    #[test]
    fn whoever_stalls_keeps_nobody_out() {
        let server = Server::start(LIMITS, 1 << 20);
        let mut stalled = Vec::new();
        for n in 0..20 {
            let mut stream = server.connect();
            match n % 3 {
                0 => {}
                1 => stream.write_all(&GET[..20]).unwrap(),
                _ => stream.write_all(GET).unwrap(),
            }
            stalled.push(stream);
        }
        assert!(server.ask(GET).starts_with("HTTP/1.1 200 OK"));
        // The first of them had to go.
        assert_eq!(stalled[0].read(&mut [0; 1]).unwrap(), 0, "it was closed");
        // It ends while there are such.
        assert!(server.stop() >= 1);
    }

    #[test]
    fn places_are_given_up_only_after_their_grace_and_when_the_time_is_over() {
        let two = Limits { connections: 2, grace: PATIENCE, ..LIMITS };
        let server = Server::start(two, 1);
        let mut first = [server.connect(), server.connect()];
        let mut late = server.connect();
        late.write_all(GET).unwrap();
        late.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        let waits = late.read(&mut [0; 1]).unwrap_err();
        assert!(matches!(waits.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut), "{waits}");
        first[0].write_all(GET).unwrap();
        let mut text = String::new();
        first[0].read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK"));
        drop(first);
        late.set_read_timeout(Some(PATIENCE)).unwrap();
        late.read_to_string(&mut text).unwrap();
        assert_eq!(server.stop(), 2);

        let server = Server::start(Limits { time: Duration::from_millis(100), ..two }, 1);
        let mut idle = server.connect();
        assert_eq!(idle.read(&mut [0; 1]).unwrap(), 0, "it was closed");
        assert_eq!(server.stop(), 0);
    }
}
