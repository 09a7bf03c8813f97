//! Address groups: snapshots against an oracle that reads the raw records, and followers that miss changes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use dcenet_core::provider::AddressSource;
use dcenet_core::test_support::{Rng, Rung, TestHost, require_with};
use dcenet_ipam::groups::{GroupDirectory, GroupFeed, GroupName, Grouping, Groups, ListForm, MemberState};
use dcenet_ipam::model::AddressSpace;
use dcenet_ipam::store::log::LogStore;
use dcenet_ipam::store::memory::MemoryStore;
use dcenet_ipam::store::{Batch, Caps, Change, Entry, Key, Outcome, Store, StoreError, Watch};
use dcenet_ipam::{Ipam, Quarantine};
use ipnet::IpNet;
use parking_lot::Mutex;
use pollster::block_on;

use crate::{attachment, each_store, ipam, lease, release, request};

const JSON: &str = r#"{ "cooldown": "5s", "pools": [
    { "name": "a", "subnet": "10.0.0.0/27", "claims": {
        "shop/db": { "address": "10.0.0.5" }, "shop/pg-*": { "members": "ordinal", "addresses": ["10.0.0.6-10.0.0.8"] },
        "shop/web-*": { "members": "replica", "addresses": ["10.0.0.9-10.0.0.11"] },
        "shop/brief": { "address": "10.0.0.12", "keep": "ephemeral" }, "shop/timed": { "keep": "10s" },
        "shop/log-*": { "members": "ordinal", "keep": "workload" } } },
    { "name": "six", "subnet": "fd00::/123", "claims": { "shop/timed": { "keep": "10s" } } },
    { "name": "own", "subnet": "2001:db8::/56", "delegate": 64, "group": "own", "select": { "namespaces": ["ops"] },
      "claims": { "ops/vm": { "address": "2001:db8:0:7::1" } } } ] }"#;

/// Workloads with the group that each belongs to, told by hand.
const WORKLOADS: [(Option<&str>, &str); 13] = [
    (None, "network.net"),
    (Some("shop/db"), "shop/db"),
    (Some("shop/pg-0"), "shop/pg"),
    (Some("shop/pg-2"), "shop/pg"),
    (Some("shop/web-7d9f8c6b5-x2x4z"), "shop/web"),
    (Some("shop/web-7d9f8c6b5-b2b4z"), "shop/web"),
    (Some("shop/brief"), "shop/brief"),
    (Some("shop/timed"), "shop/timed"),
    (Some("shop/log-0"), "shop/log"),
    (Some("shop/log-1"), "shop/log"),
    (Some("ops/vm"), "ops/vm"),
    (Some("ops/scan-66bb99cc44-x2x4z"), "ops/scan"),
    (Some("shop/api"), "shop/api"),
];

/// Addresses that the configuration fixes, with their groups.
const FIXED: [(&str, &str); 9] = [
    ("10.0.0.5/32", "shop/db"),
    ("10.0.0.6/32", "shop/pg"),
    ("10.0.0.7/32", "shop/pg"),
    ("10.0.0.8/32", "shop/pg"),
    ("10.0.0.9/32", "shop/web"),
    ("10.0.0.10/32", "shop/web"),
    ("10.0.0.11/32", "shop/web"),
    ("10.0.0.12/32", "shop/brief"),
    ("2001:db8:0:7::/64", "ops/vm"),
];

type Sets = BTreeMap<String, BTreeMap<String, MemberState>>;

fn sets(groups: &Groups) -> Sets {
    let text = |members: &BTreeMap<IpNet, MemberState>| members.iter().map(|(p, s)| (p.to_string(), *s)).collect();
    groups.groups.iter().map(|(name, members)| (name.to_string(), text(members))).collect()
}

