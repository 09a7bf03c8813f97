//! Whatever happened to the files of a store: opening it fails or shows what was once committed, and never a binding
//! that nobody made.
//!
//! The first byte tells which file is damaged and how: with the rest of the input in its place, or with the rest as
//! edits of three bytes, place and difference, which leave checksums right elsewhere.

#![no_main]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use dcenet_core::provider::{AddressSource, LeaseRequest};
use dcenet_ipam::{Ipam, IpamConfig};
use libfuzzer_sys::fuzz_target;
use pollster::block_on;

const IN_MEMORY: &str = "/dev/shm/dcenet-fuzz-";
const FILES: [&str; 3] = ["log", "snap", "lock"];

struct Base {
    config: IpamConfig,
    directory: PathBuf,
    files: [Vec<u8>; 3],
    /// Every binding that there ever was.
    made: BTreeSet<String>,
}

static BASE: LazyLock<Base> = LazyLock::new(|| {
    let config: IpamConfig = serde_json::from_str(
        r#"{ "store": { "kind": "log" }, "pools": [{ "name": "p", "subnet": "10.0.0.0/24" }], "cooldown": "0s" }"#,
    )
    .expect("the configuration is right");
    clear_earlier();
    let directory = PathBuf::from(format!("{IN_MEMORY}{}", std::process::id()));
    let state = directory.join("base");
    let ipam = Ipam::open(&config, &state).expect("a new store");
    let mut made = BTreeSet::new();
    // So many that the log was merged into a snapshot, and some more.
    for n in 0..300 {
        let attachment = serde_json::from_value(
            serde_json::json!({ "network": "n", "container": format!("c{n}"), "ifname": "eth0" }),
        );
        let request = LeaseRequest::new(attachment.expect("a key"));
        let lease = block_on(ipam.lease(&request)).expect("a free address");
        made.insert(format!("{} {}", request.attachment, lease.addresses[0].address.addr()));
        if n % 3 == 0 {
            block_on(ipam.release_current(&request.attachment)).expect("to release");
        }
    }
    let store = state.join("ipam");
    let files = FILES.map(|name| fs::read(store.join(name)).expect("the store's file"));
    assert!(files.iter().all(|f| !f.is_empty()), "the log was merged");
    Base { config, directory, files, made }
});

/// A fuzzer ends without a chance to clean up.
fn clear_earlier() {
    for entry in fs::read_dir("/dev/shm").expect("a file system in memory").flatten() {
        let path = entry.path().display().to_string();
        if let Some(process) = path.strip_prefix(IN_MEMORY)
            && !PathBuf::from(format!("/proc/{process}")).exists()
        {
            fs::remove_dir_all(&path).expect("an earlier run's directory");
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let base = &*BASE;
    let Some((&how, rest)) = input.split_first() else { return };
    let state = base.directory.join("state");
    let store = state.join("ipam");
    fs::create_dir_all(&store).expect("a directory in memory");
    let damaged = usize::from(how & 0x3f) % FILES.len();
    for (at, name) in FILES.into_iter().enumerate() {
        let mut bytes = base.files[at].clone();
        if at == damaged && how & 0x80 != 0 {
            bytes = rest.to_vec();
        } else if at == damaged {
            let (edits, cut) = rest.as_chunks::<3>();
            for [high, low, difference] in edits {
                let place = usize::from(u16::from_be_bytes([*high, *low])) % bytes.len();
                bytes[place] ^= difference;
            }
            // A rest of one byte cuts the file off, in parts of 256.
            if let [part] = cut {
                bytes.truncate(bytes.len() * usize::from(*part) / 256);
            }
        }
        // Without the notes of the processes, as after a loss of power.
        if name == "lock" && how & 0x40 != 0 {
            bytes.clear();
        }
        fs::write(store.join(name), bytes).expect("a file in memory");
    }
    let Ok(ipam) = Ipam::open(&base.config, &state) else { return };
    let Ok(bindings) = block_on(ipam.bindings(None)) else { return };
    for binding in bindings {
        let line = format!("{} {}", binding.attachment, binding.address.addr());
        assert!(base.made.contains(&line), "{line} was never made");
    }
});
