//! A proxy for the Domain Name System, from whose answers rules by [names](crate::model::NamePattern) learn.
//!
//! ```text
//!   pod ---- query ----> proxy ---- query ----> upstream
//!                          | <---- answer ------
//!                          |-- addresses, of a name that some policy asks for --> owner: tables written
//!                          | <------------------------------------------------- in force
//!   pod <--- answer -------
//! ```
//!
//! An answer for a name that some policy asks for is released when its addresses are in force for the pod that asked
//! ([`Learn`]), so that whatever is sent because of it is allowed. Where they cannot be, or the owner is gone, the pod hears
//! SERVFAIL: an address that it cannot reach would be worse. All other answers go through as they are.
//!
//! # What is learnt
//!
//! Of a name that is asked for, the addresses (A and AAAA) in the answer that belong to it, or to what CNAME records lead on to
//! from it (RFC 1034, section 3.6.2). The name is the question's, not one on the way. Addresses in other parts and of other
//! owners are not learnt, nor are loopback, unspecified, multicast and IPv4-mapped ones, nor hints of HTTPS and SVCB records
//! (RFC 9460): these are for clients that ask for the addresses, too. Nor are link-local and broadcast addresses, at which a cloud
//! has its metadata. A time to live above [`MOST_TTL`] is lowered to that.
//!
//! # How queries get here
//!
//! The pods' `resolv.conf` names an address of the proxy's: `dns.nameservers` of the CNI configuration for runtimes that go by
//! it, `clusterDNS` of the kubelet's, or the pod's `dnsConfig`. With the proxy at an address of the node, rules of the tier
//! NetworkPolicy let the node's own pods ask it; a policy of another tier that denies must allow it (`nodes`, or the
//! prefix). Who asks another server learns addresses that nobody has told the owner of, and cannot reach them.
//!
//! The proxy keeps no answers: a resolver with a cache belongs behind it, not before it. One before it hides from the proxy
//! that a pod has an answer, and the addresses end while it still hands them out, by [`LEAST_TTL`](crate::enforcer::learnt::LEAST_TTL)
//! at the earliest.

mod admission;
mod lately;
mod listen;
mod message;
mod upstream;

use std::fmt;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use self::admission::Admission;
use self::lately::Lately;
use self::message::{Failure, Question};
use self::upstream::Way;
use crate::enforcer::learnt::MOST_TTL;
use crate::enforcer::{LearnError, Learner};
use crate::model::DomainName;

/// Who is told of answers before they are released.
pub trait Learn: Send + Sync + 'static {
    /// Whether somebody at the address is an endpoint, whom the proxy is for. It is asked for each query and connection.
    fn is_client(&self, client: IpAddr) -> bool;

    /// Whether some policy asks for the name: answers for others are released at once.
    fn is_asked_for(&self, name: &DomainName) -> bool;

    /// Called before an answer to somebody at the address `client` is released; returns when that may be. It may be called for
    /// one name many times, also at once.
    ///
    /// # Errors
    /// The answer is not released.
    fn learn(&self, client: IpAddr, name: &DomainName, addresses: &[(IpAddr, Duration)]) -> Result<(), LearnError>;
}

impl Learn for Learner {
    fn is_client(&self, client: IpAddr) -> bool {
        Self::is_endpoint(self, client)
    }

    fn is_asked_for(&self, name: &DomainName) -> bool {
        Self::is_asked_for(self, name)
    }

    fn learn(&self, client: IpAddr, name: &DomainName, addresses: &[(IpAddr, Duration)]) -> Result<(), LearnError> {
        Self::learn(self, client, name, addresses.iter().copied())
    }
}

