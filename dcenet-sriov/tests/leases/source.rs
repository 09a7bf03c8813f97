//! Functions as core's engine asks for them, on the modelled kernel.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::provider::{DeviceError, DeviceRequest, DeviceSource, DeviceWish, LentDevice};
use dcenet_sriov::PciAddress;
use dcenet_sriov::count::CountRequest;
use dcenet_sriov::kernel::{Kernel, LinkCounters, Namespace, NetdevChange, Traffic, VfChange, VfRate, VfVlan};
use dcenet_sriov::kubelet::Resource;
use dcenet_sriov::lease::{Counted, LeaseError, Leases, Outcome, Recovered};
use dcenet_sriov::pool::{HostUse, Pools};
use dcenet_sriov::source::{Machine, VfSource};
use dcenet_sriov::test_support::{Fault, FlakyKernel, Port, Profile, Tree};
use serde_json::{Value, json};

use crate::world::{Dress, POD, World, look, mac, owner};

fn section() -> Value {
    json!({ "pools": [{ "name": "fast", "select": [{ "pfs": ["eth0"] }] }] })
}

/// A host with two functions, of which the first is the one of the world.
fn host() -> World {
    let world = World::new(Profile::IGB, Dress::Plain);
    let mut tree = Tree::new(world.state.path());
    tree.port(&Port { vfs: 2, ..Port::igb("0000:01:00.0", "eth0") });
    world
}

fn machine(world: &World, kernel: Arc<dyn Kernel>) -> impl Fn() -> Result<Machine, DeviceError> + use<> {
    let (state, scrub) = (world.state.path().to_owned(), world.model.clone());
    move || {
        let leases = Leases::open(kernel.clone(), &state).map_err(|error| DeviceError::Failed(error.into()))?;
        Ok(Machine {
            leases: leases.with_scrub(scrub.clone()).with_patience(Duration::from_millis(20)),
            sysfs: Arc::new(Tree::new(&state).sysfs()),
            host: Box::new(|| Ok(HostUse::default())),
        })
    }
}

fn source(world: &World, kernel: Arc<dyn Kernel>, section: Value) -> VfSource {
    VfSource::new(world.state.path(), Some(section), Box::new(machine(world, kernel)))
}

fn modelled(world: &World) -> VfSource {
    source(world, world.model.clone(), section())
}

fn request(container: &str) -> DeviceRequest {
    let settings = json!({ "vlan": 100, "trust": true, "spoofchk": false });
    DeviceRequest {
        attachment: owner(container),
        wish: DeviceWish {
            pool: Some("fast".to_owned()),
            device: None,
            settings: settings.as_object().unwrap().clone(),
            mtu: Some(1400.try_into().unwrap()),
            vlan: None,
        },
        mac: mac(0xaa),
        netns: POD.into(),
    }
}

