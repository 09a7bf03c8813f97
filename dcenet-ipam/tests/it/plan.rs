//! What a user of the fleet plan sees, on every backend, and rivals at one store.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;

use dcenet_ipam::model::AddressSpace;
use dcenet_ipam::plan::{
    Advice, Claim, ConflictKind, Document, Level, Place, Plan, PlanError, Prefix, Purpose, Receipt, State, Surrender,
};
use dcenet_ipam::store::flaky::{Failure, FlakyStore, MeetingStore, UnguardedStore};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Key, Store};
use ipnet::IpNet;
use pollster::block_on;

use crate::each_store;

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn space(name: &str) -> AddressSpace {
    name.parse().unwrap()
}

fn default() -> AddressSpace {
    AddressSpace::default()
}

/// A plan that owns 10.0.0.0/8 and fd00::/8.
pub(crate) fn fleet(store: &Arc<dyn Store>) -> Plan {
    let plan = Plan::new(store.clone(), "fleet").unwrap();
    block_on(plan.add_space(&default(), &[])).unwrap();
    for cidr in ["10.0.0.0/8", "fd00::/8"] {
        block_on(plan.own(&Claim::at(net(cidr), Level::Fleet, "corp", "net"))).unwrap();
    }
    plan
}

fn memory() -> Arc<dyn Store> {
    Arc::new(MemoryStore::new())
}

fn at(plan: &Plan, cidr: &str, level: Level, name: &str) -> Result<Prefix, PlanError> {
    block_on(plan.claim(&Claim::at(net(cidr), level, name, name)))
}

fn within(plan: &Plan, parent: &str, length: u8, level: Level, name: &str) -> Result<Prefix, PlanError> {
    block_on(plan.claim(&Claim::within(net(parent), length, level, name, name)))
}

/// What the store holds, read without the plan.
pub(crate) fn stored(store: &Arc<dyn Store>, space: &str) -> Vec<(IpNet, u8)> {
    let prefix = format!("plan/p/{space}/").into_bytes();
    let mut found = Vec::new();
    let mut after: Option<Key> = None;
    loop {
        let page = block_on(store.scan(&prefix, after.as_deref(), 500)).unwrap();
        for (key, _) in &page {
            let rest = &key[prefix.len()..];
            let bits = u128::from_be_bytes(rest[1..17].try_into().unwrap());
            let ip = match rest[0] {
                b'4' => std::net::IpAddr::V4((bits as u32).into()),
                _ => std::net::IpAddr::V6(bits.into()),
            };
            found.push((IpNet::new(ip, rest[17]).unwrap(), rest[18]));
        }
        match page.last() {
            Some((key, _)) if page.len() == 500 => after = Some(key.clone()),
            _ => return found,
        }
    }
}

/// Pairs that share an address although neither is in the other at a higher level.
pub(crate) fn overlaps(prefixes: &[(IpNet, u8)]) -> usize {
    let mut count = 0;
    for (i, (a, level_a)) in prefixes.iter().enumerate() {
        for (b, level_b) in &prefixes[i + 1..] {
            let nested = (a.contains(b) && level_a < level_b) || (b.contains(a) && level_b < level_a);
            count += usize::from((a.contains(b) || b.contains(a)) && !nested);
        }
    }
    count
}

#[test]
fn overlaps_are_refused_with_the_holders_name_and_path() {
    each_store(|store, _| {
        let plan = fleet(&store);
        at(&plan, "10.16.0.0/12", Level::Region, "eu").unwrap();
        at(&plan, "10.16.0.0/16", Level::Cluster, "prod-1").unwrap();
        let inside = at(&plan, "10.16.128.0/17", Level::Cluster, "lab").unwrap_err();
        let PlanError::Overlap { holder, .. } = &inside else { panic!("{inside}") };
        assert_eq!(holder.to_string(), "cluster corp/eu/prod-1 (10.16.0.0/16) of prod-1 in space default");
        let around = at(&plan, "10.16.0.0/15", Level::Cluster, "lab").unwrap_err();
        assert_eq!(around.holder().unwrap().path, "corp/eu/prod-1", "{around}");
        let equal = at(&plan, "10.16.0.0/16", Level::Cluster, "lab").unwrap_err();
        assert_eq!(equal.holder().unwrap().path, "corp/eu/prod-1", "{equal}");
        let outside = at(&plan, "192.168.0.0/16", Level::Cluster, "lab").unwrap_err();
        assert!(matches!(outside, PlanError::Outside { .. }), "{outside}");
        let wide = at(&plan, "0.0.0.0/0", Level::Cluster, "lab").unwrap_err();
        assert_eq!(wide.holder().unwrap().path, "corp", "{wide}");
        assert_eq!(overlaps(&stored(&store, "default")), 0);
    });
}

