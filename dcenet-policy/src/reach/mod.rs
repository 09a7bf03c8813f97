//! Who reaches whom: every pod as source, every pod as destination, for a list of probes.
//!
//! An [`Engine`] judges one packet by the policies of one pod; [`reach`] asks it about both ends of every connection and
//! gathers a [`Report`]. There are two engines, which share nothing but the model: [`Evaluator`] asks
//! [`eval`], and [`Simulator`] compiles the cluster to whole programs and runs them on packets. Their
//! reports differ in the engine's name alone.
//!
//! # What is asked
//!
//! A connection is allowed where egress of its source and ingress of its destination both allow its first packet. Each
//! pair of addresses of one family is a connection of its own, so that pods with two stacks have two results.
//!
//! - A pod reaches itself always, whatever its policies say: the packet never leaves the pod.
//! - A probe by port name asks for the ports to which the destination gives this name.
//! - A pod in its host's network is no subject of policy and no selector finds it, but a block or a rule for everybody
//!   does.
//! - Two pods without a common address family, and a destination that lacks the port's name, are told of in
//!   [`Report::not_asked`].
//!
//! # The report as JSON
//!
//! The shape of version 1 is stable: keys may be added.
//!
//! ```json
//! { "version": 1, "engine": "evaluator",
//!   "results": [
//!     { "probe": "tcp/http", "source": "x/a", "destination": "y/b", "family": "ipv4",
//!       "source_address": "10.0.1.1", "destination_address": "10.0.2.2", "protocol": "tcp", "port": 80,
//!       "egress":  { "verdict": "allow", "decided_by": "no-policy", "text": "no policy selects it" },
//!       "ingress": { "verdict": "deny", "decided_by": "isolation", "policies": ["y/deny-all"],
//!                    "text": "isolated by y/deny-all; no rule matches" },
//!       "verdict": "deny" } ],
//!   "not_asked": [
//!     { "probe": "tcp/http", "source": "x/a", "destination": "z/c",
//!       "reason": "z/c gives no tcp port the name \"http\"" } ],
//!   "notes": [
//!     { "kind": "left-out", "text": "pod x/d is left out: it is finished" } ] }
//! ```
//!
//! `port` is missing for ICMP.
//!
//! | `decided_by` | What decided | Keys that come with it |
//! |---|---|---|
//! | `rule` | a rule that matches | `policy`, `rule`; `peer` and `rule_port` where the rule has lists of them |
//! | `isolation` | policies isolate the pod, and no rule matches | `policies` |
//! | `no-policy` | no policy selects the pod in this direction | |
//! | `no-rule` | policies select the pod, none isolates it, and no rule of theirs decides | `policies` |
//! | `not-enforced` | a policy cannot be enforced, and no other allows the packet (see [`isolation`](crate::isolation)); of the engines here only the evaluator says so, of a policy whose subject asks for a service account that is not known; the simulator refuses a cluster that it cannot enforce | `policies` |
//! | `tier-end` | no rule of a tier decides that denies what is left, or there is no such tier | `policies` |
//! | `own-node` | the other end is the pod's own node | |
//! | `host-network` | the pod is in its host's network | |
//! | `same-pod` | both ends are one pod | |
//!
//! `rule` is the index, from 0, in the policy object's list for the direction. `peer` and `rule_port` are indices from 0
//! into the lists that a reader made of that rule ([`RuleRef`](crate::model::RuleRef)). For a NetworkPolicy these are the
//! object's own `from` or `to` and `ports`; for a policy of the cluster they are not, since one element may become several
//! or none: see [`clusternetworkpolicy`](crate::sources::clusternetworkpolicy). `text` uses the same numbers.
//!
//! `kind` of a note is `left-out`, `assumed-namespace`, `closed-rule`, `unknown-tier`, `unknown-peer`, `tie`, `unused` or
//! `not-read` ([`NoteKind`](crate::sources::kubernetes::NoteKind)); kinds may be added. The example `reach` has the same on
//! stderr.
//!
//! # The report as a matrix
//!
//! [`Report::matrix_text`], [`Report::matrix_svg`] and [`Report::matrix_html`] show it by probe and family, sources as rows.
//!
//! # Examples
//!
//! ```
//! use dcenet_policy::model::{Cluster, Pod, PodId, Verdict};
//! use dcenet_policy::reach::{Evaluator, reach};
//!
//! let mut cluster = Cluster::default();
//! for (name, address) in [("a", "10.0.0.1"), ("b", "10.0.0.2")] {
//!     cluster.pods.insert(PodId::new("x", name), Pod::new([], [address.parse().unwrap()]));
//! }
//! let report = reach(&cluster, &["tcp/80".parse().unwrap()], &mut Evaluator::new(&cluster)).unwrap();
//! assert_eq!(report.results.len(), 4);
//! assert!(report.results.iter().all(|result| result.verdict == Verdict::Allow));
//! ```

