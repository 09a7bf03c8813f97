//! The records of a store, read and sorted.

use std::collections::{BTreeMap, BTreeSet};

use dcenet_core::model::AttachmentKey;
use serde::de::DeserializeOwned;

use crate::binder::ledger::{OutsidePage, attachment_of_page};
use crate::model::{Addr, AddressSpace, ClaimKey, Family};
use crate::record::{
    AttachmentRecord, BlockRecord, ClaimRecord, EventRecord, NodeRecord, ReservationRecord, SlotRecord, SpaceRecord,
    attachment_of,
};
use crate::store::{Entry, Key};

/// An address of a space.
pub(super) type Place = (AddressSpace, Addr);

/// A record with its version.
pub(super) type Versioned<T> = (T, u64);

/// First and last address, with the holder.
pub(super) type Reserved = (u128, u128, String);

/// Where a row of a queue is.
pub(super) struct Row {
    pub(super) key: Key,
    pub(super) space: AddressSpace,
    pub(super) family: Family,
    /// What is between the family and the numbers: the queue, or the pool.
    pub(super) name: String,
    pub(super) at: u64,
    pub(super) number: u128,
}

/// Everything that a store holds of the allocator.
#[derive(Default)]
pub(super) struct Snapshot<'a> {
    pub(super) versions: BTreeMap<&'a [u8], u64>,
    pub(super) spaces: BTreeMap<AddressSpace, Versioned<SpaceRecord>>,
    pub(super) slots: BTreeMap<Place, Versioned<SlotRecord>>,
    pub(super) attachments: BTreeMap<AttachmentKey, Versioned<AttachmentRecord>>,
    pub(super) claims: BTreeMap<(AddressSpace, Family, ClaimKey), Versioned<ClaimRecord>>,
    pub(super) freed: Vec<Row>,
    pub(super) due: Vec<Row>,
    pub(super) quarantined: Vec<Row>,
    pub(super) delegated: Vec<Row>,
    pub(super) owned: Vec<Row>,
    /// By space, family, pool and number.
    pub(super) blocks: BTreeMap<(AddressSpace, Family, String, u128), Versioned<BlockRecord>>,
    pub(super) reservations: BTreeMap<(AddressSpace, Family), Vec<Reserved>>,
    pub(super) events: BTreeMap<Place, Vec<(&'a Key, &'a Entry)>>,
    /// What attachments have outside.
    pub(super) outside: BTreeMap<AttachmentKey, OutsidePage>,
    pub(super) planned: Vec<&'a Key>,
    pub(super) unreadable: BTreeMap<&'a [u8], String>,
}

impl<'a> Snapshot<'a> {
    pub(super) fn new(entries: &'a [(Key, Entry)]) -> Self {
        let mut snapshot = Self::default();
        for (key, entry) in entries {
            snapshot.versions.insert(key, entry.version);
            if let Err(reason) = snapshot.enter(key, entry) {
                snapshot.unreadable.insert(key, reason);
            }
        }
        snapshot
    }

    /// Whether a record of the kind cannot be read.
    pub(super) fn any_unreadable(&self, kind: &[u8]) -> bool {
        self.unreadable.keys().any(|key| key.starts_with(kind))
    }

