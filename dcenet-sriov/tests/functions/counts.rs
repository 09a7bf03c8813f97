//! The number of virtual functions, on the modelled kernel.

use std::time::Duration;

use dcenet_sriov::count::{CountError, CountRequest, Missing, set_vf_count};
use dcenet_sriov::kernel::{Kernel, Namespace, NetdevChange};
use dcenet_sriov::test_support::{Model, Profile};
use dcenet_sriov::{PciAddress, VfIndex};

fn nobody(_: PciAddress) -> Option<String> {
    None
}

fn request(count: u16) -> CountRequest<'static> {
    let limit = Duration::from_millis(50);
    CountRequest { count, autoprobe: None, user: &nobody, even_elsewhere: false, limit }
}

fn port() -> PciAddress {
    "0000:01:00.0".parse().unwrap()
}

fn writes(model: &Model) -> usize {
    model.take_calls().iter().filter(|call| call.starts_with("set the VF count")).count()
}

#[test]
fn counts_change_by_way_of_zero_and_the_same_count_writes_nothing() {
    let (model, _) = Model::with_port(Profile::IGB, 2);
    model.take_calls();
    assert_eq!(set_vf_count(&model, port(), &request(5)).unwrap().len(), 5);
    assert_eq!(writes(&model), 2);
    assert_eq!(set_vf_count(&model, port(), &request(5)).unwrap().len(), 5);
    assert_eq!(writes(&model), 0);
    assert_eq!(set_vf_count(&model, port(), &request(0)).unwrap(), []);
    assert_eq!(writes(&model), 1);
}

/// The twin writes at once, as the kernel would have it.
#[test]
fn bug_15_what_the_kernel_refuses_has_a_name_and_a_remedy() {
    let (model, netdev) = Model::with_port(Profile::IGB, 2);
    assert_eq!(model.write_vf_count(port(), 5).unwrap_err().errno, Some(libc::EBUSY));
    let said = |error: CountError| error.to_string();
    let Err(error) = set_vf_count(&model, port(), &request(8)) else { panic!("eight of seven") };
    assert!(said(error).starts_with("VF count 8 of 0000:01:00.0: it can have 7; give at most that"));
    for (errno, wanted) in
        [(libc::ENOSPC, "ask for fewer"), (libc::EINVAL, "Invalid argument"), (libc::EBUSY, "somebody else")]
    {
        model.refuse_above(netdev, 0, errno);
        let error = set_vf_count(&model, port(), &request(3)).unwrap_err();
        let named = match errno {
            libc::ENOSPC => matches!(error, CountError::Exhausted { left: 0, .. }),
            libc::EINVAL => matches!(error, CountError::Refused { left: 0, .. }),
            _ => matches!(error, CountError::Raced { left: 0, .. }),
        };
        assert!(named && said(error).contains(wanted), "{errno}");
    }
    model.refuse_above(netdev, 7, libc::EINVAL);
    model.set_port_bound(netdev, false);
    let error = set_vf_count(&model, port(), &request(3)).unwrap_err();
    assert!(matches!(error, CountError::NoDriver { .. }), "{error}");
    model.set_port_bound(netdev, true);
    model.grant_at_most(netdev, 2);
    let error = set_vf_count(&model, port(), &request(3)).unwrap_err();
    assert!(matches!(error, CountError::Fewer { made: 2, .. }), "{error}");
}

#[test]
fn bug_16_the_call_returns_when_every_function_has_its_device() {
    let (model, netdev) = Model::with_port(Profile::IGB, 0);
    model.set_delay(10_000);
    // The twin: right after the write none has one.
    model.write_vf_count(port(), 4).unwrap();
    let all = model.vf_addresses(port()).unwrap();
    assert!(all.iter().all(|(_, f)| model.netdevs(&Namespace::Host, *f).unwrap().is_empty()));
    let mut anyway = request(0);
    anyway.even_elsewhere = true;
    set_vf_count(&model, port(), &anyway).unwrap();
    for (_, function) in set_vf_count(&model, port(), &request(4)).unwrap() {
        assert_eq!(model.netdevs(&Namespace::Host, function).unwrap().len(), 1);
    }
    // Without drivers there is nothing to wait for; and one that never gets its device is told.
    set_vf_count(&model, port(), &request(0)).unwrap();
    let without = CountRequest { autoprobe: Some(false), ..request(2) };
    assert_eq!(set_vf_count(&model, port(), &without).unwrap().len(), 2);
    assert_eq!(model.driver(model.function(netdev, 1)).unwrap().driver, None);
    model.unbind(model.function(netdev, 1)).unwrap_err();
    set_vf_count(&model, port(), &request(0)).unwrap();
    model.set_delay(u64::MAX);
    let lying = CountRequest { autoprobe: Some(true), ..request(2) };
    let error = set_vf_count(&model, port(), &lying).unwrap_err();
    assert!(matches!(error, CountError::TimedOut { missing: Missing::Netdev(VfIndex(0)), .. }), "{error}");
    assert!(error.to_string().contains("VF 0 has no network device"), "{error}");
}

