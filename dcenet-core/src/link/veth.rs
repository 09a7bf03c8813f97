//! A veth without a bridge: every address is routed by itself, and no Ethernet segment is shared.
//!
//! ```text
//!  pod: eth0 (a.b.c.d/32) ---- dc<id> :host, route a.b.c.d/32 -> dc<id>
//!  default via 169.254.1.1 and fe80::1, both entered for good as the host end's Ethernet address
//! ```
//!
//! The neighbours of both sides are entered for good, so that no ARP and no neighbour discovery is needed, or
//! believed. The host must forward: its driver lets IPv4 in by the host's end; IPv6 forwarding is a setting of the whole
//! host (`net.ipv6.conf.all.forwarding`), which is left to the operator.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::bridge::{create_pair, host_end, pod_addresses, settle};
use super::{HostView, LinkDriver, LinkRequest, Need, PlanError, check_routes, device_mtu, host_mac, refuse_vlan};
use crate::model::Mtu;
use crate::plan::{End, Operation, Plan, RouteSpec, Step, Target};
use crate::provider::LeasedAddress;

/// `"link": { "kind": "veth", ... }`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VethConfig {
    /// MTU of the pod's device, in bytes; a lower one of its addresses' pools goes before it. The kernel's default (1500)
    /// where neither says anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
}

impl LinkDriver for VethConfig {
    fn kind(&self) -> &'static str {
        "veth"
    }

    fn needs(&self, _: &LinkRequest) -> Vec<Need> {
        Vec::new()
    }

    fn plan(&self, request: &LinkRequest, _: &HostView) -> Result<Plan, PlanError> {
        check_routes(&request.routes)?;
        refuse_vlan(self.kind(), &request.addresses)?;
        let mtu = device_mtu(self.mtu, &request.addresses)?;
        let key = &request.key;
        let pod = End { name: key.ifname.clone(), mac: request.mac };
        let end = End { name: key.id().host_ifname(), mac: host_mac(key, request.mac) };
        let alone = |a: &LeasedAddress| LeasedAddress { address: IpNet::from(a.address.addr()), ..a.clone() };
        let addresses: Vec<_> = request.addresses.iter().map(alone).collect();

        let mut steps = create_pair(&pod, &end, mtu, key);
        pod_addresses(&pod, &addresses, &mut steps);
        for family in [GATEWAY_V4, GATEWAY_V6] {
            if addresses.iter().any(|a| a.address.addr().is_ipv4() == family.is_ipv4()) {
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
            let gateway = Some(if destination.addr().is_ipv4() { GATEWAY_V4 } else { GATEWAY_V6 });
            let route = RouteSpec { destination, gateway, on_link: true, metric: None, table: None };
            steps.push(Step::new(Target::Pod, Operation::AddRoute { link: pod.name.clone(), route }));
        }

        host_end(&end, key, request.policy, &mut steps);
        let on_host = |operation| Step::new(Target::Host, operation);
        if addresses.iter().any(|a| a.address.addr().is_ipv4()) {
            steps.push(on_host(Operation::ForwardIpv4 { link: end.name.clone() }));
        }
        steps.push(on_host(Operation::Up { link: end.name.clone(), master: None }));
        for address in &addresses {
            let link = end.name.clone();
            steps.push(on_host(Operation::AddNeighbour { link, address: address.address.addr(), mac: pod.mac }));
        }
        for address in &addresses {
            let route =
                RouteSpec { destination: address.address, gateway: None, on_link: false, metric: None, table: None };
            steps.push(on_host(Operation::AddRoute { link: end.name.clone(), route }));
        }
        settle(&pod, &end, &mut steps);
        Ok(Plan { steps, host_end: Some(end), pod_end: pod, bridge: None })
    }
}

/// The first hop that every routed pod sees (RFC 3927: an address that no network assigns).
const GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
/// As [`GATEWAY_V4`].
const GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));
