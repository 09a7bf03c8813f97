//! The kinds of `dcenet.io/v1alpha1` that policies refer to by name.

use serde_json::Value;

use super::SourceError;
use super::fields::{At, Fields};
use super::native;
use super::networkpolicy::{KindNeeded, METADATA, dns_name, one_of};
use crate::model::{Catalog, Tier, TierEnd, TierSpec};

/// What such an object adds, with its kind and its name.
pub(super) struct Named {
    pub(super) kind: &'static str,
    pub(super) name: String,
    pub(super) adds: Catalog,
}

/// The kinds beside [`native::KIND`].
pub(super) const KINDS: [&str; 2] = [TIER, PREFIX_GROUP];
const TIER: &str = "Tier";
const PREFIX_GROUP: &str = "PrefixGroup";

/// Reads an object of one of [`KINDS`].
pub(super) fn read(at: &At<'_>, kind: &str, kind_needed: KindNeeded) -> Result<Named, SourceError> {
    let object = at.fields(&["apiVersion", "kind", "metadata", "spec"])?;
    for (field, wanted) in [("kind", kind), ("apiVersion", native::API_VERSION)] {
        let field = object.field(field);
        if kind_needed == KindNeeded::Yes || field.value.is_some() {
            one_of(&field, &[wanted])?;
        }
    }
    let metadata = object.field("metadata").fields(METADATA)?;
    let namespace = metadata.field("namespace");
    if namespace.value.is_some() {
        return Err(namespace.invalid("such an object is the cluster's; remove the namespace"));
    }
    let name = metadata.field("name");
    dns_name(&name, 63)?;
    if kind == PREFIX_GROUP { prefix_group(&name, &object) } else { tier(&name, &object) }
}

fn prefix_group(name: &At<'_>, object: &Fields<'_>) -> Result<Named, SourceError> {
    let spec = object.field("spec").fields(&["cidrs", "except"])?;
    let blocks = native::blocks(&spec.field("cidrs"), &spec.field("except"))?;
    let name = name.text()?.to_owned();
    let groups = [(name.clone(), blocks)].into();
    Ok(Named { kind: PREFIX_GROUP, name, adds: Catalog { groups, ..Catalog::default() } })
}

fn tier(name: &At<'_>, object: &Fields<'_>) -> Result<Named, SourceError> {
    let text = name.text()?;
    if !matches!(Tier::from(text.to_owned()), Tier::Named(_)) {
        return Err(name.invalid("is the name of a tier that there always is; choose another"));
    }
    let spec = object.field("spec").fields(&["order", "end"])?;
    let (order, end) = (spec.field("order"), spec.field("end"));
    let number = order.value.and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok());
    let number =
        number.filter(|number| *number > 0).ok_or_else(|| order.invalid("must be a number from 1 to 65535"))?;
    let fixed = [(Tier::Admin, TierSpec::ADMIN), (Tier::NetworkPolicy, TierSpec::NETWORK_POLICY)];
    if let Some((taken, _)) =
        fixed.into_iter().chain([(Tier::Baseline, TierSpec::BASELINE)]).find(|(_, spec)| spec.order == number)
    {
        return Err(order.invalid(format!("is the place of the tier {taken}; choose another")));
    }
    let end = match end.value {
        None => TierEnd::Pass,
        Some(_) => match one_of(&end, &["pass", "deny"])? {
            "deny" => TierEnd::Deny,
            _ => TierEnd::Pass,
        },
    };
    let tiers = [(text.to_owned(), TierSpec { order: number, end })].into();
    Ok(Named { kind: TIER, name: text.to_owned(), adds: Catalog { tiers, ..Catalog::default() } })
}
