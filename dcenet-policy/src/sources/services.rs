//! EndpointSlices: who answers for a service.

use std::collections::BTreeSet;

use super::SourceError;
use super::fields::Fields;
use super::kubernetes::address;
use super::networkpolicy::{dns_name, one_of, port_number};
use super::objects::Named;
use crate::model::{Backend, Catalog, Protocol, ServiceId};

pub(super) const API_VERSION: &str = "discovery.k8s.io/v1";
pub(super) const KIND: &str = "EndpointSlice";
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
    let namespace = metadata.field("namespace");
    let namespace = if namespace.value.is_none() { "default" } else { dns_name(&namespace, 63)? };
    let name = dns_name(&metadata.field("name"), 253)?;
    let id = ServiceId::new(namespace, dns_name(service, 63)?);

    let mut ports = Vec::new();
    for port in fields.field("ports").elements()? {
        let port = port.some_fields()?;
        let (protocol, number) = (port.field("protocol"), port.field("port"));
        let protocol = match protocol.value {
            None => Protocol::TCP,
            Some(_) => match one_of(&protocol, &["TCP", "UDP", "SCTP"])? {
                "UDP" => Protocol::UDP,
                "SCTP" => Protocol::SCTP,
                _ => Protocol::TCP,
            },
        };
        // "If this is not specified, ports are not restricted" (`EndpointPort.port`).
        let number = if number.value.is_none() { None } else { Some(port_number(&number)?) };
        ports.push((protocol, number));
    }
    let mut backends = BTreeSet::new();
    for endpoint in fields.field("endpoints").elements()? {
        for at in endpoint.some_fields()?.field("addresses").elements()? {
            let address = address(&at)?;
            backends.extend(ports.iter().map(|(protocol, port)| Backend { address, protocol: *protocol, port: *port }));
        }
    }
    let adds = Catalog { services: [(id, backends)].into(), ..Catalog::default() };
    Ok(Some(Named { kind: KIND, name: format!("{namespace}/{name}"), adds }))
}
