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
    late: Late,
    /// The longest time between two receipts, in microseconds.
    gap: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

/// How much arrived of what was sent after a mark: what waited in a socket by then is not of it, however late the receiving
/// thread gets to it.
#[derive(Clone)]
struct Late {
    mark: Arc<AtomicU64>,
    count: Arc<AtomicU64>,
}

impl Late {
    fn new() -> Self {
        Self { mark: Arc::new(AtomicU64::new(u64::MAX)), count: Arc::default() }
    }

    /// Counts anew, of what is sent from now on. One datagram may be on its way before it is counted as sent.
    fn mark(&self, sent: u64) {
        self.mark.store(u64::MAX, Ordering::SeqCst);
        self.count.store(0, Ordering::SeqCst);
        self.mark.store(sent + 1, Ordering::SeqCst);
    }

    fn see(&self, Got { amount, number }: Got) {
        if number > self.mark.load(Ordering::SeqCst) {
            self.count.fetch_add(amount, Ordering::SeqCst);
        }
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }
}

/// What arrived, and as the how manieth it was sent.
#[derive(Clone, Copy)]
struct Got {
    amount: u64,
    number: u64,
}

impl Got {
    /// Bytes, which have no number.
    fn bytes(amount: usize) -> Self {
        Self { amount: amount as u64, number: u64::MAX }
    }
}

impl Stream {
    /// `send` is told the number of what it sends.
    fn start(
        mut send: impl FnMut(u64) -> u64 + Send + 'static,
        mut receive: impl FnMut() -> Got + Send + 'static,
        pause: Duration,
    ) -> Self {
        let (stopping, late) = (Arc::new(AtomicBool::new(false)), Late::new());
        let [sent, received, gap] = [(); 3].map(|()| Arc::new(AtomicU64::new(0)));
        let (stop, count) = (Arc::clone(&stopping), Arc::clone(&sent));
        let sender = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                count.fetch_add(send(count.load(Ordering::Relaxed) + 1), Ordering::Relaxed);
                std::thread::sleep(pause);
            }
        });
        let (stop, count, longest) = (Arc::clone(&stopping), Arc::clone(&received), Arc::clone(&gap));
        let marked = late.clone();
        let receiver = std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                let stop = stop.load(Ordering::Relaxed);
                let got = receive();
                if got.amount > 0 {
                    longest.fetch_max(last.elapsed().as_micros() as u64, Ordering::Relaxed);
                    last = Instant::now();
                    count.fetch_add(got.amount, Ordering::Relaxed);
                    marked.see(got);
                } else if stop {
                    return;
                }
            }
        });
        Self { stopping, sent, received, late, gap, threads: vec![sender, receiver] }
    }

    /// A TCP connection over which bytes go from the client to the server.
    pub fn tcp(client: &TestNetNs, server: &TestNetNs, to: SocketAddr) -> Self {
        let listener = server.run(|| TcpListener::bind(to)).unwrap();
        let mut sender = client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(4))).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        sender.set_write_timeout(Some(QUIET)).unwrap();
        receiver.set_read_timeout(Some(QUIET)).unwrap();
        let send = move |_| match sender.write(&[7; 512]) {
            Ok(sent) => sent as u64,
            Err(error) if is_quiet(&error) => 0,
            Err(error) => panic!("the connection broke: {error}"),
        };
        let receive = move || match receiver.read(&mut [0; 65536]) {
            Ok(got) => Got::bytes(got),
            Err(error) if is_quiet(&error) => Got::bytes(0),
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
        let send =
            move |number: u64| u64::from(sender.send_to(&[number; 8].map(u64::to_ne_bytes).concat(), to).is_ok());
        let receive = move || {
            let mut datagram = [0; 64];
            match receiver.recv(&mut datagram) {
                Ok(_) => Got { amount: 1, number: u64::from_ne_bytes(datagram[..8].try_into().unwrap()) },
                Err(error) if is_quiet(&error) => Got::bytes(0),
                Err(error) => panic!("the socket broke: {error}"),
            }
        };
        Self::start(send, receive, Duration::from_micros(200))
    }

    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// How much arrives in a while, of how much that was sent.
    pub fn during(&self, time: Duration) -> (u64, u64) {
        let before = self.sent.load(Ordering::Relaxed);
        self.late.mark(before);
        std::thread::sleep(time);
        (self.late.count(), self.sent.load(Ordering::Relaxed) - before)
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
        let (before, begun) = (self.sent.load(Ordering::Relaxed), Instant::now());
        self.late.mark(before);
        std::thread::sleep(time);
        while self.sent.load(Ordering::Relaxed) - before <= enough {
            assert!(begun.elapsed() < PATIENCE, "the sender stands still");
            std::thread::sleep(Duration::from_millis(5));
        }
        self.late.count()
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