#[test]
fn a_resource_of_kubernetes_is_a_pool_with_what_ails() {
    let world = host();
    let machine = machine(&world, world.model.clone())().unwrap();
    let pools = Pools::read("pools", &section()["pools"]).unwrap();
    let seen = Resource::of_pool(&machine, &pools, "fast").unwrap();
    let other = world.model.function(world.port, 1);
    assert_eq!((seen.members, seen.ailing.len()), (vec![world.vf.address, other], 0));
    modelled(&world).lend(&request("a")).unwrap();
    std::fs::write(world.file(), String::from_utf8(world.bytes()).unwrap().replace(':', "?")).unwrap();
    let seen = Resource::of_pool(&machine, &pools, "fast").unwrap();
    assert_eq!((seen.members.len(), seen.ailing), (2, [world.vf.address].into()));
    let error = Resource::of_pool(&machine, &pools, "slow").unwrap_err().to_string();
    assert_eq!(error, r#""slow" is none of the pools, which are ["fast"]"#);
}

/// What the engine does with a device that it was lent.
fn move_in(world: &World, kernel: &dyn Kernel, device: &LentDevice) {
    let up = NetdevChange { up: Some(true), ..NetdevChange::default() };
    let there = Namespace::Path(POD.into());
    kernel.move_netdev(&Namespace::Host, device.index, &there, &"net1".parse().unwrap(), &up).unwrap();
    if device.id == world.vf.address.to_string() {
        world.meddle();
    }
}

#[test]
fn pods_get_functions_as_they_wish_and_leave_them_as_they_were() {
    let world = host();
    let other = world.model.function(world.port, 1);
    let home = look(&world.model, other).unwrap();
    let source = modelled(&world);
    assert!(!source.is_lent(&owner("a")).unwrap());
    source.release(&owner("a")).unwrap();
    source.ready(Some(&request("a").wish)).unwrap();

    let first = source.lend(&request("a")).unwrap();
    assert_eq!((first.id.as_str(), first.mac), (world.vf.address.to_string().as_str(), mac(0xaa)));
    let device = world.model.netdevs(&Namespace::Host, world.vf.address).unwrap().pop().unwrap();
    assert_eq!((device.index, &device.name, device.up), (first.index, &first.name, false));
    assert_eq!((device.mac, device.mtu), (Some(mac(0xaa)), 1400));
    let port = world.model.vf(world.port, world.vf.index).unwrap();
    assert_eq!((port.mac, port.vlan.id.map(|vlan| vlan.get())), (mac(0xaa), Some(100)));
    assert_eq!((port.trust, port.spoofchk), (Some(true), Some(false)));
    move_in(&world, &*world.model, &first);

    let second = source.lend(&request("b")).unwrap();
    assert_eq!(second.id, other.to_string());
    let third = source.lend(&request("c")).unwrap_err();
    assert!(matches!(third, DeviceError::Unavailable(_)) && third.is_retryable(), "{third}");
    assert!(!source.is_lent(&owner("c")).unwrap());

    source.release(&owner("a")).unwrap();
    assert!(world.is_home(), "{:?}", world.now());
    assert!(source.is_lent(&owner("b")).unwrap() && !source.is_lent(&owner("a")).unwrap());
    // The twin: what a move and root in the pod leave without it.
    let third = source.lend(&request("c")).unwrap();
    assert_eq!(third.id, first.id);
    move_in(&world, &*world.model, &third);
    world.model.remove_namespace(POD);
    assert!(!world.is_home());
    // A DEL of who had it before comes late, and takes it from nobody.
    source.release(&owner("a")).unwrap();
    assert!(source.is_lent(&owner("c")).unwrap() && !world.is_home());
    source.release(&owner("c")).unwrap();
    source.release(&owner("c")).unwrap();
    source.release(&owner("b")).unwrap();
    assert!(world.is_home());
    assert_eq!(look(&world.model, other).unwrap(), home);
}

#[test]
fn an_attachment_that_asks_again_has_one_function_and_not_two() {
    let world = host();
    let source = modelled(&world);
    let first = source.lend(&request("a")).unwrap();
    move_in(&world, &*world.model, &first);
    let again = source.lend(&request("a")).unwrap();
    assert_eq!(again.id, first.id);
    assert_eq!(world.leases().held().unwrap().len(), 1);
    source.release(&owner("a")).unwrap();
    assert!(world.is_home());
}

#[test]
fn who_has_functions_is_told_by_network() {
    let world = host();
    let source = modelled(&world);
    let (fast, slow) = ("fast".parse().unwrap(), "slow".parse().unwrap());
    assert_eq!(source.lent(&fast).unwrap(), []);
    for name in ["b", "a"] {
        source.lend(&request(name)).unwrap();
    }
    assert_eq!((source.lent(&fast).unwrap(), source.lent(&slow).unwrap()), (vec![owner("a"), owner("b")], vec![]));
    source.release(&owner("a")).unwrap();
    assert_eq!(source.lent(&fast).unwrap(), [owner("b")]);
}

/// What somebody does with a free function of no pool of his is not undone by a pod that finds its own pool empty. The
/// twin is a recovery, which undoes it.
#[test]
fn an_empty_pool_disturbs_no_function_of_others() {
    let world = host();
    let first = modelled(&world).lend(&request("a")).unwrap();
    modelled(&world).release(&owner("a")).unwrap();
    let up = NetdevChange { up: Some(true), ..NetdevChange::default() };
    world.model.configure_netdev(&Namespace::Host, first.index, &up).unwrap();
    let used = world.now();
    let narrow = json!({ "pools": [{ "name": "fast", "select": [{ "pfs": ["eth0#1"] }] }] });
    let source = source(&world, world.model.clone(), narrow);
    source.lend(&request("b")).unwrap();
    let error = source.lend(&request("c")).unwrap_err();
    assert!(matches!(error, DeviceError::Unavailable(_)), "{error}");
    assert_eq!(world.now(), used);
    world.leases().recover_network(&"fast".parse().unwrap(), |_| true).unwrap();
    assert_ne!(world.now(), used);
}

#[test]
fn what_is_wrong_names_its_field_and_nothing_is_lent() {
    let world = host();
    let asking = |change: &dyn Fn(&mut DeviceRequest)| {
        let mut request = request("a");
        change(&mut request);
        request
    };
    let vf = |settings: Value| asking(&|r| r.wish.settings = settings.as_object().unwrap().clone());
    let good = || asking(&|_| {});
    let address = world.vf.address.to_string();
    for (section, request, words) in [
        (
            section(),
            asking(&|r| r.wish.pool = Some("fat".to_owned())),
            "link.pool: \"fat\" is none of the section sriov's",
        ),
        (section(), asking(&|r| r.wish.device = Some("eth0".to_owned())), "link.device: "),
        (section(), asking(&|r| r.wish.device = Some("0000:07:10.0".to_owned())), "no virtual function 0000:07:10.0"),
        (section(), vf(json!({ "vlna": 7 })), "link.vf"),
        (section(), vf(json!({ "qos": 3 })), "link.vf: qos 3: a priority needs a tag"),
        (section(), vf(json!({ "mac": "02:00:00:00:00:07" })), "link.vf.mac: 02:00:00:00:00:07 has another place"),
        (section(), vf(json!({ "mtu": 1400 })), "link.vf.mtu: 1400 has another place: say link.mtu"),
        (section(), vf(json!({ "linkState": "enable" })), "link.vf: "),
        (
            section(),
            asking(&|r| r.wish.vlan = Some(7.try_into().unwrap())),
            "link.vf.vlan: 100, and the pod's addresses",
        ),
        (json!({}), good(), "sriov.pools: missing"),
        (json!({ "pools": [], "poolsFile": "/x" }), good(), "sriov.poolsFile: pools are given too"),
        (json!({ "poolsFile": "/nowhere/pools.json" }), good(), "sriov.poolsFile: /nowhere/pools.json: "),
        (json!({ "pool": [] }), good(), "sriov.pool: unknown field"),
        (json!({ "pools": [{ "name": "fast", "select": [] }] }), good(), "sriov.pools[0].select: "),
        (
            json!({ "pools": [{ "name": "fast", "select": [{ "pfs": ["eth0"] }] },
                { "name": "too", "select": [{ "addresses": [address] }] }] }),
            good(),
            "sriov.pools: pools \"fast\" and \"too\" both have",
        ),
        (
            json!({ "pools": [{ "name": "fast", "select": [{ "pfs": ["eth0#1"] }] }] }),
            asking(&|r| r.wish.device = Some(world.vf.address.to_string())),
            "is not of pool \"fast\"",
        ),
    ] {
        let source = source(&world, world.model.clone(), section);
        let error = source.lend(&request).unwrap_err();
        assert!(matches!(error, DeviceError::Invalid { .. }), "{error}");
        assert!(error.to_string().contains(words), "{words}: {error}");
        assert!(!source.is_lent(&owner("a")).unwrap());
        assert!(world.is_home(), "{words}");
    }
    // Without a pool the runtime's choice stands, and the VLAN of a pool of addresses is the function's.
    let source = source(&world, world.model.clone(), json!({}));
    let lent = source
        .lend(&asking(&|r| {
            let device = Some(world.model.function(world.port, 1).to_string());
            r.wish = DeviceWish { device, vlan: Some(7.try_into().unwrap()), ..DeviceWish::default() };
        }))
        .unwrap();
    assert_eq!(lent.id, world.model.function(world.port, 1).to_string());
    let port = world.model.vf(world.port, dcenet_sriov::VfIndex(1)).unwrap();
    assert_eq!(port.vlan.id.map(|vlan| vlan.get()), Some(7));
}

#[test]
fn pools_of_a_file_serve_every_network_of_the_node() {
    let world = host();
    let file = world.state.path().join("pools.json");
    std::fs::write(&file, section()["pools"].to_string()).unwrap();
    let from_file = source(&world, world.model.clone(), json!({ "poolsFile": file }));
    from_file.ready(None).unwrap();
    assert_eq!(from_file.lend(&request("a")).unwrap().id, world.vf.address.to_string());
    std::fs::write(&file, "[{}]").unwrap();
    let error = source(&world, world.model.clone(), json!({ "poolsFile": file })).ready(None).unwrap_err();
    assert!(error.to_string().contains("pools.json"), "{error}");
    // Who cannot read it gives back all the same.
    source(&world, world.model.clone(), json!({ "poolsFile": file })).release(&owner("a")).unwrap();
    assert!(world.is_home());
}

/// It may be a virtual machine's, to whose port nothing is said to find that out.
#[test]
fn a_function_without_the_kernels_driver_is_passed_over() {
    let world = host();
    let unbind = |vf: &str| {
        std::fs::remove_file(world.state.path().join(format!("bus/pci/devices/{vf}/driver"))).unwrap();
    };
    unbind(&world.vf.address.to_string());
    let source = modelled(&world);
    let lent = source.lend(&request("a")).unwrap();
    assert_eq!(lent.id, world.model.function(world.port, 1).to_string());
    let error = source.lend(&request("b")).unwrap_err();
    assert!(matches!(error, DeviceError::Unavailable(_)), "{error}");
    source.release(&owner("a")).unwrap();
    unbind(&lent.id);
    let error = source.lend(&request("b")).unwrap_err();
    assert!(error.to_string().contains("link.pool: no function of \"fast\" has the kernel's driver"), "{error}");
    assert!(world.is_home());
}

#[test]
fn calls_at_one_time_never_get_one_function() {
    for _ in 0..20 {
        let world = host();
        let sources: Vec<_> = (0..2).map(|_| modelled(&world)).collect();
        let lent: Vec<_> = std::thread::scope(|scope| {
            let lend = |(n, source): (usize, &VfSource)| source.lend(&request(&format!("pod{n}")));
            let calls: Vec<_> = sources.iter().enumerate().map(|one| scope.spawn(move || lend(one))).collect();
            calls.into_iter().map(|call| call.join().unwrap()).collect()
        });
        let got: Vec<_> = lent.iter().flatten().map(|device| &device.id).collect();
        assert!(!got.is_empty() && (got.len() < 2 || got[0] != got[1]), "{lent:?}");
        assert_eq!(world.leases().held().unwrap().iter().filter(|held| held.committed).count(), got.len());
    }
}

/// A process that dies at any of its calls, in ADD or in DEL: the DEL after it leaves nothing. The twin is what there
/// is before.
#[test]
fn a_kill_at_every_call_leaves_nothing_after_the_next_del() {
    let live = |world: &World, kernel: Arc<dyn Kernel>| {
        let source = source(world, kernel.clone(), section());
        let device = source.lend(&request("a"))?;
        move_in(world, &*kernel, &device);
        source.release(&owner("a"))
    };
    let (mut kills, mut unclean) = (0, 0);
    'fault: for fault in [Fault::Die, Fault::DieAfter] {
        for call in 1.. {
            let world = host();
            let flaky = Arc::new(FlakyKernel::new(world.model.clone(), call, fault));
            let outcome = catch_unwind(AssertUnwindSafe(|| live(&world, flaky.clone())));
            if flaky.calls() < call {
                assert!(matches!(outcome, Ok(Ok(()))), "{outcome:?}");
                continue 'fault;
            }
            kills += 1;
            unclean += u32::from(!world.is_home());
            modelled(&world).release(&owner("a")).unwrap();
            assert_eq!(world.now().as_ref(), Some(&world.home), "{fault:?} at call {call}");
            assert!(!modelled(&world).is_lent(&owner("a")).unwrap());
            // Who comes next gets it.
            assert_eq!(modelled(&world).lend(&request("b")).unwrap().id, world.vf.address.to_string());
        }
    }
    eprintln!("{kills} kills, {unclean} unclean before the next DEL");
    assert!(kills > 60 && unclean * 3 > kills, "{kills} kills, {unclean} unclean");
}