/// Where a proxy listens, whom it asks, and for how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyConfig {
    /// Addresses of the host, each for UDP and TCP, also such as come later (IP_FREEBIND). An unspecified one would answer from
    /// another address than it was asked at.
    pub listen: Vec<SocketAddr>,
    /// Asked in this order: the next one where one does not answer in time.
    pub upstreams: Vec<SocketAddr>,
    /// How long each of them may take.
    pub timeout: Duration,
    /// Queries at a time, and connections of clients. Whoever is one too many hears SERVFAIL, or has its connection closed.
    pub most: usize,
    /// As many queries of one client's, and an eighth as many connections.
    pub most_of_client: usize,
    /// Who may ask beside [endpoints](Learn::is_client). Nobody else is answered, so that whoever else reaches the address has
    /// neither a resolver nor somebody who sends large answers to whom it names (RFC 5358).
    pub clients: Vec<IpNet>,
}

impl Default for ProxyConfig {
    /// Two seconds, 512 queries, 64 of one client's; endpoints alone; neither addresses nor upstreams.
    fn default() -> Self {
        let timeout = Duration::from_secs(2);
        let (listen, upstreams, clients) = (Vec::new(), Vec::new(), Vec::new());
        Self { listen, upstreams, timeout, most: 512, most_of_client: 64, clients }
    }
}

impl ProxyConfig {
    /// Whether a proxy can be what it says, wherever it is.
    ///
    /// # Errors
    /// [`ProxyError::Invalid`], of the first field that is wrong.
    pub fn check(&self) -> Result<(), ProxyError> {
        let invalid = |field, value: String, reason| Err(ProxyError::Invalid { field, value, reason });
        if self.listen.is_empty() {
            return invalid("listen", "[]".to_owned(), "must have an address of the host with a port");
        }
        if let Some(address) = self.listen.iter().find(|address| address.ip().is_unspecified()) {
            return invalid(
                "listen",
                address.to_string(),
                "must be one address of the host, from which answers come, too",
            );
        }
        if self.upstreams.is_empty() {
            return invalid("upstreams", "[]".to_owned(), "must have the address of a DNS server with a port");
        }
        if let Some(address) = self.upstreams.iter().find(|address| self.listen.contains(address)) {
            return invalid("upstreams", address.to_string(), "is the proxy itself; name the server behind it");
        }
        if self.timeout.is_zero() {
            return invalid("timeout", "0".to_owned(), "must be longer than nothing");
        }
        for (field, value) in [("most", self.most), ("most_of_client", self.most_of_client)] {
            if value == 0 {
                return invalid(field, "0".to_owned(), "must be at least 1");
            }
        }
        Ok(())
    }
}

/// Why a proxy cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// A field of the configuration.
    #[error("{field}: {value}: {reason}")]
    Invalid {
        /// Its name.
        field: &'static str,
        /// What it holds.
        value: String,
        /// What would be accepted.
        reason: &'static str,
    },
    /// An address cannot be listened on.
    #[error("listening on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
}

/// What a proxy has done since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ProxyCounts {
    /// Queries that were taken.
    pub queries: u64,
    /// Answers that were held until their addresses were in force.
    pub learnt: u64,
    /// Answers that were not released, for their addresses are not in force.
    pub withheld: u64,
    /// Queries that no upstream answered.
    pub unanswered: u64,
    /// Queries and connections that were one too many.
    pub refused: u64,
    /// Queries and connections of others than endpoints and [`ProxyConfig::clients`], which are not answered.
    pub strangers: u64,
}

#[derive(Default)]
struct Counts {
    queries: AtomicU64,
    learnt: AtomicU64,
    withheld: AtomicU64,
    unanswered: AtomicU64,
    refused: AtomicU64,
    strangers: AtomicU64,
}

