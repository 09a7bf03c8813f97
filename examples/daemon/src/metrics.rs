//! What Prometheus sees, over HTTP: `GET /metrics`, in the text format of OpenMetrics 1.0. Beside it `GET /policy`, of
//! [`crate::issued`].
//!
//! Beside what [`dcenet_ipam::metrics`], [`dcenet_policy::enforcer::flows::prometheus`] and [`crate::functions`] list:
//!
//! | Name | Labels | Of |
//! |---|---|---|
//! | `dcenet_daemon_policy_reads_total` | outcome | readings of the directory of policies: `ok` or `failed` |
//! | `dcenet_daemon_policies_current` | | 1 where the directory's present content is what was put in force last, 0 where it is refused and an earlier one stands |
//! | `dcenet_daemon_policy_set_generation` | set | generation of each bundle that the owner of policy was told last |
//! | `dcenet_daemon_endpoints` | phase | endpoints of the node: `default`, `compiled`, `enforced` |
//! | `dcenet_daemon_endpoint_failures` | | endpoints for which the latest change is not in force |
//! | `dcenet_daemon_names_overdue` | | 1 where addresses of names are allowed by although their time is over, else 0 |
//! | `dcenet_daemon_dns_queries_total` | | queries that the DNS proxy took |
//! | `dcenet_daemon_dns_outcomes_total` | outcome | answers that it held until they were in force (`learnt`), or did not release as they are not (`withheld`); queries that nobody behind answered (`unanswered`), that were one too many (`refused`), or of others than endpoints (`strangers`) |

use std::fs::{self, Permissions};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dcenet_ipam::Ipam;
use dcenet_policy::dns::{Proxy, ProxyCounts};
use dcenet_policy::enforcer::flows::prometheus::FlowMetrics;
use dcenet_policy::enforcer::{Enforcer, Phase};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::config::Listen;
use crate::functions::Functions;
use crate::http::{self, Answer, Limits};
use crate::issued::Issued;
use crate::names::Running;
use crate::threads::Threads;

