//! Many processes on one log, killed at random.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use dcenet_core::provider::AddressSource;
use dcenet_ipam::Ipam;
use pollster::block_on;

use crate::{attachment, config, request};

/// Wide enough for what killed workers leave behind, at most 4 leases a life.
const JSON: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/24" } ] }"#;
const WORKERS: usize = 8;
const LEASES: usize = 100;

fn nanoseconds() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos()
}

/// Leases and releases as the CNI binary does: the store is opened for each operation. Tells what it begins and what
/// was acknowledged. Not a test of its own: `kill_nine_at_random...` starts it with `DCENET_IPAM_WORKER`.
#[test]
#[ignore = "run by another test"]
fn worker() {
    let Some(job) = std::env::var_os("DCENET_IPAM_WORKER") else { panic!("run by another test") };
    let job = job.into_string().unwrap();
    let (name, dir) = job.split_once(' ').unwrap();
    let say = |text: String| {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes()).unwrap();
        out.flush().unwrap();
    };
    for i in 0..LEASES {
        let container = format!("{name}-{i}");
        say(format!("@leasing {container}\n"));
        let lease = block_on(open(Path::new(dir)).lease(&request(&container, None))).unwrap();
        let (address, sequence) = (lease.addresses[0].address.addr(), lease.addresses[0].sequence);
        say(format!("@leased {container} {address} {sequence} {}\n", nanoseconds()));
        // Up to three at a time.
        if let Some(old) = i.checked_sub(3) {
            let container = format!("{name}-{old}");
            say(format!("@releasing {container} {}\n", nanoseconds()));
            block_on(open(Path::new(dir)).release_current(&attachment(&container))).unwrap();
            say(format!("@released {container}\n"));
        }
    }
    say("@end\n".to_owned());
}

fn open(dir: &Path) -> Ipam {
    Ipam::open(&config(JSON), dir).unwrap()
}

fn spawn(name: &str, dir: &Path, lines: mpsc::Sender<String>) -> (Child, thread::JoinHandle<()>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "processes::worker", "--ignored", "--nocapture"])
        .env("DCENET_IPAM_WORKER", format!("{name} {}", dir.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
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

#[test]
fn kill_nine_at_random_doubles_and_loses_nothing() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (lines, history) = mpsc::channel();
    let kills: usize = thread::scope(|scope| {
        let slots: Vec<_> = (0..WORKERS)
            .map(|slot| {
                let (lines, dir) = (lines.clone(), dir.path());
                scope.spawn(move || {
                    let mut kills = 0;
                    // Six lives, five of them cut short, then one to the end.
                    for life in 0..6 {
                        let (mut child, reader) = spawn(&format!("w{slot}-{life}"), dir, lines.clone());
                        if life < 5 {
                            let bits = nanoseconds() as u64 / 100 + slot as u64 * 7919;
                            thread::sleep(Duration::from_micros(5000 + bits % 60_000));
                            if child.try_wait().unwrap().is_none() {
                                kills += 1;
                                child.kill().unwrap();
                            }
                            child.wait().unwrap();
                        } else {
                            assert!(child.wait().unwrap().success(), "a worker failed");
                        }
                        reader.join().unwrap();
                    }
                    kills
                })
            })
            .collect();
        slots.into_iter().map(|s| s.join().unwrap()).sum()
    });
    drop(lines);

    let (mut leased, mut releasing, mut released) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
    let (mut begun, mut acknowledged) = (BTreeSet::new(), 0);
    for line in history {
        let words: Vec<&str> = line.split(' ').collect();
        let word = |i: usize| words[i].to_owned();
        match words[0] {
            "leasing" => drop(begun.insert(word(1))),
            "leased" if words.len() == 5 => {
                acknowledged += 1;
                let (sequence, time): (u64, u128) = (words[3].parse().unwrap(), words[4].parse().unwrap());
                leased.insert(word(1), (word(2), sequence, time));
            }
            "releasing" if words.len() == 3 => drop(releasing.insert(word(1), words[2].parse::<u128>().unwrap())),
            "released" => drop(released.insert(word(1))),
            _ => {}
        }
    }
    assert!(kills >= WORKERS * 2, "only {kills} were killed in time");
    assert!(acknowledged >= WORKERS * LEASES, "{acknowledged} leases");

    // While an address was held, nobody else got it.
    let mut by_address: BTreeMap<&str, Vec<(u64, u128, &str)>> = BTreeMap::new();
    for (container, (address, sequence, time)) in &leased {
        by_address.entry(address).or_default().push((*sequence, *time, container));
    }
    let mut handed_on = 0;
    for (address, mut holders) in by_address {
        holders.sort_unstable();
        for pair in holders.windows(2) {
            let ((one, _, before), (two, time, after)) = (pair[0], pair[1]);
            assert!(one < two, "sequence {one} was given to {before} and {after}");
            let let_go = releasing.get(before);
            assert!(let_go.is_some_and(|t| *t < time), "{address} of {before} was given to {after}");
            handed_on += 1;
        }
    }
    assert!(handed_on > 100, "addresses changed hands {handed_on} times");

    // What was acknowledged and not let go is there, what was released is not, and there is nothing unheard of.
    let ipam = open(dir.path());
    let bindings = block_on(ipam.bindings(None)).unwrap();
    let held: BTreeMap<String, (String, u64)> = bindings
        .iter()
        .map(|b| (b.attachment.container.to_string(), (b.address.addr().to_string(), b.sequence)))
        .collect();
    assert_eq!(held.values().map(|(a, _)| a).collect::<BTreeSet<_>>().len(), bindings.len(), "an address twice");
    for (container, (address, sequence, _)) in &leased {
        if !releasing.contains_key(container) {
            assert_eq!(held.get(container), Some(&(address.clone(), *sequence)), "{container} lost its address");
        }
    }
    assert!(held.keys().all(|c| begun.contains(c) && !released.contains(c)));

    // Nothing leaks: once the rest is collected, every address is free.
    block_on(ipam.retain(&"net".parse().unwrap(), &[])).unwrap();
    let usage = block_on(ipam.usage()).unwrap().remove(0);
    assert_eq!((usage.bound, usage.kept, usage.size), (0, 0, 254));
    for i in 0..254 {
        block_on(ipam.lease(&request(&format!("all-{i}"), None))).unwrap();
    }
}
