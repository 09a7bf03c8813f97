//! Replies that are lost, requests that come late, members that are killed and stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dcenet_core::provider::{AddressSource, LeaseError};
use dcenet_ipam::store::etcd::EtcdConfig;
use dcenet_ipam::store::etcd::cluster::Cluster;
use dcenet_ipam::store::{Batch, Change, Outcome, Store, StoreError};
use dcenet_ipam::{Ipam, IpamConfig};
use pollster::block_on;

use super::{SOON, can_run, commit, guarded, id, memory_dir, open, put, read};
use crate::{attachment, request};

/// Passes bytes on, or does not.
struct Proxy {
    port: u16,
    mode: Arc<AtomicU8>,
    /// What clients sent while it was held, and where it was to go.
    held: Arc<Held>,
}

/// Both ways.
const PASS: u8 = 0;
/// Requests only.
const SWALLOW_REPLIES: u8 = 1;
/// Neither; requests are kept.
const HOLD: u8 = 2;
/// Neither.
const CUT: u8 = 3;

impl Proxy {
    fn start(cluster: &Cluster) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = cluster.endpoint(0).strip_prefix("http://").unwrap().to_owned();
        let proxy = Self { port, mode: Arc::default(), held: Arc::default() };
        let (mode, held) = (proxy.mode.clone(), proxy.held.clone());
        // Ends with the process; every connection ends with its client.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&target) else { continue };
                let (mode_up, mode_down, held) = (mode.clone(), mode.clone(), held.clone());
                let (client_up, server_up) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                thread::spawn(move || pump(client_up, server_up, &mode_up, PASS | SWALLOW_REPLIES, Some(&held)));
                thread::spawn(move || pump(server, client, &mode_down, PASS, None));
            }
        });
        proxy
    }

    fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn set(&self, mode: u8) {
        self.mode.store(mode, Ordering::SeqCst);
    }

    fn holds(&self, text: &str) -> bool {
        let held = self.held.lock().unwrap();
        held.iter().any(|(_, bytes)| bytes.windows(text.len()).any(|w| w == text.as_bytes()))
    }

    /// Passes on what was held.
    fn release(&self) {
        for (server, bytes) in self.held.lock().unwrap().iter_mut() {
            server.write_all(bytes).unwrap();
        }
    }
}

type Held = Mutex<Vec<(TcpStream, Vec<u8>)>>;

fn pump(mut from: TcpStream, mut to: TcpStream, mode: &AtomicU8, passing: u8, held: Option<&Held>) {
    let mut buffer = [0; 65536];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = &buffer[..count];
        let mode = mode.load(Ordering::SeqCst);
        if let (HOLD, Some(held)) = (mode, held) {
            held.lock().unwrap().push((to.try_clone().unwrap(), bytes.to_vec()));
        } else if mode | passing == passing && to.write_all(bytes).is_err() {
            break;
        }
    }
    // What is held is still to be written.
    if held.is_none_or(|held| held.lock().unwrap().is_empty()) {
        let _ = to.shutdown(Shutdown::Both);
    }
}

/// Revisions that wrote a key.
fn written(store: &dyn Store, key: &str) -> Vec<u64> {
    let mut watch = block_on(store.watch(key.as_bytes(), 0)).unwrap();
    commit(store, &put(key, "the end"));
    let mut revisions = Vec::new();
    loop {
        match block_on(watch.next(SOON)).unwrap().unwrap() {
            Change::Writes { writes, .. } if writes[0].1.as_ref().is_some_and(|e| e.value == b"the end") => break,
            change => revisions.push(change.revision()),
        }
    }
    revisions
}

