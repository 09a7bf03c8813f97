//! Updates of names alone, and what of them a program can tell.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{CompileError, Compiler, SetId, Update};
use crate::classes::ClassId;
use crate::model::Cluster;

impl Compiler {
    /// As [`Compiler::update_parts_within`] where names alone differ, unless it would compile everything anew, or there is no
    /// room: nothing is done then. Where programs are others, the compiler of before is returned, too.
    pub(crate) fn update_names_within(
        &mut self,
        cluster: &Cluster,
        renamed: &BTreeSet<IpAddr>,
        room: impl FnOnce(&Update) -> Result<(), CompileError>,
    ) -> Option<(Update, Option<Self>)> {
        let mut before = None;
        let mut keep = |kept: Self| before = Some(kept);
        let update = self.update_quickly_within(cluster, [], renamed, room, Some(&mut keep))?;
        Some((update, before))
    }

    /// Whether a class is nobody to a policy set whose programs may run: it satisfies nothing that the set asks. Else a local id
    /// of 0 says that those programs cannot tell whom it is.
    pub(crate) fn is_nobody(&self, set: SetId, class: ClassId) -> bool {
        let held = self.state.sets.values().find(|held| held.set.id == set).map(|held| &held.signatures);
        let retired = || self.state.retired_sets.iter().find(|(_, known, _)| known.id == set).map(|(.., known)| known);
        let atoms = self.state.classes.key(class.0).map_or(&[][..], |atoms| atoms.as_slice());
        held.or_else(retired).is_some_and(|signatures| signatures.of_class(atoms).is_empty())
    }
}
