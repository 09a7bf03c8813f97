//! Arrays of local ids, and whether there is room.

use std::sync::Arc;

use dcenet_ebpf::abi::{Sizes, local_ids_element};
use dcenet_ebpf::maps::{Array, Map};

use crate::classes::{AddressTable, TableChanges};
use crate::compiler::{CompileError, PolicySet, Update};
use crate::enforcer::EnforcerError;
use crate::enforcer::tables::ClassTables;

/// Whether a node's maps hold what an update needs.
pub(super) fn has_room(update: &Update, sizes: &Sizes, tables: &mut ClassTables) -> Result<(), CompileError> {
    let classes = update.table.exact().values().chain(update.table.prefixes().values());
    let in_table = classes.max().map_or(0, |class| class.0 as usize + 1);
    // Classes that no entry names yet have local ids already.
    let last = |set: &&Arc<PolicySet>| set.locals.iter().rposition(|local| *local != 0).map_or(0, |last| last + 1);
    let in_arrays = update.sets().values().map(last).max().unwrap_or(0);
    let (found, limit) = (in_table.max(in_arrays), sizes.classes as usize);
    if found > limit {
        return Err(CompileError::ImplLimitExceeded { what: "classes of peers of the node", found, limit });
    }
    tables.check(update)
}

pub(super) fn array(map: &Map) -> Result<Array<u64>, EnforcerError> {
    let copy = map.try_clone().map_err(|e| EnforcerError::map(LOCAL_IDS, e))?;
    Array::new(copy).map_err(|e| EnforcerError::map(LOCAL_IDS, e))
}

/// Local ids as the map has them, four in an element.
pub(super) fn elements(locals: &[u16]) -> Vec<u64> {
    let mut elements = vec![0u64; locals.len().div_ceil(4)];
    for (class, local) in (0..).zip(locals) {
        let (element, shift) = local_ids_element(class);
        elements[element as usize] |= u64::from(*local) << shift;
    }
    elements
}

/// Writes what differs.
pub(super) fn rewrite(map: &Map, old: &[u16], new: &[u16]) -> Result<(), EnforcerError> {
    let (old, new) = (elements(old), elements(new));
    let array = array(map)?;
    for index in 0..old.len().max(new.len()) {
        let at = |elements: &[u64]| elements.get(index).copied().unwrap_or(0);
        if at(&old) != at(&new) {
            array.store(index as u32, &at(&new)).map_err(|e| EnforcerError::map(LOCAL_IDS, e))?;
        }
    }
    Ok(())
}

/// Whether a set judges some address otherwise once the table has changed.
pub(super) fn judges_otherwise(
    old: &PolicySet,
    new: &PolicySet,
    changes: &TableChanges,
    before: &AddressTable,
) -> bool {
    let local = |set: &PolicySet, class: Option<crate::classes::ClassId>| class.map_or(0, |class| set.local(class));
    let exact = changes.exact.iter().any(|(address, class)| {
        // An exact entry that goes leaves the address to a prefix, whose class is not looked up here.
        class.is_none() || local(old, Some(before.lookup(*address))) != local(new, *class)
    });
    // The addresses of a prefix are too many to ask for each.
    exact || !changes.prefixes.is_empty()
}

/// In errors; the map's own name depends on the direction.
pub(super) const LOCAL_IDS: &str = "local_ids";