#[test]
fn a_lost_reply_is_unknown_and_the_request_applies_once() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    let proxy = Proxy::start(&cluster);
    let config = |endpoint: String, seconds: u64| EtcdConfig {
        endpoints: vec![endpoint],
        timeout: Some(Duration::from_secs(seconds)),
        ..Default::default()
    };
    let (through, direct) = (open(&config(proxy.endpoint(), 3)), open(&config(cluster.endpoint(0), 100)));
    read(&*through, "once");
    proxy.set(SWALLOW_REPLIES);
    // Nothing guards it: sent again under another id it would apply again.
    let blind = put("once", "1");
    let outcome = block_on(through.commit(&blind)).unwrap();
    assert!(matches!(outcome, Outcome::Unknown { .. }), "{outcome:?}");
    assert!(matches!(block_on(through.read(&[b"once".to_vec()])), Err(StoreError::Unavailable(_))));
    proxy.set(PASS);
    let revision = loop {
        match block_on(through.commit(&blind)) {
            Ok(Outcome::Committed { revision }) => break revision,
            Ok(Outcome::Unknown { .. }) | Err(StoreError::Unavailable(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(written(&*direct, "once"), [revision]);

    // The twin: every try under an id of its own.
    proxy.set(SWALLOW_REPLIES);
    for _ in 0..2 {
        let outcome = block_on(through.commit(&put("twice", "1"))).map(drop);
        assert!(outcome.is_ok() || matches!(outcome, Err(StoreError::Unavailable(_))), "{outcome:?}");
    }
    proxy.set(PASS);
    block_on(through.commit(&put("twice", "1"))).unwrap();
    assert!(written(&*direct, "twice").len() >= 2);
}

/// A first try is held up on its way. The second is told the truth, a conflict; after that the first may not be
/// carried out any more, although its guards would hold by then.
#[test]
fn a_request_that_comes_late_is_not_carried_out_after_its_conflict_was_told() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    let direct = open(&cluster.config());
    let handled = || {
        let name = "grpc_server_handled_total{grpc_code=\"OK\",grpc_method=\"Txn\",grpc_service=\"etcdserverpb.KV\",\
                    grpc_type=\"unary\"}";
        cluster.metric(0, name).unwrap()
    };
    // The twin goes through the proxy alone, so that nobody tells it anything; its late request does harm.
    for (round, twin) in [(0, false), (1, true)] {
        let (guard, target) = (format!("guard{round}"), format!("target{round}"));
        let taken = commit(&*direct, &put(&guard, "1"));
        let (proxy, attempt) = loop {
            let proxy = Proxy::start(&cluster);
            let mut endpoints = vec![proxy.endpoint()];
            if !twin {
                endpoints.push(cluster.endpoint(0));
            }
            let seconds = if twin { 4 } else { 60 };
            let through =
                open(&EtcdConfig { endpoints, timeout: Some(Duration::from_secs(seconds)), ..Default::default() });
            read(&*through, &guard);
            proxy.set(HOLD);
            let batch = guarded(&guard, None, put(&target, "late"));
            let attempt = thread::spawn(move || block_on(through.commit(&batch)));
            while !proxy.holds(&target) && !attempt.is_finished() {
                thread::sleep(Duration::from_millis(5));
            }
            if proxy.holds(&target) {
                // The end of the request may be a segment of its own; what follows it is the cancellation.
                thread::sleep(Duration::from_millis(200));
                proxy.set(CUT);
                break (proxy, attempt);
            }
            // It began at the other member.
            assert!(matches!(attempt.join().unwrap(), Ok(Outcome::Conflict(_))));
        };
        let outcome = attempt.join().unwrap().unwrap();
        match twin {
            false => assert!(matches!(outcome, Outcome::Conflict(_)), "{outcome:?}"),
            true => assert!(matches!(outcome, Outcome::Unknown { .. }), "{outcome:?}"),
        }
        commit(
            &*direct,
            &guarded(
                &guard,
                Some(taken),
                Batch {
                    writes: vec![dcenet_ipam::store::Write::Delete(guard.clone().into())],
                    request_id: id(),
                    ..Batch::default()
                },
            ),
        );
        let before = handled();
        proxy.release();
        let deadline = Instant::now() + SOON;
        while handled() <= before {
            assert!(Instant::now() < deadline, "the late request never came");
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(read(&*direct, &target).is_some(), twin, "round {round}");
    }
}

/// Kills and stops members by turns until told to end, and says how often.
fn torment(cluster: &mut Cluster, done: &AtomicBool) -> (usize, usize) {
    let (mut kills, mut pauses) = (0, 0);
    let rest = |seconds: u64| {
        let until = Instant::now() + Duration::from_secs(seconds);
        while Instant::now() < until && !done.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(50));
        }
    };
    for round in 0.. {
        rest(1);
        if done.load(Ordering::Relaxed) && kills > 0 && pauses > 1 {
            break;
        }
        let leader = cluster.leader().unwrap_or(0);
        match round % 3 {
            0 => {
                cluster.kill(leader);
                kills += 1;
                rest(1);
                cluster.restart(leader);
            }
            n => {
                let at = if n == 1 { leader } else { (leader + 1) % cluster.size() };
                cluster.pause(at);
                pauses += 1;
                rest(3);
                cluster.resume(at);
            }
        }
        assert!(cluster.wait(), "a member has ended");
    }
    (kills, pauses)
}

/// Counters lose nothing and gain nothing while leaders are killed and members stopped, and a watch sees every step.
#[test]
fn increments_and_watches_survive_kills_and_pauses() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let mut cluster = Cluster::start(3, dir.path());
    let config = EtcdConfig { timeout: Some(Duration::from_secs(6)), ..cluster.config() };
    let (done, unknown) = (AtomicBool::new(false), AtomicUsize::new(0));
    let watching = open(&config);
    let mut watch = block_on(watching.watch(b"n", 0)).unwrap();
    let deadline = Instant::now() + 2 * SOON;
    let increments = thread::scope(|scope| {
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (config, done, unknown) = (&config, &done, &unknown);
                scope.spawn(move || {
                    let store = open(config);
                    let mut made = 0_u64;
                    while !done.load(Ordering::Relaxed) {
                        assert!(Instant::now() < deadline);
                        let Ok(found) = block_on(store.read(&[b"n".to_vec()])) else { continue };
                        let now = found[0].as_ref();
                        let number = now.map_or(0, |e| String::from_utf8_lossy(&e.value).parse::<u64>().unwrap());
                        let batch = guarded("n", now.map(|e| e.version), put("n", &(number + 1).to_string()));
                        loop {
                            match block_on(store.commit(&batch)) {
                                Ok(Outcome::Committed { .. }) => {
                                    made += 1;
                                    break;
                                }
                                Ok(Outcome::Conflict(_)) => break,
                                // The same again, until it is known.
                                Ok(Outcome::Unknown { .. }) => drop(unknown.fetch_add(1, Ordering::Relaxed)),
                                Err(StoreError::Unavailable(_)) => {}
                                Err(error) => panic!("{error}"),
                            }
                            assert!(Instant::now() < deadline);
                        }
                    }
                    made
                })
            })
            .collect();
        // Until each kind of trouble came twice.
        let stop = AtomicBool::new(false);
        thread::scope(|inner| {
            inner.spawn(|| {
                thread::sleep(Duration::from_secs(20));
                stop.store(true, Ordering::Relaxed);
            });
            let (kills, pauses) = torment(&mut cluster, &stop);
            assert!(kills > 0 && pauses > 1);
        });
        done.store(true, Ordering::Relaxed);
        workers.into_iter().map(|w| w.join().unwrap()).sum::<u64>()
    });
    let last = read(&*open(&config), "n").unwrap();
    assert_eq!(String::from_utf8(last.value).unwrap(), increments.to_string(), "{unknown:?} unknown outcomes");
    assert!(increments > 20, "{increments}");
    let mut seen = 0;
    while seen < increments {
        let Ok(change) = block_on(watch.next(SOON)) else { continue };
        let Some(Change::Writes { writes, .. }) = change else { panic!("{change:?} after {seen} of {increments}") };
        seen += 1;
        assert_eq!(String::from_utf8_lossy(&writes[0].1.as_ref().unwrap().value), seen.to_string());
    }
    assert!(read(&*open(&config), "n").unwrap().version == last.version);
}

