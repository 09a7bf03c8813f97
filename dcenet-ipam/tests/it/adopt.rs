//! Going over from another allocator.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{AddressSource, LeaseError, LeaseRequest};
use dcenet_core::test_support::{Rung, require};
use dcenet_ipam::Ipam;
use dcenet_ipam::adopt::host_local::HostLocal;
use dcenet_ipam::adopt::{AdoptError, Adopted, Inventory, Options, Plan, Source, Why};
use dcenet_ipam::reclaim::{Alive, Policy, Reclaimer, Scope, Snapshot};
use dcenet_ipam::store::flaky::{Failure, FlakyStore};
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Entry, Key, Outcome, Store, StoreError};
use parking_lot::Mutex;
use pollster::block_on;
use proptest::prelude::*;

use crate::{attachment, each_store, ipam, lease, request};

mod objects;

const JSON: &str = r#"{ "cooldown": "1h", "pools": [
    { "name": "v4", "subnet": "10.1.0.0/16", "gateway": "10.1.0.1", "exclude": ["10.1.0.200-10.1.0.210"],
      "claims": { "shop/db": { "address": "10.1.0.99" } } },
    { "name": "v6", "subnet": "fd00:1::/64" } ] }"#;

fn options() -> Options {
    Options::new("net".parse().unwrap())
}

fn memory() -> Arc<dyn Store> {
    Arc::new(MemoryStore::new())
}

fn plan_of(ipam: &Ipam, inventory: &Inventory) -> Plan {
    block_on(ipam.plan_adoption(inventory, &options())).unwrap()
}

/// Adopts, and nothing may be refused.
fn adopt(ipam: &Ipam, inventory: &Inventory) -> Adopted {
    let plan = plan_of(ipam, inventory);
    assert_eq!(plan.refused, [], "refused");
    block_on(ipam.adopt(&plan, &BTreeSet::new())).unwrap()
}

/// Whose each address is, `container/interface`.
fn bound(ipam: &Ipam) -> BTreeMap<IpAddr, String> {
    let bindings = block_on(ipam.bindings(None)).unwrap();
    let pairs = bindings.iter().map(|b| {
        let AttachmentKey { container, ifname, .. } = &b.attachment;
        (b.address.addr(), format!("{container}/{ifname}"))
    });
    let owners: BTreeMap<IpAddr, String> = pairs.collect();
    assert_eq!(owners.len(), bindings.len(), "an address is bound twice: {bindings:?}");
    owners
}

/// Keys and values, without versions.
fn dump(store: &dyn Store) -> Vec<(Vec<u8>, Vec<u8>)> {
    let all = block_on(store.scan(b"", None, usize::MAX)).unwrap();
    all.into_iter().map(|(key, entry)| (key, entry.value)).collect()
}

/// What host-local's files say, read in another way: every file of this name that is an address.
fn independent(dir: &Path) -> BTreeMap<IpAddr, String> {
    let mut found = BTreeMap::new();
    for file in fs::read_dir(dir).unwrap() {
        let file = file.unwrap();
        let Ok(address) = file.file_name().to_str().unwrap().parse::<IpAddr>() else { continue };
        let bytes = fs::read(file.path()).unwrap();
        let words: Vec<&[u8]> =
            bytes.split(|b| b.is_ascii_whitespace()).filter(|word| !word.is_empty()).take(2).collect();
        let text = |i: usize, default: &str| {
            words.get(i).map_or(default.to_owned(), |w| String::from_utf8(w.to_vec()).unwrap())
        };
        found.insert(address, format!("{}/{}", text(0, ""), text(1, "eth0")));
    }
    found
}

fn write(dir: &Path, name: &str, content: &str) {
    fs::write(dir.join(name), content).unwrap();
}

/// A directory with as many containers, with one address each of both families.
fn directory(containers: usize) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "lock", "");
    for i in 0..containers {
        let number = i + 300;
        let owner = format!("ctr{i}\r\neth0");
        write(dir.path(), &format!("10.1.{}.{}", number / 256, number % 256), &owner);
        write(dir.path(), &format!("fd00:1::{number:x}"), &owner);
    }
    write(dir.path(), "last_reserved_ip.0", "10.1.1.44");
    dir
}

