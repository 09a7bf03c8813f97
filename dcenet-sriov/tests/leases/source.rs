//! Functions as core's engine asks for them, on the modelled kernel.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use dcenet_core::provider::{DeviceError, DeviceRequest, DeviceSource, DeviceWish, LentDevice};
use dcenet_sriov::kernel::{Kernel, Namespace, NetdevChange};
use dcenet_sriov::lease::Leases;
use dcenet_sriov::pool::HostUse;
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

fn source(world: &World, kernel: Arc<dyn Kernel>, section: Value) -> VfSource {
    let (state, scrub) = (world.state.path().to_owned(), world.model.clone());
    let open = move || {
        let leases = Leases::open(kernel.clone(), &state).map_err(|error| DeviceError::Failed(error.into()))?;
        Ok(Machine {
            leases: leases.with_scrub(scrub.clone()).with_patience(Duration::from_millis(20)),
            sysfs: Arc::new(Tree::new(&state).sysfs()),
            host: Box::new(|| Ok(HostUse::default())),
        })
    };
    VfSource::new(world.state.path(), Some(section), Box::new(open))
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
    source.ready().unwrap();

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

/// What somebody does with a free function of no pool of his is not undone by a pod that finds its own pool empty. The twin is
/// a recovery, which undoes it.
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
    from_file.ready().unwrap();
    assert_eq!(from_file.lend(&request("a")).unwrap().id, world.vf.address.to_string());
    std::fs::write(&file, "[{}]").unwrap();
    let error = source(&world, world.model.clone(), json!({ "poolsFile": file })).ready().unwrap_err();
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

/// A process that dies at any of its calls, in ADD or in DEL: the DEL after it leaves nothing. The twin is what there is before.
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