#[test]
fn free_prefixes_are_found_best_fit_aligned_and_the_same_again() {
    each_store(|store, _| {
        let plan = fleet(&store);
        at(&plan, "10.0.0.0/10", Level::Region, "eu").unwrap();
        at(&plan, "10.0.4.0/22", Level::Cluster, "a").unwrap();
        // The holes before it are of 22 bits; the smallest with room is taken, and the lowest of it.
        assert_eq!(within(&plan, "10.0.0.0/10", 24, Level::Cluster, "b").unwrap().cidr, net("10.0.0.0/24"));
        assert_eq!(within(&plan, "10.0.0.0/10", 23, Level::Cluster, "c").unwrap().cidr, net("10.0.2.0/23"));
        assert_eq!(within(&plan, "10.0.0.0/10", 22, Level::Cluster, "d").unwrap().cidr, net("10.0.8.0/22"));
        let again = within(&plan, "10.0.0.0/10", 24, Level::Cluster, "b").unwrap();
        assert_eq!(again.cidr, net("10.0.0.0/24"));
        let other = within(&plan, "10.0.0.0/10", 25, Level::Cluster, "b").unwrap_err();
        assert!(matches!(other, PlanError::Name { .. }), "{other}");
        let wide = within(&plan, "10.0.0.0/10", 10, Level::Cluster, "e").unwrap_err();
        assert!(matches!(wide, PlanError::Exhausted { length: 10, largest: Some(11), .. }), "{wide}");
        let six = within(&plan, "fd00::/8", 64, Level::Cluster, "b").unwrap();
        assert_eq!(six.cidr, net("fd00::/64"));
        for length in [9, 33] {
            let refused = within(&plan, "10.0.0.0/10", length, Level::Cluster, "f").unwrap_err();
            assert!(matches!(refused, PlanError::Invalid { .. }), "{refused}");
        }
        // Claimed again after release, at a later epoch; the older release is refused.
        assert!(block_on(plan.release(&again)).unwrap());
        assert!(!block_on(plan.release(&again)).unwrap());
        let newer = within(&plan, "10.0.0.0/10", 24, Level::Cluster, "b").unwrap();
        assert!(newer.epoch > again.epoch && newer.cidr == again.cidr);
        let late = block_on(plan.release(&again)).unwrap_err();
        assert!(matches!(late, PlanError::Stale { .. }), "{late}");
    });
}

#[test]
fn malformed_claims_are_refused_by_field() {
    let plan = fleet(&memory());
    let refused = |claim: Claim, field: &str| match block_on(plan.claim(&claim)).unwrap_err() {
        PlanError::Invalid { field: found, .. } => assert_eq!(found, field),
        error => panic!("{error}"),
    };
    refused(Claim::at(net("10.0.0.1/24"), Level::Pool, "a", "a"), "cidr");
    refused(Claim::at(net("::ffff:10.0.0.0/104"), Level::Pool, "a", "a"), "cidr");
    refused(Claim::within(net("10.0.0.1/8"), 24, Level::Pool, "a", "a"), "parent");
    refused(Claim::at(net("10.0.0.0/24"), Level::Pool, "a b", "a"), "name");
    refused(Claim::at(net("10.0.0.0/24"), Level::Pool, "a", ""), "owner");
    refused(Claim::at(net("10.0.0.0/24"), Level::Pool, "a", "a").space(space("blue")), "space");
    let free = Claim {
        place: Place::In { parent: net("192.168.0.0/16"), length: 24 },
        ..Claim::at(net("10.0.0.0/8"), Level::Fleet, "b", "b")
    };
    assert!(matches!(block_on(plan.own(&free)).unwrap_err(), PlanError::Invalid { .. }));
    assert!(Plan::new(memory(), "a/b").is_err());
}

#[test]
fn purposes_hold_down_the_tree() {
    let plan = fleet(&memory());
    let pods = Claim::at(net("10.0.0.0/12"), Level::Cluster, "pods", "a").purpose(Purpose::Pod);
    block_on(plan.claim(&pods)).unwrap();
    let pool = Claim::within(net("10.0.0.0/12"), 24, Level::Pool, "web", "a");
    let refused = block_on(plan.claim(&pool.clone().purpose(Purpose::Service))).unwrap_err();
    assert!(matches!(refused, PlanError::Purpose { wanted: Purpose::Pod, .. }), "{refused}");
    block_on(plan.claim(&pool.purpose(Purpose::Pod))).unwrap();
    // Nothing is claimed in a pool.
    let deeper = at(&plan, "10.0.0.0/25", Level::Pool, "half").unwrap_err();
    assert_eq!(deeper.holder().unwrap().path, "corp/pods/web", "{deeper}");
}

