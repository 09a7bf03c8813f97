//! Traffic that runs while something happens.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dcenet_core::test_support::TestNetNs;

/// How long a busy machine may take over what an idle one does at once.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs until it is stopped.
pub struct Stream {
    stopping: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    /// The longest time between two receipts, in microseconds.
    gap: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Stream {
    fn start(
        mut send: impl FnMut() -> u64 + Send + 'static,
        mut receive: impl FnMut() -> u64 + Send + 'static,
        pause: Duration,
    ) -> Self {
        let stopping = Arc::new(AtomicBool::new(false));
        let [sent, received, gap] = [(); 3].map(|()| Arc::new(AtomicU64::new(0)));
        let (stop, count) = (Arc::clone(&stopping), Arc::clone(&sent));
        let sender = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                count.fetch_add(send(), Ordering::Relaxed);
                std::thread::sleep(pause);
            }
        });
        let (stop, count, longest) = (Arc::clone(&stopping), Arc::clone(&received), Arc::clone(&gap));
        let receiver = std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                let stop = stop.load(Ordering::Relaxed);
                let got = receive();
                if got > 0 {
                    longest.fetch_max(last.elapsed().as_micros() as u64, Ordering::Relaxed);
                    last = Instant::now();
                    count.fetch_add(got, Ordering::Relaxed);
                } else if stop {
                    return;
                }
            }
        });
        Self { stopping, sent, received, gap, threads: vec![sender, receiver] }
    }

    /// A TCP connection over which bytes go from the client to the server.
    pub fn tcp(client: &TestNetNs, server: &TestNetNs, to: SocketAddr) -> Self {
        let listener = server.run(|| TcpListener::bind(to)).unwrap();
        let mut sender = client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(4))).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        sender.set_write_timeout(Some(QUIET)).unwrap();
        receiver.set_read_timeout(Some(QUIET)).unwrap();
        let send = move || match sender.write(&[7; 512]) {
            Ok(sent) => sent as u64,
            Err(error) if is_quiet(&error) => 0,
            Err(error) => panic!("the connection broke: {error}"),
        };
        let receive = move || match receiver.read(&mut [0; 65536]) {
            Ok(got) => got as u64,
            Err(error) if is_quiet(&error) => 0,
            Err(error) => panic!("the connection broke: {error}"),
        };
        Self::start(send, receive, Duration::from_millis(1))
    }

    /// Datagrams from the client to the server, each once.
    pub fn udp(client: &TestNetNs, server: &TestNetNs, to: SocketAddr) -> Self {
        let receiver = bound(server, to);
        let any: std::net::IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let sender = client.run(|| UdpSocket::bind((any, 0))).unwrap();
        Self::datagrams(sender, to, receiver)
    }

    /// Datagrams that the server sends to a client that has asked once.
    pub fn pushed(client: &TestNetNs, server: &TestNetNs, to: SocketAddr) -> Self {
        let sender = bound(server, to);
        let any: std::net::IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let receiver = client.run(|| UdpSocket::bind((any, 0))).unwrap();
        receiver.send_to(b"?", to).unwrap();
        sender.set_read_timeout(Some(Duration::from_secs(4))).unwrap();
        let (_, from) = sender.recv_from(&mut [0; 8]).unwrap();
        Self::datagrams(sender, from, receiver)
    }

    fn datagrams(sender: UdpSocket, to: SocketAddr, receiver: UdpSocket) -> Self {
        receiver.set_read_timeout(Some(QUIET)).unwrap();
        let send = move || u64::from(sender.send_to(&[7; 64], to).is_ok());
        let receive = move || match receiver.recv(&mut [0; 128]) {
            Ok(_) => 1,
            Err(error) if is_quiet(&error) => 0,
            Err(error) => panic!("the socket broke: {error}"),
        };
        Self::start(send, receive, Duration::from_micros(200))
    }

    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// How much arrives in a while, of how much that was sent.
    pub fn during(&self, time: Duration) -> (u64, u64) {
        let before = (self.received(), self.sent.load(Ordering::Relaxed));
        std::thread::sleep(time);
        (self.received() - before.0, self.sent.load(Ordering::Relaxed) - before.1)
    }

    /// Whether more than so much arrives, on a busy machine after a while.
    pub fn moves(&self, enough: u64) -> bool {
        let (before, begun) = (self.received(), Instant::now());
        while self.received() - before <= enough {
            if begun.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// How much arrives of more than so much, which is sent in at least this time.
    pub fn of_more_than(&self, enough: u64, time: Duration) -> u64 {
        let (before, begun) = ((self.received(), self.sent.load(Ordering::Relaxed)), Instant::now());
        std::thread::sleep(time);
        while self.sent.load(Ordering::Relaxed) - before.1 <= enough {
            assert!(begun.elapsed() < PATIENCE, "the sender stands still");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.received() - before.0
    }

    /// Ends it; what was sent, received, and the longest gap.
    pub fn stop(mut self) -> (u64, u64, Duration) {
        self.stopping.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
        let gap = Duration::from_micros(self.gap.load(Ordering::Relaxed));
        (self.sent.load(Ordering::Relaxed), self.received(), gap)
    }
}

/// The socket before may still be open in a child of another test that is about to exec.
fn bound(server: &TestNetNs, to: SocketAddr) -> UdpSocket {
    let begun = Instant::now();
    loop {
        match server.run(|| UdpSocket::bind(to)) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && begun.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            socket => return socket.unwrap(),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn is_quiet(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

const QUIET: Duration = Duration::from_millis(30);
