//! Reading trees, whole and broken.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use dcenet_sriov::inventory::{Inventory, LinkType, Note, Problem, VfDriverKind, locate};
use dcenet_sriov::sysfs::{Sysfs, SysfsDir};
use dcenet_sriov::test_support::{Port, Tree, VfOf};
use dcenet_sriov::{Distance, PciAddress, VfIndex};
use proptest::prelude::*;
use tempfile::TempDir;

fn tree(ports: &[Port<'_>]) -> (TempDir, Tree) {
    let directory = tempfile::tempdir().unwrap();
    let mut tree = Tree::new(directory.path());
    for port in ports {
        tree.port(port);
    }
    (directory, tree)
}

fn address(text: &str) -> PciAddress {
    text.parse().unwrap()
}

fn scan(tree: &Tree) -> Inventory {
    Inventory::scan(&tree.sysfs()).unwrap()
}

#[test]
fn an_igb_port_is_told_whole() {
    let (_directory, tree) = tree(&[Port::igb("0000:01:00.0", "ens1")]);
    let all = scan(&tree);
    assert_eq!(all.notes, []);
    let [pf] = &all.functions[..] else { panic!("{all:?}") };
    assert_eq!((pf.address, pf.ids.to_string().as_str()), (address("0000:01:00.0"), "8086:10c9"));
    assert_eq!((pf.driver.as_deref(), pf.total_vfs, pf.num_vfs, pf.autoprobe), (Some("igb"), 7, 7, true));
    assert_eq!(
        (pf.location.numa, &pf.location.bridges[..]),
        (None, &["pci0000:00", "0000:00:02.0"].map(String::from)[..])
    );
    let [netdev] = &pf.netdevs[..] else { panic!("{pf:?}") };
    assert_eq!((netdev.name.as_str(), netdev.link_type, netdev.dev_port), ("ens1", LinkType::Ether, 0));
    assert_eq!((netdev.index.unwrap().get(), netdev.mac.unwrap().to_string().as_str()), (2, "52:54:00:00:00:02"));
    assert!(pf.representors.is_empty() && pf.rdma.is_empty());
    // 82576 datasheet, 9.6.4: first VF offset 0x80, VF stride 2.
    let addresses: Vec<String> = pf.vfs.iter().map(|vf| vf.address.to_string()).collect();
    let expected = ["10.0", "10.2", "10.4", "10.6", "11.0", "11.2", "11.4"].map(|end| format!("0000:01:{end}"));
    assert_eq!(addresses, expected);
    let vf = &pf.vfs[3];
    assert_eq!((vf.index, vf.ids.to_string().as_str()), (VfIndex(3), "8086:10ca"));
    assert_eq!((&vf.driver, &vf.netdevs[..]), (&VfDriverKind::Kernel("igbvf".into()), &["ens1v3".to_owned()][..]));
    assert_eq!((vf.iommu_group, vf.is_elsewhere()), (Some(14), false));
    assert_eq!(all.vf(vf.address).unwrap().0.address, pf.address);
    assert_eq!(all.port_of(vf.address).unwrap().address, pf.address);
}

#[test]
fn rdma_devices_and_representors_belong_to_their_functions() {
    let mlx5 = Port { switch_id: Some("aabbccddeeff"), ..Port::mlx5("0000:81:00.0", "ens2np0") };
    let (_directory, tree) = tree(&[mlx5, Port::ice("0000:3b:00.0", "ens3")]);
    let all = scan(&tree);
    assert_eq!(all.notes, []);
    let [ice, mlx5] = &all.functions[..] else { panic!("{all:?}") };
    assert_eq!((ice.vfs.len(), ice.vfs[0].address.to_string().as_str()), (16, "0000:3b:01.0"));
    assert_eq!((ice.location.numa, mlx5.location.numa), (Some(0), Some(1)));
    let [uplink] = &mlx5.netdevs[..] else { panic!("{mlx5:?}") };
    assert_eq!((uplink.name.as_str(), uplink.phys_port_name.as_deref()), ("ens2np0", Some("p0")));
    let found: Vec<_> = mlx5.representors.iter().map(|r| (r.name.as_str(), r.pf_number, r.vf.0)).collect();
    assert_eq!(found, [("ens2np0_0", 0, 0), ("ens2np0_1", 0, 1), ("ens2np0_2", 0, 2), ("ens2np0_3", 0, 3)]);
    assert_eq!(mlx5.representors[0].phys_switch_id, "aabbccddeeff");
    assert_eq!(mlx5.rdma[0].name, "mlx5_0");
    assert_eq!(mlx5.vfs[1].rdma[0].name, "mlx5_2");
    assert_eq!(mlx5.vfs[1].rdma[0].character_devices, ["uverbs2", "issm2", "umad2"]);
}

#[test]
fn functions_of_user_space_and_of_nobody_are_told_apart() {
    let vfio = Port { vf: VfOf::UserSpace("vfio-pci"), ..Port::igb("0000:01:00.0", "ens1") };
    let bare = Port { vf: VfOf::Nobody, ..Port::igb("0000:02:00.0", "ens2") };
    let (_directory, tree) = tree(&[vfio, bare]);
    let all = scan(&tree);
    assert_eq!(all.notes, []);
    assert_eq!(all.functions[0].vfs[0].driver, VfDriverKind::UserSpace("vfio-pci".into()));
    assert_eq!((all.functions[1].vfs.len(), &all.functions[1].vfs[0].driver), (7, &VfDriverKind::None));
    assert!(all.vfs().all(|(_, vf)| !vf.is_elsewhere() && vf.netdevs.is_empty()));
}

#[test]
fn what_is_no_network_adapter_is_left_out() {
    let (_directory, mut tree) = tree(&[Port::igb("0000:01:00.0", "ens1")]);
    let nvme = tree.device("0000:05:00.0", &["pci0000:00", "0000:00:05.0"], (0x1b36, 0x10), 0x01_0802, 0);
    fs::write(nvme.join("sriov_totalvfs"), "127\n").unwrap();
    let gpu = ["pci0000:00", "0000:00:02.0", "0000:06:00.0"];
    tree.device("0000:07:00.0", &gpu, (0x10de, 0x2330), 0x03_0200, -1);
    let all = scan(&tree);
    assert_eq!((all.functions.len(), &all.notes[..]), (1, &[][..]));
    let there = locate(&tree.sysfs(), address("0000:07:00.0")).unwrap();
    assert_eq!(all.functions[0].location.distance(&there), Distance::Bridges(1));
    assert!(locate(&tree.sysfs(), address("0000:08:00.0")).unwrap_err().to_string().contains("0000:08:00.0"));
}

#[test]
fn a_function_in_another_namespace_is_not_gone() {
    let (_directory, tree) = tree(&[Port::igb("0000:01:00.0", "ens1")]);
    fs::remove_dir_all(tree.function("0000:01:10.2").join("net/ens1v1")).unwrap();
    let all = scan(&tree);
    assert_eq!(all.notes, []);
    let elsewhere: Vec<u16> = all.vfs().filter(|(_, vf)| vf.is_elsewhere()).map(|(_, vf)| vf.index.0).collect();
    assert_eq!(elsewhere, [1]);
}

#[test]
fn broken_places_are_noted_and_the_rest_is_told() {
    let (_directory, tree) = tree(&[Port::igb("0000:01:00.0", "ens1"), Port::igb("0000:02:00.0", "ens2")]);
    let first = tree.function("0000:01:00.0");
    // A link that leads nowhere, one that is missing, one that is none, and one to what is no function.
    fs::remove_file(first.join("virtfn0")).unwrap();
    fs::remove_file(first.join("virtfn1")).unwrap();
    symlink("../0000:09:10.2", first.join("virtfn1")).unwrap();
    fs::remove_file(first.join("virtfn2")).unwrap();
    fs::write(first.join("virtfn2"), "").unwrap();
    fs::remove_file(first.join("virtfn3")).unwrap();
    symlink("../what", first.join("virtfn3")).unwrap();
    fs::write(first.join("numa_node"), "west\n").unwrap();
    let vf = tree.function("0000:01:11.0");
    fs::remove_file(vf.join("iommu_group")).unwrap();
    symlink("../../groups/many", vf.join("iommu_group")).unwrap();
    // No number of functions at all: this one is no port any more.
    fs::write(tree.function("0000:02:00.0").join("sriov_totalvfs"), [0xff, 0xfe]).unwrap();

    let all = scan(&tree);
    let [pf] = &all.functions[..] else { panic!("{all:?}") };
    assert_eq!(pf.vfs.iter().map(|vf| vf.index.0).collect::<Vec<_>>(), [4, 5, 6]);
    assert_eq!(pf.vfs[0].iommu_group, None);
    let base = Path::new("bus/pci/devices/0000:01:00.0");
    let malformed = |path: PathBuf, value: &str, wanted| Note {
        path,
        problem: Problem::Malformed { value: value.to_owned(), wanted },
    };
    let mut expected = [
        Note { path: base.to_owned(), problem: Problem::MissingVf(VfIndex(0)) },
        Note { path: base.join("virtfn1"), problem: Problem::Dangling { target: "../0000:09:10.2".into() } },
        Note { path: base.join("virtfn2"), problem: Problem::Unreadable(io::ErrorKind::InvalidInput) },
        malformed(base.join("virtfn3"), "../what", "a function"),
        malformed(base.join("numa_node"), "west", "a NUMA node, or -1"),
        malformed("bus/pci/devices/0000:01:11.0/iommu_group".into(), "many", "the number of an IOMMU group"),
        Note {
            path: "bus/pci/devices/0000:02:00.0/sriov_totalvfs".into(),
            problem: Problem::Unreadable(io::ErrorKind::InvalidData),
        },
    ]
    .map(|note| note.to_string());
    let mut found: Vec<String> = all.notes.iter().map(Note::to_string).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn one_port_or_function_is_read_anew_without_the_others() {
    let (_directory, tree) = tree(&[Port::igb("0000:01:00.0", "ens1"), Port::igb("0000:02:00.0", "ens2")]);
    let mut all = scan(&tree);
    let vf = tree.function("0000:01:10.2");
    fs::rename(vf.join("net/ens1v1"), vf.join("net/net0")).unwrap();
    fs::remove_dir_all(tree.function("0000:02:10.0").join("net")).unwrap();
    let before = all.clone();
    all.refresh_vf(&tree.sysfs(), address("0000:01:10.2"));
    assert_eq!(all.vf(address("0000:01:10.2")).unwrap().1.netdevs, ["net0"]);
    assert_eq!(all.functions[1], before.functions[1]);
    // By the address of one of its functions.
    all.refresh(&tree.sysfs(), address("0000:02:10.2"));
    assert!(all.vf(address("0000:02:10.0")).unwrap().1.is_elsewhere());
    assert_eq!(all, scan(&tree));
    // A port that is gone is no port any more, and one that comes is one.
    let port = tree.function("0000:02:00.0");
    fs::rename(port.join("sriov_totalvfs"), port.join("hidden")).unwrap();
    all.refresh(&tree.sysfs(), address("0000:02:00.0"));
    assert_eq!(all.functions.len(), 1);
    fs::rename(port.join("hidden"), port.join("sriov_totalvfs")).unwrap();
    all.refresh(&tree.sysfs(), address("0000:02:00.0"));
    assert_eq!(all, scan(&tree));
}

#[test]
fn a_tree_that_is_not_there_is_an_error() {
    let error = Inventory::scan(&SysfsDir::new("/nonexistent")).unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("is sysfs mounted"), "{error}");
}

#[test]
fn no_path_leaves_the_root() {
    let (directory, _tree) = tree(&[]);
    let inner = SysfsDir::new(directory.path().join("bus"));
    for path in ["../devices", "/etc/passwd", "pci/../../devices"] {
        assert_eq!(inner.list(Path::new(path)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(inner.write(Path::new(path), "1").unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
    assert_eq!(inner.write(Path::new("new"), "1").unwrap_err().kind(), io::ErrorKind::NotFound);
}

/// Answers the n-th call with an error, and counts calls.
#[derive(Debug)]
struct Flaky {
    inner: SysfsDir,
    calls: Mutex<usize>,
    failing: usize,
    with: io::ErrorKind,
}

impl Flaky {
    fn call<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let mut calls = self.calls.lock().unwrap();
        *calls += 1;
        if *calls == self.failing { Err(self.with.into()) } else { call() }
    }
}

impl Sysfs for Flaky {
    fn read(&self, path: &Path) -> io::Result<String> {
        self.call(|| self.inner.read(path))
    }
    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        self.call(|| self.inner.list(path))
    }
    fn link(&self, path: &Path) -> io::Result<PathBuf> {
        self.call(|| self.inner.link(path))
    }
    fn write(&self, path: &Path, value: &str) -> io::Result<()> {
        self.call(|| self.inner.write(path, value))
    }
}

#[test]
fn any_call_may_fail_and_functions_that_are_told_are_told_right() {
    let (_directory, tree) = tree(&[Port { vfs: 2, ..Port::mlx5("0000:81:00.0", "ens2") }]);
    let whole = scan(&tree);
    for with in [io::ErrorKind::NotFound, io::ErrorKind::PermissionDenied] {
        let mut failing = 0;
        let calls = loop {
            failing += 1;
            let flaky = Flaky { inner: tree.sysfs(), calls: Mutex::new(0), failing, with };
            let result = Inventory::scan(&flaky);
            let calls = *flaky.calls.lock().unwrap();
            if calls < failing {
                break calls;
            }
            let Ok(found) = result else {
                assert_eq!(failing, 1, "only the list of devices is needed");
                continue;
            };
            assert!(found != whole || with == io::ErrorKind::NotFound, "call {failing} changed nothing");
            assert!(with == io::ErrorKind::NotFound || !found.notes.is_empty(), "call {failing} was not noted");
            for (pf, vf) in found.vfs() {
                let (same_pf, same) = whole.vf(vf.address).unwrap();
                assert_eq!((pf.address, vf.index, vf.ids), (same_pf.address, same.index, same.ids));
            }
        };
        assert!(calls > 20, "{calls}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn files_may_hold_anything(
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::collection::vec(any::<u8>(), 0..40)), 1..8),
    ) {
        let (_directory, tree) = tree(&[Port { vfs: 2, ..Port::mlx5("0000:81:00.0", "ens2") }]);
        let mut files = Vec::new();
        for function in ["0000:81:00.0", "0000:81:00.2"] {
            let path = tree.function(function);
            for directory in [path.clone(), path.join("net").read_dir().unwrap().next().unwrap().unwrap().path()] {
                files.extend(directory.read_dir().unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file() && !p.is_symlink()));
            }
        }
        files.sort();
        for (at, bytes) in &changes {
            fs::write(at.get(&files), bytes).unwrap();
        }
        let found = Inventory::scan(&tree.sysfs()).unwrap();
        prop_assert!(found.functions.len() <= 1 && found.vfs().count() <= 2);
    }
}
