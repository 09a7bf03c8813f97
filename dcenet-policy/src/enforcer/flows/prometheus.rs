//! Metrics for Prometheus, of flows and of what the datapath counts.
//!
//! All names begin with `dcenet_policy_`:
//!
//! | Name | Labels | Of |
//! |---|---|---|
//! | `flow_events_total` | kind, direction, verdict, reason | what the sink was told |
//! | `flow_packets_total` | direction | packets of the flows that are over ([`FlowKind::Ended`]), by the direction in which they went |
//! | `flow_bytes_total` | direction | their bytes, Ethernet headers included |
//! | `flow_events_lost_total` | cause | [`Losses`] |
//! | `reason_packets_total` | direction, verdict, reason | packets that a reason decided on: exact, whatever events were lost |
//! | `reason_bytes_total` | direction, verdict, reason | their bytes |
//! | `rule_packets_total` | policy, rule | packets that a rule decided on, likewise |
//! | `rule_bytes_total` | policy, rule | their bytes |
//!
//! The last four are those of [`Enforcer::reason_counters`](crate::enforcer::Enforcer::reason_counters) and
//! [`Enforcer::rule_counters`](crate::enforcer::Enforcer::rule_counters) as of the last [`FlowMetrics::publish`].
//!
//! No label is an address, a port or a pod. Rules have a series each up to a limit, in the order in which they are first
//! published; the others are counted together under the rule `other`. A rule that is not in use gives its place back.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::{Flow, FlowKind, FlowSink, Losses, ReasonCounter, RuleCounter};
use crate::model::Direction;

/// A label's name and value.
type Label = (&'static str, Cow<'static, str>);

/// Counts flows; see the [module](self). Clones count into the same.
#[derive(Clone)]
pub struct FlowMetrics {
    events: Family<[Label; 4], Counter>,
    ended: [Family<[Label; 1], Counter>; 2],
    lost: Family<[Label; 1], Counter>,
    reasons: [Family<[Label; 3], Counter>; 2],
    rules: [Family<[Label; 2], Counter>; 2],
    published: Arc<Mutex<Published>>,
}

/// What was published last.
#[derive(Default)]
struct Published {
    most_rules: usize,
    reasons: BTreeMap<(&'static str, Direction), [u64; 2]>,
    rules: BTreeMap<String, Rule>,
}

struct Rule {
    counts: [u64; 2],
    /// The labels of its own series, if it has one.
    own: Option<[Label; 2]>,
}

impl fmt::Debug for FlowMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowMetrics").finish_non_exhaustive()
    }
}

impl FlowMetrics {
    /// Enters all metrics into a registry, with a series of its own for so many rules at most.
    pub fn register(registry: &mut Registry, most_rules: usize) -> Self {
        let metrics = Self {
            events: Family::default(),
            ended: Default::default(),
            lost: Family::default(),
            reasons: Default::default(),
            rules: Default::default(),
            published: Arc::new(Mutex::new(Published { most_rules, ..Published::default() })),
        };
        let r = registry.sub_registry_with_prefix("dcenet_policy");
        r.register("flow_events", "What was told of flows and dropped packets", metrics.events.clone());
        let units = ["packets", "bytes"];
        for (unit, family) in units.into_iter().zip(&metrics.ended) {
            r.register(format!("flow_{unit}"), "Of flows that are over, by direction", family.clone());
        }
        r.register("flow_events_lost", "Events that nobody will see, by cause", metrics.lost.clone());
        for (unit, family) in units.into_iter().zip(&metrics.reasons) {
            r.register(format!("reason_{unit}"), "Of packets, by the reason for their verdict", family.clone());
        }
        for (unit, family) in units.into_iter().zip(&metrics.rules) {
            r.register(format!("rule_{unit}"), "Of packets, by the rule that decided on them", family.clone());
        }
        metrics
    }