    fn enter(&mut self, key: &'a Key, entry: &'a Entry) -> Result<(), String> {
        let version = entry.version;
        let Some((kind, rest)) = key.iter().position(|b| *b == b'/').map(|slash| key.split_at(slash + 1)) else {
            return Ok(());
        };
        match kind {
            b"e/" => {
                let space = text(rest)?.parse().map_err(|e| format!("{e}"))?;
                self.spaces.insert(space, (value(entry)?, version));
            }
            b"s/" => {
                let (space, family, rest) = place(rest)?;
                let address = Addr { family, bits: number(rest)? };
                self.slots.insert((space, address), (value(entry)?, version));
            }
            b"t/" => {
                let attachment = attachment_of(key).ok_or("the key is no network, container and interface")?;
                let record: AttachmentRecord = value(entry)?;
                if record.addresses.iter().any(|held| held.slot().is_none()) {
                    return Err("a space of it is no name".to_owned());
                }
                self.attachments.insert(attachment, (record, version));
            }
            b"c/" => {
                let (space, family, rest) = place(rest)?;
                let claim = text(rest.strip_prefix(b"/").ok_or(MALFORMED)?)?.parse().map_err(|e| format!("{e}"))?;
                self.claims.insert((space, family, claim), (value(entry)?, version));
            }
            b"k/" => {
                let (space, family, rest) = place(rest)?;
                let rest = rest.strip_prefix(b"/").ok_or(MALFORMED)?;
                self.due.push(timed(key, space, family, String::new(), rest)?);
            }
            b"q/" => {
                let (space, family, rest) = place(rest)?;
                let (key, name, number) = (key.clone(), String::new(), number(rest)?);
                self.quarantined.push(Row { key, space, family, name, at: 0, number });
            }
            b"h/" => {
                let (space, family, rest) = place(rest)?;
                if rest.len() != 28 {
                    return Err(MALFORMED.to_owned());
                }
                value::<EventRecord>(entry)?;
                let address = Addr { family, bits: number(&rest[..16])? };
                self.events.entry((space, address)).or_default().push((key, entry));
            }
            b"n/" => {
                value::<NodeRecord>(entry)?;
            }
            b"f/" => {
                let (space, family, rest) = place(rest)?;
                let (name, rest) = named(rest)?;
                self.freed.push(timed(key, space, family, name, rest)?);
            }
            b"b/" => {
                let (space, family, rest) = place(rest)?;
                let (pool, rest) = named(rest)?;
                self.blocks.insert((space, family, pool, number(rest)?), (value(entry)?, version));
            }
            b"o/" => {
                let (space, family, rest) = place(rest)?;
                let (pool, rest) = named(rest)?;
                let (node, rest) = rest.split_at_checked(rest.len().saturating_sub(17)).ok_or(MALFORMED)?;
                let number = number(rest.strip_prefix(b"/").ok_or(MALFORMED)?)?;
                let name = format!("{pool}/{}", text(node)?);
                self.owned.push(Row { key: key.clone(), space, family, name, at: 0, number });
            }
            b"p/" => {
                let (space, family, rest) = place(rest)?;
                let (name, rest) = named(rest)?;
                let number = number(rest)?;
                self.delegated.push(Row { key: key.clone(), space, family, name, at: 0, number });
            }
            b"x/" => {
                let (space, family, rest) = place(rest)?;
                let rest = rest.strip_prefix(b"/").filter(|rest| rest.len() == 32).ok_or(MALFORMED)?;
                // It is there, whether its holder can be read or not.
                let all = self.reservations.entry((space, family)).or_default();
                let (last, first) = (number(&rest[..16])?, number(&rest[16..])?);
                let record = value::<ReservationRecord>(entry);
                all.push((first, last, record.as_ref().map_or_else(|_| String::new(), |r| r.holder.clone())));
                record?;
            }
            b"y/" => {
                let attachment = attachment_of_page(key)?;
                self.outside.insert(attachment, OutsidePage::read(&entry.value, version)?);
            }
            b"plan/" if rest.starts_with(b"p/") => self.planned.push(key),
            // Of others who share the store.
            _ => {}
        }
        Ok(())
    }

    /// The version of a key for a guard.
    pub(super) fn version(&self, key: &[u8]) -> Option<u64> {
        self.versions.get(key).copied()
    }

    /// Spaces with an unreadable record of their own, and others that exist.
    pub(super) fn all_spaces(&self) -> BTreeSet<&AddressSpace> {
        self.spaces.keys().chain(self.reservations.keys().map(|(space, _)| space)).collect()
    }
}

const MALFORMED: &str = "the key is not of its form";

fn value<T: DeserializeOwned>(entry: &Entry) -> Result<T, String> {
    serde_json::from_slice(&entry.value).map_err(|error| error.to_string())
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|error| error.to_string())
}

/// `SPACE/F` and the rest.
fn place(rest: &[u8]) -> Result<(AddressSpace, Family, &[u8]), String> {
    let slash = rest.iter().position(|b| *b == b'/').ok_or(MALFORMED)?;
    let space = text(&rest[..slash])?.parse().map_err(|e| format!("{e}"))?;
    match rest[slash + 1..].split_first() {
        Some((b'4', rest)) => Ok((space, Family::V4, rest)),
        Some((b'6', rest)) => Ok((space, Family::V6, rest)),
        _ => Err(MALFORMED.to_owned()),
    }
}

/// `/NAME/` and the rest.
fn named(rest: &[u8]) -> Result<(String, &[u8]), String> {
    let rest = rest.strip_prefix(b"/").ok_or(MALFORMED)?;
    let slash = rest.iter().position(|b| *b == b'/').ok_or(MALFORMED)?;
    Ok((text(&rest[..slash])?.to_owned(), &rest[slash + 1..]))
}

fn number(rest: &[u8]) -> Result<u128, String> {
    rest.try_into().map(u128::from_be_bytes).map_err(|_| MALFORMED.to_owned())
}

fn timed(key: &Key, space: AddressSpace, family: Family, name: String, rest: &[u8]) -> Result<Row, String> {
    let (at, bits) = rest.split_at_checked(8).ok_or(MALFORMED)?;
    let at = at.try_into().map(u64::from_be_bytes).map_err(|_| MALFORMED.to_owned())?;
    Ok(Row { key: key.clone(), space, family, name, at, number: number(bits)? })
}
