//! Dumps of Kubernetes objects: whereabouts, Calico, Spiderpool.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use dcenet_core::model::Workload;
use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_ipam::adopt::calico::Calico;
use dcenet_ipam::adopt::spiderpool::Spiderpool;
use dcenet_ipam::adopt::whereabouts::Whereabouts;
use dcenet_ipam::adopt::{Adopted, AdoptedBy, Dump, DumpFormat, Options, Plan, Refusal, Source, SourceError, Why};
use dcenet_ipam::model::{KeepPolicy, NodeName};
use dcenet_ipam::reclaim::{Alive, Policy, Reclaimer, Scope, Snapshot};
use pollster::block_on;

use super::{JSON, bound, delete, dump, memory, options, plan_of};
use crate::{attachment, ipam, lease, request};

pub(super) fn whereabouts(json: &str) -> Whereabouts {
    let dump = Dump::parse("pool.json", json, DumpFormat::Json).unwrap();
    Whereabouts { dumps: vec![dump], network_name: String::new() }
}

fn fixture(name: &str) -> Dump {
    Dump::open(format!("{}/tests/fixtures/adopt/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Every address with what it becomes.
fn shown(plan: &Plan) -> Vec<String> {
    let of = |by: &AdoptedBy| match by {
        AdoptedBy::Attachment { attachment, workload, node } => format!(
            "{}/{} {} {}",
            &attachment.container.as_str()[..4],
            attachment.ifname,
            workload.as_ref().map_or("-".to_owned(), |w| w.to_string()),
            node.as_ref().map_or("-", |n| n.as_str())
        ),
        AdoptedBy::Claim { claim, .. } => format!("claim {claim}"),
    };
    let all = plan.adoptees.iter().flat_map(|a| a.addresses.iter().map(move |at| (at.address, a)));
    let mut all: Vec<_> = all.map(|(address, a)| (address, of(&a.by))).collect();
    all.sort();
    all.into_iter().map(|(address, by)| format!("{address} {by}")).collect()
}

fn field_of<'p>(plan: &'p Plan, field: &str) -> &'p Refusal {
    let mut found = plan.refused.iter().filter(|refusal| refusal.origin.field.contains(field));
    let refusal = found.next().unwrap_or_else(|| panic!("{field}: {:#?}", plan.refused));
    assert!(found.next().is_none(), "{field} twice: {:#?}", plan.refused);
    refusal
}

fn accept_all(plan: &Plan) -> BTreeSet<dcenet_ipam::adopt::Origin> {
    plan.refused.iter().map(|refusal| refusal.origin.clone()).collect()
}

#[test]
fn whereabouts_pools_become_attachments_of_their_containers() {
    let source = Whereabouts { dumps: vec![fixture("whereabouts.yaml")], network_name: String::new() };
    let ours = ipam(JSON, &memory());
    let plan = plan_of(&ours, &source.read().unwrap());
    assert_eq!(
        shown(&plan),
        [
            "10.1.0.10 aaaa/net1 shop/db-0 -",
            // The interface is told by the reservation.
            "10.1.0.11 bbbb/net1 shop/web-7d9f8c6b5-x2x4z -",
            "10.1.0.13 claim shop/waits/net1",
            "10.1.1.3 abab/net1 shop/sliced n7",
            "fd00:1::77 acac/net1 shop/late -",
            "fd00:1::8000:0:0:1 aaaa/net1 shop/db-0 -",
            "fd00:1::ffff:ffff:ffff:ffff cccc/net1 shop/web-7d9f8c6b5-z4z2z -",
        ]
    );
    assert_eq!(plan.refused.len(), 7, "{:#?}", plan.refused);
    for (field, part) in [
        (r#"allocations["300"]"#, "out of the range 10.1.0.0/24"),
        (r#"allocations["014"]"#, "not written as whereabouts does"),
        (r#"allocations["15"]"#, "podref"),
        (r#"allocations["16"]"#, "neither a container nor a pod"),
        (r#"allocations["18446744073709551616"]"#, "out of the range fd00:1::/64"),
    ] {
        let refusal = field_of(&plan, field);
        assert!(matches!(&refusal.why, Why::Unreadable { reason } if reason.contains(part)), "{refusal}");
        assert!(refusal.origin.file.ends_with("whereabouts.yaml"), "{refusal}");
    }
    for field in [r#"allocations["12"]"#, "OverlappingRangeIPReservation 10.1.0.12"] {
        assert!(matches!(field_of(&plan, field).why, Why::TwoOwners { .. }));
    }
    let passed_over: Vec<_> = plan.passed_over.iter().map(|p| p.origin.field.as_str()).collect();
    assert_eq!(
        passed_over,
        ["IPPool storage-10.1.0.0-24", "NodeSlicePool slices", "OverlappingRangeIPReservation storage-10.1.0.10"]
    );
    // The other network is another routing domain.
    let other = Whereabouts { network_name: "storage".to_owned(), ..source };
    assert_eq!(shown(&plan_of(&ours, &other.read().unwrap())), ["10.1.0.10 afaf/net2 other/db -"]);

    let adopted = block_on(ours.adopt(&plan, &accept_all(&plan))).unwrap();
    assert_eq!((adopted.attachments, adopted.claims, adopted.addresses), (5, 1, 7));
    let key = |container: &str| {
        let mut key = attachment(container);
        key.ifname = "net1".parse().unwrap();
        key
    };
    let held = block_on(ours.held(&key("aaaa"))).unwrap().unwrap();
    assert_eq!(held.addresses.len(), 2);
    assert!(delete(&ours, &key("aaaa")));
    assert_eq!(bound(&ours).len(), 4);
    let node: Vec<_> = block_on(ours.bindings(None)).unwrap().into_iter().filter_map(|b| b.node).collect();
    assert_eq!(node, ["n7".parse::<NodeName>().unwrap()]);
}

#[test]
fn calicos_blocks_become_attachments_claims_and_reservations() {
    let source = Calico { dumps: vec![fixture("calico.json")] };
    let store = memory();
    let ours = ipam(JSON, &store);
    let plan = plan_of(&ours, &source.read().unwrap());
    assert_eq!(
        shown(&plan),
        [
            "10.1.2.1 0f0e/eth0 shop/db-0 n1",
            // Its handle names no container.
            "10.1.2.2 claim shop/vm-a",
            // Without a node of its own it is on that of the block.
            "fd00:1::2:1 0f0e/eth0 shop/db-0 n1",
        ]
    );
    let outside: Vec<_> = plan.outside.iter().map(|o| format!("{} {}", o.address, o.holder)).collect();
    assert_eq!(
        outside,
        [
            "10.1.2.0 calico: reserved for Windows of node n1",
            "10.1.2.4 calico: ipipTunnelAddress of node n1",
            "fd00:1::2:f calico: handle by-hand of node n1",
        ]
    );
    let refused: Vec<_> = plan.refused.iter().map(|r| r.to_string()).collect();
    for (i, part) in ["9 is the number of no attribute; there are 6", "it names no owner", "\"10.1.4/30\" is no prefix"]
        .into_iter()
        .enumerate()
    {
        assert!(refused.iter().any(|r| r.contains(part)), "{i} {part}: {refused:#?}");
    }
    assert_eq!(refused.len(), 3, "{refused:#?}");
    let passed_over: Vec<_> = plan.passed_over.iter().map(|p| p.what.as_str()).collect();
    assert_eq!(
        passed_over,
        ["10.1.2.5 was released and cools", "an empty block", "an object of a kind that holds no address in use",]
    );

    let accepted = accept_all(&plan);
    let adopted = block_on(ours.adopt(&plan, &accepted)).unwrap();
    let wanted = Adopted { attachments: 1, claims: 1, addresses: 3, reserved: 3, present: 0 };
    assert_eq!(adopted, wanted);
    // Nobody gets the tunnel's address, and who asks is told.
    let asked = LeaseRequest { addresses: vec!["10.1.2.4".parse().unwrap()], ..request("thief", None) };
    let error = block_on(ours.lease(&asked)).unwrap_err().to_string();
    assert!(error.contains("ipipTunnelAddress of node n1"), "{error}");
    // Twice is once.
    let before = dump(&*store);
    assert_eq!(block_on(ours.adopt(&plan, &accepted)).unwrap(), Adopted { present: 2, ..Adopted::default() });
    let again = plan_of(&ours, &source.read().unwrap());
    assert_eq!((again.adoptees.len(), again.outside.len(), again.refused.len()), (0, 0, 3));
    assert_eq!(dump(&*store), before);
    // DEL of the container that the handle named.
    let container = "0f0e0d0c0b0a090807060504030201000f0e0d0c0b0a09080706050403020100";
    assert!(delete(&ours, &attachment(container)));
    // The virtual machine's address comes back to it, whatever container runs it.
    assert_eq!(lease(&ours, "new", Some("shop/vm-a")).unwrap()[0], "10.1.2.2/16");
}

#[test]
fn spiderpools_pods_become_claims_that_the_pods_find_again() {
    let source = Spiderpool { dumps: vec![fixture("spiderpool.yaml")] };
    let ours = ipam(JSON, &memory());
    let inventory = source.read().unwrap();
    let plan = plan_of(&ours, &inventory);
    assert_eq!(
        shown(&plan),
        [
            "10.1.5.2 claim shop/db-0/eth0",
            "10.1.5.3 claim shop/db-1/eth0",
            "10.1.5.4 claim shop/db-1/net1",
            "10.1.5.5 claim shop/lonely",
            "10.1.5.8 claim shop/left/eth0",
            "fd00:1::5:2 claim shop/db-0/eth0",
        ]
    );
    for (field, part) in [
        (r#"allocatedIPs["10.9.9.9"]"#, "not in the pool's subnet"),
        (r#"allocatedIPs["10.1.5.7"]"#, "names no pod"),
        (r#"allocatedIPs["ten"]"#, "no address"),
        ("SpiderIPPool torn: status.allocatedIPs", "no JSON map"),
    ] {
        let refusal = field_of(&plan, field);
        assert!(matches!(&refusal.why, Why::Unreadable { reason } if reason.contains(part)), "{refusal}");
    }
    // Two pods of one name.
    for field in [r#"allocatedIPs["10.1.5.6"]"#, "SpiderEndpoint swapped"] {
        let refusal = field_of(&plan, field);
        assert!(matches!(&refusal.why, Why::TwoOwners { other } if other.contains("UID u-")), "{refusal}");
    }
    assert_eq!(plan.refused.len(), 6, "{:#?}", plan.refused);
    block_on(ours.adopt(&plan, &accept_all(&plan))).unwrap();

    // DEL of a running container, of which nothing is known, is no error and frees nothing.
    assert!(!delete(&ours, &attachment("unknown")));
    // Nobody else gets the address, and the pod that starts again does, on each interface its own, in both families.
    let asked = LeaseRequest { addresses: vec!["10.1.5.2".parse().unwrap()], ..request("thief", None) };
    block_on(ours.lease(&asked)).unwrap_err();
    assert_eq!(lease(&ours, "new0", Some("shop/db-0")).unwrap(), ["10.1.5.2/16", "fd00:1::5:2/64"]);
    let mut on_net1 = request("new1", Some("shop/db-1"));
    on_net1.attachment.ifname = "net1".parse().unwrap();
    assert_eq!(block_on(ours.lease(&on_net1)).unwrap().addresses[0].address.to_string(), "10.1.5.4/16");
    // Released, it is kept as long as the pod exists.
    assert!(delete(&ours, &attachment("new0")));
    assert_eq!(lease(&ours, "newer", Some("shop/db-0")).unwrap()[0], "10.1.5.2/16");
    // The orchestrator's word ends what nobody attached again.
    let mut reclaimer = Reclaimer::new(&ours, Policy::default());
    let alive: BTreeSet<(Workload, Option<NodeName>)> =
        [("shop/db-0".parse().unwrap(), None), ("shop/db-1".parse().unwrap(), None)].into();
    let mut ended = Vec::new();
    for _ in 0..2 {
        let begun = block_on(Snapshot::begin(&ours)).unwrap();
        let snapshot = begun.complete(Scope::default(), Alive::Workloads(alive.clone()));
        ended.extend(block_on(reclaimer.observe(&snapshot)).unwrap().ended);
    }
    let ended: Vec<_> = ended.iter().map(|claim| claim.to_string()).collect();
    assert_eq!(ended, ["shop/left/eth0", "shop/lonely"]);
}

#[test]
fn pods_whose_containers_the_runtime_names_become_attachments() {
    let source = Spiderpool { dumps: vec![fixture("spiderpool.yaml")] };
    let ours = ipam(JSON, &memory());
    let mut options: Options = options();
    options.containers.insert("shop/db-0".parse().unwrap(), "cafe0000".parse().unwrap());
    let plan = block_on(ours.plan_adoption(&source.read().unwrap(), &options)).unwrap();
    let shown = shown(&plan);
    assert!(shown.contains(&"10.1.5.2 cafe/eth0 shop/db-0 n3".to_owned()), "{shown:?}");
    block_on(ours.adopt(&plan, &accept_all(&plan))).unwrap();
    assert_eq!(block_on(ours.held(&attachment("cafe0000"))).unwrap().unwrap().addresses.len(), 2);
    assert!(delete(&ours, &attachment("cafe0000")), "DEL works from the first moment");
}

/// The time for which an adopted claim keeps its address begins with the adoption, and a repetition begins no other.
#[test]
fn what_is_adopted_for_a_time_ends() {
    let now = Arc::new(AtomicU64::new(1_000_000_000));
    let clock = now.clone();
    let ours = ipam(JSON, &memory()).with_clock(move || clock.load(Ordering::Relaxed));
    let pool = r#"{ "kind": "SpiderIPPool", "metadata": { "name": "v4" }, "spec": { "subnet": "10.1.5.0/24" }, "status":
        { "allocatedIPs": "{\"10.1.5.3\":{\"pod\":\"shop/api\"},\"10.1.5.4\":{\"pod\":\"shop/used\"}}" } }"#;
    let source = Spiderpool { dumps: vec![Dump::parse("pools.json", pool, DumpFormat::Json).unwrap()] };
    let inventory = source.read().unwrap();
    let mut options = options();
    options.keep = KeepPolicy::For(Duration::from_secs(72 * 3600));
    let adopt = || {
        let plan = block_on(ours.plan_adoption(&inventory, &options)).unwrap();
        assert_eq!(plan.refused, []);
        block_on(ours.adopt(&plan, &accept_all(&plan))).unwrap();
    };
    adopt();
    // With the one of the configuration.
    assert_eq!(block_on(ours.claims()).unwrap().len(), 3);
    // Used before its time is over: it is kept for as long again afterwards.
    now.fetch_add(71 * 3_600_000, Ordering::Relaxed);
    assert_eq!(lease(&ours, "used", Some("shop/used")).unwrap()[0], "10.1.5.4/16");
    adopt();
    assert_eq!(block_on(ours.expire()).unwrap(), 0);
    now.fetch_add(3_600_000, Ordering::Relaxed);
    assert_eq!(block_on(ours.expire()).unwrap(), 1, "72 h after the first adoption");
    let kept: Vec<_> = block_on(ours.claims()).unwrap().into_iter().map(|c| c.claim.key.to_string()).collect();
    assert!(kept.iter().any(|claim| claim.starts_with("shop/used")), "{kept:?}");
    let asked = LeaseRequest { addresses: vec!["10.1.5.3".parse().unwrap()], ..request("other", None) };
    now.fetch_add(2 * 3_600_000, Ordering::Relaxed);
    assert_eq!(block_on(ours.lease(&asked)).unwrap().addresses[0].address.to_string(), "10.1.5.3/16");
}

#[test]
fn without_interfaces_two_addresses_of_a_pod_are_not_guessed_apart() {
    let pool = r#"{ "kind": "SpiderIPPool", "metadata": { "name": "v4" }, "spec": { "subnet": "10.1.5.0/24" }, "status":
        { "allocatedIPs": "{\"10.1.5.3\":{\"pod\":\"shop/api\"},\"10.1.5.4\":{\"pod\":\"shop/api\"}}" } }"#;
    let source = Spiderpool { dumps: vec![Dump::parse("pools.json", pool, DumpFormat::Json).unwrap()] };
    let plan = plan_of(&ipam(JSON, &memory()), &source.read().unwrap());
    assert!(matches!(&plan.refused[..], [Refusal { why: Why::TwoOfClaim { .. }, .. }]), "{:?}", plan.refused);
}

#[test]
fn yaml_and_json_say_the_same_and_a_broken_dump_is_an_error_with_its_line() {
    let yaml = fixture("whereabouts.yaml");
    let source = |dump| Whereabouts { dumps: vec![dump], network_name: String::new() };
    // JSON is YAML.
    let text = std::fs::read_to_string(format!("{}/tests/fixtures/adopt/calico.json", env!("CARGO_MANIFEST_DIR")));
    let text = text.unwrap();
    let read = |format| Calico { dumps: vec![Dump::parse("x", &text, format).unwrap()] }.read().unwrap();
    assert_eq!(read(DumpFormat::Json), read(DumpFormat::Yaml));
    assert!(!source(yaml).read().unwrap().entries.is_empty());
    for (format, text) in [(DumpFormat::Json, "{\n \"kind\": }"), (DumpFormat::Yaml, "kind: x\n  - y: [")] {
        let error = Dump::parse("dump", text, format).unwrap_err();
        let SourceError::Syntax { origin, .. } = &error else { panic!("{error}") };
        assert_eq!(origin.line, Some(2), "{error}");
    }
}