    /// Shows these counts until the next call. A count that is less than before began anew; those of one name are added up.
    /// Without any rules, those of the last call stand; of some, a rule that is not among them is no more.
    pub fn publish(&self, reasons: &[ReasonCounter], rules: &[RuleCounter]) {
        let mut published = self.published.lock();
        for counter in reasons {
            let ReasonCounter { reason, verdict, direction, packets, bytes } = counter;
            let labels = [
                ("direction", direction.as_str().into()),
                ("verdict", verdict.as_str().into()),
                ("reason", (*reason).into()),
            ];
            let now = [*packets, *bytes];
            let before = published.reasons.insert((reason, *direction), now).unwrap_or_default();
            add(&self.reasons, &labels, since(now, before));
        }
        if rules.is_empty() {
            return;
        }
        let mut sums: BTreeMap<&str, (bool, [u64; 2])> = BTreeMap::new();
        for RuleCounter { rule, in_use, packets, bytes, .. } in rules {
            let (used, [all_packets, all_bytes]) = sums.entry(rule).or_default();
            *used |= in_use;
            *all_packets = all_packets.saturating_add(*packets);
            *all_bytes = all_bytes.saturating_add(*bytes);
        }
        published.rules.retain(|name, rule| {
            // What has been counted with others is remembered, or it would be added to them again.
            let kept = sums.get(name.as_str()).is_some_and(|(used, _)| *used || rule.own.is_none());
            if let (false, Some(labels)) = (kept, &rule.own) {
                for family in &self.rules {
                    family.remove(labels);
                }
            }
            kept
        });
        let mut room =
            published.most_rules.saturating_sub(published.rules.values().filter(|rule| rule.own.is_some()).count());
        for RuleCounter { rule: name, policy, .. } in rules {
            let Some((used, now)) = sums.remove(name.as_str()) else { continue };
            if !used && !published.rules.contains_key(name) {
                continue;
            }
            let rule = published.rules.entry(name.clone()).or_insert_with(|| {
                let own = room > 0;
                room -= usize::from(own);
                let policy = policy.as_ref().map_or_else(String::new, ToString::to_string);
                Rule { counts: [0; 2], own: own.then(|| rule_labels(policy, name.clone())) }
            });
            let more = since(now, rule.counts);
            rule.counts = now;
            match &rule.own {
                Some(labels) => add(&self.rules, labels, more),
                None => add(&self.rules, &rule_labels("", "other"), more),
            }
        }
    }
}

impl FlowSink for FlowMetrics {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        let labels = [
            ("kind", flow.kind.as_str().into()),
            ("direction", flow.direction.as_str().into()),
            ("verdict", flow.verdict.as_str().into()),
            ("reason", flow.reason.into()),
        ];
        self.events.get_or_create(&labels).inc();
        // Counts at a FIN are not the last ones.
        if flow.kind == FlowKind::Ended {
            let egress = [flow.egress_packets, flow.egress_bytes];
            let ingress = [flow.ingress_packets, flow.ingress_bytes];
            for (direction, counts) in [(Direction::Egress, egress), (Direction::Ingress, ingress)] {
                add(&self.ended, &[("direction", direction.as_str().into())], counts);
            }
        }
        Ok(())
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        let Losses { full, limited, unreadable, undelivered } = losses;
        let causes = [("full", full), ("limited", limited), ("unreadable", unreadable), ("undelivered", undelivered)];
        for (cause, count) in causes {
            self.lost.get_or_create(&[("cause", cause.into())]).inc_by(count);
        }
        Ok(())
    }
}

fn rule_labels(policy: impl Into<Cow<'static, str>>, rule: impl Into<Cow<'static, str>>) -> [Label; 2] {
    [("policy", policy.into()), ("rule", rule.into())]
}

/// Adds packets and bytes.
fn add<const N: usize>(families: &[Family<[Label; N], Counter>; 2], labels: &[Label; N], counts: [u64; 2])
where
    [Label; N]: Clone + std::hash::Hash + Eq,
{
    for (family, count) in families.iter().zip(counts) {
        family.get_or_create(labels).inc_by(count);
    }
}

