//! `sriov-discovery`: what a call that knows nothing pays to learn which virtual functions there are, on a tree of 1,000 PCI
//! functions: 8 ports with 124 virtual functions each, every one with a driver and a network device. The peer is a walk that
//! asks every function for the same ten things and draws no conclusions. The tree is in memory, and its names are in the
//! kernel's cache: of a real sysfs that was not looked at before, the system calls are the same, and the kernel makes the
//! entries besides.
//!
//! Then one function that changed is read anew, and two are chosen from all, near a GPU and on different ports.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::Instant;

use dcenet_benches::{Row, Summary, rounds, say};
use dcenet_sriov::PciAddress;
use dcenet_sriov::allocate::{Candidates, Near, Request, Shape};
use dcenet_sriov::inventory::{Inventory, locate};
use dcenet_sriov::test_support::{Port, Tree};

const ID: &str = "sriov-discovery";
const PORTS: usize = 8;
const FUNCTIONS: u16 = 124;
const GPU: &str = "0000:f0:00.0";

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory)? } else { tempfile::tempdir()? };
    let mut tree = Tree::new(directory.path());
    for n in 0..PORTS {
        let (address, name) = (format!("0000:{:02x}:00.0", 0x10 + 4 * n), format!("ens{n}"));
        tree.port(&Port { vfs: FUNCTIONS, total_vfs: FUNCTIONS, ..Port::igb(&address, &name) });
    }
    tree.device(GPU, &["pci0000:00", "0000:00:02.0"], (0x10de, 0x2330), 0x03_0200, 0);
    let sysfs = tree.sysfs();
    let inventory = Inventory::scan(&sysfs)?;
    let members: Vec<PciAddress> = inventory.vfs().map(|(_, vf)| vf.address).collect();
    if (members.len() + PORTS, inventory.notes.len()) != (1_000, 0) {
        return Err(format!("{} of 992 functions were found: {:?}", members.len(), inventory.notes).into());
    }
    let last = *members.last().ok_or("there are functions")?;
    let near = vec![Near { name: "gpu".to_owned(), location: locate(&sysfs, GPU.parse()?)? }];
    let wanted = Request { near, shape: Shape::Distinct, ..Request::of(2) };

    let runs = rounds(40, 5);
    let [mut scans, mut walks, mut ones, mut choices] = [const { Vec::new() }; 4];
    // The first round warms.
    for round in 0..=runs {
        let (scan, found) = timed(|| Inventory::scan(&sysfs));
        let (walk, seen) = timed(|| walk(directory.path()));
        let (mut inventory, seen) = (found?, seen?);
        if seen < 992 * 8 {
            return Err(format!("the walk saw {seen} things").into());
        }
        let (one, ()) = timed(|| inventory.refresh_vf(&sysfs, last));
        let (choice, chosen) = timed(|| Candidates::of(&inventory, &members, |_| false).choose(&wanted));
        if chosen.map_err(|refusal| refusal.to_string())?.functions.len() != 2 {
            return Err("two were wanted".into());
        }
        if round > 0 {
            scans.push(scan);
            walks.push(walk);
            ones.push(one);
            choices.push(choice);
        }
    }
    say(format_args!("{ID}: {} functions of {PORTS} ports", members.len()));
    let bound = |limit: f64| vec![limit; runs];
    let mut summary = Summary::default();
    summary.add(Row::compare(ID, "1,000 functions", 1.0, &scans, ("a plain walk", &walks)));
    summary.add(Row::compare(ID, "1,000 functions, bound", 1.0, &scans, ("40 ms", &bound(40.0))));
    summary.add(Row::compare(ID, "one function", 1.0, &ones, ("1 ms", &bound(1.0))));
    summary.add(Row::compare(ID, "two of all, near a GPU", 1.0, &choices, ("1 ms", &bound(1.0))));
    summary.write();
    Ok(())
}

/// Milliseconds, and what came of it.
fn timed<T>(work: impl FnOnce() -> T) -> (f64, T) {
    let begin = Instant::now();
    let outcome = work();
    (begin.elapsed().as_secs_f64() * 1e3, outcome)
}

/// How many attributes, links and names all functions have of those that matter. Each is asked for everything, as by whoever
/// does not know which are ports.
fn walk(root: &Path) -> Result<usize, io::Error> {
    let mut seen = 0;
    let mut text = [0; 4096];
    let mut attribute = |path: &Path| File::open(path).and_then(|mut file| file.read(&mut text)).is_ok();
    for entry in fs::read_dir(root.join("bus/pci/devices"))? {
        let function = entry?.path();
        for name in ["class", "vendor", "device", "numa_node", "sriov_totalvfs"] {
            seen += usize::from(attribute(&function.join(name)));
        }
        for name in ["driver", "iommu_group", "physfn"] {
            seen += usize::from(fs::read_link(function.join(name)).is_ok());
        }
        for class in ["net", "infiniband"] {
            seen += fs::read_dir(function.join(class)).map_or(0, Iterator::count);
        }
    }
    Ok(seen)
}
