//! What every [`Kernel`] does: the model, and Linux with an adapter.

use std::time::{Duration, Instant};

use dcenet_core::model::{IfIndex, IfName, MacAddr, Mtu};

use crate::address::{PciAddress, VfIndex};
use crate::config::{Capabilities, VfConfig, VfSettings};
use crate::kernel::{
    Attribute, ErrorClass, Kernel, KernelError, Namespace, NetdevChange, NetdevState, VfChange, VfLinkState, VfRate,
    VfState, VfVlan, VlanProtocol,
};

/// A kernel to be tried, with a function that nobody else uses.
#[derive(Debug)]
pub struct Bed<'a> {
    /// The kernel.
    pub kernel: &'a dyn Kernel,
    /// The device of a port that has carrier.
    pub port: IfIndex,
    /// The port's driver.
    pub driver: &'a str,
    /// One of its functions.
    pub vf: VfIndex,
    /// The function's address, where it is a PCI function with a device in the host's namespace.
    pub function: Option<PciAddress>,
    /// Another namespace, which is empty.
    pub pod: Option<Namespace>,
}

impl Bed<'_> {
    fn state(&self) -> VfState {
        self.kernel.vf(self.port, self.vf).expect("the port reports the function")
    }

    fn set(&self, change: VfChange) -> Result<(), KernelError> {
        self.kernel.configure_vf(self.port, self.vf, &change)
    }

    /// The function's device, once it is there.
    fn device(&self, at: &Namespace, function: PciAddress) -> NetdevState {
        let deadline = Instant::now() + Duration::from_secs(120);
        let mut watch = self.kernel.watch().expect("to watch");
        loop {
            let found = self.kernel.netdevs(at, function).expect("to look for devices");
            if let [device] = &found[..] {
                return device.clone();
            }
            assert!(Instant::now() < deadline, "{function} has no device in {at}: {found:?}");
            watch.wait(Duration::from_millis(200)).expect("to wait");
        }
    }
}

/// All of it. The function is left as it was, but for what drivers remember.
///
/// # Panics
/// Where the kernel does otherwise.
pub fn conforms(bed: &Bed<'_>) {
    settings_are_kept(bed);
    what_is_refused_is_named_and_changes_nothing(bed);
    what_came_before_a_refusal_stays(bed);
    what_is_not_there_is_told(bed);
    counters_are_of_the_same_functions(bed);
    if let (Some(function), Some(pod)) = (bed.function, &bed.pod) {
        devices_move_and_come_back(bed, function, pod);
        drivers_are_exchanged(bed, function);
    }
}

fn settings_are_kept(bed: &Bed<'_>) {
    let before = bed.state();
    let can = Capabilities::of(Some(bed.driver), &before);
    bed.set(VfChange::default()).expect("nothing is no error");
    assert_eq!(bed.state(), before);
    let settings = VfSettings {
        mac: Some(MacAddr::new([2, 0, 0, 0, 0x77, 1])),
        vlan: Some(100),
        qos: Some(3),
        protocol: can.supports(Attribute::Protocol).then_some(VlanProtocol::Dot1Ad),
        min_rate: can.supports(Attribute::MinRate).then_some(20),
        max_rate: can.supports(Attribute::MaxRate).then_some(200),
        spoofchk: Some(false),
        trust: can.supports(Attribute::Trust).then_some(true),
        link_state: can.supports(Attribute::LinkState).then_some(VfLinkState::Enable),
        rss_query: can.supports(Attribute::RssQuery).then_some(true),
        ..VfSettings::default()
    };
    let config = VfConfig::new(settings.clone()).expect("good settings");
    can.check(&config).expect("only what it can");
    bed.set(config.change(&before).expect("no contradiction")).expect("one message sets all");
    let after = bed.state();
    assert_eq!(Some(after.mac), settings.mac);
    let vlan = VfVlan { id: 100.try_into().ok(), qos: 3, protocol: settings.protocol.unwrap_or_default() };
    assert_eq!(after.vlan, vlan);
    assert_eq!(
        after.rate,
        VfRate { min: settings.min_rate.unwrap_or_default(), max: settings.max_rate.unwrap_or_default() }
    );
    assert_eq!(after.spoofchk, settings.spoofchk);
    assert_eq!(after.trust, settings.trust.or(before.trust));
    assert_eq!(after.link_state, settings.link_state.unwrap_or(before.link_state));
    assert_eq!(after.rss_query, settings.rss_query.or(before.rss_query));

    let defaults = VfChange {
        vlan: Some(VfVlan::default()),
        rate: can.supports(Attribute::MaxRate).then(VfRate::default),
        spoofchk: before.spoofchk,
        trust: before.trust.filter(|_| can.supports(Attribute::Trust)),
        link_state: can.supports(Attribute::LinkState).then_some(before.link_state),
        rss_query: before.rss_query,
        ..VfChange::default()
    };
    bed.set(defaults).expect("to put all back");
    assert_eq!(bed.state(), VfState { mac: after.mac, ..before.clone() });
    let zeros = MacAddr::new([0; 6]);
    let refuses = super::Profile::ALL.iter().find(|profile| profile.driver == bed.driver).map(|p| p.refuses_zero_mac);
    match bed.set(VfChange { mac: Some(zeros), ..VfChange::default() }) {
        Ok(()) => {
            assert_ne!(refuses, Some(true));
            assert_eq!(bed.state().mac, zeros);
        }
        // Of a driver that is not modelled nobody knows which it is.
        Err(error) => {
            assert!(refuses.unwrap_or(true) && error.class == ErrorClass::Invalid, "to take the address away: {error}");
            assert_eq!(bed.state().mac, after.mac);
        }
    }
}

