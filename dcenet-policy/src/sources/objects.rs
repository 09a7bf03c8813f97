//! The kinds of `dcenet.io/v1alpha1` that policies refer to by name.

use serde_json::Value;

use super::SourceError;
use super::fields::{At, Fields};
use super::kubernetes::labels;
use super::native;
use super::networkpolicy::{KindNeeded, METADATA, dns_name, one_of, within};
use crate::model::{
    CLUSTER_NAME_LABEL, CLUSTER_SET_LABEL, Catalog, ClusterSpec, DAYS, MINUTES, Schedule, Tier, TierEnd, TierSpec,
    Window,
};

/// What such an object adds, with its kind and its name.
pub(super) struct Named {
    pub(super) kind: &'static str,
    pub(super) name: String,
    pub(super) adds: Catalog,
}

/// The kinds beside [`native::KIND`].
pub(super) const KINDS: [&str; 4] = [TIER, PREFIX_GROUP, SCHEDULE, CLUSTER];
const TIER: &str = "Tier";
const PREFIX_GROUP: &str = "PrefixGroup";
const SCHEDULE: &str = "Schedule";
const CLUSTER: &str = "Cluster";
/// Of a Schedule: the search for its next change goes with their square.
const MAX_WINDOWS: usize = 100;

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
    match kind {
        PREFIX_GROUP => prefix_group(&name, &object),
        SCHEDULE => schedule(&name, &object),
        CLUSTER => cluster(&name, &metadata, &object),
        _ => tier(&name, &object),
    }
}

fn cluster(name: &At<'_>, metadata: &Fields<'_>, object: &Fields<'_>) -> Result<Named, SourceError> {
    let spec = object.field("spec").fields(&["clusterSet", "cidrs", "except"])?;
    let blocks = native::blocks(&spec.field("cidrs"), &spec.field("except"))?;
    let name = name.text()?.to_owned();
    let mut labels = labels(metadata)?;
    labels.insert(CLUSTER_NAME_LABEL.to_owned(), name.clone());
    let set = spec.field("clusterSet");
    if set.value.is_some() {
        labels.insert(CLUSTER_SET_LABEL.to_owned(), dns_name(&set, 63)?.to_owned());
    }
    let clusters = [(name.clone(), ClusterSpec { labels, blocks })].into();
    Ok(Named { kind: CLUSTER, name, adds: Catalog { clusters, ..Catalog::default() } })
}

fn schedule(name: &At<'_>, object: &Fields<'_>) -> Result<Named, SourceError> {
    let spec = object.field("spec").fields(&["utcOffset", "windows"])?;
    let (offset, windows) = (spec.field("utcOffset"), spec.field("windows"));
    let offset = match offset.value {
        None => 0,
        Some(_) => distance(offset.text()?)
            .ok_or_else(|| offset.invalid("must be a distance from UTC such as \"+01:00\" or \"-03:30\""))?,
    };
    let elements = windows.elements()?;
    if elements.is_empty() {
        return Err(windows.invalid("must have at least one element"));
    }
    within(&windows.path, windows.document, "windows", elements.len(), MAX_WINDOWS)?;
    let windows = elements.iter().map(window).collect::<Result<Vec<_>, _>>()?;
    let name = name.text()?.to_owned();
    let schedules = [(name.clone(), Schedule { offset, windows })].into();
    Ok(Named { kind: SCHEDULE, name, adds: Catalog { schedules, ..Catalog::default() } })
}

fn window(at: &At<'_>) -> Result<Window, SourceError> {
    let fields = at.fields(&["days", "from", "until"])?;
    let (listed, from, until) = (fields.field("days"), fields.field("from"), fields.field("until"));
    let mut days = 0;
    for day in listed.value.map(|_| listed.elements()).transpose()?.unwrap_or_default() {
        let name = one_of(&day, &DAYS)?;
        days |= DAYS.iter().zip(0..).find(|(day, _)| **day == name).map_or(0, |(_, bit)| 1 << bit);
    }
    if days == 0 {
        if listed.value.is_some() {
            return Err(listed.invalid("must have at least one day; leave it out for all"));
        }
        days = (1 << DAYS.len()) - 1;
    }
    if from.value.is_some() != until.value.is_some() {
        let missing = if from.value.is_some() { &until } else { &from };
        return Err(missing.invalid("is required beside the other; leave out both for the whole day"));
    }
    let (mut begin, mut end) = (0, MINUTES);
    if from.value.is_some() {
        begin = clock(from.text()?)
            .filter(|minute| *minute < MINUTES)
            .ok_or_else(|| from.invalid("must be a time of day from \"00:00\" to \"23:59\", in quotes"))?;
        end = clock(until.text()?).filter(|minute| *minute > 0).ok_or_else(|| {
            until.invalid("must be a time of day from \"00:01\" to \"24:00\", in quotes; \"24:00\" is the day's end")
        })?;
    }
    Ok(Window { days, from: begin, until: end })
}

/// Minutes of `HH:MM`, up to 24:00.
fn clock(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number =
        |text: &str| (text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?;
    let (hours, minutes): (u16, u16) = (number(hours)?, number(minutes)?);
    (minutes < 60).then_some(hours * 60 + minutes).filter(|all| *all <= MINUTES)
}

fn distance(text: &str) -> Option<i16> {
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+')?),
    };
    let minutes = clock(rest).filter(|minutes| *minutes < MINUTES)?;
    Some(sign * i16::try_from(minutes).ok()?)
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