/// A proxy that runs until it is dropped.
pub struct Proxy {
    shared: Arc<Shared>,
    addresses: Vec<SocketAddr>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

struct Shared {
    config: ProxyConfig,
    learn: Arc<dyn Learn>,
    admission: Arc<Admission>,
    connections: Arc<Admission>,
    counts: Counts,
    /// Names of answers that were withheld.
    told: Lately,
    stopping: AtomicBool,
}

impl Proxy {
    /// Listens, and asks upstreams, in the calling thread's network namespace.
    ///
    /// # Errors
    /// [`ProxyError`]; nothing is left then.
    pub fn start(config: ProxyConfig, learn: Arc<dyn Learn>) -> Result<Self, ProxyError> {
        config.check()?;
        let mut sockets = Vec::new();
        for address in &config.listen {
            let failed = |source| ProxyError::Listen { address: *address, source };
            let (udp, tcp) = listen::at(*address).map_err(failed)?;
            udp.set_read_timeout(Some(WAKE)).map_err(failed)?;
            set_socket_timeout(tcp.as_fd(), Timeout::Recv, Some(WAKE)).map_err(|e| failed(e.into()))?;
            sockets.push((udp.local_addr().map_err(failed)?, udp, tcp));
        }
        let shared = Arc::new(Shared {
            admission: Admission::new(config.most, config.most_of_client),
            connections: Admission::new(config.most, (config.most_of_client / 8).max(1)),
            config,
            learn,
            counts: Counts::default(),
            told: Lately::default(),
            stopping: AtomicBool::new(false),
        });
        let mut proxy = Self { shared, addresses: Vec::new(), threads: Vec::new() };
        for (address, udp, tcp) in sockets {
            let failed = |source| ProxyError::Listen { address, source };
            let (of_udp, of_tcp) = (Arc::clone(&proxy.shared), Arc::clone(&proxy.shared));
            // Dropped with an error, the proxy ends those that run.
            proxy.threads.push(thread(move || serve_udp(&of_udp, &udp)).map_err(failed)?);
            proxy.threads.push(thread(move || serve_tcp(&of_tcp, &tcp)).map_err(failed)?);
            proxy.addresses.push(address);
        }
        Ok(proxy)
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Whether one of its threads has ended, as by a panic: nobody is answered at some address then.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// What it has done so far.
    pub fn counts(&self) -> ProxyCounts {
        let Counts { queries, learnt, withheld, unanswered, refused, strangers } = &self.shared.counts;
        let [queries, learnt, withheld, unanswered, refused, strangers] =
            [queries, learnt, withheld, unanswered, refused, strangers].map(|count| count.load(Ordering::Relaxed));
        ProxyCounts { queries, learnt, withheld, unanswered, refused, strangers }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the DNS proxy panicked");
            }
        }
    }
}

fn thread(run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("dcenet-dns".to_owned()).stack_size(STACK).spawn(run)
}

fn serve_udp(shared: &Arc<Shared>, socket: &UdpSocket) {
    let mut buffer = vec![0; MOST_BYTES];
    while !shared.stopping.load(Ordering::Relaxed) {
        let (length, client) = match socket.recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if is_timeout(&error) => continue,
            Err(error) => {
                // An answer to somebody who is gone comes back so.
                tracing::debug!(%error, "receiving a query");
                continue;
            }
        };
        if !shared.serves(client.ip()) {
            continue;
        }
        let query = buffer[..length].to_vec();
        let (own, to) = (Arc::clone(shared), socket.try_clone());
        let answered = to.and_then(|to| {
            let Some(admitted) = shared.admission.admit(client.ip()) else {
                shared.counts.refused.fetch_add(1, Ordering::Relaxed);
                if let Some(answer) = message::failure(&query, Failure::Server) {
                    to.send_to(&answer, client)?;
                }
                return Ok(());
            };
            let answering = thread(move || {
                let _admitted = admitted;
                if let Some(answer) = own.answer(&query, client.ip(), Way::Udp)
                    && let Err(error) = to.send_to(&answer, client)
                {
                    tracing::debug!(%client, %error, "answering a query");
                }
            });
            answering.map(drop)
        });
        if let Err(error) = answered {
            tracing::warn!(%client, %error, "a query is not answered");
        }
    }
}