fn what_is_refused_is_named_and_changes_nothing(bed: &Bed<'_>) {
    let before = bed.state();
    let can = Capabilities::of(Some(bed.driver), &before);
    let none = VfChange::default;
    let tagged = VfVlan { id: 5.try_into().ok(), qos: 0, protocol: VlanProtocol::Dot1Ad };
    for (attribute, change) in [
        (Attribute::Protocol, VfChange { vlan: Some(tagged), ..none() }),
        (Attribute::MinRate, VfChange { rate: Some(VfRate { min: 5, max: 10 }), ..none() }),
        (Attribute::LinkState, VfChange { link_state: Some(VfLinkState::Disable), ..none() }),
        (Attribute::RssQuery, VfChange { rss_query: Some(true), ..none() }),
        (Attribute::NodeGuid, VfChange { node_guid: Some(crate::kernel::Guid(7)), ..none() }),
    ] {
        if can.supports(attribute) {
            continue;
        }
        let error = bed.set(change).expect_err("the table says that the driver cannot");
        assert!(matches!(error.class, ErrorClass::Unsupported | ErrorClass::Invalid), "{attribute}: {error}");
        assert_eq!(error.attribute, Some(attribute), "{error}");
        assert!(error.errno.is_some() && error.to_string().contains(error.class.remedy()), "{error}");
        assert_eq!(bed.state(), before, "{attribute}");
    }
}

/// The kernel takes nothing back: callers must.
fn what_came_before_a_refusal_stays(bed: &Bed<'_>) {
    let before = bed.state();
    if Capabilities::of(Some(bed.driver), &before).supports(Attribute::NodeGuid) {
        return;
    }
    let tagged = VfVlan { id: 9.try_into().ok(), ..VfVlan::default() };
    let change = VfChange { vlan: Some(tagged), node_guid: Some(crate::kernel::Guid(7)), ..VfChange::default() };
    let error = bed.set(change).expect_err("an Ethernet function has no GUID");
    assert_eq!((error.class, error.attribute), (ErrorClass::Unsupported, Some(Attribute::NodeGuid)), "{error}");
    assert_eq!(bed.state().vlan, tagged);
    bed.set(VfChange { vlan: Some(before.vlan), ..VfChange::default() }).expect("to put it back");
    assert_eq!(bed.state(), before);
}

fn what_is_not_there_is_told(bed: &Bed<'_>) {
    let nowhere = Namespace::Path("/run/netns/dcenet-nobody-made-this".into());
    assert_eq!(bed.kernel.namespace_id(&nowhere).expect("no error"), None);
    assert!(bed.kernel.namespace_id(&Namespace::Host).expect("no error").is_some());
    let nothing = IfIndex::new(4_000_000).expect("not zero");
    assert_eq!(bed.kernel.netdev(&nowhere, nothing).expect_err("gone").class, ErrorClass::NamespaceGone);
    assert_eq!(bed.kernel.netdev(&Namespace::Host, nothing).expect("no error"), None);
    assert_eq!(bed.kernel.vf(nothing, bed.vf).expect_err("gone").class, ErrorClass::Gone);
    assert_eq!(bed.kernel.vf(bed.port, VfIndex(5_000)).expect_err("no such").class, ErrorClass::NotReported);
    let change = NetdevChange { up: Some(true), ..NetdevChange::default() };
    let error = bed.kernel.configure_netdev(&Namespace::Host, nothing, &change).expect_err("gone");
    assert_eq!(error.class, ErrorClass::Gone, "{error}");
    let never: PciAddress = "fffe:00:1f.7".parse().expect("an address");
    assert_eq!(bed.kernel.driver(never).expect_err("gone").class, ErrorClass::Gone);
    assert_eq!(bed.kernel.unbind(never).expect_err("gone").class, ErrorClass::Gone);
    assert_eq!(bed.kernel.vf_count(never).expect_err("gone").class, ErrorClass::Gone);
}