/// The daemon's own.
#[derive(Debug, Clone, Default)]
pub struct DaemonMetrics {
    reads: Family<[(&'static str, &'static str); 1], Counter>,
    current: Gauge,
    sets: Family<[(&'static str, String); 1], Gauge>,
    endpoints: Family<[(&'static str, &'static str); 1], Gauge>,
    failures: Gauge,
    overdue: Gauge,
    queries: Counter,
    outcomes: Family<[(&'static str, &'static str); 1], Counter>,
}

impl DaemonMetrics {
    /// Enters them into a registry.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let r = registry.sub_registry_with_prefix("dcenet_daemon");
        r.register("policy_reads", "Readings of the directory of policies", metrics.reads.clone());
        r.register("policies_current", "Whether the directory's content is in force", metrics.current.clone());
        r.register("policy_set_generation", "Generation of each bundle of policies", metrics.sets.clone());
        r.register("endpoints", "Endpoints of the node, by phase", metrics.endpoints.clone());
        r.register("endpoint_failures", "Endpoints without the latest change", metrics.failures.clone());
        r.register("names_overdue", "Whether names count beyond their time", metrics.overdue.clone());
        r.register("dns_queries", "Queries that the DNS proxy took", metrics.queries.clone());
        r.register("dns_outcomes", "What became of some of them", metrics.outcomes.clone());
        metrics
    }

    /// Counts a reading of the directory.
    pub fn count_read(&self, ok: bool) {
        self.reads.get_or_create(&[("outcome", if ok { "ok" } else { "failed" })]).inc();
        self.current.set(ok.into());
    }

    fn publish_sets(&self, issued: &Issued) {
        // One that is gone is not told any more.
        self.sets.clear();
        for (name, generation) in issued.generations() {
            self.sets.get_or_create(&[("set", name)]).set(i64::try_from(generation).unwrap_or(i64::MAX));
        }
    }

    fn publish(&self, enforcer: &Enforcer) {
        let endpoints = enforcer.endpoints();
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        for (phase, name) in [(Phase::Default, "default"), (Phase::Compiled, "compiled"), (Phase::Enforced, "enforced")]
        {
            let number = endpoints.iter().filter(|e| e.phase == phase).count();
            self.endpoints.get_or_create(&[("phase", name)]).set(count(number));
        }
        self.failures.set(count(endpoints.iter().filter(|e| e.failure.is_some()).count()));
        self.overdue.set(enforcer.overdue_names().is_some().into());
    }

    fn publish_names(&self, counts: &ProxyCounts) {
        // The proxy's own numbers, which only grow.
        let set = |counter: &Counter, value: u64| counter.inner().store(value, Ordering::Relaxed);
        let ProxyCounts { queries, learnt, withheld, unanswered, refused, strangers, .. } = *counts;
        set(&self.queries, queries);
        let outcomes = [("learnt", learnt), ("withheld", withheld), ("unanswered", unanswered)];
        for (outcome, value) in outcomes.into_iter().chain([("refused", refused), ("strangers", strangers)]) {
            set(&self.outcomes.get_or_create(&[("outcome", outcome)]), value);
        }
    }
}

/// Where the numbers come from.
pub struct Sources {
    /// All metrics.
    pub registry: Registry,
    /// The daemon's.
    pub daemon: DaemonMetrics,
    /// The store's pools, and what counts them.
    pub addresses: Option<(Arc<Ipam>, dcenet_ipam::metrics::Metrics)>,
    /// The functions that pods have.
    pub functions: Functions,
    /// The owner of policy, and what counts its flows.
    pub policy: Option<(Arc<Enforcer>, FlowMetrics)>,
    /// What the owner was told.
    pub issued: Option<Issued>,
    /// The DNS proxy.
    pub proxy: Option<Running>,
}

impl Sources {
    /// All of it as of now, addresses and functions as of [`COUNT`] ago at most. What cannot be counted stays as it was, and is told.
    fn text(&self, counted: &mut Option<Instant>) -> Result<String, std::fmt::Error> {
        if counted.is_none_or(|at| at.elapsed() >= COUNT) {
            if let Some((ipam, metrics)) = &self.addresses {
                match pollster::block_on(ipam.capacity()) {
                    Ok(capacity) => metrics.publish(&capacity),
                    Err(error) => tracing::warn!(%error, "addresses cannot be counted"),
                }
            }
            self.functions.publish();
            *counted = Some(Instant::now());
        }
        if let Some(issued) = &self.issued {
            self.daemon.publish_sets(issued);
        }
        if let Some((enforcer, metrics)) = &self.policy {
            self.daemon.publish(enforcer);
            match enforcer.reason_counters().and_then(|reasons| Ok((reasons, enforcer.rule_counters()?))) {
                Ok((reasons, rules)) => metrics.publish(&reasons, &rules),
                Err(error) => tracing::warn!(%error, "packets cannot be counted"),
            }
        }
        if let Some(counts) = self.proxy.as_ref().and_then(|proxy| proxy.lock().as_ref().map(Proxy::counts)) {
            self.daemon.publish_names(&counts);
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// How often addresses and functions are counted at the most: it reads the whole store, which a cluster may share, and asks
/// drivers under the lock of all links.
const COUNT: Duration = Duration::from_secs(1);

/// How often it is tried to listen where that is refused.
const AGAIN: Duration = Duration::from_secs(2);

/// Prometheus needs one connection. The rest is for those who stall, and for a few who look by hand.
const LIMITS: Limits =
    Limits { connections: 16, head: 8 << 10, time: Duration::from_secs(10), grace: Duration::from_secs(1) };

/// A thread that answers until it is dropped.
#[derive(Debug)]
pub struct Endpoint {
    /// Its end is the thread's.
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// Listens. Where the address cannot be had, that is told and tried again.
    ///
    /// # Errors
    /// Where there can be no thread.
    pub fn start(listen: &Listen, sources: Sources, threads: &Threads) -> io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        let (listen, first) = (listen.clone(), Listener::bind(listen));
        let answer_all = move || answer_all(&listen, first, &sources, &stopped);
        Ok(Self { stop: Some(stop), thread: Some(threads.spawn("dcenetd-metrics", answer_all)?) })
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that answers Prometheus panicked");
        }
    }
}

fn answer_all(listen: &Listen, mut listener: io::Result<Listener>, sources: &Sources, stop: &UnixStream) {
    let (mut told, mut counted) = (String::new(), None);
    loop {
        let served = listener.and_then(|listener| {
            told.clear();
            http::serve(&listener, stop, LIMITS, |path| page(path, sources, &mut counted))
        });
        let Err(error) = served else { return };
        let error = error.to_string();
        if error != told {
            tracing::warn!(%error, "metrics.listen: {listen}: nobody is answered; it is tried again");
            told = error;
        }
        if ends_within(stop, AGAIN) {
            return;
        }
        listener = Listener::bind(listen);
    }
}

/// Waits, at the longest until the other end of `stop` is gone. Tells whether it is.
fn ends_within(stop: &UnixStream, time: Duration) -> bool {
    let timeout = Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: 0 };
    match poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&timeout)) {
        Ok(ready) => ready > 0,
        Err(Errno::INTR) => false,
        Err(error) => {
            tracing::error!(%error, "the metrics' thread cannot wait");
            true
        }
    }
}