fn ipam_config(cluster: &EtcdConfig, pools: &str) -> IpamConfig {
    let json = format!(
        r#"{{ "cooldown": "0s", "store": {{ "kind": "etcd", "timeout": "6s", "endpoints": {} }}, "pools": {pools} }}"#,
        serde_json::to_string(&cluster.endpoints).unwrap()
    );
    serde_json::from_str(&json).unwrap()
}

/// Some more than all allocators hold at once, so that addresses change hands.
const POOLS: &str = r#"[ { "name": "p", "subnet": "10.0.0.0/25" } ]"#;
const SOAK_POOLS: &str = r#"[ { "name": "p", "subnet": "10.0.0.0/23" } ]"#;

fn soak() -> bool {
    std::env::var_os("DCENET_SOAK").is_some()
}

fn nanoseconds() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()
}

/// Leases and releases, trying again whatever may succeed later. Not a test of its own: `allocators...` starts it.
#[test]
#[ignore = "run by another test"]
fn allocator() {
    let Some(job) = std::env::var_os("DCENET_IPAM_ALLOCATOR") else { panic!("run by another test") };
    let job = job.into_string().unwrap();
    let (name, config) = job.split_once(' ').unwrap();
    let ipam = Ipam::open(&serde_json::from_str(config).unwrap(), "/nonexistent".as_ref()).unwrap();
    let say = |text: String| {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).unwrap();
        out.flush().unwrap();
    };
    // However many there are, each gets through.
    let retryable = |begun: Instant, error: LeaseError| {
        assert!(matches!(error, LeaseError::Store(_) | LeaseError::Busy(_)), "{error}");
        assert!(begun.elapsed() < 2 * SOON, "{error}");
    };
    let leases = if soak() { 100 } else { 12 };
    for i in 0_usize..leases {
        let container = format!("{name}-{i}");
        let begun = Instant::now();
        let lease = loop {
            match block_on(ipam.lease(&request(&container, None))) {
                Ok(lease) => break lease,
                Err(error) => retryable(begun, error),
            }
        };
        say(format!("@leased {container} {} {}\n", lease.addresses[0].address.addr(), nanoseconds()));
        // Up to three at a time.
        if let Some(old) = i.checked_sub(3) {
            let container = format!("{name}-{old}");
            say(format!("@releasing {container} {}\n", nanoseconds()));
            let begun = Instant::now();
            while let Err(error) = block_on(ipam.release_current(&attachment(&container))) {
                retryable(begun, error);
            }
        }
    }
}