/// The twin writes 0 with a function in a pod: its interface vanishes there.
#[test]
fn bug_17_functions_in_use_are_not_taken_away() {
    for elsewhere in [false, true] {
        let (model, netdev) = Model::with_port(Profile::IGB, 3);
        let pod = model.create_namespace("/pod");
        let function = model.function(netdev, 1);
        let leased = |asked: PciAddress| (asked == function).then(|| "pod shop/db".to_owned());
        let mut wanted = request(1);
        if elsewhere {
            let device = model.netdevs(&Namespace::Host, function).unwrap().remove(0);
            let name = "net1".parse().unwrap();
            model.move_netdev(&Namespace::Host, device.index, &pod, &name, &NetdevChange::default()).unwrap();
        } else {
            wanted.user = &leased;
            wanted.even_elsewhere = true;
        }
        let error = set_vf_count(&model, port(), &wanted).unwrap_err();
        let user = if elsewhere { "another network namespace" } else { "pod shop/db" };
        assert!(matches!(&error, CountError::InUse { function: f, .. } if *f == function), "{error}");
        assert!(error.to_string().contains(user), "{error}");
        assert_eq!(model.vf_count(port()).unwrap().now, 3);
        if elsewhere {
            model.write_vf_count(port(), 0).unwrap();
            assert_eq!(model.netdevs(&pod, function).unwrap(), []);
        }
    }
}

#[test]
fn a_refused_count_puts_the_former_one_back() {
    let (model, netdev) = Model::with_port(Profile::ICE, 2);
    let before = model.vf_count(port()).unwrap();
    let refused = CountRequest { autoprobe: Some(false), ..request(4) };
    model.refuse_above(netdev, 3, libc::ENOSPC);
    let error = set_vf_count(&model, port(), &refused).unwrap_err();
    assert!(matches!(error, CountError::Exhausted { left: 2, .. }), "{error}");
    assert_eq!(model.vf_count(port()).unwrap(), before);
    // With drivers, as they were.
    for (_, function) in model.vf_addresses(port()).unwrap() {
        assert_eq!(model.driver(function).unwrap().driver.as_deref(), Some(Profile::ICE.vf_driver));
        assert_eq!(model.netdevs(&Namespace::Host, function).unwrap().len(), 1);
    }
}

#[test]
fn an_autoprobe_that_cannot_be_written_takes_no_function_away() {
    let (model, netdev) = Model::with_port(Profile::ICE, 2);
    let devices = || [0, 1].map(|n| model.netdevs(&Namespace::Host, model.function(netdev, n)).unwrap());
    let before = devices();
    model.refuse_autoprobe(netdev, Some(libc::EROFS));
    let error = set_vf_count(&model, port(), &CountRequest { autoprobe: Some(false), ..request(4) }).unwrap_err();
    assert!(matches!(&error, CountError::Kernel(error) if error.errno == Some(libc::EROFS)), "{error}");
    assert_eq!(devices(), before);
    assert_eq!(set_vf_count(&model, port(), &request(4)).unwrap().len(), 4);
}

#[test]
fn a_function_that_a_virtual_machine_may_have_is_in_use() {
    let (model, netdev) = Model::with_port(Profile::IGB, 2);
    let function = model.function(netdev, 1);
    model.unbind(function).unwrap();
    model.set_driver_override(function, Some("vfio-pci")).unwrap();
    model.bind(function, "vfio-pci").unwrap();
    let error = set_vf_count(&model, port(), &request(1)).unwrap_err();
    assert!(matches!(&error, CountError::InUse { function: f, .. } if *f == function), "{error}");
    assert!(error.to_string().contains("vfio-pci"), "{error}");
    assert_eq!(model.vf_count(port()).unwrap().now, 2);
    let anyway = CountRequest { even_elsewhere: true, ..request(1) };
    assert_eq!(set_vf_count(&model, port(), &anyway).unwrap().len(), 1);
}