fn serve_tcp(shared: &Arc<Shared>, listener: &TcpListener) {
    while !shared.stopping.load(Ordering::Relaxed) {
        let (stream, client) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error) if is_timeout(&error) => continue,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection");
                // Such as too many open files, which do not get fewer by asking at once.
                std::thread::sleep(WAKE);
                continue;
            }
        };
        if !shared.serves(client.ip()) {
            continue;
        }
        // Of their own, so that connections on which nothing is asked keep nobody from asking.
        let Some(admitted) = shared.connections.admit(client.ip()) else {
            shared.counts.refused.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let own = Arc::clone(shared);
        let serving = thread(move || {
            let _admitted = admitted;
            if let Err(error) = own.converse(stream, client.ip()) {
                tracing::debug!(%client, %error, "a connection has ended");
            }
        });
        if let Err(error) = serving {
            tracing::warn!(%client, %error, "a connection is not served");
        }
    }
}

impl Shared {
    /// Whether a client is answered at all.
    fn serves(&self, client: IpAddr) -> bool {
        let serves = self.config.clients.iter().any(|prefix| prefix.contains(&client)) || self.learn.is_client(client);
        if !serves {
            self.counts.strangers.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%client, "a query of nobody whom the proxy is for");
        }
        serves
    }

    /// Queries on a connection, each answered before the next is read (RFC 7766, section 6.2.1.1, lets a server do so).
    fn converse(&self, mut stream: TcpStream, client: IpAddr) -> io::Result<()> {
        stream.set_write_timeout(Some(IDLE))?;
        while !self.stopping.load(Ordering::Relaxed) {
            let (mut length, until) = ([0; 2], Instant::now() + IDLE);
            match upstream::read_by(&mut stream, &mut length, until) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                read => read?,
            }
            let mut query = vec![0; u16::from_be_bytes(length).into()];
            upstream::read_by(&mut stream, &mut query, until)?;
            let answer = match self.admission.admit(client) {
                Some(_admitted) => self.answer(&query, client, Way::Tcp),
                None => {
                    self.counts.refused.fetch_add(1, Ordering::Relaxed);
                    message::failure(&query, Failure::Server)
                }
            };
            let Some(answer) = answer else { return Ok(()) };
            stream.write_all(&upstream::framed(&answer)?)?;
        }
        Ok(())
    }

    /// The answer to a query, once it may be released; none to what is no query.
    fn answer(&self, query: &[u8], client: IpAddr, way: Way) -> Option<Vec<u8>> {
        self.counts.queries.fetch_add(1, Ordering::Relaxed);
        let question = match Question::read(query) {
            Ok(question) => question,
            Err(failure) => return message::failure(query, failure?),
        };
        let asked = upstream::ask(&self.config, query, &question, way);
        let Some(answer) = asked else {
            self.counts.unanswered.fetch_add(1, Ordering::Relaxed);
            return message::failure(query, Failure::Server);
        };
        let Some(name) = question.domain_name().filter(|name| self.learn.is_asked_for(name)) else {
            return Some(answer);
        };
        if let Some(head) = message::truncated(&answer, query) {
            return Some(head);
        }
        let released = message::addresses(&answer, &question, MOST_TTL).map_err(|error| error.to_string());
        let released = released.and_then(|found| {
            if !found.addresses.is_empty() {
                self.learn.learn(client, &name, &found.addresses).map_err(|error| error.to_string())?;
                self.counts.learnt.fetch_add(1, Ordering::Relaxed);
            }
            Ok(found.shortened.unwrap_or(answer))
        });
        match released {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.counts.withheld.fetch_add(1, Ordering::Relaxed);
                if self.told.is_news(&name, Instant::now()) {
                    tracing::warn!(%client, %name, error, "an answer is not released; of this name that is told once a minute");
                }
                message::failure(query, Failure::Server)
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// How often a thread that waits looks whether it is to end.
const WAKE: Duration = Duration::from_millis(250);

/// How long a connection may bring no query (RFC 7766, section 6.2.3: a few seconds).
const IDLE: Duration = Duration::from_secs(10);

const STACK: usize = 512 << 10;

/// Of a message (RFC 1035, section 4.2.2).
const MOST_BYTES: usize = 65_535;