/// Two lists with state directories of their own. The twin has nothing in common.
#[test]
fn a_function_that_is_in_another_ledger_is_passed_over() {
    for common in [true, false] {
        let world = host();
        let other = tempfile::TempDir::new().unwrap();
        let open = |state: &std::path::Path| {
            let leases = Leases::open(world.model.clone(), state).unwrap().with_patience(Duration::from_millis(20));
            if common { leases.with_claims(&world.state.path().join("run")).unwrap() } else { leases }
        };
        let (ours, theirs) = (open(world.state.path()), open(other.path()));
        let incarnation = ours.prepare(&owner("a"), world.vf, &world.wanted()).unwrap().commit().unwrap();
        let taken = theirs.prepare(&owner("b"), world.vf, &world.wanted());
        match taken {
            Err(LeaseError::Elsewhere { ref state, .. }) if common => assert_eq!(state, world.state.path()),
            Ok(lease) if !common => {
                drop(lease);
                continue;
            }
            other => panic!("{other:?}"),
        }
        let port = world.model.vf(world.port, world.vf.index).unwrap();
        assert_eq!(port.vlan.id.map(|vlan| vlan.get()), Some(100), "nothing was written");
        ours.release(&owner("a"), world.vf.address, incarnation).unwrap();
        theirs.prepare(&owner("b"), world.vf, &world.wanted()).unwrap().commit().unwrap();
        // By another path it is the same ledger.
        let link = world.state.path().join("link");
        std::os::unix::fs::symlink(other.path(), &link).unwrap();
        let again = open(&link).prepare(&owner("c"), world.vf, &world.wanted()).map(drop);
        assert!(matches!(again, Err(LeaseError::Taken { .. })), "{again:?}");
        let (port, count) = (world.vf.port, world.model.vf_count(world.vf.port).unwrap());
        let request = CountRequest {
            count: 1,
            autoprobe: None,
            user: &|_| None,
            even_elsewhere: false,
            limit: Duration::from_secs(60),
        };
        let error = ours.set_vf_count(port, &request).unwrap_err();
        assert!(error.to_string().contains("by the ledger of state directory"), "{error}");
        assert_eq!(world.model.vf_count(port).unwrap(), count);
        assert!(matches!(ours.readmit(world.vf), Err(LeaseError::Elsewhere { .. })));
        assert!(matches!(ours.prepare(&owner("a"), world.vf, &world.wanted()), Err(LeaseError::Elsewhere { .. })));
        let recovered = ours.recover(|_| true).unwrap();
        assert!(matches!(&recovered[..], [Recovered { outcome: Outcome::Elsewhere(_), .. }, ..]), "{recovered:?}");
        theirs.recover(|_| false).unwrap();
        assert!(world.is_home());
    }
}

