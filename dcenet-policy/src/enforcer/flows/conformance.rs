//! What every [`FlowSink`] must do, as a test that a sink of somebody else's can run too.

use std::io;

use dcenet_core::model::IfIndex;

use super::{Flow, FlowAudit, FlowEnd, FlowKind, FlowSink, Losses};
use crate::model::{Direction, PodId, PolicyId, Protocol, Verdict};

/// What a sink shows of what it took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shown {
    /// Flows, one for each call of [`FlowSink::flow`].
    pub flows: u64,
    /// The sum of all losses.
    pub losses: u64,
}

/// Runs a new sink through the suite. `shown` reads what the sink has made of flows where its users would see it: by
/// another way than through the sink's own code, where there is one.
///
/// # Panics
/// Where the sink does not conform.
pub fn conforms<S: FlowSink>(mut sink: S, mut shown: impl FnMut(&mut S) -> Shown) {
    sink.flush().expect("nothing to send on is no error");
    assert_eq!(shown(&mut sink), Shown::default(), "a new sink shows nothing");
    let mut expected = Shown::default();
    for flow in flows() {
        sink.flow(&flow).unwrap_or_else(|error| panic!("{error}: {flow:#?}"));
        expected.flows += 1;
        sink.flush().expect("flushes");
        assert_eq!(shown(&mut sink), expected, "after {flow:#?}");
    }
    let losses = Losses { full: 1, limited: 20, unreadable: 300, undelivered: 4000 };
    for _ in 0..2 {
        sink.lost(losses).expect("takes losses");
        expected.losses += losses.total();
        sink.flush().expect("flushes");
        assert_eq!(shown(&mut sink), expected, "losses add up, and are no flows");
    }
    for flow in flows().iter().cycle().take(50) {
        sink.flow(flow).expect("takes many");
        expected.flows += 1;
    }
    sink.flush().expect("flushes");
    sink.flush().expect("flushes again");
    assert_eq!(shown(&mut sink), expected, "after many flows in one drain");
}

/// Flows of every kind and shape.
pub fn flows() -> Vec<Flow> {
    let end = |address: Option<&str>, port, name: Option<&str>| FlowEnd {
        address: address.map(|a| a.parse().expect("an address")),
        port,
        workload: name.map(|name| PodId::new("shop", name)),
        node: None,
    };
    let plain = Flow {
        time: 5_000_000_000,
        kind: FlowKind::New,
        verdict: Verdict::Allow,
        reason: "allowed",
        direction: Direction::Egress,
        attachment: None,
        pod: end(Some("10.0.0.1"), 40_000, Some("web")),
        peer: end(Some("10.0.0.2"), 443, None),
        protocol: Protocol::TCP,
        interface: IfIndex::new(7),
        tcp_flags: Some(0x12),
        icmp: None,
        policy: Some(PolicyId::new("shop", "web")),
        rule: Some("shop/web egress[0]".to_owned()),
        rule_number: Some(9),
        log: false,
        audit: None,
        egress_packets: 3,
        egress_bytes: 300,
        ingress_packets: 2,
        ingress_bytes: 2000,
    };
    let mut flows: Vec<Flow> = FlowKind::ALL.into_iter().map(|kind| Flow { kind, ..plain.clone() }).collect();
    let denied =
        Flow { kind: FlowKind::Denied, verdict: Verdict::Deny, reason: "denied", tcp_flags: None, ..plain.clone() };
    flows.extend([
        Flow {
            kind: FlowKind::Active,
            direction: Direction::Ingress,
            pod: end(Some("fd00::1"), 53, None),
            peer: end(Some("fd00::2"), 50_000, Some("db")),
            protocol: Protocol::UDP,
            tcp_flags: None,
            ..plain.clone()
        },
        Flow { protocol: Protocol::ICMP, icmp: Some((8, 0)), ..denied.clone() },
        Flow {
            log: true,
            audit: Some(FlowAudit {
                verdict: Verdict::Deny,
                policy: Some(PolicyId::new("shop", "strict")),
                rule: "shop/strict egress[0] to[1]".to_owned(),
            }),
            ..plain.clone()
        },
        Flow {
            pod: end(Some("fd00::1"), 0, None),
            peer: end(Some("fd00::2"), 0, None),
            protocol: Protocol::ICMPV6,
            icmp: Some((128, 0)),
            ..denied.clone()
        },
        // Dropped before it was read.
        Flow {
            direction: Direction::Ingress,
            reason: "other-ethertype",
            pod: end(None, 0, None),
            peer: end(None, 0, None),
            protocol: Protocol(0),
            interface: None,
            policy: None,
            rule: None,
            rule_number: None,
            egress_packets: 0,
            egress_bytes: 0,
            ..denied
        },
        // The largest that there can be, with names as long as Kubernetes allows, and characters that formats quote.
        Flow {
            kind: FlowKind::Ended,
            time: i64::MAX as u64,
            pod: FlowEnd { workload: Some(PodId::new("n".repeat(63), "p".repeat(253))), ..plain.pod.clone() },
            rule: Some("a \"quoted\" \\ rule\nof two lines".to_owned()),
            rule_number: Some(u32::MAX - 1),
            egress_packets: u64::MAX,
            egress_bytes: u64::MAX,
            ingress_packets: u64::MAX,
            ingress_bytes: u64::MAX,
            ..plain
        },
    ]);
    flows
}

/// Passes calls on to a sink, and fails at one of them.
#[derive(Debug)]
pub struct FlakySink<S> {
    inner: S,
    left: usize,
}

impl<S> FlakySink<S> {
    /// Fails at the call with this number, counted from 0, and at no other.
    pub fn failing_at(inner: S, call: usize) -> Self {
        Self { inner, left: call + 1 }
    }

    fn step(&mut self) -> io::Result<()> {
        self.left = self.left.wrapping_sub(1);
        if self.left == 0 { Err(io::Error::other("the sink is broken")) } else { Ok(()) }
    }
}

impl<S: FlowSink> FlowSink for FlakySink<S> {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        self.step()?;
        self.inner.flow(flow)
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        self.step()?;
        self.inner.lost(losses)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.step()?;
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{JsonLines, LastFlows};
    use super::*;

    #[test]
    fn lines_of_json_conform() {
        conforms(JsonLines(Vec::new()), |sink| {
            let mut shown = Shown::default();
            for line in std::str::from_utf8(&sink.0).expect("text").lines() {
                let line: serde_json::Value = serde_json::from_str(line).expect("a line of JSON");
                match line.get("lost") {
                    Some(lost) => {
                        let lost = lost.as_object().expect("an object");
                        shown.losses += lost.values().map(|n| n.as_u64().expect("a number")).sum::<u64>();
                    }
                    None => shown.flows += u64::from(line["kind"].is_string() && line["pod"].is_object()),
                }
            }
            shown
        });
    }

    #[test]
    fn the_last_flows_conform() {
        let last = LastFlows::new(1000);
        conforms(&last, |last| Shown { flows: last.flows().len() as u64, losses: last.losses().total() });
    }

    #[test]
    fn a_sink_that_fails_fails_once() {
        let last = LastFlows::new(1000);
        let mut sink = FlakySink::failing_at(&last, 1);
        let flow = &flows()[0];
        assert!(sink.flow(flow).is_ok() && sink.flow(flow).is_err() && sink.flow(flow).is_ok());
        assert!(FlakySink::failing_at(&last, 0).lost(Losses::default()).is_err());
        assert!(FlakySink::failing_at(&last, 0).flush().is_err());
        assert_eq!(last.flows().len(), 2);
    }
}