fn counters_are_of_the_same_functions(bed: &Bed<'_>) {
    let functions: Vec<VfIndex> = bed.kernel.vfs(bed.port).expect("to list").into_iter().map(|(vf, _)| vf).collect();
    let counted = bed.kernel.vf_counters(bed.port).expect("to count");
    assert_eq!(counted.into_iter().map(|(vf, _)| vf).collect::<Vec<_>>(), functions);
    let nowhere = Namespace::Path("/run/netns/dcenet-nobody-made-this".into());
    let never: PciAddress = "fffe:00:1f.7".parse().expect("an address");
    assert_eq!(bed.kernel.netdev_counters(&nowhere, never).expect_err("gone").class, ErrorClass::NamespaceGone);
    assert_eq!(bed.kernel.netdev_counters(&Namespace::Host, never).expect("to look"), None);
    if let Some(function) = bed.function {
        assert!(bed.kernel.netdev_counters(&Namespace::Host, function).expect("to look").is_some());
    }
}

fn devices_move_and_come_back(bed: &Bed<'_>, function: PciAddress, pod: &Namespace) {
    let host = Namespace::Host;
    let kernel = bed.kernel;
    let before = bed.device(&host, function);
    assert_eq!(kernel.netdev(&host, before.index).expect("no error").as_ref(), Some(&before));
    let name: IfName = "net1".parse().expect("a name");
    // Where the port gave it an address, it has to keep that.
    let mac = Some(MacAddr::new([2, 0, 0, 0, 0x77, 2])).filter(|_| !bed.state().mac.is_device_address());
    let mtu = Mtu::try_from(1400).expect("an MTU");
    kernel.add_alternative_name(&host, before.index, "dcenet-conformance-altname").expect("to name it");
    let change = NetdevChange {
        mac,
        mtu: Some(mtu),
        alias: Some("of a pod".to_owned()),
        all_multicast: Some(true),
        promisc: Some(true),
        up: Some(true),
        ..NetdevChange::default()
    };
    // One message moves, renames and configures.
    kernel.move_netdev(&host, before.index, pod, &name, &change).expect("to move it");
    assert_eq!(kernel.netdevs(&host, function).expect("no error"), []);
    assert!(kernel.has_netdev(function).expect("to look"), "it is in the pod");
    let inside = bed.device(pod, function);
    let wanted = NetdevState {
        index: inside.index,
        name: name.clone(),
        alternative_names: vec!["dcenet-conformance-altname".to_owned()],
        alias: Some("of a pod".to_owned()),
        mac: mac.or(before.mac),
        mtu: 1400,
        up: true,
        promisc: true,
        all_multicast: true,
    };
    assert_eq!(inside, wanted);
    let nothing = NetdevChange::default();
    kernel.configure_netdev(pod, inside.index, &nothing).expect("nothing is no error");
    assert_eq!(bed.device(pod, function), wanted);
    let taken = kernel.add_alternative_name(pod, inside.index, "net1").expect_err("the name is taken");
    assert_eq!(taken.class, ErrorClass::Exists, "{taken}");
    let back = NetdevChange {
        mac: before.mac.filter(|_| mac.is_some()),
        mtu: Mtu::try_from(before.mtu).ok(),
        alias: Some(String::new()),
        promisc: Some(false),
        all_multicast: Some(false),
        up: Some(false),
        ..NetdevChange::default()
    };
    kernel.move_netdev(pod, inside.index, &host, &before.name, &back).expect("to move it back");
    assert_eq!(kernel.netdevs(pod, function).expect("no error"), []);
    let after = bed.device(&host, function);
    kernel.delete_alternative_name(&host, after.index, "dcenet-conformance-altname").expect("to take the name away");
    kernel.delete_alternative_name(&host, after.index, "dcenet-conformance-altname").expect_err("it has none");
    let after = bed.device(&host, function);
    assert_eq!(after, NetdevState { index: after.index, up: false, ..before });
}

fn drivers_are_exchanged(bed: &Bed<'_>, function: PciAddress) {
    let kernel = bed.kernel;
    let before = kernel.driver(function).expect("no error");
    let driver = before.driver.clone().expect("it is bound");
    let busy = kernel.bind(function, &driver).expect_err("it is bound");
    assert!(matches!(busy.class, ErrorClass::Gone | ErrorClass::Busy), "{busy}");
    kernel.bind(function, "dcenet-no-driver").expect_err("no such driver");
    kernel.unbind(function).expect("to unbind it");
    assert_eq!(kernel.driver(function).expect("no error").driver, None);
    assert_eq!(kernel.netdevs(&Namespace::Host, function).expect("no error"), []);
    assert!(!kernel.has_netdev(function).expect("to look"), "nobody makes one");
    assert_eq!(kernel.unbind(function).expect_err("it has none").class, ErrorClass::Gone);
    kernel.set_driver_override(function, Some("vfio-pci")).expect("to set the override");
    assert_eq!(kernel.driver(function).expect("no error").driver_override.as_deref(), Some("vfio-pci"));
    kernel.bind(function, &driver).expect_err("another driver is to have it");
    kernel.set_driver_override(function, None).expect("to take the override away");
    kernel.bind(function, &driver).expect("to bind it");
    assert_eq!(kernel.driver(function).expect("no error"), before);
    let back = bed.device(&Namespace::Host, function);
    assert!(!back.up, "{back:?}");
}