#[test]
fn the_same_prefix_may_be_used_in_another_space_unless_its_purpose_is_unique() {
    each_store(|store, _| {
        let plan = fleet(&store);
        let blue = space("blue");
        block_on(plan.add_space(&blue, &[Purpose::Underlay])).unwrap();
        block_on(plan.own(&Claim::at(net("10.0.0.0/8"), Level::Fleet, "corp", "net").space(blue.clone()))).unwrap();
        let claim = |space: &AddressSpace, cidr: &str, purpose: Purpose, name: &str| {
            let claim = Claim::at(net(cidr), Level::Cluster, name, name).purpose(purpose).space(space.clone());
            block_on(plan.claim(&claim))
        };
        claim(&default(), "10.0.0.0/16", Purpose::Pod, "a").unwrap();
        claim(&blue, "10.0.0.0/16", Purpose::Pod, "a").unwrap();
        let refused = claim(&blue, "10.0.0.0/15", Purpose::Underlay, "u").unwrap_err();
        assert_eq!(refused.holder().unwrap().path, "corp/a", "{refused}");
        claim(&blue, "10.2.0.0/16", Purpose::Underlay, "u").unwrap();
        // From the other side, inside and around it; what serves any purpose is room and no use.
        for cidr in ["10.2.7.0/24", "10.2.0.0/15"] {
            let refused = claim(&default(), cidr, Purpose::Pod, "b").unwrap_err();
            assert_eq!(
                (refused.holder().unwrap().path.as_str(), refused.holder().unwrap().space.as_str()),
                ("corp/u", "blue")
            );
        }
        let room = claim(&default(), "10.2.0.0/15", Purpose::Any, "b").unwrap();
        // Delegated room may become any use.
        let refused = block_on(plan.delegate(&default(), room.cidr, room.level)).unwrap_err();
        assert_eq!(refused.holder().unwrap().path, "corp/u", "{refused}");
        // A rule that is broken already cannot be made.
        let late = block_on(plan.add_space(&default(), &[Purpose::Pod])).unwrap_err();
        assert!(matches!(late, PlanError::Overlap { .. }), "{late}");
    });
}

#[test]
fn a_mesh_prefix_is_one_clusters_in_all_spaces_and_nothing_else_is_in_it() {
    each_store(|store, _| {
        let plan = fleet(&store);
        for (name, unique) in [("blue", &[Purpose::Mesh][..]), ("green", &[])] {
            block_on(plan.add_space(&space(name), unique)).unwrap();
            block_on(plan.own(&Claim::at(net("10.0.0.0/8"), Level::Fleet, "corp", "net").space(space(name)))).unwrap();
        }
        let range = Claim::at(net("10.240.0.0/12"), Level::Region, "mesh", "net").purpose(Purpose::Mesh);
        block_on(plan.claim(&range)).unwrap();
        let of = |name: &str| Claim::within(net("10.240.0.0/12"), 16, Level::Cluster, name, name);
        for (name, cidr) in [("a", "10.240.0.0/16"), ("b", "10.241.0.0/16")] {
            let claimed = block_on(plan.claim(&of(name).purpose(Purpose::Mesh))).unwrap();
            assert_eq!((claimed.cidr, claimed.purpose), (net(cidr), Purpose::Mesh));
        }
        let pods = block_on(plan.claim(&of("c").purpose(Purpose::Pod))).unwrap_err();
        assert!(matches!(pods, PlanError::Purpose { wanted: Purpose::Mesh, .. }), "{pods}");
        assert!(pods.to_string().contains("mesh"), "{pods}");
        // In a space that keeps mesh prefixes apart from those of others, and in one that does not.
        let there = |name: &str, purpose: Purpose| {
            let claim = Claim::at(net("10.241.0.0/16"), Level::Cluster, "x", "x").purpose(purpose).space(space(name));
            block_on(plan.claim(&claim))
        };
        let refused = there("blue", Purpose::Mesh).unwrap_err();
        assert!(refused.holder().unwrap().path.starts_with("corp/mesh"), "{refused}");
        there("blue", Purpose::Pod).unwrap();
        there("green", Purpose::Mesh).unwrap();
        // The purpose goes through a document.
        let text = serde_json::to_string(&block_on(plan.document(&default())).unwrap()).unwrap();
        let copy = Plan::new(memory(), "fleet").unwrap();
        block_on(copy.add_space(&default(), &[])).unwrap();
        assert!(block_on(copy.import(&serde_json::from_str(&text).unwrap())).unwrap().applied);
        let copied = block_on(copy.get(&default(), net("10.241.0.0/16"), Level::Cluster)).unwrap().unwrap();
        assert_eq!((copied.purpose, copied.path.as_str()), (Purpose::Mesh, "corp/mesh/b"));
    });
}

