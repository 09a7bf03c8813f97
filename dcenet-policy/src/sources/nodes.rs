//! v1 Node: labels and addresses.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::SourceError;
use super::fields::Fields;
use super::kubernetes::{address, labels};
use super::networkpolicy::dns_name;
use crate::model::Labels;

pub(super) const KIND: &str = "Node";

pub(super) struct ReadNode {
    pub(super) name: String,
    pub(super) labels: Labels,
    /// Those of its interfaces.
    pub(super) internal: BTreeSet<IpAddr>,
    /// Those that it is known under elsewhere, which others may have, too.
    pub(super) external: BTreeSet<IpAddr>,
}

pub(super) fn read(fields: &Fields<'_>) -> Result<ReadNode, SourceError> {
    let metadata = fields.field("metadata").some_fields()?;
    let (mut internal, mut external) = (BTreeSet::new(), BTreeSet::new());
    for element in fields.field("status").some_fields()?.field("addresses").elements()? {
        let element = element.some_fields()?;
        // The other types are names (`NodeAddressType` in k8s.io/api/core/v1).
        let found = match element.field("type").value.and_then(|kind| kind.as_str()) {
            Some("InternalIP") => &mut internal,
            Some("ExternalIP") => &mut external,
            _ => continue,
        };
        found.insert(address(&element.field("address"))?);
    }
    let external = external.difference(&internal).copied().collect();
    Ok(ReadNode {
        name: dns_name(&metadata.field("name"), 253)?.to_owned(),
        labels: labels(&metadata)?,
        internal,
        external,
    })
}
