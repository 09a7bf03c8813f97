//! What the tests of this crate share.

#![allow(dead_code, reason = "each test file uses a part")]

use dcenet_core::engine::AttachRequest;
use dcenet_core::link::{LinkConfig, Policy};
use dcenet_core::model::{AttachmentKey, LabelSet};
use dcenet_core::provider::{Dns, Lease, LeasedAddress, LeasedRoute};
use dcenet_core::test_support::TestNetNs;

pub(crate) fn key(container: &str) -> AttachmentKey {
    AttachmentKey {
        network: "shop".parse().unwrap(),
        container: container.parse().unwrap(),
        ifname: "eth0".parse().unwrap(),
    }
}

pub(crate) fn bridge() -> LinkConfig {
    serde_json::from_str(r#"{"kind": "bridge", "bridge": "dc0", "isGateway": true, "mtu": 1400}"#).unwrap()
}

pub(crate) fn veth() -> LinkConfig {
    serde_json::from_str(r#"{"kind": "veth"}"#).unwrap()
}

/// Addresses `10.20.0.N` and `fd20::N`, with default routes.
pub(crate) fn lease(n: u16) -> Lease {
    let address = |address: String, gateway: &str| LeasedAddress {
        gateway: Some(gateway.parse().unwrap()),
        ..LeasedAddress::new(address.parse().unwrap(), "pods", n.into())
    };
    let route = |destination: &str| LeasedRoute { destination: destination.parse().unwrap(), gateway: None };
    Lease {
        addresses: vec![address(format!("10.20.0.{n}/24"), "10.20.0.1"), address(format!("fd20::{n:x}/64"), "fd20::1")],
        routes: vec![route("0.0.0.0/0"), route("::/0")],
        dns: Dns::default(),
        mac: None,
    }
}

pub(crate) fn request<'a>(container: &str, pod: &'a TestNetNs, link: &LinkConfig, lease: Lease) -> AttachRequest<'a> {
    AttachRequest {
        key: key(container),
        pod: pod.pod(),
        link: link.clone(),
        lease,
        mac: None,
        workload: None,
        labels: LabelSet::new(),
        policy: Policy::None,
        nat: Default::default(),
        fingerprint: "1".into(),
    }
}