fn page(path: &str, sources: &Sources, counted: &mut Option<Instant>) -> Answer {
    match (path, &sources.policy, &sources.issued) {
        ("/metrics", ..) => metrics(sources, counted),
        ("/policy", Some((enforcer, _)), Some(issued)) => match issued.page(enforcer) {
            Ok(body) => Answer { status: "200 OK", kind: "application/json", body },
            Err(error) => {
                tracing::error!(%error, "what is in force cannot be written");
                Answer::plain("500 Internal Server Error", "what is in force cannot be written")
            }
        },
        _ => Answer::plain("404 Not Found", "see /metrics and, under policy, /policy"),
    }
}

fn metrics(sources: &Sources, counted: &mut Option<Instant>) -> Answer {
    match sources.text(counted) {
        Ok(body) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            Answer { status: "200 OK", kind, body }
        }
        Err(error) => {
            tracing::error!(%error, "metrics cannot be written");
            Answer::plain("500 Internal Server Error", "metrics cannot be written")
        }
    }
}

/// A listening socket, which goes with its file.
#[derive(Debug)]
struct Listener {
    socket: OwnedFd,
    /// Its path, device and inode.
    file: Option<(PathBuf, u64, u64)>,
}

impl Listener {
    fn bind(listen: &Listen) -> io::Result<Self> {
        match listen {
            Listen::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                tracing::info!(address = %listener.local_addr()?, "metrics");
                Ok(Self { socket: listener.into(), file: None })
            }
            Listen::Unix(path) => {
                let this = private(path)?;
                tracing::info!(path = %path.display(), "metrics");
                Ok(this)
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let Some((path, device, inode)) = &self.file else { return };
        // Another daemon's may be in its place.
        let ours = fs::symlink_metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == (*device, *inode));
        if ours && let Err(error) = fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "the socket of the metrics stays");
        }
    }
}

/// A socket that nobody finds before it has its mode, in the place of one that a dead process left.
fn private(path: &Path) -> io::Result<Listener> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    // The same name each time: what a process left that died here is found.
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(",new");
    let fresh = Path::new(&fresh);
    match fs::remove_file(fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(fresh)?;
    let made = fs::symlink_metadata(fresh)?;
    listener.set_nonblocking(true)?;
    let mut this = Listener { socket: listener.into(), file: Some((fresh.to_owned(), made.dev(), made.ino())) };
    fs::set_permissions(fresh, Permissions::from_mode(0o600))?;
    fs::rename(fresh, path)?;
    this.file = Some((path.to_owned(), made.dev(), made.ino()));
    Ok(this)
}