/// A cluster that has 10.0.0.0/16.
fn cluster(parent: &Plan) -> (Plan, Prefix) {
    let prefix = within(parent, "10.0.0.0/8", 16, Level::Cluster, "prod-1").unwrap();
    let grant = block_on(parent.delegate(&default(), prefix.cidr, prefix.level)).unwrap();
    let plan = Plan::new(memory(), "prod-1").unwrap();
    let held = block_on(plan.accept(&grant)).unwrap();
    (plan, held)
}

#[test]
fn what_is_delegated_is_claimed_by_its_owner_alone() {
    each_store(|store, _| {
        let parent = fleet(&store);
        let (owner, held) = cluster(&parent);
        assert_eq!(held.path, "corp/prod-1");
        let refused = at(&parent, "10.0.7.0/24", Level::Pool, "p").unwrap_err();
        assert!(matches!(refused, PlanError::Delegated { .. }), "{refused}");
        let pods = within(&owner, "10.0.0.0/16", 20, Level::Pool, "pods").unwrap();
        assert_eq!(pods.path, "corp/prod-1/pods");
        assert!(matches!(at(&owner, "10.1.0.0/24", Level::Pool, "p").unwrap_err(), PlanError::Outside { .. }));
        let held_here = Prefix { level: Level::Cluster, ..held.clone() };
        assert!(matches!(
            block_on(owner.release(&held_here)).unwrap_err(),
            PlanError::NotEmpty { .. } | PlanError::State { .. }
        ));
        let grant = block_on(parent.delegate(&default(), held.cidr, held.level)).unwrap();
        let stranger = Plan::new(memory(), "prod-2").unwrap();
        assert!(matches!(block_on(stranger.accept(&grant)).unwrap_err(), PlanError::Misdirected { .. }));
        assert_eq!(block_on(owner.accept(&grant)).unwrap(), held);
    });
}

#[test]
fn a_delegation_ends_by_consent_and_old_documents_are_void() {
    each_store(|store, _| {
        let parent = fleet(&store);
        let (owner, held) = cluster(&parent);
        let grant = block_on(parent.delegate(&default(), held.cidr, held.level)).unwrap();
        let pods = within(&owner, "10.0.0.0/16", 20, Level::Pool, "pods").unwrap();
        let revocation = block_on(parent.revoke(&default(), held.cidr, held.level)).unwrap();
        let Surrender::Draining(draining) = block_on(owner.surrender(&revocation)).unwrap() else { panic!() };
        assert_eq!(draining.state, State::Draining);
        let refused = within(&owner, "10.0.0.0/16", 20, Level::Pool, "more").unwrap_err();
        assert!(matches!(refused, PlanError::Closing { .. }), "{refused}");
        // It is nobody else's meanwhile.
        let rival = at(&parent, "10.0.0.0/16", Level::Cluster, "prod-2").unwrap_err();
        assert_eq!(rival.holder().unwrap().owner, "prod-1");
        assert!(block_on(owner.release(&pods)).unwrap());
        let Surrender::Returned(receipt) = block_on(owner.surrender(&revocation)).unwrap() else { panic!() };
        assert_eq!(block_on(owner.surrender(&revocation)).unwrap(), Surrender::Returned(receipt.clone()));
        assert!(block_on(parent.settle(&receipt)).unwrap());
        assert!(!block_on(parent.settle(&receipt)).unwrap());
        // The late grant brings nothing back.
        assert!(matches!(block_on(owner.accept(&grant)).unwrap_err(), PlanError::Stale { .. }));
        // Granted again, the late receipt does not end it, nor does the late revocation.
        let (again, _) = {
            let prefix = within(&parent, "10.0.0.0/8", 16, Level::Cluster, "prod-1").unwrap();
            assert_eq!(prefix.cidr, held.cidr);
            (block_on(parent.delegate(&default(), prefix.cidr, prefix.level)).unwrap(), ())
        };
        assert!(again.epoch > grant.epoch);
        assert!(!block_on(parent.settle(&receipt)).unwrap());
        block_on(owner.accept(&again)).unwrap();
        assert!(matches!(block_on(owner.surrender(&revocation)).unwrap_err(), PlanError::Stale { .. }));
        assert!(matches!(block_on(owner.accept(&grant)).unwrap_err(), PlanError::Stale { .. }));
        within(&owner, "10.0.0.0/16", 20, Level::Pool, "pods").unwrap();
    });
}