fn spawn(name: &str, config: &str, lines: mpsc::Sender<String>) -> (Child, thread::JoinHandle<()>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "etcd::faults::allocator", "--ignored", "--nocapture"])
        .env("DCENET_IPAM_ALLOCATOR", format!("{name} {config}"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let out = BufReader::new(child.stdout.take().unwrap());
    let reader = thread::spawn(move || {
        for line in out.lines().map_while(Result::ok) {
            if let Some((_, line)) = line.split_once('@') {
                let _ = lines.send(line.to_owned());
            }
        }
    });
    (child, reader)
}

/// What allocators said that they leased, with the address and when, and what they then began to release.
#[derive(Default)]
struct Said {
    leased: BTreeMap<String, (String, u128)>,
    releasing: BTreeMap<String, u128>,
}

impl Said {
    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["leased", container, address, time] => {
                self.leased.insert(container.to_owned(), (address.to_owned(), time.parse().unwrap()));
            }
            ["releasing", container, time] => drop(self.releasing.insert(container.to_owned(), time.parse().unwrap())),
            _ => panic!("{line}"),
        }
    }

    /// Addresses that were given to somebody while another held them, and how many changed hands properly.
    fn doubled(&self) -> (Vec<String>, usize) {
        let mut holders: BTreeMap<&str, Vec<(u128, &str)>> = BTreeMap::new();
        for (container, (address, time)) in &self.leased {
            holders.entry(address).or_default().push((*time, container));
        }
        let (mut doubled, mut handed_on) = (Vec::new(), 0);
        for (address, mut holders) in holders {
            holders.sort_unstable();
            for pair in holders.windows(2) {
                let ((_, before), (time, after)) = (pair[0], pair[1]);
                if self.releasing.get(before).is_some_and(|t| *t < time) {
                    handed_on += 1;
                } else {
                    doubled.push(format!("{address} of {before} was given to {after}"));
                }
            }
        }
        (doubled, handed_on)
    }

    /// What was acknowledged and not let go: attachments with their addresses.
    fn held(&self) -> BTreeSet<(String, String)> {
        let held = self.leased.iter().filter(|(container, _)| !self.releasing.contains_key(*container));
        held.map(|(container, (address, _))| (format!("net/{container}/eth0"), address.clone())).collect()
    }
}

