//! From conditions on peers to local ids.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::{Condition, FlatSet};
use crate::classes::AtomId;
use crate::compiler::{CompileError, Limits, Locals};
use crate::ir::{Entry, LocalSet, RuleList};

/// The local ids of a policy set: each stands for one combination of the set's conditions.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signatures {
    /// The generation that began the numbering. Ids of different epochs mean different things.
    pub(crate) epoch: u64,
    conditions: Vec<Condition>,
    /// Per local id the conditions that hold, as ascending indices; the first is empty.
    known: Vec<Vec<u32>>,
    /// How many local ids there may be before the numbering is begun anew.
    most: usize,
}

impl Signatures {
    /// The conditions that a class satisfies, as ascending indices.
    pub(crate) fn of_class(&self, class: &[AtomId]) -> Vec<u32> {
        let holds = |condition: &Condition| condition.iter().all(|atom| class.binary_search(atom).is_ok());
        (0..).zip(&self.conditions).filter(|(_, condition)| holds(condition)).map(|(index, _)| index).collect()
    }

    /// The last part of each condition, each once: a class without any of these satisfies none.
    pub(crate) fn last_atoms(&self) -> BTreeSet<AtomId> {
        self.conditions.iter().filter_map(|condition| condition.last().copied()).collect()
    }

    /// The local id of a combination of conditions, if it has one.
    pub(crate) fn local(&self, signature: &[u32]) -> Option<u16> {
        self.known.iter().zip(0..).find(|(known, _)| known.as_slice() == signature).map(|(_, local)| local)
    }

    /// Gives a combination that has none a local id; `None` where the numbering is better begun anew, or is full.
    pub(crate) fn add(&mut self, signature: Vec<u32>, limits: &Limits) -> Option<u16> {
        let local = u16::try_from(self.known.len()).ok()?;
        if self.known.len() >= self.most || self.known.len() >= limits.locals {
            return None;
        }
        self.known.push(signature);
        Some(local)
    }

    /// The local id of every class, for a set whose rules are no longer compiled; a combination of conditions that it
    /// never had counts as none.
    pub(crate) fn locals(&self, classes: &ClassMembers) -> Locals {
        let local_of: HashMap<&Vec<u32>, u16> = self.known.iter().zip(0..).collect();
        let held = held(&self.conditions, classes).into_iter();
        held.map(|(class, signature)| (class, local_of.get(&signature).copied().unwrap_or(0))).collect()
    }

    /// Assigns local ids to classes and resolves the rules to them.
    ///
    /// Ids given before are kept while the conditions are the same, so that a peer that comes and goes leaves the
    /// list as it is.
    pub(crate) fn resolve(
        &mut self,
        set: &FlatSet,
        classes: &ClassMembers,
        generation: u64,
        limits: &Limits,
    ) -> Result<(RuleList, Locals), CompileError> {
        let mut seen: HashSet<&Condition> = HashSet::new();
        let mut conditions: Vec<Condition> = Vec::new();
        let rules = set.rules.iter().chain(set.audit.iter().flat_map(|audit| &audit.rules));
        for rule in rules.filter(|rule| !rule.condition.is_empty()) {
            if seen.insert(&rule.condition) {
                conditions.push(rule.condition.clone());
            }
        }
        let held = held(&conditions, classes);
        let wanted: BTreeSet<&Vec<u32>> = held.values().collect();
        self.most = 2 * wanted.len() + 64;
        if self.known.is_empty() || self.conditions != conditions || self.known.len() > self.most {
            self.epoch = generation;
            self.known = vec![Vec::new()];
        }
        let mut local_of: HashMap<Vec<u32>, u16> = HashMap::new();
        for (signature, local) in self.known.iter().zip(0..) {
            local_of.insert(signature.clone(), local);
        }
        for signature in wanted {
            if !local_of.contains_key(signature) {
                limits.check("groups of peers in one policy set", self.known.len() + 1, limits.locals)?;
                local_of.insert(signature.clone(), self.known.len() as u16);
                self.known.push(signature.clone());
            }
        }
        self.conditions = conditions;

        let locals = held.iter().map(|(class, signature)| (*class, local_of[signature])).collect();
        Ok((self.list(set), locals))
    }

    /// The set's rules by local ids.
    pub(crate) fn list(&self, set: &FlatSet) -> RuleList {
        let index_of: HashMap<&Condition, usize> = self.conditions.iter().zip(0..).collect();
        let mut members: Vec<Vec<u16>> = vec![Vec::new(); self.conditions.len()];
        for (local, signature) in (0..).zip(&self.known) {
            for condition in signature {
                members[*condition as usize].push(local);
            }
        }
        let members: Vec<LocalSet> = members.into_iter().map(LocalSet::from_iter).collect();
        let count = self.known.len() as u32;
        let list_of = |set: &FlatSet| {
            let mut entries = Vec::with_capacity(set.rules.len());
            for rule in &set.rules {
                let locals = match index_of.get(&rule.condition) {
                    None => LocalSet::below(count),
                    Some(index) => members[*index].clone(),
                };
                if !locals.is_empty() {
                    entries.push(Entry { locals, service: rule.service, leaf: rule.leaf });
                }
            }
            RuleList { direction: set.direction, locals: count, entries, default: set.default, audit: None }
        };
        RuleList { audit: set.audit.as_deref().map(|audit| Box::new(list_of(audit))), ..list_of(set) }
    }
}

/// The conditions that each class satisfies, as ascending indices; classes that satisfy none are left out.
fn held(conditions: &[Condition], classes: &ClassMembers) -> BTreeMap<u32, Vec<u32>> {
    let mut held: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (index, condition) in (0..).zip(conditions) {
        for class in classes.satisfying(condition) {
            held.entry(class).or_default().push(index);
        }
    }
    held
}

/// Which classes satisfy an atom.
pub(crate) struct ClassMembers {
    by_atom: HashMap<AtomId, BTreeSet<u32>>,
}

impl ClassMembers {
    pub(crate) fn new<'a>(classes: impl Iterator<Item = (u32, &'a Vec<AtomId>)>) -> Self {
        let mut by_atom: HashMap<AtomId, BTreeSet<u32>> = HashMap::new();
        for (class, atoms) in classes {
            for atom in atoms {
                by_atom.entry(*atom).or_default().insert(class);
            }
        }
        Self { by_atom }
    }

    fn satisfying(&self, condition: &[AtomId]) -> Vec<u32> {
        let Some((first, rest)) = condition.split_first() else { return Vec::new() };
        let Some(candidates) = self.by_atom.get(first) else { return Vec::new() };
        let also = |class: &u32| rest.iter().all(|atom| self.by_atom.get(atom).is_some_and(|set| set.contains(class)));
        candidates.iter().copied().filter(also).collect()
    }
}
