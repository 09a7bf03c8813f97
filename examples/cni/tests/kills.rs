//! The binary killed at random moments, several pods at once: after DEL nothing is left, and no address is doubled or
//! lost.
//!
//! 100 kills, or 2,000 with `DCENET_SOAK=1`. Each proof that something never happens has beside it a run in which it is
//! made to happen, and is seen.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Node, Pod, Running};
use dcenet_core::model::AttachmentKey;
use dcenet_core::test_support::{HostState, Rung, effort, ping, require};
use serde_json::{Value, json};

/// Pods that come and go at once.
const WORKERS: usize = 4;
/// Addresses of the smaller pool beside network, broadcast, gateway and the claim's.
const DYNAMIC: usize = 12;

/// Numbers without pattern, the same in every run: what a kill meets is chance enough.
struct Random(u64);

impl Random {
    /// xorshift64 (Marsaglia 2003).
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Kills of one verb: when they came, and within which time from the start of the process the next ones come.
#[derive(Debug, Default)]
struct Kills {
    before_reply: AtomicUsize,
    after_reply: AtomicUsize,
    within_us: AtomicU64,
}

impl Kills {
    fn within(limit: Duration) -> Self {
        let within_us = AtomicU64::new(limit.as_micros() as u64);
        Self { within_us, ..Self::default() }
    }

    /// Lets the process run for some part of the time, then kills it.
    fn kill(&self, mut running: Running, random: &mut Random) -> Option<Result<Value, Value>> {
        let within = self.within_us.load(Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(within * (random.next() % 1000) / 1000));
        running.kill();
        let answer = running.wait();
        // The machine is busy by turns: the time follows it, so that some five of seven come before the reply.
        let (phase, within) = match answer {
            None => (&self.before_reply, within + within / 20),
            Some(_) => (&self.after_reply, within - within / 8),
        };
        phase.fetch_add(1, Ordering::Relaxed);
        self.within_us.store(within, Ordering::Relaxed);
        answer
    }

    fn early(&self) -> usize {
        self.before_reply.load(Ordering::Relaxed)
    }

    fn total(&self) -> usize {
        self.early() + self.after_reply.load(Ordering::Relaxed)
    }
}

/// Who was told that it has which address. An address that two have at once is doubled.
#[derive(Debug, Default)]
struct Told {
    holders: Mutex<BTreeMap<String, String>>,
    doubled: AtomicUsize,
}

impl Told {
    fn add(&self, pod: &Pod, result: &Value) {
        let mut holders = self.holders.lock().unwrap();
        for address in addresses(result) {
            let before = holders.insert(address, pod.container.clone());
            let rival = before.is_some_and(|holder| holder != pod.container);
            self.doubled.fetch_add(usize::from(rival), Ordering::Relaxed);
        }
    }

    /// Called before DEL, which may free the address before it returns.
    fn forget(&self, pod: &Pod) {
        self.holders.lock().unwrap().retain(|_, holder| *holder != pod.container);
    }
}

fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().expect("the result has ips");
    ips.iter().map(|ip| ip["address"].as_str().expect("an address is text").to_owned()).collect()
}

/// A node on which addresses are few and used again at once.
fn node() -> Node {
    scarce(Node::new())
}

fn scarce(mut node: Node) -> Node {
    node.config["ipam"]["cooldown"] = json!("0s");
    node.config["ipam"]["pools"][0]["subnet"] = json!("10.20.0.0/28");
    node.config["ipam"]["pools"][0]["claims"]["shop/db"]["address"] = json!("10.20.0.7");
    node.warm();
    node
}

/// What one process of each verb takes here and now, several at once.
fn durations(node: &Node) -> [Duration; 2] {
    let times: Mutex<[Vec<Duration>; 2]> = Mutex::default();
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let times = &times;
            scope.spawn(move || {
                let pod = node.pod(&format!("calibration{worker}"));
                for _ in 0..3 {
                    for (verb, name) in ["ADD", "DEL"].into_iter().enumerate() {
                        let begin = Instant::now();
                        node.start(name, &pod).wait().expect("not killed").expect("the verb succeeds");
                        times.lock().unwrap()[verb].push(begin.elapsed());
                    }
                }
            });
        }
    });
    times.into_inner().unwrap().map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2]
    })
}

/// Everything below a directory, by path.
fn files(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).expect("the directory is ours").flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path().display().to_string());
        }
    }
    found.sort();
    found
}

/// A pod's echo requests to some addresses, sent until told to stop.
#[derive(Debug, Default)]
struct Pings {
    stop: AtomicBool,
    answered: AtomicUsize,
    lost: AtomicUsize,
}