/// What CHECK tells. The twin is a function with which nobody meddled.
#[test]
fn what_others_change_of_a_pods_function_is_told() {
    let world = host();
    let source = modelled(&world);
    let device = source.lend(&request("a")).unwrap();
    let up = NetdevChange { up: Some(true), ..NetdevChange::default() };
    let there = Namespace::Path(POD.into());
    world.model.move_netdev(&Namespace::Host, device.index, &there, &"net1".parse().unwrap(), &up).unwrap();
    assert_eq!(source.missing(&owner("a"), &device).unwrap(), [""; 0]);

    let index = world.model.netdevs(&there, world.vf.address).unwrap()[0].index;
    let mtu =
        NetdevChange { mtu: Some(1300.try_into().unwrap()), alias: Some("its".into()), ..NetdevChange::default() };
    world.model.configure_netdev(&there, index, &mtu).unwrap();
    assert_eq!(source.missing(&owner("a"), &device).unwrap(), ["mtu is 1300 instead of 1400"]);
    let vlan = VfVlan { id: Some(7.try_into().unwrap()), ..VfVlan::default() };
    let rate = VfRate { min: 0, max: 9 };
    let change = VfChange { vlan: Some(vlan), trust: Some(false), rate: Some(rate), ..VfChange::default() };
    world.model.configure_vf(world.port, world.vf.index, &change).unwrap();
    let told = source.missing(&owner("a"), &device).unwrap();
    let what: Vec<&str> = told.iter().map(|told| told.split(' ').next().unwrap()).collect();
    assert_eq!(what, ["vlan", "rate", "trust", "mtu"], "{told:?}");
    assert!(source.missing(&owner("b"), &device).unwrap()[0].contains("not lent to the pod"));
    world.leases().recover(|_| false).unwrap();
    assert_eq!(source.missing(&owner("a"), &device).unwrap(), ["it is not lent to the pod any more"]);
}

