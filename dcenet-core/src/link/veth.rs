//! A veth without a bridge: every address is routed by itself, and no Ethernet segment is shared.
//!
//! ```text
//!  pod: eth0 (a.b.c.d/32) ---- dc<id> :host, route a.b.c.d/32 -> dc<id>
//!  default via 169.254.1.1 and fe80::1, both entered for good as the host end's Ethernet address
//! ```
//!
//! ```
//! # use dcenet_core::link::LinkConfig;
//! # let value = serde_json::json!(
//! { "kind": "veth", "mtu": 1500 }
//! # );
//! # LinkConfig::read(&value)?;
//! # Ok::<(), dcenet_core::section::SectionError>(())
//! ```
//!
//! The neighbours of both sides are entered for good, so that no ARP and no neighbour discovery is needed, or
//! believed. The host must forward: its driver lets IPv4 in by the host's end; IPv6 forwarding is a setting of the whole
//! host (`net.ipv6.conf.all.forwarding`), which is left to the operator.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::bridge::{create_pair, host_end, set_up_pod, settle};
use super::pod_end::{self, Neighbours, direct};
use super::{HostView, LinkDriver, LinkRequest, Need, PlanError, check_routes, device_mtu, host_mac, refuse_vlan};
use crate::bandwidth::Bandwidth;
use crate::model::{IfName, Mtu};
use crate::plan::{End, Operation, Plan, RouteSpec, Step, Target, Tuning};
use crate::provider::LeasedAddress;
use crate::sysctl::Sysctls;

/// `"link": { "kind": "veth", ... }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VethConfig {
    /// MTU of the pod's device, in bytes; a lower one of its addresses' pools goes before it. The kernel's default (1500)
    /// where neither says anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// What else the pod's device is to be.
    #[serde(default, skip_serializing_if = "Tuning::is_default")]
    pub tuning: Tuning,
    /// How fast the pod may send and receive; as it can where absent.
    #[serde(default, skip_serializing_if = "Bandwidth::is_none")]
    pub bandwidth: Bandwidth,
    /// Settings of the pod's namespace, and of its device.
    #[serde(default, skip_serializing_if = "Sysctls::is_empty")]
    pub sysctl: Sysctls,
}

impl LinkDriver for VethConfig {
    fn kind(&self) -> &'static str {
        "veth"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        Vec::new()
    }

    fn plan(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        let pair = RoutedPair::new(self.kind(), request, self.mtu, self.bandwidth)?;
        let steps = create_pair(&pair.pod, &pair.host, pair.mtu, &request.key);
        Ok(pair.plan(steps, self.tuning, None, Vec::new()))
    }
}

/// A pair of which the host routes to the pod's end, however it was made.
pub(super) struct RoutedPair<'a> {
    pub(super) request: &'a LinkRequest,
    pub(super) pod: End,
    pub(super) host: End,
    pub(super) mtu: Option<Mtu>,
    pub(super) neighbours: Neighbours,
    bandwidth: Bandwidth,
}

/// A routing domain of the host.
pub(super) struct Domain<'a> {
    pub(super) master: &'a IfName,
    pub(super) table: u32,
}

impl<'a> RoutedPair<'a> {
    pub(super) fn new(
        kind: &str,
        request: &'a LinkRequest,
        mtu: Option<Mtu>,
        bandwidth: Bandwidth,
    ) -> Result<Self, PlanError> {
        check_routes(request)?;
        refuse_vlan(kind, &request.addresses)?;
        let mtu = device_mtu(mtu, &request.addresses)?;
        bandwidth.check(mtu)?;
        let key = &request.key;
        let pod = End { name: key.ifname.clone(), mac: request.mac };
        let host = End { name: key.id().host_ifname(), mac: host_mac(key, request.mac) };
        let neighbours = Neighbours::Resolved(pod.mac);
        Ok(Self { request, pod, host, mtu, neighbours, bandwidth })
    }

    /// The plan, after `steps` that make the pair, with `shared` before the host's end is set up.
    pub(super) fn plan(
        self,
        mut steps: Vec<Step>,
        tuning: Tuning,
        domain: Option<Domain<'_>>,
        shared: Vec<Step>,
    ) -> Plan {
        let Self { request, pod, host: end, mtu: _, neighbours, bandwidth } = self;
        let resolved = neighbours != Neighbours::None;
        let alone = |a: &LeasedAddress| LeasedAddress { address: IpNet::from(a.address.addr()), ..a.clone() };
        let addresses: Vec<_> = request.addresses.iter().map(alone).collect();
        set_up_pod(&pod, tuning, &addresses, &mut steps);
        for family in [GATEWAY_V4, GATEWAY_V6] {
            if resolved && addresses.iter().any(|a| a.address.addr().is_ipv4() == family.is_ipv4()) {
                let (link, mac) = (pod.name.clone(), end.mac);
                steps.push(Step::new(Target::Pod, Operation::AddNeighbour { link, address: family, mac }));
            }
        }
        // Whatever router the lease names, this host is the first hop: to every other place in the subnet too.
        let subnets =
            request.addresses.iter().map(|a| a.address.trunc()).filter(|net| net.prefix_len() < net.max_prefix_len());
        let mut destinations: Vec<IpNet> = Vec::new();
        for destination in subnets.chain(request.routes.iter().map(|r| r.destination.trunc())) {
            if !destinations.contains(&destination) {
                destinations.push(destination);
            }
        }
        for destination in destinations {
            let gateway = if destination.addr().is_ipv4() { GATEWAY_V4 } else { GATEWAY_V6 };
            let route = if resolved {
                RouteSpec { gateway: Some(gateway), on_link: true, ..direct(destination) }
            } else {
                direct(destination)
            };
            steps.push(pod_end::pod_route(&pod.name, route));
        }

        host_end(&end, &request.key, request.policy, bandwidth, &mut steps);
        steps.extend(shared);
        let on_host = |operation| Step::new(Target::Host, operation);
        if addresses.iter().any(|a| a.address.addr().is_ipv4()) {
            steps.push(on_host(Operation::ForwardIpv4 { link: end.name.clone() }));
        }
        let master = domain.as_ref().map(|d| d.master.clone());
        steps.push(on_host(Operation::Up { link: end.name.clone(), master }));
        if resolved {
            for address in &addresses {
                let link = end.name.clone();
                steps.push(on_host(Operation::AddNeighbour { link, address: address.address.addr(), mac: pod.mac }));
            }
        }
        for address in &addresses {
            let route = RouteSpec { table: domain.as_ref().map(|d| d.table), ..direct(address.address) };
            steps.push(on_host(Operation::AddRoute { link: end.name.clone(), route }));
        }
        settle(&pod, &end, &addresses, &mut steps);
        Plan { steps, host_end: Some(end), pod_end: pod, bridge: None, router: None }
    }
}

/// The first hop that every routed pod sees (RFC 3927: an address that no network assigns).
const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
/// As [`GATEWAY_V4`].
const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