/// What etcdctl finds in the slots.
fn bound(cluster: &Cluster) -> BTreeSet<(String, String)> {
    let slots = cluster.dump("/dcenet/ipam/k/s/default/4");
    let bound = slots.iter().filter_map(|(key, value)| {
        let record: serde_json::Value = serde_json::from_slice(value).unwrap();
        let [a, b, c, d] = *key.last_chunk().unwrap();
        Some((record["bound"]["by"].as_str()?.to_owned(), format!("{a}.{b}.{c}.{d}")))
    });
    bound.collect()
}

/// What etcdctl finds in the records of attachments.
fn attached(cluster: &Cluster) -> BTreeSet<(String, String)> {
    let records = cluster.dump("/dcenet/ipam/k/t/");
    let attached = records.iter().map(|(key, value)| {
        let record: serde_json::Value = serde_json::from_slice(value).unwrap();
        let address = record["addresses"][0]["address"].as_str().unwrap().split('/').next().unwrap().to_owned();
        (String::from_utf8_lossy(&key["/dcenet/ipam/k/t/".len()..]).into_owned(), address)
    });
    attached.collect()
}

/// Runs allocators, each a process, until they are done, while members are killed and stopped. All must succeed.
fn run_allocators(cluster: &mut Cluster, count: usize, pools: &str) -> Said {
    let config = serde_json::to_string(&ipam_config(&cluster.config(), pools)).unwrap();
    let (lines, history) = mpsc::channel();
    let mut children: Vec<_> = (0..count).map(|n| spawn(&format!("a{n}"), &config, lines.clone())).collect();
    drop(lines);
    let done = AtomicBool::new(false);
    let (kills, pauses) = thread::scope(|scope| {
        scope.spawn(|| {
            for (child, _) in &mut children {
                let status = child.wait().unwrap();
                if !status.success() {
                    eprintln!("an allocator ended with {status}");
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        torment(cluster, &done)
    });
    println!("{} members, {count} allocators: {kills} kills, {pauses} pauses", cluster.size());
    assert!(kills > 0 && pauses > 1);
    for (mut child, reader) in children {
        reader.join().unwrap();
        assert!(child.wait().unwrap().success(), "an allocator failed");
    }
    let mut said = Said::default();
    history.iter().for_each(|line| said.hear(&line));
    said
}

fn allocators_double_and_lose_nothing(members: usize, count: usize, pools: &str) {
    let dir = memory_dir();
    let mut cluster = Cluster::start(members, dir.path());
    let said = run_allocators(&mut cluster, count, pools);
    let per_child = if soak() { 100 } else { 12 };
    assert_eq!((said.leased.len(), said.releasing.len()), (count * per_child, count * (per_child - 3)));
    let (doubled, handed_on) = said.doubled();
    assert_eq!(doubled, Vec::<String>::new());
    assert!(handed_on > count, "addresses changed hands {handed_on} times");
    // In slots and in attachments, and nothing else.
    assert_eq!(bound(&cluster), said.held());
    assert_eq!(attached(&cluster), said.held());
}

#[test]
fn allocators_double_and_lose_nothing_while_members_are_killed_and_stopped() {
    if can_run() {
        let (count, pools) = if soak() { (128, SOAK_POOLS) } else { (32, POOLS) };
        allocators_double_and_lose_nothing(3, count, pools);
    }
}

/// Nobody answers while it is down, and what it acknowledged before is there when it is back.
#[test]
fn allocators_double_and_lose_nothing_while_the_only_member_is_killed_and_stopped() {
    if can_run() {
        let (count, pools) = if soak() { (128, SOAK_POOLS) } else { (32, POOLS) };
        allocators_double_and_lose_nothing(1, count, pools);
    }
}

/// The twin: a member that comes back without its data has lost and doubles, and the judge sees both.
#[test]
fn a_member_that_comes_back_empty_is_seen_to_lose_and_to_double() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let mut cluster = Cluster::start(1, dir.path());
    // Whoever leases two has all there are.
    let pools = r#"[ { "name": "p", "subnet": "10.0.0.0/25", "ranges": ["10.0.0.1-10.0.0.2"] } ]"#;
    let config = ipam_config(&cluster.config(), pools);
    let mut said = Said::default();
    let mut lease = |containers: [&str; 2]| {
        let ipam = Ipam::open(&config, "/nonexistent".as_ref()).unwrap();
        for container in containers {
            let lease = block_on(ipam.lease(&request(container, None))).unwrap();
            said.hear(&format!("leased {container} {} {}", lease.addresses[0].address.addr(), nanoseconds()));
        }
    };
    lease(["a0-0", "a0-1"]);
    cluster.kill(0);
    let data: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path().join("0/data")).collect();
    data.iter().filter(|data| data.exists()).for_each(|data| std::fs::remove_dir_all(data).unwrap());
    cluster.restart(0);
    assert!(cluster.wait());
    assert_eq!((bound(&cluster).len(), attached(&cluster).len()), (0, 0));
    lease(["b0-0", "b0-1"]);
    assert_eq!(said.doubled().0.len(), 2);
    assert_eq!(said.held().difference(&bound(&cluster)).count(), 2);
    assert_eq!(said.held().difference(&attached(&cluster)).count(), 2);
}

#[test]
fn a_thousand_addresses_serve_a_thousand_callers_and_not_one_more() {
    if !can_run() {
        return;
    }
    let dir = memory_dir();
    let cluster = Cluster::start(1, dir.path());
    let pools = r#"[ { "name": "p", "subnet": "10.0.0.0/22", "ranges": ["10.0.0.1-10.0.3.232"] } ]"#;
    let config = ipam_config(&cluster.config(), pools);
    let ipams: Vec<Ipam> = (0..4).map(|_| Ipam::open(&config, "/nonexistent".as_ref()).unwrap()).collect();
    let addresses: BTreeSet<String> = thread::scope(|scope| {
        let callers: Vec<_> = (0..1000)
            .map(|n| {
                let ipam = &ipams[n % ipams.len()];
                scope.spawn(move || {
                    let lease = block_on(ipam.lease(&request(&format!("c{n}"), None)));
                    lease.unwrap_or_else(|e| panic!("caller {n}: {e}")).addresses[0].address.addr().to_string()
                })
            })
            .collect();
        callers.into_iter().map(|c| c.join().unwrap()).collect()
    });
    assert_eq!(addresses.len(), 1000);
    let one_more = block_on(ipams[0].lease(&request("one-more", None)));
    assert!(matches!(one_more, Err(LeaseError::Exhausted { .. })), "{one_more:?}");
    assert_eq!(cluster.dump("/dcenet/ipam/k/s/default/4").len(), 1000);
}