/// Some process keeps the namespace of a pod that is gone. The twin is a function that cannot be made what it was, but
/// is home.
#[test]
fn a_function_that_is_not_found_keeps_its_attachment_until_it_is() {
    let world = host();
    let source = modelled(&world);
    let device = source.lend(&request("a")).unwrap();
    move_in(&world, &*world.model, &device);
    let held = world.model.hold_namespace(POD);
    world.model.remove_namespace(POD);
    for _ in 0..2 {
        let error = source.release(&owner("a")).unwrap_err();
        assert!(matches!(error, DeviceError::Busy(_)) && error.is_retryable(), "{error}");
        assert!(error.to_string().contains("in no namespace that can be looked into"), "{error}");
        assert!(source.is_lent(&owner("a")).unwrap());
        assert_eq!(source.lent(&owner("a").network).unwrap(), [owner("a")]);
    }
    // Others get what is left, and nobody its next device before.
    world.model.create_namespace(POD);
    assert_ne!(source.lend(&request("b")).unwrap().id, device.id);
    assert!(matches!(source.lend(&request("a")), Err(DeviceError::Busy(_))));
    world.model.release_namespace(held);
    source.release(&owner("a")).unwrap();
    assert!(world.is_home() && !source.is_lent(&owner("a")).unwrap());
    let device = source.lend(&request("a")).unwrap();

    // What it bears at home keeps nobody's addresses.
    world.model.withhold(device.id.parse().unwrap(), true);
    source.release(&owner("a")).unwrap();
    assert!(!source.is_lent(&owner("a")).unwrap());
    assert!(world.leases().lost().unwrap().is_empty() && world.leases().held().unwrap().len() == 1);
}