fn read(dir: &Path) -> Inventory {
    HostLocal::new(dir).read().unwrap()
}

/// Calls Debian's host-local as a runtime would.
fn host_local(data: &Path, verb: &str, container: &str) -> serde_json::Value {
    let config = serde_json::json!({
        "cniVersion": "1.0.0", "name": "net", "type": "macvlan",
        "ipam": { "type": "host-local", "dataDir": data,
                  "ranges": [[{ "subnet": "10.1.0.0/16" }], [{ "subnet": "fd00:1::/64" }]] }
    });
    let mut plugin = Command::new("/usr/lib/cni/host-local")
        .env_clear()
        .envs([("CNI_COMMAND", verb), ("CNI_CONTAINERID", container), ("CNI_NETNS", "/x")])
        .envs([("CNI_IFNAME", "eth0"), ("CNI_PATH", "/usr/lib/cni")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    plugin.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = plugin.wait_with_output().unwrap();
    assert!(output.status.success(), "{verb} {container}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// DEL as the CNI binary does it.
fn delete(ipam: &Ipam, attachment: &AttachmentKey) -> bool {
    match block_on(ipam.held(attachment)).unwrap() {
        None => false,
        Some(lease) => {
            block_on(ipam.release(attachment, lease.sequence())).unwrap();
            true
        }
    }
}

#[test]
fn what_debians_host_local_handed_out_is_adopted_and_released_by_our_del() {
    if !require(Rung::Services) {
        return;
    }
    let data = tempfile::tempdir().unwrap();
    let mut handed_out: BTreeMap<IpAddr, String> = BTreeMap::new();
    for i in 0..40 {
        let container = format!("ctr{i}");
        for ip in host_local(data.path(), "ADD", &container)["ips"].as_array().unwrap() {
            let (address, _) = ip["address"].as_str().unwrap().split_once('/').unwrap();
            handed_out.insert(address.parse().unwrap(), format!("{container}/eth0"));
        }
    }
    for i in (0..40).step_by(5) {
        host_local(data.path(), "DEL", &format!("ctr{i}"));
        handed_out.retain(|_, owner| *owner != format!("ctr{i}/eth0"));
    }
    assert_eq!(handed_out.len(), 64);
    let dir = data.path().join("net");
    assert_eq!(independent(&dir), handed_out, "the plugin said what it wrote");
    let before: Vec<_> =
        fs::read_dir(&dir).unwrap().map(|f| f.unwrap().path()).map(|p| (p.clone(), fs::read(p).unwrap())).collect();
    each_store(|store, _| {
        let ours = ipam(JSON, &store);
        let inventory = read(&dir);
        // The lock and a cursor of each set of ranges.
        assert_eq!(inventory.passed_over.len(), 3, "{inventory:?}");
        let adopted = adopt(&ours, &inventory);
        assert_eq!((adopted.attachments, adopted.addresses), (32, 64));
        assert_eq!(bound(&ours), handed_out);

        // A repeated ADD is given what the container has.
        let again = block_on(ours.lease(&request("ctr7", None))).unwrap();
        for address in &again.addresses {
            assert_eq!(handed_out[&address.address.addr()], "ctr7/eth0");
        }
        assert_eq!(again.addresses.len(), 2);
        assert!(again.addresses[0].gateway.is_some() && again.addresses[0].address.prefix_len() == 16, "{again:?}");
        // A new container gets what nobody has.
        for address in lease(&ours, "new", None).unwrap() {
            let (address, _) = address.split_once('/').unwrap();
            assert!(!handed_out.contains_key(&address.parse().unwrap()), "{address} is in use");
        }
        assert!(delete(&ours, &attachment("ctr7")), "DEL finds the lease");
        assert!(!delete(&ours, &attachment("ctr7")), "and only once");
        assert_eq!(bound(&ours).values().filter(|owner| *owner == "ctr7/eth0").count(), 0);
        assert_eq!(bound(&ours).len(), 64);
    });
    for (path, content) in before {
        assert_eq!(fs::read(&path).unwrap(), content, "{} changed", path.display());
    }
}

#[test]
fn adopted_containers_live_as_others_do() {
    let dir = directory(8);
    each_store(|store, _| {
        let ours = ipam(JSON, &store);
        adopt(&ours, &read(dir.path()));
        // Cooldown: what was adopted and released rests.
        assert!(delete(&ours, &attachment("ctr0")));
        let usage = block_on(ours.usage()).unwrap();
        assert_eq!(usage.iter().map(|u| u.cooling).sum::<u128>(), 2, "{usage:?}");
        let denied = block_on(
            ours.lease(&LeaseRequest { addresses: vec!["10.1.1.45".parse().unwrap()], ..request("thief", None) }),
        );
        assert!(matches!(&denied, Err(LeaseError::Held { holder, .. }) if holder.contains("ctr1")), "{denied:?}");
        // GC.
        let valid: Vec<_> = (2..8).map(|i| (format!("ctr{i}").parse().unwrap(), "eth0".parse().unwrap())).collect();
        let collected = block_on(ours.retain(&"net".parse().unwrap(), &valid)).unwrap();
        assert_eq!(collected, [attachment("ctr1")]);
        // Reclaim, by two complete snapshots.
        let mut reclaimer = Reclaimer::new(&ours, Policy::default());
        let alive: BTreeSet<_> = (2..7).map(|i| attachment(&format!("ctr{i}"))).collect();
        let mut released = Vec::new();
        for _ in 0..2 {
            let begun = block_on(Snapshot::begin(&ours)).unwrap();
            let snapshot = begun.complete(Scope::default(), Alive::Attachments(alive.clone()));
            released.extend(block_on(reclaimer.observe(&snapshot)).unwrap().released);
        }
        assert_eq!(released.iter().map(|(a, _)| a.clone()).collect::<Vec<_>>(), [attachment("ctr7")]);
        assert_eq!(bound(&ours).len(), 10);
    });
}

#[test]
fn every_entry_that_cannot_be_adopted_is_refused_with_the_reason_and_its_place() {
    let dir = directory(2);
    let at = |name: &str| dir.path().join(name);
    write(dir.path(), "10.1.0.1", "gw\r\neth0");
    write(dir.path(), "10.1.0.205", "excluded\r\neth0");
    write(dir.path(), "10.1.255.255", "broadcast\r\neth0");
    write(dir.path(), "10.9.0.5", "abroad\r\neth0");
    write(dir.path(), "10.1.0.99", "claimed\r\neth0");
    write(dir.path(), "10.1.7.7", "");
    write(dir.path(), "10.1.7.8", "two words\r\neth0");
    write(dir.path(), "10.1.7.9", "c\r\na-name-beyond-fifteen-bytes");
    write(dir.path(), "10.1.7.10", "held\r\neth0");
    write(dir.path(), "fd00_1__77", "windows\r\neth0");
    write(dir.path(), "fd00:1::78", "one\r\neth0");
    write(dir.path(), "fd00:1:0::78", "other\r\neth0");
    write(dir.path(), "10.1.8.1", "twice\r\neth0");
    write(dir.path(), "10.1.8.2", "twice\r\neth0");
    write(dir.path(), "10.1.8.3", "old-form-without-an-interface");
    write(dir.path(), "notes.txt", "hello");
    let store = memory();
    let ours = ipam(JSON, &store);
    let other = LeaseRequest { addresses: vec!["10.1.7.10".parse().unwrap()], ..request("holder", None) };
    block_on(ours.lease(&other)).unwrap();
    let before = dump(&*store);

    let plan = plan_of(&ours, &read(dir.path()));
    let why = |name: &str| {
        let found: Vec<_> = plan.refused.iter().filter(|r| r.origin.file == at(name)).collect();
        assert_eq!(found.len(), 1, "{name}: {:?}", plan.refused);
        found[0].clone()
    };
    let not_handed_out = |name: &str, part: &str| {
        let Why::NotHandedOut { pool, what } = why(name).why else { panic!("{name}: {:?}", why(name)) };
        assert!(pool == "v4" && what.contains(part), "{name}: {what}");
    };
    not_handed_out("10.1.0.1", "gateway");
    not_handed_out("10.1.0.205", "excluded");
    not_handed_out("10.1.255.255", "broadcast");
    assert!(matches!(why("10.9.0.5").why, Why::NoPool { .. }));
    assert_eq!(why("10.1.0.99").why, Why::Held { holder: "claim shop/db".into() });
    assert_eq!(why("10.1.7.10").why, Why::Held { holder: "attachment net/holder/eth0".into() });
    for (name, line, field) in
        [("10.1.7.7", None, "container"), ("10.1.7.8", Some(1), "container"), ("10.1.7.9", Some(2), "ifname")]
    {
        let refusal = why(name);
        assert!(matches!(refusal.why, Why::Unreadable { .. }), "{refusal:?}");
        assert_eq!((refusal.origin.line, refusal.origin.field.as_str()), (line, field), "{refusal}");
        assert_eq!(refusal.address, Some(name.parse().unwrap()));
    }
    assert!(why("notes.txt").to_string().contains("no address"), "{}", why("notes.txt"));
    // Both are refused: nobody can tell who is right.
    for (name, other) in [("fd00:1::78", "other"), ("fd00:1:0::78", "one")] {
        assert!(matches!(&why(name).why, Why::TwoOwners { other: told } if told.contains(other)), "{}", why(name));
    }
    assert!(matches!(why("10.1.8.2").why, Why::TwoOfPool { .. }));
    assert_eq!(plan.refused.len(), 13, "{:#?}", plan.refused);
    assert_eq!(dump(&*store), before, "a plan writes nothing");

    // All or nothing.
    let refused = block_on(ours.adopt(&plan, &BTreeSet::new())).unwrap_err();
    let AdoptError::Refused { refused, left } = &refused else { panic!("{refused}") };
    assert_eq!((refused.len(), left.len()), (13, 0));
    let mut accepted: BTreeSet<_> = plan.refused.iter().skip(1).map(|r| r.origin.clone()).collect();
    let one_left = block_on(ours.adopt(&plan, &accepted)).unwrap_err();
    assert!(one_left.to_string().contains("1 entries are refused"), "{one_left}");
    assert_eq!(dump(&*store), before);
    // Or what the caller does without by name.
    accepted.insert(plan.refused[0].origin.clone());
    let adopted = block_on(ours.adopt(&plan, &accepted)).unwrap();
    assert_eq!(adopted.attachments, 5);
    let bound = bound(&ours);
    assert_eq!(bound[&"fd00:1::77".parse::<IpAddr>().unwrap()], "windows/eth0");
    assert_eq!(bound[&"10.1.8.3".parse::<IpAddr>().unwrap()], "old-form-without-an-interface/eth0");
    // Two containers with both families, three with one, and the holder with both.
    assert_eq!(bound.len(), 4 + 3 + 2);

    // A plan can be written down.
    let written = serde_json::to_string_pretty(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&written).unwrap(), plan);
}

#[test]
fn twice_is_once() {
    let dir = directory(20);
    each_store(|store, _| {
        let ours = ipam(JSON, &store);
        let plan = plan_of(&ours, &read(dir.path()));
        let first = block_on(ours.adopt(&plan, &BTreeSet::new())).unwrap();
        assert_eq!((first.attachments, first.present), (20, 0));
        let before = block_on(store.scan(b"", None, usize::MAX)).unwrap();
        // The same plan, and a new one.
        for plan in [plan, plan_of(&ours, &read(dir.path()))] {
            let second = block_on(ours.adopt(&plan, &BTreeSet::new())).unwrap();
            assert_eq!(second, Adopted { present: 20, ..Adopted::default() });
        }
        assert_eq!(block_on(store.scan(b"", None, usize::MAX)).unwrap(), before, "not even a version changes");
    });
}

#[test]
fn a_container_that_ended_since_is_not_taken_back_to_life() {
    let dir = directory(2);
    let store = memory();
    let ours = ipam(JSON, &store);
    let plan = plan_of(&ours, &read(dir.path()));
    block_on(ours.adopt(&plan, &BTreeSet::new())).unwrap();
    assert!(delete(&ours, &attachment("ctr0")));
    let error = block_on(ours.adopt(&plan, &BTreeSet::new())).unwrap_err();
    assert!(error.to_string().contains("released after the plan was made"), "{error}");
    assert_eq!(bound(&ours).len(), 2, "ctr0 stays released");
    // What the other allocator's files say now counts.
    assert_eq!(plan_of(&ours, &read(dir.path())).adoptees.len(), 1);
}

#[test]
fn a_crash_half_way_is_completed_by_the_same_plan() {
    let dir = directory(12);
    let inventory = read(dir.path());
    let healthy = memory();
    let ours = ipam(JSON, &healthy).with_clock(|| 1_000_000);
    adopt(&ours, &inventory);
    let wanted = dump(&*healthy);
    for failure in [Failure::Before, Failure::Lost, Failure::After] {
        let (mut at, mut errors, mut halves) = (0, 0, 0);
        loop {
            at += 1;
            let inner = memory();
            let plan = plan_of(&ipam(JSON, &inner).with_clock(|| 1_000_000), &inventory);
            let flaky = Arc::new(FlakyStore::new(inner.clone(), failure, at));
            let store: Arc<dyn Store> = flaky.clone();
            let result = block_on(ipam(JSON, &store).with_clock(|| 1_000_000).adopt(&plan, &BTreeSet::new()));
            // The process is gone; what it left is whole owners.
            let left = ipam(JSON, &inner).with_clock(|| 1_000_000);
            let mut owners: BTreeMap<String, usize> = BTreeMap::new();
            bound(&left).into_values().for_each(|owner| *owners.entry(owner).or_default() += 1);
            assert!(owners.values().all(|addresses| *addresses == 2), "{failure:?}, call {at}: {owners:?}");
            halves += usize::from(!owners.is_empty() && owners.len() < 12);
            if result.is_err() {
                errors += 1;
                block_on(left.adopt(&plan, &BTreeSet::new())).unwrap();
            }
            assert_eq!(dump(&*inner), wanted, "{failure:?}, call {at}");
            if flaky.calls() < at {
                break;
            }
        }
        assert!(at > 12, "{at} calls");
        assert!(failure != Failure::Before || (errors == at - 1 && halves > 5), "{failure:?}: {errors} and {halves}");
    }
}

#[test]
fn a_race_with_a_live_allocation_is_refused_and_taken_back() {
    let dir = directory(6);
    let inventory = read(dir.path());
    let rival = |store: &Arc<dyn Store>| {
        let request = LeaseRequest { addresses: vec!["10.1.1.47".parse().unwrap()], ..request("rival", None) };
        block_on(ipam(JSON, store).lease(&request)).map(drop)
    };
    // Between the plan and its doing.
    let store = memory();
    let ours = ipam(JSON, &store);
    let plan = plan_of(&ours, &inventory);
    rival(&store).unwrap();
    let before = dump(&*store);
    let error = block_on(ours.adopt(&plan, &BTreeSet::new())).unwrap_err();
    let AdoptError::Refused { refused, left } = &error else { panic!("{error}") };
    assert_eq!((refused.len(), left.len()), (1, 0));
    assert_eq!(refused[0].origin.file, dir.path().join("10.1.1.47"));
    assert!(refused[0].why == Why::Held { holder: "attachment net/rival/eth0".into() }, "{error}");
    assert_eq!(dump(&*store), before);

    // Between its looking over everything and its commits.
    for unguarded in [false, true] {
        let inner = memory();
        let (seen, unheeded) = (inner.clone(), Mutex::new(true));
        let store: Arc<dyn Store> = Arc::new(Hooked {
            inner: inner.clone(),
            before: Box::new(move || {
                if std::mem::take(&mut *unheeded.lock()) {
                    rival(&seen).unwrap();
                }
            }),
            unguarded,
            ..Hooked::over(memory())
        });
        let plan = plan_of(&ipam(JSON, &inner), &inventory);
        let result = block_on(ipam(JSON, &store).adopt(&plan, &BTreeSet::new()));
        let holders: Vec<_> = block_on(ipam(JSON, &inner).bindings(None))
            .unwrap()
            .into_iter()
            .filter(|b| b.address.addr().to_string() == "10.1.1.47")
            .map(|b| b.attachment.to_string())
            .collect();
        if unguarded {
            // The twin: without the guards the address is doubled.
            assert_eq!(holders.len(), 2, "{holders:?}");
            continue;
        }
        let Err(AdoptError::Refused { refused, left }) = &result else { panic!("{result:?}") };
        assert_eq!((refused.len(), left.len()), (1, 0), "{result:?}");
        assert_eq!(holders, ["net/rival/eth0"]);
        // What had been done is taken back.
        assert_eq!(bound(&ipam(JSON, &inner)).values().filter(|owner| owner.starts_with("ctr")).count(), 0);
        assert_eq!(dump(&*inner), before);
    }
}

#[test]
fn the_work_is_bounded_by_the_number_of_entries() {
    let dir = directory(2500);
    let store = Arc::new(Hooked::over(memory()));
    let shared: Arc<dyn Store> = store.clone();
    let ours = ipam(JSON, &shared);
    let plan = plan_of(&ours, &read(dir.path()));
    // A barrier for the revision.
    assert_eq!((store.groups.load(Ordering::Relaxed), store.commits.load(Ordering::Relaxed)), (0, 1));
    let planned = store.reads.swap(0, Ordering::Relaxed);
    // 1024 owners at a time, with five records each and 4096 of them in a read; and what registers the pools.
    assert!(planned <= 3 * 3 + 4, "{planned} reads");
    let adopted = block_on(ours.adopt(&plan, &BTreeSet::new())).unwrap();
    assert_eq!(adopted.addresses, 5000);
    assert_eq!(store.groups.load(Ordering::Relaxed), 3, "groups of commits");
    let commits = store.commits.load(Ordering::Relaxed);
    assert!(commits <= 8, "{commits} single commits: only the pools and their claims are registered so");
    let reads = store.reads.load(Ordering::Relaxed);
    assert!(reads <= 2 * 3 * 3 + 16, "{reads} reads");
}

#[test]
fn claims_of_the_configuration_and_the_store_are_kept_with_what_is_adopted() {
    let json = r#"{ "cooldown": "0s", "pools": [ { "name": "v4", "subnet": "10.1.0.0/24", "claims": {
        "shop/db": { "address": "10.1.0.9", "keep": "workload" },
        "shop/q-*": { "members": "ordinal" },
        "shop/moved": { "address": "10.1.0.50" } } } ] }"#;
    let store = memory();
    let ours = ipam(json, &store);
    block_on(ours.reserve("v4", &"shop/kept".parse().unwrap(), Some("10.1.0.20".parse().unwrap()), Default::default()))
        .unwrap();
    let text = |offset: u32, pod: &str| {
        format!("\"{offset}\":{{\"id\":\"c{offset}\",\"podref\":\"shop/{pod}\",\"ifname\":\"eth0\"}}")
    };
    let allocations =
        [text(9, "db"), text(20, "kept"), text(30, "q-3"), text(40, "moved"), text(41, "plain")].join(",");
    let pool = format!(
        r#"{{"kind":"IPPool","metadata":{{"name":"10.1.0.0-24"}},"spec":{{"range":"10.1.0.0/24","allocations":{{{allocations}}}}}}}"#
    );
    let inventory = objects::whereabouts(&pool).read().unwrap();
    let adopted = adopt(&ours, &inventory);
    assert_eq!(adopted.attachments, 5);
    for i in [9, 20, 30, 40, 41] {
        assert!(delete(&ours, &attachment(&format!("c{i}"))));
    }
    let comes_back = |pod: &str| lease(&ours, &format!("new-{pod}"), Some(&format!("shop/{pod}"))).unwrap().remove(0);
    assert_eq!(comes_back("db"), "10.1.0.9/24", "fixed by the configuration");
    assert_eq!(comes_back("kept"), "10.1.0.20/24", "recorded in the store");
    assert_eq!(comes_back("q-3"), "10.1.0.30/24", "of a set whose members keep what they got");
    assert_eq!(comes_back("moved"), "10.1.0.50/24", "from the next start on what the configuration says");
    assert_ne!(comes_back("plain"), "10.1.0.41/24", "of no claim");
}

