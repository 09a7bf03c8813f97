//! Writing the class tables into their maps.

use std::collections::VecDeque;
use std::sync::Arc;

use dcenet_ebpf::abi::{self, Sizes};
use dcenet_ebpf::datapath::classes::{ClassError, Classes, Write};
use dcenet_ebpf::maps::{Map, Put};
use ipnet::IpNet;

use super::EnforcerError;
use super::apply::wait_for_programs;
use super::node::NodeMaps;
use crate::classes::{AddressTable, ClassId, TableChanges};
use crate::compiler::{CompileError, Update};

/// The class tables of an owner.
pub(crate) struct ClassTables {
    classes: Classes,
    maps: [(&'static str, Map); 4],
    /// What the maps hold once nothing is pending, whatever became of the change that this was for.
    table: Arc<AddressTable>,
    /// What is to be stored still: everything before it was, and nothing behind it.
    pending: VecDeque<Write>,
    /// Whether something was stored since programs were waited for.
    written: bool,
}

impl ClassTables {
    /// Over maps that are all zero.
    pub(crate) fn new(maps: &NodeMaps, sizes: &Sizes) -> Result<Self, EnforcerError> {
        let open = |name| Ok::<_, EnforcerError>((name, maps.get(name)?));
        let maps = [open(abi::CLASS_V4)?, open(abi::MEMBERS_V6)?, open(abi::CLASS_V6)?, open(abi::NODES_V6)?];
        let (classes, table, pending) = (Classes::new(sizes), Arc::default(), VecDeque::new());
        Ok(Self { classes, maps, table, pending, written: false })
    }

    /// Whether there is room for an update's table in the place of the one that was written last. May wait until blocks of
    /// the changes before are free.
    ///
    /// # Errors
    /// What is full.
    pub(crate) fn check(&mut self, update: &Update) -> Result<(), CompileError> {
        let changes = wanted(&update.changes_from(&self.table), &self.table, &update.table);
        let mut checked = self.classes.check(&changes);
        if matches!(checked, Err(ClassError::Full { .. })) && self.pending.is_empty() && self.written {
            self.settle();
            checked = self.classes.check(&changes);
        }
        checked.map_err(|error| match error {
            ClassError::Full { map, needed, free } => {
                let what = match map {
                    abi::CLASS_V4 => "blocks of IPv4 peers",
                    abi::MEMBERS_V6 => "places of single IPv6 peers",
                    _ => "blocks of IPv6 peers",
                };
                CompileError::ImplLimitExceeded { what, found: needed, limit: free }
            }
            _ => CompileError::ImplLimitExceeded {
                what: "classes of peers",
                found: usize::MAX,
                limit: (abi::CHILD - 1) as usize,
            },
        })
    }

    /// Writes what of an update's table differs from the one that was written last.
    ///
    /// # Errors
    /// As [`ClassTables::write`].
    pub(crate) fn write_update(&mut self, update: &Update) -> Result<(), EnforcerError> {
        let changes = update.changes_from(&self.table);
        self.write_changes(&changes, &update.table)
    }

    /// Writes what differs from the table that was written last.
    ///
    /// # Errors
    /// [`EnforcerError::Tables`] where there is no room, and nothing was changed; [`EnforcerError::Map`] where a store
    /// failed: the stores behind it are made first by the next call, whatever that is for.
    pub(crate) fn write(&mut self, after: &Arc<AddressTable>) -> Result<(), EnforcerError> {
        let changes = self.table.changes_to(after);
        self.write_changes(&changes, after)
    }

    fn write_changes(&mut self, changes: &TableChanges, after: &Arc<AddressTable>) -> Result<(), EnforcerError> {
        self.flush()?;
        let changes = wanted(changes, &self.table, after);
        if changes.is_empty() {
            return Ok(());
        }
        let writes = match self.classes.apply(&changes) {
            Err(ClassError::Full { .. }) if self.written => {
                // Blocks of the changes before may be all that is missing.
                self.settle();
                self.classes.apply(&changes)
            }
            done => done,
        }?;
        self.pending.extend(writes);
        self.table = Arc::clone(after);
        self.flush()
    }

    /// Frees what programs may have looked at before the latest stores.
    fn settle(&mut self) {
        wait_for_programs();
        self.classes.settled();
        self.written = false;
    }

    fn flush(&mut self) -> Result<(), EnforcerError> {
        while let Some(write) = self.pending.front() {
            let map = self.maps.iter().find(|(name, _)| *name == write.map()).map(|(_, map)| map);
            let stored = map.map(|map| map.update(&write.index().to_ne_bytes(), &write.value(), Put::Any));
            match stored {
                Some(Ok(())) => drop(self.pending.pop_front()),
                Some(Err(error)) => return Err(EnforcerError::map(write.map(), error)),
                None => {
                    let missing = format!("the datapath writes to map {:?}, which it does not have", write.map());
                    return Err(EnforcerError::Lowering(missing.into()));
                }
            }
            self.written = true;
        }
        Ok(())
    }
}

/// Changes by prefix. Of a single address and a prefix that holds nothing else, the address counts.
fn wanted(changes: &TableChanges, before: &AddressTable, after: &AddressTable) -> Vec<(IpNet, Option<ClassNumber>)> {
    let class = |class: &Option<ClassId>| class.map(|class| class.0);
    let mut wanted = Vec::with_capacity(changes.exact.len() + changes.prefixes.len());
    for (prefix, new) in &changes.prefixes {
        let single = prefix.prefix_len() == prefix.max_prefix_len();
        if !single || !after.exact().contains_key(&prefix.addr()) && !before.exact().contains_key(&prefix.addr()) {
            wanted.push((*prefix, class(new)));
        }
    }
    for (address, new) in &changes.exact {
        let prefix = IpNet::from(*address);
        let new = class(new).or_else(|| after.prefixes().get(&prefix).map(|class| class.0));
        wanted.push((prefix, new));
    }
    wanted
}

type ClassNumber = abi::ClassId;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn a_single_address_counts_before_a_prefix_that_holds_nothing_else() {
        let address: IpAddr = "10.0.0.1".parse().unwrap();
        let prefix = IpNet::from(address);
        let table = |exact: Option<u32>, net: Option<u32>| {
            let exact: BTreeMap<_, _> = exact.map(|class| (address, ClassId(class))).into_iter().collect();
            let prefixes: BTreeMap<_, _> = net.map(|class| (prefix, ClassId(class))).into_iter().collect();
            AddressTable::of(exact, prefixes)
        };
        // Whatever comes and goes, the last word on the address is the class that the table says.
        let all: Vec<_> = [None, Some(1), Some(2)]
            .into_iter()
            .flat_map(|exact| [None, Some(3), Some(4)].map(|net| (exact, net)))
            .collect();
        for before in &all {
            for after in &all {
                let (old, new) = (table(before.0, before.1), table(after.0, after.1));
                let mut now = before.0.or(before.1);
                for (changed, class) in wanted(&old.changes_to(&new), &old, &new) {
                    assert_eq!(changed, prefix);
                    now = class;
                }
                assert_eq!(now, after.0.or(after.1), "from {before:?} to {after:?}");
            }
        }
    }
}