/// The twin is a port whose driver counts nothing.
#[test]
fn what_was_counted_is_told_of_those_who_have_functions() {
    let traffic = |n| Traffic { packets: n, bytes: 100 * n, dropped: n / 2 };
    let counters = |n| LinkCounters { received: traffic(n), sent: traffic(n + 1) };
    for counts in [true, false] {
        let world = host();
        let source = modelled(&world);
        assert_eq!(world.leases().counters().unwrap(), []);
        let device = source.lend(&request("a")).unwrap();
        let vf: PciAddress = device.id.parse().unwrap();
        let by_port = if counts { counters(8) } else { LinkCounters::default() };
        world.model.count(vf, counters(4), by_port);
        let told = |by_device| Counted { vf, owner: owner("a"), by_device, by_port: counts.then_some(by_port) };
        // Not moved yet, as of a call that was killed there.
        assert_eq!(world.leases().counters().unwrap(), [told(None)]);
        move_in(&world, &*world.model, &device);
        assert_eq!(world.leases().counters().unwrap(), [told(Some(counters(4)))]);
        source.release(&owner("a")).unwrap();
        assert_eq!(world.leases().counters().unwrap(), []);
    }
}

/// A DEL and a GC need no section, and who looks on the way says nothing of what a function is to be.
#[test]
fn a_function_becomes_what_its_own_network_says_whoever_takes_it_back() {
    let vlan = |world: &World| world.model.vf(world.port, world.vf.index).unwrap().vlan.id.map(|vlan| vlan.get());
    for restore in ["snapshot", "defaults"] {
        let world = host();
        let seven = VfVlan { id: Some(7.try_into().unwrap()), ..VfVlan::default() };
        let change = VfChange { vlan: Some(seven), ..VfChange::default() };
        world.model.configure_vf(world.port, world.vf.index, &change).unwrap();
        let wanted = (restore == "snapshot").then_some(7);
        let mut section = section();
        section["restore"] = restore.into();
        let device = source(&world, world.model.clone(), section).lend(&request("a")).unwrap();
        assert_eq!(vlan(&world), Some(100));
        move_in(&world, &*world.model, &device);
        source(&world, world.model.clone(), Value::Null).release(&owner("a")).unwrap();
        assert_eq!(vlan(&world), wanted, "{restore}");
        world.leases().recover(|_| true).unwrap();
        assert_eq!(vlan(&world), wanted, "{restore}: recovered");
    }
}

