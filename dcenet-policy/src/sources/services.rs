//! Services: their own addresses, by v1 Service, and who answers for them, by EndpointSlices.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::SourceError;
use super::fields::{At, Fields};
use super::kubernetes::address;
use super::networkpolicy::{dns_name, one_of, port_number};
use super::objects::Named;
use crate::model::{Backend, Catalog, Protocol, ServiceId};

pub(super) const API_VERSION: &str = "discovery.k8s.io/v1";
pub(super) const KIND: &str = "EndpointSlice";
pub(super) const SERVICE: &str = "Service";
/// `LabelServiceName` of `k8s.io/api/discovery/v1`.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// Reads a slice; `None` where it is no service's, or has names in the place of addresses. All endpoints count: which of
/// them gets traffic when none is ready is for whoever translates.
pub(super) fn read(fields: &Fields<'_>) -> Result<Option<Named>, SourceError> {
    let metadata = fields.field("metadata").some_fields()?;
    let labels = metadata.field("labels").text_map()?;
    let Some((_, service)) = labels.iter().find(|(key, _)| *key == SERVICE_LABEL) else { return Ok(None) };
    if one_of(&fields.field("addressType"), &["IPv4", "IPv6", "FQDN"])? == "FQDN" {
        return Ok(None);
    }
    let namespace = namespace(&metadata)?;
    let name = dns_name(&metadata.field("name"), 253)?;
    let id = ServiceId::new(namespace, dns_name(service, 63)?);

    let mut ports = Vec::new();
    for port in fields.field("ports").elements()? {
        let port = port.some_fields()?;
        let number = port.field("port");
        // "If this is not specified, ports are not restricted" (`EndpointPort.port`).
        let number = if number.value.is_none() { None } else { Some(port_number(&number)?) };
        ports.push((protocol(&port)?, number));
    }
    let mut addresses = BTreeSet::new();
    for endpoint in fields.field("endpoints").elements()? {
        for at in endpoint.some_fields()?.field("addresses").elements()? {
            addresses.insert(address(&at)?);
        }
    }
    let adds = Catalog { services: [(id, at_ports(&addresses, &ports))].into(), ..Catalog::default() };
    Ok(Some(Named { kind: KIND, name: format!("{namespace}/{name}"), adds }))
}

/// Reads a v1 Service; `None` for one that is only another name of something (`ExternalName`).
pub(super) fn read_service(fields: &Fields<'_>) -> Result<Option<Named>, SourceError> {
    let metadata = fields.field("metadata").some_fields()?;
    let (namespace, name) = (namespace(&metadata)?, dns_name(&metadata.field("name"), 63)?);
    let spec = fields.field("spec").some_fields()?;
    let kind = spec.field("type");
    if kind.value.is_some()
        && one_of(&kind, &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"])? == "ExternalName"
    {
        return Ok(None);
    }
    let mut addresses = BTreeSet::new();
    let mut add = |at: &At<'_>| -> Result<(), SourceError> {
        // "None" is a headless service's, "" that of one that has none yet (`ServiceSpec.clusterIP`).
        if !["", "None"].contains(&at.text()?) {
            addresses.insert(address(at)?);
        }
        Ok(())
    };
    let single = spec.field("clusterIP");
    single.value.map_or(Ok(()), |_| add(&single))?;
    for list in ["clusterIPs", "externalIPs"] {
        spec.field(list).elements()?.iter().try_for_each(&mut add)?;
    }
    let balancer = fields.field("status").some_fields()?.field("loadBalancer").some_fields()?;
    for point in balancer.field("ingress").elements()? {
        // A balancer may be told by a name instead.
        let ip = point.some_fields()?.field("ip");
        ip.value.map_or(Ok(()), |_| add(&ip))?;
    }
    let mut ports = Vec::new();
    for port in spec.field("ports").elements()? {
        let port = port.some_fields()?;
        ports.push((protocol(&port)?, Some(port_number(&port.field("port"))?)));
    }
    let id = ServiceId::new(namespace, name);
    let adds = Catalog { service_addresses: [(id, at_ports(&addresses, &ports))].into(), ..Catalog::default() };
    Ok(Some(Named { kind: SERVICE, name: format!("{namespace}/{name}"), adds }))
}

fn namespace<'a>(metadata: &Fields<'a>) -> Result<&'a str, SourceError> {
    let namespace = metadata.field("namespace");
    if namespace.value.is_none() { Ok("default") } else { dns_name(&namespace, 63) }
}

fn protocol(port: &Fields<'_>) -> Result<Protocol, SourceError> {
    let protocol = port.field("protocol");
    Ok(match protocol.value {
        None => Protocol::TCP,
        Some(_) => match one_of(&protocol, &["TCP", "UDP", "SCTP"])? {
            "UDP" => Protocol::UDP,
            "SCTP" => Protocol::SCTP,
            _ => Protocol::TCP,
        },
    })
}

fn at_ports(addresses: &BTreeSet<IpAddr>, ports: &[(Protocol, Option<u16>)]) -> BTreeSet<Backend> {
    let at = |address: &IpAddr| {
        let address = *address;
        ports.iter().map(move |(protocol, port)| Backend { address, protocol: *protocol, port: *port })
    };
    addresses.iter().flat_map(at).collect()
}
