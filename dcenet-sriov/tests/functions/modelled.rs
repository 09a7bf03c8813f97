//! The modelled kernel: that it behaves as Linux does, and what is known to go wrong with virtual functions.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use dcenet_core::model::{IfIndex, MacAddr};
use dcenet_core::provider::DeviceScrub;
use dcenet_sriov::config::{Capabilities, VfConfig, VfSettings};
use dcenet_sriov::kernel::{
    Attribute, ErrorClass, Kernel, Namespace, NetdevChange, NetdevState, VfChange, VfRate, VfState, VfVlan,
};
use dcenet_sriov::test_support::conformance::{Bed, conforms};
use dcenet_sriov::test_support::{Fault, FlakyKernel, Model, Profile};
use dcenet_sriov::{PciAddress, VfIndex};

const HOST: Namespace = Namespace::Host;
const VF: VfIndex = VfIndex(0);

fn mac(last: u8) -> MacAddr {
    MacAddr::new([2, 0, 0, 0, 0, last])
}

fn netdev(model: &Model, at: &Namespace, function: PciAddress) -> NetdevState {
    let found = model.netdevs(at, function).unwrap();
    let [device] = &found[..] else { panic!("{found:?}") };
    device.clone()
}

fn one(profile: Profile) -> (Model, IfIndex, PciAddress) {
    let (model, port) = Model::with_port(profile, 2);
    let function = model.function(port, 0);
    (model, port, function)
}

fn up(up: bool) -> NetdevChange {
    NetdevChange { up: Some(up), ..NetdevChange::default() }
}

#[test]
fn the_model_conforms_with_every_driver() {
    for profile in Profile::ALL {
        let (model, port, function) = one(profile);
        let pod = model.create_namespace("/run/netns/pod");
        model.set_delay(7);
        conforms(&Bed {
            kernel: &model,
            port,
            driver: profile.driver,
            vf: VF,
            function: Some(function),
            pod: Some(pod.clone()),
        });
        // Through a wrapper that has nothing to do, it is the same kernel.
        let (model, port, _) = one(profile);
        let flaky = FlakyKernel::new(Arc::new(model), 0, Fault::Lose);
        conforms(&Bed { kernel: &flaky, port, driver: profile.driver, vf: VF, function: None, pod: None });
        assert!(flaky.calls() > 10);
    }
}

#[test]
fn a_flaky_kernel_fails_loses_and_dies_at_the_call() {
    let change = VfChange { trust: Some(true), ..VfChange::default() };
    for (fault, happened) in
        [(Fault::Fail(libc::EBUSY), false), (Fault::Lose, true), (Fault::Die, false), (Fault::DieAfter, true)]
    {
        let (model, port, _) = one(Profile::IGB);
        let model = Arc::new(model);
        let flaky = FlakyKernel::new(model.clone(), 2, fault);
        flaky.vf(port, VF).unwrap();
        let outcome = catch_unwind(AssertUnwindSafe(|| flaky.configure_vf(port, VF, &change)));
        match (fault, outcome) {
            (Fault::Fail(errno), Ok(Err(error))) => assert_eq!(error.errno, Some(errno)),
            (Fault::Lose, Ok(Err(error))) => assert!(error.may_have_happened()),
            (Fault::Die | Fault::DieAfter, Err(panic)) => {
                assert_eq!(panic.downcast_ref::<String>().map(String::as_str), Some(FlakyKernel::DEATH));
                flaky.vf(port, VF).unwrap_err();
            }
            (fault, outcome) => panic!("{fault:?}: {outcome:?}"),
        }
        assert_eq!(flaky.is_dead(), matches!(fault, Fault::Die | Fault::DieAfter));
        assert_eq!(model.vf(port, VF).unwrap().trust, Some(happened), "{fault:?}");
    }
}