/// What the records say, read as JSON.
fn oracle(store: &dyn Store, now: u64) -> Sets {
    let all = block_on(store.scan(b"", None, usize::MAX)).unwrap();
    let json = |entry: &Entry| serde_json::from_slice::<serde_json::Value>(&entry.value).unwrap();
    let group_of = |workload: Option<&str>| {
        let place = workload.is_some_and(|w| w.contains('#'));
        match workload {
            Some(workload) if place => workload.split('#').next().unwrap().to_owned(),
            // Renamed by the test.
            Some("shop/moved") => "shop/moved".to_owned(),
            Some("shop/pg-1") => "shop/pg".to_owned(),
            workload => WORKLOADS.iter().find(|(w, _)| *w == workload).unwrap().1.to_owned(),
        }
    };
    let prefix_of = |bytes: &[u8]| {
        let bits = u128::from_be_bytes(bytes.try_into().unwrap());
        let ip = if bits <= u32::MAX.into() { IpAddr::V4((bits as u32).into()) } else { IpAddr::V6(bits.into()) };
        let length = if ip.to_string().starts_with("2001:db8:") {
            64
        } else if ip.is_ipv4() {
            32
        } else {
            128
        };
        IpNet::new(ip, length).unwrap().trunc().to_string()
    };
    let attachments: BTreeMap<&[u8], serde_json::Value> =
        all.iter().filter_map(|(key, entry)| Some((key.strip_prefix(b"t/")?, json(entry)))).collect();
    let away: BTreeSet<String> = all
        .iter()
        .filter(|(key, entry)| key.starts_with(b"c/") && json(entry).get("away").is_some())
        .map(|(key, _)| String::from_utf8(key[b"c/default/4/".len()..].to_vec()).unwrap())
        .collect();
    let externals: Vec<(Vec<u8>, Vec<u8>)> = all
        .iter()
        .filter_map(|(key, _)| key.strip_prefix(b"x/default/4/"))
        .map(|rest| (rest[16..].to_vec(), rest[..16].to_vec()))
        .collect();
    let (mut found, mut settled) = (Sets::new(), BTreeSet::new());
    let mut put = |group: String, prefix: String, state| {
        assert_eq!(found.entry(group).or_default().insert(prefix, state), None);
    };
    for (key, entry) in &all {
        let Some(bytes) = key.strip_prefix(b"s/default/4").or(key.strip_prefix(b"s/default/6")) else { continue };
        let (slot, prefix) = (json(entry), prefix_of(bytes));
        let (kind, slot) = slot.as_object().unwrap().iter().next().unwrap();
        let claim = slot.get("claim").and_then(|c| c.as_str());
        let over = slot.get("until").and_then(|u| u.as_u64()).is_some_and(|until| now >= until);
        match kind.as_str() {
            "bound" | "handover" => {
                let workload = attachments[slot["by"].as_str().unwrap().as_bytes()].get("workload");
                let name =
                    workload.and_then(|w| w.as_str()).or(claim).filter(|_| !claim.is_some_and(|c| c.contains('#')));
                settled.insert(prefix.clone());
                put(group_of(name.or(claim)), prefix, MemberState::Bound);
            }
            "kept" | "quarantined" if claim.is_some() && (kind == "kept") != over => {
                settled.insert(prefix.clone());
                if !away.contains(claim.unwrap()) {
                    put(group_of(claim), prefix, MemberState::Kept);
                }
            }
            "quarantined" if !over => drop(settled.insert(prefix)),
            "freed" | "kept" | "quarantined" => {}
            other => panic!("{other}"),
        }
    }
    for (prefix, group) in FIXED {
        let bytes = match prefix.parse::<IpNet>().unwrap().addr() {
            IpAddr::V4(ip) => u128::from(u32::from(ip)).to_be_bytes(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let external = externals.iter().any(|(low, high)| bytes[..] >= low[..] && bytes[..] <= high[..]);
        if !settled.contains(prefix) && !external {
            put(group.to_owned(), prefix.to_owned(), MemberState::Kept);
        }
    }
    found
}

/// A store whose watches now and then lose a change, and tell a gap or keep silent about it.
#[derive(Debug)]
struct ForgetfulStore {
    inner: Arc<dyn Store>,
    chance: usize,
    silent: bool,
    rng: Arc<Mutex<Rng>>,
    lost: Arc<AtomicU64>,
}

struct ForgetfulWatch {
    inner: Box<dyn Watch>,
    chance: usize,
    silent: bool,
    rng: Arc<Mutex<Rng>>,
    lost: Arc<AtomicU64>,
}

#[async_trait]
impl Watch for ForgetfulWatch {
    async fn next(&mut self, limit: Duration) -> Result<Option<Change>, StoreError> {
        loop {
            let change = self.inner.next(limit).await?;
            if change.is_none() || !self.rng.lock().chance(self.chance) {
                return Ok(change);
            }
            self.lost.fetch_add(1, Ordering::Relaxed);
            if !self.silent {
                return Ok(change.map(|change| Change::Gap { revision: change.revision() }));
            }
        }
    }
}

#[async_trait]
impl Store for ForgetfulStore {
    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Entry>>, StoreError> {
        self.inner.read(keys).await
    }
    async fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<Vec<(Key, Entry)>, StoreError> {
        self.inner.scan(prefix, after, limit).await
    }
    async fn commit(&self, batch: &Batch) -> Result<Outcome, StoreError> {
        self.inner.commit(batch).await
    }
    async fn first_gap(&self, prefix: &[u8], range: RangeInclusive<u128>) -> Result<Option<u128>, StoreError> {
        self.inner.first_gap(prefix, range).await
    }
    async fn watch(&self, prefix: &[u8], after: u64) -> Result<Box<dyn Watch>, StoreError> {
        let inner = self.inner.watch(prefix, after).await?;
        let (rng, lost) = (self.rng.clone(), self.lost.clone());
        Ok(Box::new(ForgetfulWatch { inner, chance: self.chance, silent: self.silent, rng, lost }))
    }
    fn caps(&self) -> Caps {
        self.inner.caps()
    }
}

/// Does something to the store. What is refused is refused.
fn disturb(ipam: &Ipam, rng: &mut Rng, now: &AtomicU64) {
    let space = AddressSpace::default();
    let container = format!("c{}", rng.below(14));
    let address: IpAddr = format!("10.0.0.{}", 1 + rng.below(20)).parse().unwrap();
    let names = ["shop/db", "shop/timed", "shop/log-0", "shop/log-1", "shop/moved", "ops/vm", "shop/pg-0"];
    let claim = rng.pick(&names).parse().unwrap();
    let why =
        Quarantine { reason: "seen".to_owned(), time: rng.chance(70).then_some(Duration::from_secs(7)), seen: None };
    match rng.below(30) {
        0..=9 => drop(lease(ipam, &container, rng.pick(&WORKLOADS).0)),
        10..=15 => release(ipam, &container),
        16 => {
            let valid = [("c1".parse().unwrap(), "eth0".parse().unwrap())];
            drop(block_on(ipam.retain(&"net".parse().unwrap(), &valid)));
        }
        17 => drop(block_on(ipam.workload_gone(&rng.pick(&["shop/log-0", "shop/log-1"]).parse().unwrap()))),
        18 => drop(block_on(ipam.forget(&space, &claim))),
        19 => {
            let to = if claim.to_string() == "shop/moved" { "shop/timed" } else { "shop/moved" };
            drop(block_on(ipam.rename_claim(&space, &claim, &to.parse().unwrap())));
        }
        20 => drop(block_on(ipam.quarantine(&space, address, &why))),
        21 => drop(block_on(ipam.lift(&space, address))),
        22 => {
            if let Ok(Some(lease)) = block_on(ipam.held(&attachment(&container))) {
                let bad = lease.addresses[0].address.addr();
                drop(block_on(ipam.replace(&attachment(&container), lease.sequence(), bad, &why)));
            }
        }
        23 => {
            let limit = Duration::from_secs(20);
            drop(block_on(ipam.begin_handover(&attachment(&container), None, None, limit)));
        }
        24 => drop(block_on(ipam.complete_handover(&attachment(&container)))),
        25 => drop(block_on(ipam.hand_out(&space, &claim, &"west".parse().unwrap()))),
        26 => drop(block_on(ipam.take_back(&space, &claim))),
        27 => {
            let range = "10.0.0.9-10.0.0.13".parse().unwrap();
            if rng.chance(50) {
                drop(block_on(ipam.reserve_external(&space, range, "edge")));
            } else {
                drop(block_on(ipam.unreserve_external(&space, range, "edge")));
            }
        }
        28 => drop(block_on(ipam.expire())),
        _ => drop(now.fetch_add([1, 2000, 8000, 11_000][rng.below(4)], Ordering::Relaxed)),
    }
}

/// Applies an update, and checks that it tells what is new and nothing else.
fn apply(ours: &mut Groups, update: &dcenet_ipam::groups::Update) -> Result<(), String> {
    let none = BTreeMap::new();
    for change in &update.changes {
        let had = ours.groups.get(&change.group).unwrap_or(&none);
        let known = change.added.iter().find(|(prefix, state)| had.get(prefix) == Some(state));
        let unknown = change.removed.iter().find(|prefix| !had.contains_key(prefix));
        if known.is_some() || unknown.is_some() {
            return Err(format!("told twice: {known:?} added, {unknown:?} removed by {update:?}"));
        }
    }
    ours.apply(update);
    Ok(())
}

/// Follows random operations; the error says how the follower's groups went wrong.
fn follow(seed: u64, inner: Arc<dyn Store>, silent: bool, lost: &Arc<AtomicU64>) -> Result<usize, String> {
    let mut rng = Rng::new(seed);
    let now = Arc::new(AtomicU64::new(1_000_000));
    let clock = now.clone();
    let forgetful = ForgetfulStore {
        inner: inner.clone(),
        chance: if seed.is_multiple_of(3) { 0 } else { 15 },
        silent,
        rng: Arc::new(Mutex::new(Rng::new(seed ^ 77))),
        lost: lost.clone(),
    };
    let store: Arc<dyn Store> = Arc::new(forgetful);
    let ours = Arc::new(ipam(JSON, &store).with_clock(move || clock.load(Ordering::Relaxed)));
    let grouping = Grouping::default();
    let mut known = Groups::new(AddressSpace::default());
    let mut feed = GroupFeed::new(ours.clone(), &grouping).unwrap();
    let mut told = 0;
    for step in 0..150 {
        disturb(&ours, &mut rng, &now);
        if rng.chance(50) {
            continue;
        }
        if rng.chance(10) {
            // A restart: what was written down is all that is left.
            let written = serde_json::to_string(&known).unwrap();
            feed = GroupFeed::resume(ours.clone(), &grouping, serde_json::from_str(&written).unwrap()).unwrap();
        }
        while let Some(update) = block_on(feed.next(Duration::ZERO)).unwrap() {
            apply(&mut known, &update).map_err(|e| format!("seed {seed}, step {step}: {e}"))?;
            told += 1;
        }
        let fresh = block_on(ours.groups(&grouping)).unwrap();
        assert_eq!(sets(&fresh), oracle(&*inner, now.load(Ordering::Relaxed)), "seed {seed}, step {step}");
        if known.groups != fresh.groups {
            return Err(format!("seed {seed}, step {step}: {:?} and not {:?}", sets(&known), sets(&fresh)));
        }
        assert_eq!(feed.groups().groups, known.groups);
    }
    Ok(told)
}

#[test]
fn whoever_follows_has_what_a_fresh_export_shows() {
    let lost = Arc::new(AtomicU64::new(0));
    let mut told = 0;
    for seed in 0..60 {
        told += follow(seed, Arc::new(MemoryStore::new()), false, &lost).unwrap();
    }
    for seed in 100..106 {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        told += follow(seed, Arc::new(LogStore::open(dir.path()).unwrap()), false, &lost).unwrap();
    }
    let lost = lost.load(Ordering::Relaxed);
    println!("{told} updates, {lost} gaps");
    assert!(told > 2000 && lost > 200, "{told} updates, {lost} gaps");
}

/// The twin: a store that does not say what it forgot makes followers go wrong, and the test sees it.
#[test]
fn a_gap_that_nobody_tells_is_seen() {
    let lost = Arc::new(AtomicU64::new(0));
    let wrong = (0..30).filter(|seed| follow(*seed, Arc::new(MemoryStore::new()), true, &lost).is_err()).count();
    println!("{wrong} of 30 followers went wrong, {} changes lost", lost.load(Ordering::Relaxed));
    assert!(wrong > 10, "{wrong}");
}

/// Scans and feeds beside writers: no batch is seen by half, so an address that moves from one claim to another is
/// always in exactly one group.
#[test]
fn a_snapshot_is_of_one_moment() {
    each_store(|store, _| {
        let ours = Arc::new(ipam(
            r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/16", "claims": {
                "a/one": { "address": "10.0.200.1" } } } ] }"#,
            &store,
        ));
        for i in 0..600 {
            lease(&ours, &format!("fill{i}"), Some("a/fill")).unwrap();
        }
        block_on(ours.reserve("p", &"a/x".parse().unwrap(), None, Default::default())).unwrap();
        let (stop, space) = (AtomicBool::new(false), AddressSpace::default());
        let whole = |groups: &Groups| {
            let count = ["a/x", "a/y"].iter().filter(|g| groups.groups.contains_key(&g.parse::<GroupName>().unwrap()));
            assert_eq!(count.count(), 1, "{:?}", groups.groups.keys());
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut names = ["a/x", "a/y"];
                while !stop.load(Ordering::Relaxed) {
                    let [from, to] = names.map(|n| n.parse().unwrap());
                    assert!(block_on(ours.rename_claim(&space, &from, &to)).unwrap());
                    names.reverse();
                }
            });
            let mut known = Groups::new(space.clone());
            let mut feed = GroupFeed::new(ours.clone(), &Grouping::default()).unwrap();
            for _ in 0..30 {
                whole(&block_on(ours.groups(&Grouping::default())).unwrap());
                for _ in 0..20 {
                    if let Some(update) = block_on(feed.next(Duration::from_millis(100))).unwrap() {
                        apply(&mut known, &update).unwrap();
                        whole(&known);
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}

#[test]
fn groups_are_named_as_the_configuration_says() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(JSON, &store);
    lease(&ours, "c1", Some("shop/pay-1")).unwrap();
    lease(&ours, "c2", None).unwrap();
    let names = |json: &str| {
        let grouping: Grouping = serde_json::from_str(json).unwrap();
        sets(&block_on(ours.groups(&grouping)).unwrap()).into_keys().collect::<Vec<_>>()
    };
    assert_eq!(
        names(r#"{ "cluster": "east", "rules": [ { "workloads": "shop/p*-*", "group": "money/all" } ] }"#),
        ["east/money/all", "east/network.net", "east/ops/vm", "east/shop/brief", "east/shop/db", "east/shop/web"]
    );
    assert_eq!(names(r#"{ "by": "namespace" }"#), ["network.net", "ops", "shop"]);
    assert_eq!(
        names(r#"{ "by": "workload", "space": "default" }"#)[3..],
        ["shop/db", "shop/pay-1", "shop/pg-0", "shop/pg-1", "shop/pg-2", "shop/web"]
    );
    assert_eq!(names(r#"{ "space": "blue" }"#), [""; 0]);
    serde_json::from_str::<Grouping>(r#"{ "by": "label" }"#).unwrap_err();
    let elsewhere = Groups::new("blue".parse().unwrap());
    let error = GroupFeed::resume(&ours, &Grouping::default(), elsewhere).unwrap_err().to_string();
    assert!(error.contains("blue") && error.contains("default"), "{error}");
}

#[test]
fn a_restarting_database_keeps_its_rules_and_a_released_address_loses_them_at_once() {
    each_store(|store, _| {
        let ours = ipam(JSON, &store);
        let list = |group: &str| {
            block_on(ours.groups(&Grouping::default())).unwrap().text(&group.parse().unwrap(), ListForm::Members)
        };
        let state =
            |group: &str| sets(&block_on(ours.groups(&Grouping::default())).unwrap())[group].values().next().copied();
        // Before anybody used anything.
        assert_eq!((list("shop/db"), state("shop/db")), ("10.0.0.5/32\n".into(), Some(MemberState::Kept)));
        assert_eq!(list("ops/vm"), "2001:db8:0:7::/64\n");
        lease(&ours, "c1", Some("shop/db")).unwrap();
        assert_eq!(state("shop/db"), Some(MemberState::Bound));
        release(&ours, "c1");
        assert_eq!((list("shop/db").lines().next(), state("shop/db")), (Some("10.0.0.5/32"), Some(MemberState::Kept)));
        lease(&ours, "c2", Some("shop/api")).unwrap();
        assert_eq!(list("shop/api"), "10.0.0.1/32\nfd00::2/128\n");
        release(&ours, "c2");
        assert_eq!(list("shop/api"), "");
    });
}

#[test]
fn files_are_whole_and_say_what_the_groups_say() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(JSON, &store);
    let export = GroupDirectory::open(dir.path().join("groups"), ListForm::Cover).unwrap();
    assert_eq!(export.read().unwrap(), None);
    let now = || block_on(ours.groups(&Grouping::default())).unwrap();
    lease(&ours, "c1", Some("shop/api")).unwrap();
    let first = export.write(&now()).unwrap();
    assert_eq!((first.written, first.unchanged, first.removed), (7, 0, 0));
    let read = |name: &str| std::fs::read_to_string(dir.path().join("groups").join(name)).unwrap();
    assert_eq!(read("shop+pg.list"), "10.0.0.6/31\n10.0.0.8/32\n");
    assert_eq!(export.read().unwrap(), Some(now()));
    assert_eq!(export.write(&now()).unwrap().written, 0);
    // What a crash leaves, and what is not ours.
    std::fs::write(dir.path().join("groups/.new-shop+db.list"), "10.").unwrap();
    std::fs::write(dir.path().join("groups/README"), "ours").unwrap();
    release(&ours, "c1");
    let second = export.write(&now()).unwrap();
    // Only the index, without the group that is gone.
    assert_eq!((second.written, second.unchanged, second.removed), (1, 5, 1));
    let mut names: Vec<_> = std::fs::read_dir(dir.path().join("groups"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            ".lock",
            "README",
            "groups.json",
            "ops+vm.list",
            "shop+brief.list",
            "shop+db.list",
            "shop+pg.list",
            "shop+web.list"
        ]
    );
    std::fs::write(dir.path().join("groups/groups.json"), "{}").unwrap();
    assert!(export.read().unwrap_err().to_string().contains("begin anew"));
    GroupDirectory::open(dir.path().join("no/such"), ListForm::Members).unwrap_err();
}

/// A reader beside a writer never sees less than a whole file: each state of the file is a list of whole lines.
#[test]
fn nobody_sees_half_a_file() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let export = GroupDirectory::open(dir.path().join("groups"), ListForm::Members).unwrap();
    let of_size = |size: u32| {
        let mut groups = Groups::new(AddressSpace::default());
        let members = (0..size).map(|i| (IpNet::from(IpAddr::V4(i.into())), MemberState::Bound)).collect();
        groups.groups.insert("a/b".parse().unwrap(), members);
        groups
    };
    export.write(&of_size(3000)).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for i in 0..60 {
                export.write(&of_size(3000 + i % 2 * 1000)).unwrap();
            }
            done.store(true, Ordering::Relaxed);
        });
        let path = dir.path().join("groups/a+b.list");
        while !done.load(Ordering::Relaxed) {
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(matches!(text.lines().count(), 3000 | 4000) && text.ends_with('\n'));
        }
    });
}

fn no_nft() -> Option<String> {
    let found = Path::new("/usr/sbin/nft").exists();
    (!found).then(|| "needs Debian's nftables".to_owned())
}

#[test]
fn nftables_takes_the_sets() {
    if !require_with(Rung::Services, no_nft) {
        return;
    }
    let host = TestHost::new();
    let place = host.root();
    let nft = |text: &str| {
        let mut command = Command::new("/usr/sbin/nft");
        command.args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut child = place.run(|| command.spawn()).unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{text}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let elements = |set: &str| {
        let listed = place.sh(&format!("/usr/sbin/nft list set inet dcenet {set}"));
        let inside = listed.split_once("elements = {").map_or("", |(_, rest)| rest.split_once('}').unwrap().0);
        inside.split(',').map(|e| e.trim().to_owned()).filter(|e| !e.is_empty()).collect::<Vec<_>>()
    };
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(JSON, &store);
    let now = || block_on(ours.groups(&Grouping::default())).unwrap();
    let mut all = vec![now()];
    nft(&all[0].nft_transaction("dcenet", None));
    assert_eq!(elements("v4/shop/pg"), ["10.0.0.6/31", "10.0.0.8"]);
    assert_eq!(elements("v6/ops/vm"), ["2001:db8:0:7::/64"]);
    lease(&ours, "c1", Some("shop/api")).unwrap();
    all.push(now());
    nft(&all[1].nft_transaction("dcenet", Some(&all[0])));
    assert_eq!(elements("v4/shop/api"), ["10.0.0.1"]);
    assert_eq!(elements("v6/shop/api"), ["fd00::1"]);
    release(&ours, "c1");
    nft(&now().nft_transaction("dcenet", Some(&all[1])));
    // Emptied, not gone: a rule may name it.
    assert_eq!(elements("v4/shop/api"), [""; 0]);
    assert_eq!(elements("v4/shop/pg"), ["10.0.0.6/31", "10.0.0.8"]);
}

#[test]
fn an_export_writes_nothing() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let ours = ipam(JSON, &store);
    block_on(ours.lease(&request("c1", None))).unwrap();
    let before = block_on(store.scan(b"", None, usize::MAX)).unwrap();
    block_on(ours.groups(&Grouping::default())).unwrap();
    assert_eq!(block_on(store.scan(b"", None, usize::MAX)).unwrap(), before);
}
