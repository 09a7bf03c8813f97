//! Plans as documents: what exists already is entered from one, and a plan is written out as one.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::error::{Holder, PlanError};
use super::index::Index;
use super::model::{Level, Prefix, Purpose, space_text};
use super::record::Node;
use crate::model::AddressSpace;

/// Prefixes of one space. A flat list and a tree mean the same: what contains what follows from the prefixes.
///
/// ```
/// use dcenet_ipam::plan::Document;
///
/// let document: Document = serde_json::from_str(
///     r#"{ "prefixes": [ { "name": "corp", "cidr": "10.0.0.0/8", "owner": "net", "level": "fleet", "prefixes": [
///            { "name": "prod-1", "cidr": "10.16.0.0/12", "owner": "prod-1", "purpose": "pod" } ] } ] }"#,
/// )?;
/// assert_eq!(document.space.as_str(), "default");
/// let unknown = serde_json::from_str::<Document>(
///     r#"{ "prefixes": [ { "name": "a", "cidr": "10.0.0.0/8", "owner": "a", "purpose": "misc" } ] }"#,
/// );
/// assert!(unknown.unwrap_err().to_string().contains("expected one of `any`, `underlay`, `pod`, `service`, `mesh`"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// The routing domain, `default` unless told.
    #[serde(default, with = "space_text")]
    pub space: AddressSpace,
    /// The prefixes.
    pub prefixes: Vec<DocumentPrefix>,
}

/// A prefix as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DocumentPrefix {
    /// Its name, unique among its siblings of the family.
    pub name: String,
    /// The prefix.
    pub cidr: IpNet,
    /// Who owns it.
    pub owner: String,
    /// What it is for, `any` unless told.
    #[serde(default, skip_serializing_if = "is_any")]
    pub purpose: Purpose,
    /// Its level, `cluster` unless told.
    #[serde(default = "cluster")]
    pub level: Level,
    /// Prefixes in it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prefixes: Vec<DocumentPrefix>,
}

fn is_any(purpose: &Purpose) -> bool {
    *purpose == Purpose::Any
}

fn cluster() -> Level {
    Level::Cluster
}

impl Document {
    /// All prefixes, each before those written in it.
    pub fn flat(&self) -> Vec<&DocumentPrefix> {
        let mut all = Vec::new();
        let mut stack: Vec<&DocumentPrefix> = self.prefixes.iter().rev().collect();
        while let Some(prefix) = stack.pop() {
            all.push(prefix);
            stack.extend(prefix.prefixes.iter().rev());
        }
        all
    }

    pub(crate) fn of(space: &AddressSpace, index: &Index) -> Self {
        let mut open: Vec<(Node, DocumentPrefix)> = Vec::new();
        let mut document = Self { space: space.clone(), prefixes: Vec::new() };
        let close = |open: &mut Vec<(Node, DocumentPrefix)>, document: &mut Self| {
            if let Some((_, done)) = open.pop() {
                match open.last_mut() {
                    Some((_, parent)) => parent.prefixes.push(done),
                    None => document.prefixes.push(done),
                }
            }
        };
        for (node, held) in index.iter() {
            while open.last().is_some_and(|(around, _)| Some(*around) != held.parent) {
                close(&mut open, &mut document);
            }
            let record = &held.record;
            let written = DocumentPrefix {
                name: record.name.clone(),
                cidr: node.block.cidr(),
                owner: record.owner.clone(),
                purpose: record.purpose,
                level: node.level,
                prefixes: Vec::new(),
            };
            open.push((*node, written));
        }
        while !open.is_empty() {
            close(&mut open, &mut document);
        }
        document
    }
}

/// What an import would do, or did.
#[derive(Debug, Clone, Default)]
pub struct ImportReport {
    /// What stands against it. While there is anything, nothing is entered.
    pub conflicts: Vec<Conflict>,
    /// What is new.
    pub entered: Vec<Prefix>,
    /// How many prefixes were there already, just so.
    pub unchanged: usize,
    /// Whether it was done.
    pub applied: bool,
}

/// A prefix of a document that cannot be entered.
#[derive(Debug, Clone)]
pub struct Conflict {
    /// Its name in the document.
    pub name: String,
    /// The prefix.
    pub cidr: IpNet,
    /// Its owner in the document.
    pub owner: String,
    /// What is wrong.
    pub kind: ConflictKind,
    /// Why, and the remedy.
    pub reason: String,
}

/// How a prefix conflicts. Two prefixes that overlap are equal, or one contains the other.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConflictKind {
    /// The same prefix at the same level is another's.
    Duplicate(Box<Holder>),
    /// It lies in a prefix of the same or a higher level, or in one that is not open for claims.
    Contained(Box<Holder>),
    /// It contains a prefix of the same or a lower level.
    Contains(Box<Holder>),
    /// A rule keeps it apart from a prefix of another space.
    OtherSpace(Box<Holder>),
    /// A sibling has its name.
    Name(Box<Holder>),
    /// Its purpose is not that of the prefix around it, or of one inside.
    Purpose(Box<Holder>),
    /// The prefix, name or owner is malformed.
    Malformed,
}

impl Conflict {
    pub(crate) fn new(entry: &DocumentPrefix, kind: ConflictKind, reason: String) -> Self {
        Self { name: entry.name.clone(), cidr: entry.cidr, owner: entry.owner.clone(), kind, reason }
    }

    pub(crate) fn malformed(entry: &DocumentPrefix, error: &PlanError) -> Self {
        Self::new(entry, ConflictKind::Malformed, error.to_string())
    }
}