/// Counts calls, and does something before each group of commits.
struct Hooked {
    inner: Arc<dyn Store>,
    before: Box<dyn Fn() + Send + Sync>,
    /// Ignores what the batches of groups guard.
    unguarded: bool,
    commits: AtomicU64,
    groups: AtomicU64,
    reads: AtomicU64,
}

impl Hooked {
    fn over(inner: Arc<dyn Store>) -> Self {
        let (commits, groups, reads) = Default::default();
        Self { inner, before: Box::new(|| ()), unguarded: false, commits, groups, reads }
    }
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

#[async_trait]
impl Store for Hooked {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.read(keys).await
    }

    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.inner.scan(prefix, after, limit).await
    }

    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.inner.commit(batch).await
    }

    async fn commit_many(&self, batches: &[Batch]) -> Vec<Result<Outcome, StoreError>> {
        self.groups.fetch_add(1, Ordering::Relaxed);
        (self.before)();
        let mut batches = batches.to_vec();
        if self.unguarded {
            batches.iter_mut().for_each(|batch| batch.guards.clear());
        }
        self.inner.commit_many(&batches).await
    }

    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }

    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

/// A container with what host-local may have written for it.
fn container() -> impl Strategy<Value = (String, bool, bool, bool)> {
    ("[a-z0-9][a-zA-Z0-9_.-]{0,20}", any::<bool>(), any::<bool>(), any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn any_directory_is_adopted_as_another_reader_sees_it(
        containers in proptest::collection::btree_map(2u32..200, container(), 0..24),
    ) {
        let dir = tempfile::tempdir().unwrap();
        for (i, (name, both, old, crlf)) in &containers {
            // The number keeps names apart.
            let end = if *crlf { "\r\n" } else { "\n" };
            let content = if *old { format!("{name}{i}{end}") } else { format!("{name}{i}{end}net{}", i % 3) };
            write(dir.path(), &format!("10.1.3.{i}"), &content);
            if *both {
                write(dir.path(), &format!("fd00:1::3:{i:x}"), &content);
            }
        }
        let store = memory();
        let ours = ipam(JSON, &store);
        let adopted = adopt(&ours, &read(dir.path()));
        prop_assert_eq!(adopted.attachments, containers.len());
        prop_assert_eq!(bound(&ours), independent(dir.path()));
    }
}

#[test]
fn a_directory_that_is_not_there_is_an_error_that_names_it() {
    let error = HostLocal::new("/nonexistent/net").read().unwrap_err().to_string();
    assert!(error.contains("/nonexistent/net"), "{error}");
}

#[test]
fn reading_waits_for_host_locals_lock() {
    let dir = directory(1);
    let lock = fs::File::open(dir.path().join("lock")).unwrap();
    lock.lock().unwrap();
    let path = dir.path().to_owned();
    let reader = std::thread::spawn(move || read(&path));
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(!reader.is_finished(), "it reads under an ADD");
    // The entry of a call that was under way.
    write(dir.path(), "10.1.5.5", "late\r\neth0");
    lock.unlock().unwrap();
    assert_eq!(reader.join().unwrap().entries.len(), 3);
}