mod matrix;
mod report;
#[cfg(feature = "simulator")]
mod simulator;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use crate::eval::{self, Decision, EvalError};
use crate::model::{Cluster, PodId, Protocol, Tuple, Verdict};

pub use self::report::{Answer, DecidedBy, Family, NotAsked, Report, Side};
#[cfg(feature = "simulator")]
pub use self::simulator::Simulator;

/// What opens a connection.
///
/// As text: `tcp/80`, `udp/dns` (by the name that the destination gives to a port), `sctp/7777`, `icmp`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Probe {
    /// To a port by number.
    Port(Protocol, u16),
    /// To a port by the destination's name for it.
    NamedPort(Protocol, String),
    /// An echo request, of ICMP or ICMPv6 by the addresses (RFC 792; RFC 4443, section 4.1).
    Icmp,
}

/// A text that is no [`Probe`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("probe {text:?}: {reason}; write tcp/80, udp/dns (a port's name), sctp/7777 or icmp")]
pub struct ProbeError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl FromStr for Probe {
    type Err = ProbeError;

    fn from_str(text: &str) -> Result<Self, ProbeError> {
        let error = |reason| ProbeError { text: text.to_owned(), reason };
        let lower = text.to_ascii_lowercase();
        if lower == "icmp" {
            return Ok(Self::Icmp);
        }
        let (protocol, port) = lower.split_once('/').ok_or_else(|| error("it has no port"))?;
        let protocol = match protocol {
            "tcp" => Protocol::TCP,
            "udp" => Protocol::UDP,
            "sctp" => Protocol::SCTP,
            _ => return Err(error("its protocol is not known")),
        };
        if port.bytes().all(|byte| byte.is_ascii_digit()) {
            let number = port.parse().ok().filter(|number| *number > 0);
            return number.map(|number| Self::Port(protocol, number)).ok_or_else(|| error("ports are 1 to 65535"));
        }
        if !port.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
            return Err(error("names of ports are of a-z, 0-9 and -"));
        }
        Ok(Self::NamedPort(protocol, port.to_owned()))
    }
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(protocol, number) => write!(f, "{protocol}/{number}"),
            Self::NamedPort(protocol, name) => write!(f, "{protocol}/{name}"),
            Self::Icmp => f.write_str("icmp"),
        }
    }
}

/// Judges packets by the policies of single pods.
pub trait Engine {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// Judges the first packet of a connection at one end: `own` is the subject's address in it.
    ///
    /// # Errors
    ///
    /// Where the question cannot be answered at all. A packet that no policy allows is no error.
    fn judge(&mut self, subject: &PodId, own: IpAddr, tuple: &Tuple) -> Result<Decision, ReachError>;
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReachError {
    /// The evaluator cannot answer.
    #[error(transparent)]
    Eval(#[from] EvalError),
    /// The cluster's policies are beyond what compiler, target or tables take.
    #[error("the policies cannot be compiled: {0}")]
    Compile(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A program did what it should not. This is a defect of dcenet.
    #[error("{subject}, {tuple:?}: {what}; please report this")]
    Defect {
        /// The pod under policy.
        subject: PodId,
        /// The packet.
        tuple: Tuple,
        /// What it did.
        what: String,
    },
}

/// Answers straight from the model.
#[derive(Debug)]
pub struct Evaluator<'a> {
    cluster: &'a Cluster,
}

impl<'a> Evaluator<'a> {
    /// For a cluster.
    pub fn new(cluster: &'a Cluster) -> Self {
        Self { cluster }
    }
}

impl Engine for Evaluator<'_> {
    fn name(&self) -> &'static str {
        "evaluator"
    }