/// What was asked for alone is written, and put back by what was read before.
#[test]
fn bug_8_the_address_is_put_back_though_only_a_vlan_was_asked_for() {
    for profile in [Profile::MLX5, Profile::ICE, Profile::I40E] {
        let (model, port, function) = one(profile);
        let pod = model.create_namespace("/pod");
        model.configure_vf(port, VF, &VfChange { mac: Some(mac(1)), ..VfChange::default() }).unwrap();
        let before = model.vf(port, VF).unwrap();
        let config = VfConfig::new(VfSettings { vlan: Some(7), trust: Some(true), ..VfSettings::default() }).unwrap();
        model.configure_vf(port, VF, &config.change(&before).unwrap()).unwrap();
        assert_eq!(model.vf(port, VF).unwrap().mac, mac(1));
        // The pod changes its address, which trust allows.
        let device = netdev(&model, &HOST, function);
        model.move_netdev(&HOST, device.index, &pod, &"net1".parse().unwrap(), &config.netdev()).unwrap();
        let own = NetdevChange { mac: Some(mac(9)), ..NetdevChange::default() };
        model.configure_netdev(&pod, device.index, &own).unwrap();
        let back = NetdevChange { mac: device.mac, ..NetdevChange::default() };
        model.move_netdev(&pod, device.index, &HOST, &device.name, &back).unwrap();
        model.configure_vf(port, VF, &before.restore(&model.vf(port, VF).unwrap())).unwrap();
        assert_eq!(model.vf(port, VF).unwrap(), before, "{}", profile.driver);
        assert_eq!(netdev(&model, &HOST, function), NetdevState { index: device.index, ..device });
    }
}

#[test]
fn bug_9_igb_reports_the_functions_own_address_after_its_first_up() {
    let zero = MacAddr::new([0; 6]);
    for (profile, drifts) in [(Profile::IGB, true), (Profile::ICE, false)] {
        let (model, port, function) = one(profile);
        assert_eq!(model.vf(port, VF).unwrap().mac, zero);
        let device = netdev(&model, &HOST, function);
        model.configure_netdev(&HOST, device.index, &up(true)).unwrap();
        model.configure_netdev(&HOST, device.index, &up(false)).unwrap();
        let now = model.vf(port, VF).unwrap();
        assert_eq!(now.mac != zero, drifts, "{}", profile.driver);
        // What nobody asked for is no reason to write an address for good.
        assert!(now.restore(&now).is_empty());
    }
}

#[test]
fn bug_10_the_effective_address_is_put_back_while_the_function_is_trusted() {
    for profile in [Profile::IGB, Profile::ICE, Profile::I40E] {
        let (model, port, function) = one(profile);
        let set = |mac, trust| VfChange { mac: Some(mac), trust: Some(trust), ..VfChange::default() };
        model.configure_vf(port, VF, &set(mac(1), true)).unwrap();
        let device = netdev(&model, &HOST, function);
        let effective = |mac| {
            let change = NetdevChange { mac: Some(mac), ..NetdevChange::default() };
            model.configure_netdev(&HOST, device.index, &change)
        };
        effective(mac(9)).unwrap();
        let drop_trust = VfChange { trust: Some(false), mac: Some(mac(1)), ..VfChange::default() };
        let order = [true, false].map(|device_first| {
            model.configure_vf(port, VF, &set(mac(1), true)).unwrap();
            effective(mac(9)).unwrap();
            if device_first {
                effective(mac(5)).unwrap();
                model.configure_vf(port, VF, &drop_trust).map(|()| None).unwrap()
            } else {
                model.configure_vf(port, VF, &drop_trust).unwrap();
                Some(effective(mac(5)).unwrap_err())
            }
        });
        let [None, Some(error)] = order else { panic!("{order:?}") };
        assert_eq!(error.attribute, Some(Attribute::EffectiveMac), "{error}");
    }
}

#[test]
fn bug_11_drivers_that_refuse_zeros_say_so_and_nothing_else_changes() {
    let (model, port, _) = one(Profile::BNX2X);
    let before = model.vf(port, VF).unwrap();
    let zeros = VfChange { mac: Some(MacAddr::new([0; 6])), spoofchk: Some(false), ..VfChange::default() };
    let error = model.configure_vf(port, VF, &zeros).unwrap_err();
    assert_eq!((error.class, error.attribute), (ErrorClass::Invalid, Some(Attribute::Mac)));
    assert_eq!(model.vf(port, VF).unwrap(), before);
}

