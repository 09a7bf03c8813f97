//! What Prometheus sees, over HTTP: `GET /metrics`, in the text format of OpenMetrics 1.0.
//!
//! Beside what [`dcenet_ipam::metrics`] and [`dcenet_policy::enforcer::flows::prometheus`] list:
//!
//! | Name | Labels | Of |
//! |---|---|---|
//! | `dcenet_daemon_policy_reads_total` | outcome | readings of the directory of policies: `ok` or `failed` |
//! | `dcenet_daemon_policies_current` | | 1 where the directory's present content is what was put in force last, 0 where it is refused and an earlier one stands |
//! | `dcenet_daemon_endpoints` | phase | endpoints of the node: `default`, `compiled`, `enforced` |
//! | `dcenet_daemon_endpoint_failures` | | endpoints for which the latest change is not in force |

use std::fs::Permissions;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use dcenet_ipam::Ipam;
use dcenet_policy::enforcer::flows::prometheus::FlowMetrics;
use dcenet_policy::enforcer::{Enforcer, Phase};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tiny_http::{Header, Method, Request, Response, Server};

use crate::config::Listen;

/// The daemon's own.
#[derive(Debug, Clone, Default)]
pub struct DaemonMetrics {
    reads: Family<[(&'static str, &'static str); 1], Counter>,
    current: Gauge,
    endpoints: Family<[(&'static str, &'static str); 1], Gauge>,
    failures: Gauge,
}

impl DaemonMetrics {
    /// Enters them into a registry.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let r = registry.sub_registry_with_prefix("dcenet_daemon");
        r.register("policy_reads", "Readings of the directory of policies", metrics.reads.clone());
        r.register("policies_current", "Whether the directory's content is in force", metrics.current.clone());
        r.register("endpoints", "Endpoints of the node, by phase", metrics.endpoints.clone());
        r.register("endpoint_failures", "Endpoints without the latest change", metrics.failures.clone());
        metrics
    }

    /// Counts a reading of the directory.
    pub fn count_read(&self, ok: bool) {
        self.reads.get_or_create(&[("outcome", if ok { "ok" } else { "failed" })]).inc();
        self.current.set(ok.into());
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
    /// The owner of policy, and what counts its flows.
    pub policy: Option<(Arc<Enforcer>, FlowMetrics)>,
}

impl Sources {
    /// All of it as of now. What cannot be counted stays as it was, and is told.
    fn text(&self) -> Result<String, std::fmt::Error> {
        if let Some((ipam, metrics)) = &self.addresses {
            match pollster::block_on(ipam.capacity()) {
                Ok(capacity) => metrics.publish(&capacity),
                Err(error) => tracing::warn!(%error, "addresses cannot be counted"),
            }
        }
        if let Some((enforcer, metrics)) = &self.policy {
            self.daemon.publish(enforcer);
            match enforcer.reason_counters().and_then(|reasons| Ok((reasons, enforcer.rule_counters()?))) {
                Ok((reasons, rules)) => metrics.publish(&reasons, &rules),
                Err(error) => tracing::warn!(%error, "packets cannot be counted"),
            }
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// A thread that answers until it is dropped.
pub struct Endpoint {
    server: Arc<Server>,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// Listens.
    ///
    /// # Errors
    /// Where the address cannot be had.
    pub fn start(listen: &Listen, sources: Sources) -> Result<Self, Box<dyn std::error::Error>> {
        let server = match listen {
            Listen::Tcp(address) => {
                let listener = TcpListener::bind(address).map_err(|e| format!("metrics.listen: {address}: {e}"))?;
                tracing::info!(address = %listener.local_addr()?, "metrics");
                Server::from_listener(listener, None)
            }
            Listen::Unix(path) => {
                let listener = private(path).map_err(|e| format!("metrics.listen: {}: {e}", path.display()))?;
                Server::from_listener(listener, None)
            }
        };
        let server = Arc::new(server.map_err(|e| format!("metrics.listen: {e}"))?);
        let answering = Arc::clone(&server);
        let answer_all = move || {
            // Ends with an error when it is unblocked.
            while let Ok(request) = answering.recv() {
                if let Err(error) = answer(request, &sources) {
                    tracing::debug!(%error, "an answer was not read");
                }
            }
        };
        let thread = std::thread::Builder::new().name("dcenetd-metrics".into()).spawn(answer_all)?;
        Ok(Self { server, thread: Some(thread) })
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.server.unblock();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that answers Prometheus panicked");
        }
    }
}

/// A socket that nobody finds before it has its mode, in the place of one that a dead process left.
fn private(path: &Path) -> io::Result<UnixListener> {
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(",{}", std::process::id()));
    let remove = |path: &Path| match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    remove(fresh.as_ref())?;
    let listener = UnixListener::bind(&fresh)?;
    let placed =
        std::fs::set_permissions(&fresh, Permissions::from_mode(0o600)).and_then(|()| std::fs::rename(&fresh, path));
    if let Err(error) = placed {
        remove(fresh.as_ref())?;
        return Err(error);
    }
    Ok(listener)
}

fn answer(request: Request, sources: &Sources) -> io::Result<()> {
    let path = request.url().split('?').next().unwrap_or_default();
    match (request.method(), path) {
        (Method::Get, "/metrics") => match sources.text() {
            Ok(text) => {
                let kind = b"application/openmetrics-text; version=1.0.0; charset=utf-8";
                let header = Header::from_bytes(b"Content-Type", kind);
                request.respond(header.into_iter().fold(Response::from_string(text), Response::with_header))
            }
            Err(error) => {
                tracing::error!(%error, "metrics cannot be written");
                request.respond(Response::from_string("metrics cannot be written\n").with_status_code(500))
            }
        },
        (Method::Get, _) => request.respond(Response::from_string("see /metrics\n").with_status_code(404)),
        _ => request.respond(Response::from_string("only GET is answered\n").with_status_code(405)),
    }
}
