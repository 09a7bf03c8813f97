//! Policies that are tried out, on real packets.

use dcenet_core::test_support::{Rung, require};
use dcenet_policy::enforcer::flows::{Flow, FlowKind, LastFlows};
use dcenet_policy::model::{Mode, PodId, PolicyId, Verdict};

use crate::world::*;

#[test]
fn a_policy_in_audit_stops_nothing_and_flows_say_what_it_would() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    let mut reader = owner.flows().unwrap();
    let tried: Vec<_> =
        policies(DB).into_iter().map(|policy| dcenet_policy::model::Policy { mode: Mode::Audit, ..policy }).collect();
    let name = tried[0].id.clone();
    let report = owner.set_policies(tried).unwrap();
    assert!(report.is_complete() && report.faults.is_empty(), "{report:?}");
    reader.drain(&mut &LastFlows::new(1)).unwrap();
    world.tcp("web", "db", 5432, true);
    world.tcp("web", "db", 5433, true);
    assert!(reader.wait(ALLOWED).unwrap());
    let kept = LastFlows::new(100);
    reader.drain(&mut &kept).unwrap();
    let flows = kept.flows();
    let db = PodId::new("shop", "db");
    for ipv6 in [false, true] {
        let begun = |port| {
            let address = Some(world.address("db", ipv6));
            let is_it = |f: &&Flow| f.kind == FlowKind::New && f.pod.address == address && f.pod.port == port;
            let flow = flows.iter().find(is_it).unwrap_or_else(|| panic!("{port} in {flows:#?}"));
            assert_eq!((flow.verdict, flow.pod.workload.as_ref(), &flow.policy), (Verdict::Allow, Some(&db), &None));
            assert_eq!(flow.rule.as_deref(), Some("no policy governs the pod in this direction"));
            flow.audit.clone().unwrap()
        };
        let (allowed, denied) = (begun(5432), begun(5433));
        assert_eq!((allowed.verdict, allowed.policy), (Verdict::Allow, Some(name.clone())));
        assert_eq!(allowed.rule, "shop/db ingress[0] from[0] ports[0]");
        assert_eq!((denied.verdict, denied.policy), (Verdict::Deny, None::<PolicyId>));
        assert_eq!(denied.rule, "isolated; no rule matches");
    }
    let counters = owner.rule_counters().unwrap();
    let would_be_denied = |c: &&dcenet_policy::enforcer::flows::RuleCounter| {
        c.in_use && c.audit.as_ref().is_some_and(|audit| audit.verdict == Verdict::Deny)
    };
    assert!(counters.iter().filter(would_be_denied).any(|c| c.packets >= 2), "{counters:#?}");

    // The same in force.
    owner.set_policies(policies(DB)).unwrap();
    world.tcp("web", "db", 5432, true);
    world.tcp("web", "db", 5433, false);
    owner.uninstall().unwrap();
}