#[test]
fn bug_18_a_function_that_is_bound_again_has_its_device_on_the_host_under_another_name() {
    let (model, _, function) = one(Profile::IGB);
    let pod = model.create_namespace("/pod");
    let device = netdev(&model, &HOST, function);
    model.move_netdev(&HOST, device.index, &pod, &"net1".parse().unwrap(), &up(true)).unwrap();
    model.unbind(function).unwrap();
    assert_eq!(model.netdevs(&pod, function).unwrap(), []);
    model.bind(function, "igbvf").unwrap();
    assert_eq!(model.netdevs(&pod, function).unwrap(), []);
    let back = netdev(&model, &HOST, function);
    assert!(back.index != device.index && back.name.as_str() != "net1", "{back:?}");
}

#[test]
fn bug_24_nothing_is_written_that_nobody_asked_for() {
    let (model, port, _) = one(Profile::I40E);
    let before = model.vf(port, VF).unwrap();
    model.take_calls();
    model.configure_vf(port, VF, &VfConfig::default().change(&before).unwrap()).unwrap();
    model.configure_netdev(&HOST, port, &VfConfig::default().netdev()).unwrap();
    assert_eq!(model.take_calls(), [""; 0]);
    // The twin: a VLAN of 0 that somebody did ask for is written.
    let zero = VfConfig::new(VfSettings { vlan: Some(0), ..VfSettings::default() }).unwrap();
    assert_eq!(zero.change(&before).unwrap().vlan, Some(VfVlan::default()));
    model.configure_vf(port, VF, &zero.change(&before).unwrap()).unwrap();
    assert_eq!(model.take_calls().len(), 1);
}

#[test]
fn bug_25_a_bond_in_a_pod_needs_both_trust_and_no_spoof_check() {
    for profile in [Profile::IGB, Profile::ICE, Profile::I40E] {
        let attempt = |settings: VfSettings| {
            let (model, port, function) = one(profile);
            let settings = VfSettings { mac: Some(mac(1)), ..settings };
            let config = VfConfig::new(settings).unwrap();
            model.configure_vf(port, VF, &config.change(&model.vf(port, VF).unwrap()).unwrap()).unwrap();
            // The other member fails: its address moves here, and frames of both are sent.
            let device = netdev(&model, &HOST, function);
            let moved = NetdevChange { mac: Some(mac(2)), ..NetdevChange::default() };
            model.configure_netdev(&HOST, device.index, &moved).is_ok()
                && model.passes(function, mac(1))
                && model.passes(function, mac(2))
        };
        let trust = VfSettings { trust: Some(true), ..VfSettings::default() };
        let no_check = VfSettings { spoofchk: Some(false), ..VfSettings::default() };
        let said = [VfSettings::default(), trust, no_check, VfSettings::for_bond()].map(attempt);
        assert_eq!(said, [false, false, false, true], "{}", profile.driver);
    }
}