#[test]
fn an_owner_that_was_declared_gone_learns_it_and_stops() {
    let parent = fleet(&memory());
    let (owner, held) = cluster(&parent);
    let pods = within(&owner, "10.0.0.0/16", 20, Level::Pool, "pods").unwrap();
    let pool = serde_json::from_str(r#"{ "name": "pods", "subnet": "10.0.0.0/20" }"#).unwrap();
    block_on(owner.verify(&pool)).unwrap();
    let word = Receipt { space: default(), cidr: held.cidr, level: held.level, owner: "prod-1".to_owned(), epoch: 3 };
    let unasked = dcenet_ipam::plan::Revocation {
        space: word.space.clone(),
        cidr: word.cidr,
        level: word.level,
        owner: word.owner.clone(),
        epoch: block_on(parent.delegate(&default(), held.cidr, held.level)).unwrap().epoch,
    };
    assert!(matches!(block_on(parent.attest_gone(&unasked)).unwrap_err(), PlanError::State { .. }));
    let revocation = block_on(parent.revoke(&default(), held.cidr, held.level)).unwrap();
    assert!(block_on(parent.attest_gone(&revocation)).unwrap());
    let other = within(&parent, "10.0.0.0/8", 16, Level::Cluster, "prod-2").unwrap();
    assert_eq!(other.cidr, held.cidr);
    block_on(parent.delegate(&default(), other.cidr, other.level)).unwrap();
    // It is back.
    let statement = block_on(owner.statement()).unwrap();
    let orders = block_on(parent.orders(&statement)).unwrap();
    assert_eq!((orders.lost.len(), orders.grants.len(), orders.revocations.len()), (1, 0, 0));
    let done = block_on(owner.obey(&orders)).unwrap();
    assert_eq!((done.draining.len(), done.draining[0].state), (1, State::Lost));
    assert!(matches!(within(&owner, "10.0.0.0/16", 24, Level::Pool, "x").unwrap_err(), PlanError::Closing { .. }));
    assert!(matches!(block_on(owner.verify(&pool)).unwrap_err(), PlanError::Closing { .. }));
    block_on(owner.release(&pods)).unwrap();
    let done = block_on(owner.obey(&orders)).unwrap();
    assert_eq!(done.receipts.len(), 1);
    // prod-2 keeps it.
    assert!(!block_on(parent.settle(&done.receipts[0])).unwrap());
    assert_eq!(block_on(owner.statement()).unwrap().holdings, []);
    assert_eq!(block_on(parent.get(&default(), other.cidr, other.level)).unwrap().unwrap().owner, "prod-2");
}

#[test]
fn orders_carry_what_the_owner_missed() {
    let parent = fleet(&memory());
    let (owner, _) = cluster(&parent);
    let more = within(&parent, "10.0.0.0/8", 16, Level::Cluster, "prod-1-more");
    let more = block_on(parent.claim(&Claim::at(net("10.9.0.0/16"), Level::Cluster, "x", "prod-1"))).and(more).unwrap();
    assert_eq!(more.owner, "prod-1-more");
    block_on(parent.delegate(&default(), net("10.9.0.0/16"), Level::Cluster)).unwrap();
    let orders = block_on(parent.orders(&block_on(owner.statement()).unwrap())).unwrap();
    assert_eq!((orders.grants.len(), orders.lost.len()), (1, 0));
    let text = serde_json::to_string(&orders).unwrap();
    let done = block_on(owner.obey(&serde_json::from_str(&text).unwrap())).unwrap();
    assert_eq!((done.accepted.len(), done.refused.len()), (1, 0));
    let orders = block_on(parent.orders(&block_on(owner.statement()).unwrap())).unwrap();
    assert_eq!(orders, dcenet_ipam::plan::Orders::default());
    // A parent whose store was restored from before says so, and calls nothing lost.
    let restored = fleet(&memory());
    let behind = block_on(restored.orders(&block_on(owner.statement()).unwrap())).unwrap_err();
    assert!(matches!(behind, PlanError::Behind { .. }), "{behind}");
}

#[test]
fn pools_are_verified_against_what_is_claimed() {
    let parent = fleet(&memory());
    let (owner, _) = cluster(&parent);
    let pool = |text: &str| serde_json::from_str(text).unwrap();
    let pods = pool(r#"{ "name": "pods", "subnet": "10.0.16.0/20" }"#);
    let unclaimed = block_on(owner.verify(&pods)).unwrap_err();
    assert!(matches!(&unclaimed, PlanError::Unclaimed { parent, .. } if parent.path == "corp/prod-1"), "{unclaimed}");
    let claimed = block_on(owner.claim_pool(&pods, Purpose::Pod)).unwrap();
    assert_eq!(block_on(owner.claim_pool(&pods, Purpose::Pod)).unwrap(), claimed);
    assert_eq!(block_on(owner.verify(&pods)).unwrap(), claimed);
    // A part of it, under its name.
    block_on(owner.verify(&pool(r#"{ "name": "pods", "subnet": "10.0.17.0/24" }"#))).unwrap();
    for (text, holder) in [
        (r#"{ "name": "rival", "subnet": "10.0.17.0/24" }"#, Some("corp/prod-1/pods")),
        (r#"{ "name": "rival", "subnet": "10.0.0.0/17" }"#, Some("corp/prod-1/pods")),
        (r#"{ "name": "rival", "subnet": "10.0.0.0/15" }"#, Some("corp/prod-1")),
        (r#"{ "name": "rival", "subnet": "10.1.0.0/24" }"#, None),
        (r#"{ "name": "rival", "subnet": "10.0.0.0/24", "space": "blue" }"#, None),
    ] {
        let refused = block_on(owner.verify(&pool(text))).unwrap_err();
        assert_eq!(refused.holder().map(|h| h.path.as_str()), holder, "{text}: {refused}");
    }
    let refused = block_on(parent.verify(&pods)).unwrap_err();
    assert!(matches!(refused, PlanError::Delegated { .. }), "{refused}");
}

const EXISTING: &str = r#"{ "prefixes": [
    { "name": "a", "cidr": "10.0.0.0/16", "owner": "a", "purpose": "pod" },
    { "name": "b", "cidr": "10.0.0.0/16", "owner": "b", "purpose": "pod" },
    { "name": "c", "cidr": "10.0.4.0/22", "owner": "c", "purpose": "service" },
    { "name": "d", "cidr": "172.16.0.0/12", "owner": "d" },
    { "name": "d", "cidr": "192.168.0.0/16", "owner": "e" },
    { "name": "f", "cidr": "10.0.0.1/16", "owner": "f" },
    { "name": "g", "cidr": "fd00:1::/48", "owner": "g", "purpose": "underlay" } ] }"#;

#[test]
fn an_import_reports_every_conflict_and_enters_all_or_nothing() {
    each_store(|store, _| {
        let plan = Plan::new(store.clone(), "fleet").unwrap();
        block_on(plan.add_space(&default(), &[])).unwrap();
        let mut document: Document = serde_json::from_str(EXISTING).unwrap();
        let report = block_on(plan.import(&document)).unwrap();
        let kinds: Vec<(&str, String)> = report
            .conflicts
            .iter()
            .map(|c| {
                let kind = match &c.kind {
                    ConflictKind::Duplicate(h) => format!("duplicate of {}", h.path),
                    ConflictKind::Contained(h) => format!("in {}", h.path),
                    ConflictKind::Name(h) => format!("name of {}", h.cidr),
                    ConflictKind::Malformed => "malformed".to_owned(),
                    other => format!("{other:?}"),
                };
                (c.owner.as_str(), kind)
            })
            .collect();
        assert_eq!(
            kinds,
            [
                ("f", "malformed".to_owned()),
                ("b", "duplicate of a".to_owned()),
                ("c", "in a".to_owned()),
                ("e", "name of 172.16.0.0/12".to_owned()),
            ]
        );
        assert!(!report.applied);
        assert_eq!(stored(&store, "default"), []);
        document.prefixes.retain(|p| !["b", "c", "e", "f"].contains(&p.owner.as_str()));
        let dry = block_on(plan.dry_run(&document)).unwrap();
        assert_eq!((dry.conflicts.len(), dry.entered.len(), dry.applied), (0, 3, false));
        assert_eq!(stored(&store, "default"), []);
        let report = block_on(plan.import(&document)).unwrap();
        assert_eq!((report.entered.len(), report.applied), (3, true));
        assert_eq!(stored(&store, "default").len(), 3);
        let again = block_on(plan.import(&document)).unwrap();
        assert_eq!((again.entered.len(), again.unchanged, again.applied), (0, 3, true));
        // What is above may come later, if its level is.
        let above: Document = serde_json::from_str(
            r#"{ "prefixes": [ { "name": "corp", "cidr": "10.0.0.0/8", "owner": "net", "level": "fleet" },
                               { "name": "low", "cidr": "172.0.0.0/8", "owner": "net", "level": "pool" } ] }"#,
        )
        .unwrap();
        let report = block_on(plan.dry_run(&above)).unwrap();
        assert!(matches!(&report.conflicts[..], [c] if matches!(&c.kind, ConflictKind::Contains(h) if h.path == "d")));
        let above = Document { prefixes: above.prefixes[..1].to_vec(), ..above };
        assert!(block_on(plan.import(&above)).unwrap().applied);
        let nested = block_on(plan.get(&default(), net("10.0.0.0/16"), Level::Cluster)).unwrap().unwrap();
        assert_eq!(nested.path, "corp/a");
        // Written out, a plan can be entered elsewhere.
        let written = serde_json::to_string(&block_on(plan.document(&default())).unwrap()).unwrap();
        let copy = Plan::new(memory(), "copy").unwrap();
        block_on(copy.add_space(&default(), &[])).unwrap();
        assert_eq!(block_on(copy.import(&serde_json::from_str(&written).unwrap())).unwrap().entered.len(), 4);
        assert_eq!(block_on(copy.document(&default())).unwrap(), block_on(plan.document(&default())).unwrap());
    });
}

#[test]
fn advice_makes_room_or_says_why_not() {
    let plan = fleet(&memory());
    at(&plan, "10.0.0.0/22", Level::Region, "eu").unwrap();
    for (cidr, name) in [("10.0.0.0/25", "a"), ("10.0.1.0/24", "b"), ("10.0.2.0/25", "c"), ("10.0.3.0/24", "d")] {
        at(&plan, cidr, Level::Cluster, name).unwrap();
    }
    let advise = |cidr: &str, level, length| block_on(plan.advise(&default(), net(cidr), level, length)).unwrap();
    let eu = |length| advise("10.0.0.0/22", Level::Region, length);
    assert_eq!(eu(25), Advice::Free(net("10.0.0.128/25")));
    // Two halves are free: the cheapest is to move the first /25 into the hole beside the other.
    let Advice::Moves { moves, then } = eu(24) else { panic!("{:?}", eu(24)) };
    assert_eq!(moves.len(), 1);
    assert_eq!((moves[0].prefix.path.as_str(), moves[0].to), ("corp/eu/a", net("10.0.2.128/25")));
    assert_eq!(then, net("10.0.0.0/24"));
    let Advice::Grow { parent, beside } = eu(23) else { panic!("{:?}", eu(23)) };
    assert_eq!((parent.path.as_str(), beside), ("corp", net("10.0.4.0/23")));
    at(&plan, "10.128.0.0/9", Level::Region, "rest").unwrap();
    let Advice::Overflow { wanted, .. } = advise("10.0.0.0/8", Level::Fleet, 8) else { panic!() };
    assert_eq!(wanted, 1 << 24);
    // What is advised works: claim the target, release the old one, claim what was wanted.
    at(&plan, "10.0.2.128/25", Level::Cluster, "a-new").unwrap();
    assert!(block_on(plan.release(&moves[0].prefix)).unwrap());
    assert_eq!(within(&plan, "10.0.0.0/22", 24, Level::Cluster, "e").unwrap().cidr, then);
    let full = block_on(plan.utilisation(&default(), net("10.0.0.0/22"), Level::Region)).unwrap().unwrap();
    assert_eq!((full.used, full.size, full.children, full.largest_free), (1024, 1024, 5, None));
}

#[test]
fn the_table_shows_the_tree() {
    let plan = fleet(&memory());
    at(&plan, "10.0.0.0/9", Level::Region, "eu").unwrap();
    within(&plan, "10.0.0.0/9", 16, Level::Cluster, "prod-1").unwrap();
    block_on(plan.delegate(&default(), net("10.0.0.0/16"), Level::Cluster)).unwrap();
    let table = block_on(plan.tree(&default())).unwrap().to_string();
    let expected = "\
PREFIX           LEVEL    NAME    OWNER   PURPOSE  STATE      EPOCH  USED   LARGEST FREE
10.0.0.0/8       fleet    corp    net     any      held       1      50.0%  /9
  10.0.0.0/9     region   eu      eu      any      held       3      0.8%   /10
    10.0.0.0/16  cluster  prod-1  prod-1  any      delegated  5      -      -
fd00::/8         fleet    corp    net     any      held       2      -      -
";
    assert_eq!(table, expected, "{table}");
}

/// Two claims that overlap under different keys, decided from the same state.
fn two_claims(store: &Arc<dyn Store>) -> Vec<Result<Prefix, PlanError>> {
    fleet(store);
    let meeting: Arc<dyn Store> = MeetingStore::over(store.clone(), b"plan/p/");
    thread::scope(|scope| {
        let racers = [("10.0.0.0/16", "big"), ("10.0.7.0/24", "small")].map(|(cidr, name)| {
            let meeting = &meeting;
            scope.spawn(move || at(&Plan::new(meeting.clone(), "fleet").unwrap(), cidr, Level::Cluster, name))
        });
        racers.into_iter().map(|r| r.join().unwrap()).collect()
    })
}

#[test]
fn one_of_two_overlapping_claims_is_refused() {
    each_store(|store, _| {
        let outcomes = two_claims(&store);
        let refused: Vec<&PlanError> = outcomes.iter().filter_map(|o| o.as_ref().err()).collect();
        assert!(matches!(refused[..], [PlanError::Overlap { .. }]), "{outcomes:?}");
        assert_eq!(overlaps(&stored(&store, "default")), 0);
    });
}

#[test]
fn without_the_epochs_guard_both_get_it() {
    each_store(|store, _| {
        let unguarded: Arc<dyn Store> = Arc::new(UnguardedStore::new(store, |guard| guard.key.starts_with(b"plan/e/")));
        let outcomes = two_claims(&unguarded);
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
        assert_eq!(overlaps(&stored(&unguarded, "default")), 1);
        // Whoever reads it next is told, rather than served.
        let plan = Plan::new(unguarded.clone(), "fleet").unwrap();
        assert!(matches!(block_on(plan.tree(&default())).unwrap_err(), PlanError::Damaged(_)));
    });
}

#[test]
fn many_racers_get_disjoint_prefixes() {
    each_store(|store, _| {
        let plan = fleet(&store);
        within(&plan, "10.0.0.0/8", 18, Level::Region, "eu").unwrap();
        let claimed: Vec<IpNet> = thread::scope(|scope| {
            // Two threads share a plan, the others have their own.
            let racers: Vec<_> = (0..6)
                .map(|racer| {
                    let (shared, store) = (&plan, &store);
                    scope.spawn(move || {
                        let own = Plan::new(store.clone(), "fleet").unwrap();
                        let plan = if racer < 2 { shared } else { &own };
                        (0..10)
                            .map(|i| {
                                let length = 23 + (racer + i) % 4;
                                let name = format!("c{racer}-{i}");
                                within(plan, "10.0.0.0/18", length, Level::Cluster, &name).unwrap().cidr
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            racers.into_iter().flat_map(|r| r.join().unwrap()).collect()
        });
        let distinct: BTreeSet<IpNet> = claimed.iter().copied().collect();
        assert_eq!((claimed.len(), distinct.len()), (60, 60));
        let all = stored(&store, "default");
        assert_eq!((all.len(), overlaps(&all)), (63, 0));
        // What each knew agrees with the store.
        assert_eq!(block_on(plan.tree(&default())).unwrap().rows.len(), 63);
    });
}

#[test]
fn whichever_call_of_the_store_fails_a_repeated_claim_gets_one_prefix() {
    for failure in [Failure::Before, Failure::After, Failure::Lost] {
        let mut fail_at = 1;
        loop {
            let store = memory();
            fleet(&store);
            let flaky = Arc::new(FlakyStore::new(store.clone(), failure, fail_at));
            let plan = Plan::new(flaky.clone(), "fleet").unwrap();
            let work = || -> Result<(), PlanError> {
                let prefix = within(&plan, "10.0.0.0/8", 16, Level::Cluster, "prod-1")?;
                let grant = block_on(plan.delegate(&default(), prefix.cidr, prefix.level))?;
                let revocation = block_on(plan.revoke(&default(), prefix.cidr, prefix.level))?;
                assert_eq!(grant.epoch, revocation.epoch);
                Ok(())
            };
            // What the first run did before it failed, the second finds.
            if work().is_err() {
                let found = within(&plan, "10.0.0.0/8", 16, Level::Cluster, "prod-1").unwrap();
                match found.state {
                    State::Held => drop(block_on(plan.delegate(&default(), found.cidr, found.level)).unwrap()),
                    State::Delegated | State::Revoking => {}
                    state => panic!("{state}"),
                }
                block_on(plan.revoke(&default(), found.cidr, found.level)).unwrap();
            }
            let all = stored(&store, "default");
            assert_eq!((all.len(), overlaps(&all)), (3, 0), "{failure:?} {fail_at}");
            if flaky.calls() < fail_at {
                break;
            }
            fail_at += 1;
        }
        assert!(fail_at > 9, "{failure:?}: {fail_at} calls");
    }
}
