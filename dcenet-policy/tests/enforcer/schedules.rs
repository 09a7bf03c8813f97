//! Rules that begin and cease to hold while the owner runs.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use dcenet_core::test_support::{Rung, require};
use dcenet_policy::enforcer::Clock;
use dcenet_policy::enforcer::flows::{FlowKind, LastFlows, Logged, Tee};
use dcenet_policy::sources::kubernetes::Documents;

use crate::world::*;

/// Only on Mondays from 08:00 to 09:00, UTC.
const HOURS: &str = r#"
{ apiVersion: dcenet.io/v1alpha1, kind: Schedule, metadata: { name: hour }, spec: { windows: [ { days: [ mon ], from: "08:00", until: "09:00" } ] } }
---
apiVersion: dcenet.io/v1alpha1
kind: Policy
metadata: { name: db, namespace: shop }
spec:
  subject: { podSelector: { matchLabels: { app: db } } }
  ingress: [ { action: allow, services: [ { protocol: tcp, ports: [ 80 ] } ], schedule: hour, log: true } ]
"#;

/// 2026-11-23, a Monday, 08:00 UTC.
const EIGHT: u64 = 1_795_392_000 + 8 * 3600;

fn frozen(seconds: u64) -> Clock {
    Arc::new(move || SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
}

#[test]
fn the_owner_wakes_when_a_rule_begins_to_hold_and_when_it_ceases() {
    if !require(Rung::Kernel) {
        return;
    }
    let mut world = World::new();
    let owner = world.started();
    for (n, name) in [(2, "web"), (3, "db")] {
        world.add_enforced(name, n, &[("app", name)]);
    }
    owner.set_clock(frozen(EIGHT - 600)).unwrap();
    let documents = Documents::default().with_yaml("hours.yaml", HOURS).unwrap();
    assert!(owner.replace_documents(&Documents::default(), &documents).unwrap().is_complete());
    world.tcp("web", "db", 80, false);

    // Nobody tells the owner anything from here on; it has some seconds to fall asleep in.
    let begun = Instant::now();
    let running: Clock = Arc::new(move || SystemTime::UNIX_EPOCH + Duration::from_secs(EIGHT - 3) + begun.elapsed());
    owner.set_clock(running).unwrap();
    let mut reader = owner.flows().unwrap();
    world.tcp("web", "db", 80, true);
    assert!(reader.wait(ALLOWED).unwrap());
    let (kept, all) = (LastFlows::new(100), LastFlows::new(100));
    reader.drain(&mut Tee::new().with("logged", Logged(&kept)).with("all", &all)).unwrap();
    let kept = kept.flows();
    assert!(kept.iter().any(|f| f.kind == FlowKind::New && f.pod.port == 80), "{kept:#?}");
    let rule = "shop/policy/db ingress[0] ports[0]";
    assert!(kept.iter().all(|f| f.log && f.rule.as_deref() == Some(rule)), "{kept:#?}");
    assert!(all.flows().len() > kept.len(), "what web sends is no rule's");

    owner.set_clock(frozen(EIGHT + 3600)).unwrap();
    world.tcp("web", "db", 80, false);
    owner.uninstall().unwrap();
}