impl Pings {
    fn run(&self, pod: &Pod, addresses: &[&str]) {
        while !self.stop.load(Ordering::Relaxed) {
            for address in addresses {
                // Longer than this busy machine ever takes, and shorter than anybody would call working.
                let answer = ping(&pod.netns, address.parse().unwrap(), Duration::from_millis(500));
                let count = if answer.is_ok() { &self.answered } else { &self.lost };
                count.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn await_more(counter: &AtomicUsize) {
        let (before, begin) = (counter.load(Ordering::Relaxed), Instant::now());
        while counter.load(Ordering::Relaxed) == before {
            assert!(begin.elapsed() < Duration::from_secs(20), "no more than {before}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// One life of a pod, with ADD and DEL each killed at some moment, then finished by the next.
fn live(node: &Node, pod: &Pod, random: &mut Random, kills: &[Kills; 2], told: &Told) {
    let answer = kills[0].kill(node.start("ADD", pod), random);
    if let Some(Ok(result)) = &answer {
        told.add(pod, result);
    }
    // A runtime may try once more, or give up.
    if random.next().is_multiple_of(2) {
        let result = node.add(pod).expect("ADD after a killed one");
        told.add(pod, &result);
        node.check(pod, &result).expect("CHECK after a healed ADD");
        pod.ping("10.20.0.1");
    }
    told.forget(pod);
    kills[1].kill(node.start("DEL", pod), random);
    node.del(pod).expect("DEL after a killed one");
}

#[test]
fn killed_at_random_moments_nothing_is_left_and_no_address_is_doubled_or_lost() {
    if require(Rung::Netns) {
        kill_at_random_moments(&node());
    }
}

/// The owner's knowledge is part of what is left or not, and so is the policy on devices.
#[test]
fn killed_under_policy_nothing_is_left_and_no_address_is_doubled_or_lost() {
    if require(Rung::Kernel) {
        kill_at_random_moments(&scarce(Node::under_policy()));
    }
}

fn kill_at_random_moments(node: &Node) {
    let wanted = effort(6, 100, 2000);
    let (neighbour, partner) = (node.pod("neighbour"), node.pod("partner"));
    let told = Told::default();
    told.add(&neighbour, &node.add(&neighbour).unwrap());
    let partner_result = node.add(&partner).unwrap();
    told.add(&partner, &partner_result);
    let partner_addresses: Vec<String> =
        addresses(&partner_result).iter().map(|a| a.split('/').next().unwrap_or(a).to_owned()).collect();
    let targets: Vec<&str> = ["10.20.0.1"].into_iter().chain(partner_addresses.iter().map(String::as_str)).collect();

    // One of the pods has a claim, which must keep its address throughout.
    let pods: Vec<Pod> = (0..WORKERS).map(|w| node.pod(if w == 0 { "db" } else { "web" })).collect();
    let kills = durations(node).map(|whole| Kills::within(whole * 2 / 3));
    // The claim of `db` is in the store from the first ADD on.
    node.add(&pods[0]).unwrap();
    node.del(&pods[0]).unwrap();
    let before = (node.policy(), node.host.state(), node.store(), files(&node.host.run_dir()));
    let inside: Vec<HostState> = pods.iter().map(Pod::state).collect();

    let pings = Pings::default();
    std::thread::scope(|scope| {
        scope.spawn(|| pings.run(&neighbour, &targets));
        let workers: Vec<_> = pods
            .iter()
            .enumerate()
            .map(|(worker, pod)| {
                let (kills, told) = (&kills, &told);
                scope.spawn(move || {
                    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (worker as u64 + 1));
                    while kills.iter().map(Kills::total).sum::<usize>() < wanted {
                        live(node, pod, &mut random, kills, told);
                    }
                })
            })
            .collect();
        let ended: Vec<_> = workers.into_iter().map(|w| w.join()).collect();
        pings.stop.store(true, Ordering::Relaxed);
        for worker in ended {
            worker.expect("the worker's own message says why");
        }
    });
    let (answered, lost) = (pings.answered.load(Ordering::Relaxed), pings.lost.load(Ordering::Relaxed));

    let under = if node.owner.is_some() { " under policy" } else { "" };
    for (verb, kills) in ["ADD", "DEL"].into_iter().zip(&kills) {
        println!(
            "{verb}{under}: {} killed before the reply, {} after it",
            kills.early(),
            kills.total() - kills.early()
        );
    }
    println!("the neighbour had {answered} echo replies meanwhile and missed {lost}");
    let (early, total) = (kills.iter().map(Kills::early).sum::<usize>(), kills.iter().map(Kills::total).sum::<usize>());
    assert!(total >= wanted && early * 2 >= total, "{early} of {total} kills came before the reply");

    // The owner may have heard of the last pod's end a moment ago: what it knows comes first.
    assert_eq!(node.policy(), before.0);
    assert_eq!(before.1.diff(&node.host.state()), "");
    for (pod, inside) in pods.iter().zip(&inside) {
        assert_eq!(inside.diff(&pod.state()), "");
    }
    assert_eq!(node.store(), before.2);
    assert_eq!(files(&node.host.run_dir()), before.3);
    assert_eq!(told.doubled.load(Ordering::Relaxed), 0);
    assert!(answered > effort(10, 50, 50) && lost == 0, "the neighbour had {answered} replies and missed {lost}");
    // Every address that should be free can be had, once: all but the neighbour's and its partner's.
    let more: Vec<Pod> = (0..DYNAMIC - 1).map(|n| node.pod(&format!("last{n}"))).collect();
    let answers: Vec<_> = more.iter().map(|pod| node.add(pod)).collect();
    let (had, refused) = answers.split_at(DYNAMIC - 2);
    assert!(had.iter().all(Result::is_ok), "{answers:?}");
    assert_eq!(refused[0].as_ref().unwrap_err()["code"], 11);
    for (pod, result) in more.iter().zip(answers.iter().flatten()) {
        told.add(pod, result);
    }
    assert_eq!(told.doubled.load(Ordering::Relaxed), 0);
}

#[test]
fn without_del_what_a_killed_add_leaves_is_seen() {
    if require(Rung::Netns) {
        see_what_killed_adds_leave(&node());
    }
}

#[test]
fn without_del_what_an_add_killed_under_policy_leaves_is_seen() {
    if require(Rung::Kernel) {
        see_what_killed_adds_leave(&scarce(Node::under_policy()));
    }
}

fn see_what_killed_adds_leave(node: &Node) {
    let [adds, _] = durations(node).map(Kills::within);
    let before = (node.host.state(), node.store(), node.host.records(), node.policy());
    let mut random = Random(7);
    let (mut links, mut bindings, mut records, mut inside, mut endpoints) = (0, 0, 0, 0, 0);
    for n in 0.. {
        assert!(
            n < 200,
            "{links} links, {bindings} bindings, {records} records, {inside} pods, {endpoints} endpoints left by 200 kills"
        );
        let pod = node.pod("web");
        let untouched = pod.state();
        if adds.kill(node.start("ADD", &pod), &mut random).is_none() {
            links += usize::from(before.0 != node.host.state());
            bindings += usize::from(before.1 != node.store());
            records += usize::from(before.2 != node.host.records());
            inside += usize::from(untouched != pod.state());
            endpoints += usize::from(node.policy().iter().any(|line| line.contains(&pod.container)));
        }
        node.del(&pod).unwrap();
        assert_eq!(node.policy(), before.3);
        assert_eq!(before.0.diff(&node.host.state()), "");
        assert_eq!((&before.1, &before.2), (&node.store(), &node.host.records()));
        let has_owner = usize::from(node.owner.is_some());
        if [links, bindings, records, inside].iter().all(|seen| *seen > 0) && endpoints >= has_owner {
            println!(
                "of {} kills: {links} links, {bindings} bindings, {records} records, {inside} pods, {endpoints} endpoints",
                n + 1
            );
            break;
        }
    }
}

#[test]
fn an_address_freed_under_a_living_pod_is_seen_as_doubled() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    let told = Told::default();
    let pod = node.pod("web");
    let result = node.add(&pod).unwrap();
    told.add(&pod, &result);
    // What a plugin would do that frees addresses first and is killed before it removes the device.
    let key = AttachmentKey {
        network: "shop".parse().unwrap(),
        container: pod.container.parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    };
    pollster::block_on(node.ipam().release_current(&key)).unwrap();
    // An address that was in use comes last.
    let rivals: Vec<Pod> = (0..DYNAMIC).map(|n| node.pod(&format!("rival{n}"))).collect();
    for rival in &rivals {
        told.add(rival, &node.add(rival).unwrap());
    }
    // The IPv6 pool is too large for that to come to pass here.
    assert_eq!(told.doubled.load(Ordering::Relaxed), 1);
    for rival in rivals.iter().chain([&pod]) {
        node.del(rival).unwrap();
    }
}

#[test]
fn an_interrupted_neighbour_is_seen() {
    if !require(Rung::Netns) {
        return;
    }
    let node = node();
    let neighbour = node.pod("neighbour");
    node.add(&neighbour).unwrap();
    let pings = Pings::default();
    std::thread::scope(|scope| {
        scope.spawn(|| pings.run(&neighbour, &["10.20.0.1"]));
        let stop = Stop(&pings);
        Pings::await_more(&pings.answered);
        node.host.root().sh("ip link set dc0 down");
        Pings::await_more(&pings.lost);
        node.host.root().sh("ip link set dc0 up");
        Pings::await_more(&pings.answered);
        drop(stop);
    });
}

/// Ends the pinging also where a test fails.
struct Stop<'a>(&'a Pings);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
    }
}