fn since(now: [u64; 2], before: [u64; 2]) -> [u64; 2] {
    if now[0] < before[0] || now[1] < before[1] { now } else { [now[0] - before[0], now[1] - before[1]] }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Shown, conforms};
    use super::*;
    use crate::model::{PolicyId, Verdict};

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
        text
    }

    fn sum(text: &str, name: &str) -> u64 {
        let series = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        series.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    #[test]
    fn metrics_conform() {
        let mut registry = Registry::default();
        let sink = FlowMetrics::register(&mut registry, 10);
        conforms(sink, |_| {
            let text = text(&registry);
            Shown {
                flows: sum(&text, "dcenet_policy_flow_events_total"),
                losses: sum(&text, "dcenet_policy_flow_events_lost_total"),
            }
        });
    }

    #[test]
    fn series_bear_kind_direction_verdict_and_reason() {
        let mut registry = Registry::default();
        let mut sink = FlowMetrics::register(&mut registry, 10);
        let flows = conformance::flows();
        let denied = flows.iter().find(|f| f.reason == "other-ethertype").unwrap();
        let of_kind = |kind| flows.iter().find(|f| f.kind == kind).unwrap();
        let ended = of_kind(FlowKind::Ended);
        (0..3).for_each(|_| sink.flow(denied).unwrap());
        (0..2).for_each(|_| sink.flow(ended).unwrap());
        // Of a flow that ends later, or was counted already.
        for kind in [FlowKind::New, FlowKind::Sampled, FlowKind::Active, FlowKind::Closed] {
            sink.flow(of_kind(kind)).unwrap();
        }
        let text = text(&registry);
        for line in [
            r#"dcenet_policy_flow_events_total{kind="denied",direction="ingress",verdict="deny",reason="other-ethertype"} 3"#,
            r#"dcenet_policy_flow_events_total{kind="ended",direction="egress",verdict="allow",reason="allowed"} 2"#,
            r#"dcenet_policy_flow_packets_total{direction="egress"} 6"#,
            r#"dcenet_policy_flow_bytes_total{direction="ingress"} 4000"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }

    #[test]
    fn rules_beyond_the_limit_are_counted_together_and_no_series_falls() {
        let mut registry = Registry::default();
        let metrics = FlowMetrics::register(&mut registry, 2);
        let rule = |name: &str, packets| RuleCounter {
            rule: name.to_owned(),
            policy: Some(PolicyId::new("shop", "db")),
            audit: None,
            in_use: true,
            packets,
            bytes: packets * 100,
        };
        let series = |rule: &str, policy: &str| {
            let start = format!("dcenet_policy_rule_packets_total{{policy=\"{policy}\",rule=\"{rule}\"}} ");
            text(&registry).lines().find_map(|line| line.strip_prefix(&start).map(|n| n.parse::<u64>().unwrap()))
        };
        let seen = || ["a", "b", "c", "d"].map(|rule| series(rule, "shop/db")).into_iter().chain([series("other", "")]);
        metrics.publish(&[], &[rule("a", 1), rule("b", 2), rule("c", 3), rule("d", 4)]);
        assert!(seen().eq([Some(1), Some(2), None, None, Some(7)]));
        metrics.publish(&[], &[rule("a", 1), rule("b", 5), rule("c", 10), rule("d", 4)]);
        assert!(seen().eq([Some(1), Some(5), None, None, Some(14)]));
        // A rule that goes gives its place to the next that comes, not to one that has been counted with others.
        metrics.publish(&[], &[rule("b", 5), rule("c", 11), rule("d", 4)]);
        assert!(seen().eq([None, Some(5), None, None, Some(15)]));
        metrics.publish(&[], &[rule("b", 1), rule("c", 11), rule("a", 6)]);
        assert!(seen().eq([Some(6), Some(6), None, None, Some(15)]), "b began anew");
        assert_eq!(sum(&text(&registry), "dcenet_policy_rule_bytes_total"), 2700);

        let reason = |packets| ReasonCounter {
            reason: "spoofed",
            verdict: Verdict::Deny,
            direction: Direction::Egress,
            packets,
            bytes: packets * 60,
        };
        metrics.publish(&[reason(5)], &[]);
        metrics.publish(&[reason(7)], &[]);
        let line = r#"dcenet_policy_reason_packets_total{direction="egress",verdict="deny",reason="spoofed"} 7"#;
        assert!(text(&registry).lines().any(|l| l == line));
        assert!(seen().eq([Some(6), Some(6), None, None, Some(15)]), "nothing was said of rules");
        metrics.publish(&[], &[rule("b", 2), rule("c", 11), rule("a", 6)]);
        assert!(seen().eq([Some(6), Some(7), None, None, Some(15)]));
    }

    #[test]
    fn counts_of_one_name_are_added_up_once() {
        let mut registry = Registry::default();
        let metrics = FlowMetrics::register(&mut registry, 2);
        let rule = |packets| RuleCounter {
            rule: "a".to_owned(),
            policy: None,
            audit: None,
            in_use: true,
            packets,
            bytes: packets,
        };
        for _ in 0..3 {
            metrics.publish(&[], &[rule(100), rule(3)]);
            assert_eq!(sum(&text(&registry), "dcenet_policy_rule_packets_total"), 103);
        }
        metrics.publish(&[], &[rule(100), rule(4)]);
        assert_eq!(sum(&text(&registry), "dcenet_policy_rule_packets_total"), 104);
    }

    #[test]
    fn rules_out_of_use_have_no_series() {
        let mut registry = Registry::default();
        let metrics = FlowMetrics::register(&mut registry, 1);
        let rule = |name: &str, in_use, packets| RuleCounter {
            rule: name.to_owned(),
            policy: None,
            audit: None,
            in_use,
            packets,
            bytes: packets,
        };
        let series = |rule: &str| {
            let start = format!("dcenet_policy_rule_packets_total{{policy=\"\",rule=\"{rule}\"}} ");
            text(&registry).lines().find_map(|line| line.strip_prefix(&start).map(|n| n.parse::<u64>().unwrap()))
        };
        let seen = || ["old", "new", "more", "other"].map(series);
        metrics.publish(&[], &[rule("old", false, 9), rule("new", true, 1)]);
        assert_eq!(seen(), [None, Some(1), None, None]);
        metrics.publish(&[], &[rule("old", true, 9), rule("new", true, 1)]);
        assert_eq!(seen(), [None, Some(1), None, Some(9)]);
        metrics.publish(&[], &[rule("old", false, 9), rule("new", false, 2), rule("more", true, 5)]);
        assert_eq!(seen(), [None, None, Some(5), Some(9)], "a rule gives its place to the next");
        metrics.publish(&[], &[rule("old", true, 10), rule("new", false, 2), rule("more", true, 5)]);
        assert_eq!(seen(), [None, None, Some(5), Some(10)], "what was counted with others is not counted again");
    }
}