#[test]
fn bug_33_a_short_list_is_searched_and_not_indexed() {
    let (model, port) = Model::with_port(Profile::ICE, 3);
    let set = VfChange { rate: Some(VfRate { min: 0, max: 300 }), ..VfChange::default() };
    model.configure_vf(port, VfIndex(2), &set).unwrap();
    model.withhold(model.function(port, 1), true);
    assert_eq!(model.vfs(port).unwrap().iter().map(|(index, _)| index.0).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(model.vf(port, VfIndex(2)).unwrap().rate.max, 300);
    for missing in [1, 3] {
        let error = model.vf(port, VfIndex(missing)).unwrap_err();
        assert_eq!(error.class, ErrorClass::NotReported);
        assert!(error.is_retryable(), "{error}");
    }
}

/// A namespace that dies gives the device back as the pod left it; a name that is taken becomes another.
#[test]
fn a_dead_namespace_gives_the_device_back_as_it_was_left() {
    for taken in [false, true] {
        let (model, _, function) = one(Profile::MLX5);
        let pod = model.create_namespace("/pod");
        let device = netdev(&model, &HOST, function);
        let change = NetdevChange { mac: Some(mac(7)), promisc: Some(true), ..up(true) };
        model.move_netdev(&HOST, device.index, &pod, &"net1".parse().unwrap(), &change).unwrap();
        model.add_alternative_name(&pod, device.index, "of-the-pod").unwrap();
        model.attach_program(function, "drop_all");
        if taken {
            model.add_link(&HOST, "net1");
        }
        // Somebody has it open: its path is gone, and the device is nowhere.
        let held = model.hold_namespace("/pod");
        model.remove_namespace("/pod");
        assert_eq!(model.namespace_id(&pod).unwrap(), None);
        assert_eq!(model.netdevs(&HOST, function).unwrap(), []);
        assert_eq!(model.netdevs(&pod, function).unwrap_err().class, ErrorClass::NamespaceGone);
        model.release_namespace(held);
        let back = netdev(&model, &HOST, function);
        let wanted = if taken { format!("dev{}", device.index) } else { "net1".to_owned() };
        assert_eq!(back.name.as_str(), wanted);
        assert_eq!((back.mac, back.up, back.promisc), (Some(mac(7)), false, true));
        assert_eq!(back.alternative_names, ["of-the-pod"]);
        // Programs stay on the device, too, until they are taken off.
        assert_eq!(model.scrub(back.index).unwrap(), ["drop_all"]);
        assert_eq!(model.scrub(back.index).unwrap(), [""; 0]);
    }
}

#[test]
fn names_in_the_way_stop_a_move_or_leave_the_name() {
    let (model, _, function) = one(Profile::IGB);
    let pod = model.create_namespace("/pod");
    let net1 = "net1".parse().unwrap();
    let device = netdev(&model, &HOST, function);
    model.add_link(&pod, "net1");
    let error = model.move_netdev(&HOST, device.index, &pod, &net1, &NetdevChange::default()).unwrap_err();
    assert_eq!(error.class, ErrorClass::Exists);
    // It has moved, and kept its name.
    let inside = netdev(&model, &pod, function);
    assert_eq!(inside.name, device.name);
    model.move_netdev(&pod, inside.index, &HOST, &device.name, &NetdevChange::default()).unwrap();
    // Where both names are taken it has not.
    model.add_link(&pod, device.name.as_str());
    let error = model.move_netdev(&HOST, device.index, &pod, &net1, &NetdevChange::default()).unwrap_err();
    assert_eq!(error.class, ErrorClass::Exists);
    assert_eq!(netdev(&model, &HOST, function).name, device.name);
}

#[test]
fn what_a_driver_refuses_is_known_before_the_first_write() {
    for profile in Profile::ALL {
        let (model, port, _) = one(profile);
        let before = model.vf(port, VF).unwrap();
        let can = Capabilities::of(Some(profile.driver), &before);
        assert_eq!(can.supports(Attribute::Trust), profile.has_trust);
        assert_eq!(can.supports(Attribute::RssQuery), profile.has_rss_query);
        assert_eq!(can.supports(Attribute::LinkState), !profile.no_link_state);
        assert_eq!(can.supports(Attribute::MinRate), !profile.refuses_min_rate, "{}", profile.driver);
        assert_eq!(can.supports(Attribute::Protocol), !profile.refuses_service_tags, "{}", profile.driver);
    }
}

#[test]
fn rates_of_igb_want_carrier_and_are_restored_only_where_they_differ() {
    let (model, port, _) = one(Profile::IGB);
    let before = model.vf(port, VF).unwrap();
    model.set_carrier(port, false);
    let set = VfChange { rate: Some(VfRate { min: 0, max: 100 }), ..VfChange::default() };
    assert_eq!(model.configure_vf(port, VF, &set).unwrap_err().attribute, Some(Attribute::MaxRate));
    let changed = VfState { trust: Some(true), ..before.clone() };
    model.configure_vf(port, VF, &VfChange { trust: Some(true), ..VfChange::default() }).unwrap();
    assert_eq!(model.vf(port, VF).unwrap(), changed);
    // Nothing of the rate is written, which would be refused.
    model.configure_vf(port, VF, &before.restore(&changed)).unwrap();
    assert_eq!(model.vf(port, VF).unwrap(), before);
}
