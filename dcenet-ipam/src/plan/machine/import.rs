//! Entering what exists already.

use super::{Reply, Step, Work, check_name};
use crate::plan::block::Block;
use crate::plan::document::{Conflict, ConflictKind, Document, DocumentPrefix, ImportReport};
use crate::plan::error::PlanError;
use crate::plan::index::Index;
use crate::plan::model::{Purpose, State};
use crate::plan::record::{Delta, Node, PrefixRecord, Registry};

impl Work<'_> {
    pub(super) fn import(&self, document: &Document, dry_run: bool) -> Result<Step, PlanError> {
        self.declared()?;
        let registry = self.registry();
        let mut report = ImportReport::default();
        let mut entries: Vec<(Node, &DocumentPrefix)> = Vec::new();
        for entry in document.flat() {
            let checked = check_name("name", &entry.name)
                .and_then(|()| check_name("owner", &entry.owner))
                .and_then(|()| Block::check("cidr", &entry.cidr));
            match checked {
                Ok(block) => entries.push((Node { block, level: entry.level }, entry)),
                Err(error) => report.conflicts.push(Conflict::malformed(entry, &error)),
            }
        }
        // Each after what contains it. The sort is stable: of two alike the first in the document wins.
        entries.sort_by_key(|(node, _)| *node);
        let mut index = self.known.index.clone();
        let mut nodes = Vec::new();
        for (node, entry) in entries {
            let record = PrefixRecord {
                name: entry.name.clone(),
                owner: entry.owner.clone(),
                purpose: entry.purpose,
                epoch: self.epoch,
                state: State::Held,
                grant: None,
            };
            if let Some(held) = self.known.index.get(&node)
                && (&held.record.name, &held.record.owner, held.record.purpose)
                    == (&entry.name, &entry.owner, entry.purpose)
            {
                report.unchanged += 1;
                continue;
            }
            match self.place(&registry, &mut index, node, entry, record) {
                Ok(()) => nodes.push(node),
                Err(conflict) => report.conflicts.push(conflict),
            }
        }
        report.entered = nodes.iter().filter_map(|node| index.prefix(self.space, node)).collect();
        if dry_run || !report.conflicts.is_empty() || nodes.is_empty() {
            report.applied = report.conflicts.is_empty() && !dry_run;
            return Ok(Step::Done(Reply::Imported(report)));
        }
        report.applied = true;
        let deltas: Vec<Delta> =
            nodes.iter().filter_map(|node| Some(self.put(node, index.get(node)?.record.clone()))).collect();
        Ok(self.change(None, deltas, Reply::Imported(report)))
    }

    fn place(
        &self,
        registry: &Registry,
        index: &mut Index,
        node: Node,
        entry: &DocumentPrefix,
        record: PrefixRecord,
    ) -> Result<(), Conflict> {
        let holder = |other: &Node| index.holder(self.space, other);
        let conflict = |kind: ConflictKind, reason: String| Err(Conflict::new(entry, kind, reason));
        if index.get(&node).is_some() {
            let holder = holder(&node);
            let reason = format!("is {holder} already; keep one of them");
            return conflict(ConflictKind::Duplicate(holder), reason);
        }
        let parent = index.above(&node.block, node.level);
        for (other, held) in index.around(&node.block).map(|n| index.chain(&n)).unwrap_or_default() {
            if other.block == node.block {
                continue;
            }
            let holder = || index.holder(self.space, &other);
            if other.level >= node.level {
                let reason = format!("lies in {}; renumber one of them, or give it a higher level", holder());
                return conflict(ConflictKind::Contained(holder()), reason);
            }
            if held.record.state != State::Held {
                let reason = format!("lies in {}, which is {}; enter it there", holder(), held.record.state);
                return conflict(ConflictKind::Contained(holder()), reason);
            }
        }
        if let Some(parent) = parent
            && let Some(purpose) = index.get(&parent).map(|held| held.record.purpose)
            && purpose != Purpose::Any
            && purpose != entry.purpose
        {
            let reason = format!("lies in {}, which is for {purpose} only", holder(&parent));
            return conflict(ConflictKind::Purpose(holder(&parent)), reason);
        }
        if let Some(other) = index.named(node.block.family, parent, &entry.name) {
            let reason = format!("has the name of {}; rename one of them", holder(&other));
            return conflict(ConflictKind::Name(holder(&other)), reason);
        }
        let unfit = index
            .children_of_new(&node, parent)
            .find(|(_, held)| entry.purpose != Purpose::Any && held.record.purpose != entry.purpose)
            .map(|(inner, _)| *inner);
        if let Some(inner) = unfit {
            let reason = format!("contains {}, which is not for {}", holder(&inner), entry.purpose);
            return conflict(ConflictKind::Purpose(holder(&inner)), reason);
        }
        if let Err(error) = self.keep_apart(registry, &node, entry.purpose, State::Held) {
            let reason = error.to_string();
            return match error {
                PlanError::Overlap { holder, .. } => conflict(ConflictKind::OtherSpace(holder), reason),
                _ => conflict(ConflictKind::Malformed, reason),
            };
        }
        index.insert(node, record).map_err(|clash| {
            let holder = index.holder(self.space, &clash.old);
            let reason = format!("contains {holder}; renumber one of them, or give it a lower level");
            Conflict::new(entry, ConflictKind::Contains(holder), reason)
        })
    }
}
