//! The redb store: the suite, its one owner, and kills.

use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dcenet_core::provider::AddressSource;
use dcenet_ipam::Ipam;
use dcenet_ipam::store::redb::RedbStore;
use dcenet_ipam::store::{Batch, Store, StoreError, Write, conformance};
use pollster::block_on;

use crate::{attachment, config, request};

#[test]
fn conforms() {
    let dirs = tempfile::tempdir_in("/dev/shm").unwrap();
    let number = AtomicU64::new(0);
    conformance::all(|| {
        let dir = dirs.path().join(number.fetch_add(1, Ordering::Relaxed).to_string());
        Arc::new(RedbStore::open(&dir).unwrap())
    });
}

#[test]
fn has_one_owner_and_private_files() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("a/b");
    let store = RedbStore::open(&deep).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&deep), mode(&deep.join("ipam.redb"))), (0o700, 0o600));
    let error = RedbStore::open(&deep).unwrap_err();
    assert!(matches!(&error, StoreError::Unavailable(text) if text.contains("ipam.redb")), "{error}");
    let batch = Batch { writes: vec![Write::Put(b"k".to_vec(), b"v".to_vec())], request_id: 7, ..Batch::default() };
    let made = block_on(store.commit(&batch)).unwrap();
    drop(store);
    // The request is remembered, too.
    assert_eq!(block_on(RedbStore::open(&deep).unwrap().commit(&batch)).unwrap(), made);
    std::fs::write(deep.join("ipam.redb"), vec![7; 8192]).unwrap();
    assert!(RedbStore::open(&deep).is_err());
}

const JSON: &str = r#"{ "cooldown": "0s", "pools": [ { "name": "p", "subnet": "10.0.0.0/16" } ] }"#;

/// Leases until it is killed. Not a test of its own: it is started with `DCENET_IPAM_REDB`.
#[test]
#[ignore = "run by another test"]
fn leaser() {
    let Some(job) = std::env::var_os("DCENET_IPAM_REDB") else { panic!("run by another test") };
    let job = job.into_string().unwrap();
    let [kind, life, dir] = job.splitn(3, ' ').collect::<Vec<_>>()[..] else { panic!("{job}") };
    let store = match kind {
        "durable" => RedbStore::open(Path::new(dir)).unwrap(),
        _ => RedbStore::open_without_durability(Path::new(dir)).unwrap(),
    };
    let ipam = Ipam::new(&config(JSON), Arc::new(store)).unwrap();
    for i in 0.. {
        let container = format!("c{life}-{i}");
        let lease = block_on(ipam.lease(&request(&container, None))).unwrap();
        let (address, sequence) = (lease.addresses[0].address.addr(), lease.addresses[0].sequence);
        let mut out = std::io::stdout().lock();
        out.write_all(format!("@{container} {address} {sequence}\n").as_bytes()).unwrap();
        out.flush().unwrap();
    }
}

/// Kills a process after it has told of some leases, again and again; returns how many it told of and how many of these
/// are not there.
fn kills(kind: &str, lives: usize) -> (usize, usize) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut told: Vec<String> = Vec::new();
    for life in 0..lives {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "redb::leaser", "--ignored", "--nocapture"])
            .env("DCENET_IPAM_REDB", format!("{kind} {life} {}", dir.path().display()))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Wherever it is when it has told so many.
        let until = 3 + life * 5 % 17;
        let mut heard = 0;
        for line in lines.map_while(Result::ok) {
            let Some((_, line)) = line.split_once('@') else { continue };
            if line.split(' ').count() == 3 {
                told.push(line.to_owned());
            }
            heard += 1;
            if heard == until {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(heard >= until, "life {life} ended by itself after {heard} leases");
    }
    let ipam = Ipam::new(&config(JSON), Arc::new(RedbStore::open(dir.path()).unwrap())).unwrap();
    let there: Vec<String> = block_on(ipam.bindings(None))
        .unwrap()
        .iter()
        .map(|b| format!("{} {} {}", b.attachment.container, b.address.addr(), b.sequence))
        .collect();
    let lost = told.iter().filter(|line| !there.contains(line)).count();
    if lost == 0 {
        let mut addresses: Vec<_> = there.iter().map(|line| line.split(' ').nth(1)).collect();
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), there.len(), "an address twice");
        // At most one lease a life was made and not told.
        assert!(there.len() <= told.len() + lives, "{} are there, {} were told", there.len(), told.len());
        block_on(ipam.release_current(&attachment("nobody"))).unwrap();
    }
    (told.len(), lost)
}

#[test]
fn kill_nine_loses_nothing_that_was_acknowledged() {
    let (told, lost) = kills("durable", 12);
    assert!(told >= 100, "{told} leases");
    assert_eq!(lost, 0);
}

#[test]
fn without_durability_kill_nine_does_lose() {
    let (told, lost) = kills("volatile", 3);
    assert!(lost > told / 2, "{lost} of {told}");
}