#[test]
fn status_tells_by_what_an_add_would_fail() {
    let world = host();
    let source = modelled(&world);
    let wish = |change: &dyn Fn(&mut DeviceWish)| {
        let mut wish = request("a").wish;
        change(&mut wish);
        wish
    };
    source.ready(Some(&wish(&|_| {}))).unwrap();
    for (wish, words) in [
        (wish(&|wish| wish.pool = Some("fats".to_owned())), "link.pool: \"fats\" is none of the section sriov's pools"),
        (wish(&|wish| wish.device = Some("0000:07:10.0".to_owned())), "no virtual function 0000:07:10.0"),
        (wish(&|wish| drop(wish.settings.insert("vlan".to_owned(), json!(5000)))), "link.vf: vlan 5000"),
    ] {
        let error = source.ready(Some(&wish)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    // That none is free is none.
    for name in ["a", "b"] {
        source.lend(&request(name)).unwrap();
    }
    source.ready(Some(&wish(&|_| {}))).unwrap();
    assert_eq!(world.leases().held().unwrap().len(), 2);
}

/// The twin is a value that no driver takes.
#[test]
fn a_driver_that_resets_its_functions_is_asked_again_later() {
    let world = World::new(Profile::I40E, Dress::Plain);
    Tree::new(world.state.path()).port(&Port { vfs: 2, ..Port::igb("0000:01:00.0", "eth0") });
    for function in 0..2 {
        world.model.withhold(world.model.function(world.port, function), true);
    }
    let error = modelled(&world).lend(&request("a")).unwrap_err();
    assert!(matches!(error, DeviceError::Busy(_)) && error.is_retryable(), "{error}");
    let mut other = request("a");
    other.wish.settings.insert("protocol".to_owned(), json!("802.1ad"));
    let world = host();
    let error = modelled(&world).lend(&other).unwrap_err();
    assert!(!error.is_retryable(), "{error}");
}