    fn judge(&mut self, subject: &PodId, _: IpAddr, tuple: &Tuple) -> Result<Decision, ReachError> {
        Ok(eval::evaluate(self.cluster, subject, tuple)?)
    }
}

/// Asks for every probe, source and destination, in this order; pods by name.
///
/// # Errors
///
/// The first [`ReachError`] of the engine.
pub fn reach(cluster: &Cluster, probes: &[Probe], engine: &mut dyn Engine) -> Result<Report, ReachError> {
    let mut report = Report::new(engine.name());
    for probe in probes {
        for source in cluster.pods.keys() {
            for destination in cluster.pods.keys() {
                connect(cluster, probe, source, destination, engine, &mut report)?;
            }
        }
    }
    Ok(report)
}

fn connect(
    cluster: &Cluster,
    probe: &Probe,
    source: &PodId,
    destination: &PodId,
    engine: &mut dyn Engine,
    report: &mut Report,
) -> Result<(), ReachError> {
    let not_asked = |reason| NotAsked {
        probe: probe.to_string(),
        source: source.clone(),
        destination: destination.clone(),
        reason,
    };
    let (from, to) = (&cluster.pods[source].addresses, &cluster.pods[destination].addresses);
    let services: BTreeSet<Option<(Protocol, u16)>> = match probe {
        Probe::Icmp => [None].into(),
        Probe::Port(protocol, port) => [Some((*protocol, *port))].into(),
        Probe::NamedPort(protocol, name) => {
            let ports = cluster.pods[destination].ports.iter();
            let wanted = ports.filter(|port| port.protocol == *protocol && port.name == *name);
            wanted.map(|port| Some((*protocol, port.port))).collect()
        }
    };
    if let (true, Probe::NamedPort(protocol, name)) = (services.is_empty(), probe) {
        report.not_asked.push(not_asked(format!("{destination} gives no {protocol} port the name {name:?}")));
        return Ok(());
    }
    let mut any = false;
    for (service, from, to) in services
        .iter()
        .flat_map(|service| from.iter().flat_map(move |from| to.iter().map(move |to| (service, *from, *to))))
        .filter(|(_, from, to)| from.is_ipv4() == to.is_ipv4())
    {
        any = true;
        let (protocol, port) = service.unwrap_or(match to {
            IpAddr::V4(_) => (Protocol::ICMP, Tuple::icmp_port(8, 0)),
            IpAddr::V6(_) => (Protocol::ICMPV6, Tuple::icmp_port(128, 0)),
        });
        let [egress, ingress] = if source == destination {
            [Side::same_pod(), Side::same_pod()]
        } else {
            let egress = engine.judge(source, from, &Tuple::egress(to, protocol, port))?;
            [egress, engine.judge(destination, to, &Tuple::ingress(from, protocol, port))?].map(Side::from)
        };
        let verdict =
            if [egress.verdict, ingress.verdict].contains(&Verdict::Deny) { Verdict::Deny } else { Verdict::Allow };
        report.results.push(Answer {
            probe: probe.to_string(),
            source: source.clone(),
            destination: destination.clone(),
            family: if to.is_ipv4() { Family::Ipv4 } else { Family::Ipv6 },
            source_address: from,
            destination_address: to,
            protocol,
            port: service.map(|(_, port)| port),
            egress,
            ingress,
            verdict,
        });
    }
    if !any {
        report.not_asked.push(not_asked("they have no address family in common".to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_are_read_and_written() {
        for text in ["tcp/80", "udp/dns", "sctp/7777", "icmp", "tcp/serve-80-tcp", "udp/65535"] {
            assert_eq!(text.parse::<Probe>().unwrap().to_string(), text);
        }
        assert_eq!("TCP/80".parse(), Ok(Probe::Port(Protocol::TCP, 80)));
        for (text, reason) in [
            ("tcp", "it has no port"),
            ("", "it has no port"),
            ("gre/1", "its protocol is not known"),
            ("tcp/0", "ports are 1 to 65535"),
            ("tcp/65536", "ports are 1 to 65535"),
            ("tcp/", "ports are 1 to 65535"),
            ("tcp/a b", "names of ports are of a-z, 0-9 and -"),
            ("icmp/8", "its protocol is not known"),
        ] {
            assert_eq!(text.parse::<Probe>().unwrap_err().reason, reason, "{text:?}");
        }
    }
}
