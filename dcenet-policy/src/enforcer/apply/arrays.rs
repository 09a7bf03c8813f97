//! Arrays of local ids, and whether there is room.

use std::collections::BTreeSet;
use std::sync::Arc;

use dcenet_ebpf::abi::{Sizes, local_ids_element};
use dcenet_ebpf::maps::{Array, Map};

use crate::classes::{AddressTable, ClassId, TableChanges};
use crate::compiler::{CHUNK, CompileError, Locals, PolicySet, Update};
use crate::enforcer::EnforcerError;
use crate::enforcer::tables::ClassTables;

/// Whether a node's maps hold what an update needs.
pub(super) fn has_room(update: &Update, sizes: &Sizes, tables: &mut ClassTables) -> Result<(), CompileError> {
    let classes = update.table.exact().values().chain(update.table.prefixes().values());
    let in_table = classes.max().map_or(0, |class| class.0 as usize + 1);
    // Classes that no entry names yet have local ids already.
    let last = |set: &&Arc<PolicySet>| set.locals.last().map_or(0, |last| last as usize + 1);
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

/// Writes what differs.
pub(super) fn rewrite(map: &Map, old: &Locals, new: &Locals) -> Result<(), EnforcerError> {
    let array = array(map)?;
    for (place, chunk) in new.differing(old) {
        let first = (place * CHUNK) as u32;
        let (mut before, mut after) = ([0u64; ELEMENTS], [0u64; ELEMENTS]);
        for (class, local) in (first..).zip(chunk) {
            let (element, shift) = local_ids_element(class);
            before[element as usize % ELEMENTS] |= u64::from(old.get(class)) << shift;
            after[element as usize % ELEMENTS] |= u64::from(*local) << shift;
        }
        let differs = |place: &usize| before[*place] != after[*place];
        if let (Some(from), Some(to)) = ((0..ELEMENTS).find(differs), (0..ELEMENTS).rfind(differs)) {
            let at = local_ids_element(first).0 + from as u32;
            array.store_all(at, &after[from..=to]).map_err(|e| EnforcerError::map(LOCAL_IDS, e))?;
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
    let local = |set: &PolicySet, class: Option<ClassId>| class.map_or(0, |class| set.local(class));
    let exact = changes.exact.iter().any(|(address, class)| {
        // An exact entry that goes leaves the address to a prefix, whose class is not looked up here.
        class.is_none() || local(old, Some(before.lookup(*address))) != local(new, *class)
    });
    // The addresses of a prefix are too many to ask for each.
    exact || !changes.prefixes.is_empty()
}

/// The classes that a table names.
pub(super) fn classes_of(table: &AddressTable) -> BTreeSet<ClassId> {
    table.exact().values().chain(table.prefixes().values()).copied().chain([ClassId::UNKNOWN]).collect()
}

/// Whether a set says of these classes what it said before. Of others no packet asks: what was learnt and given up may have left some.
pub(super) fn says_the_same(old: &PolicySet, new: &PolicySet, classes: &BTreeSet<ClassId>) -> bool {
    Arc::ptr_eq(&old.program, &new.program) && classes.iter().all(|class| old.local(*class) == new.local(*class))
}

/// Elements of the array that hold a chunk.
const ELEMENTS: usize = CHUNK / 4;

/// In errors; the map's own name depends on the direction.
pub(super) const LOCAL_IDS: &str = "local_ids";
