//! What the numbers of rules stand for.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dcenet_ebpf::abi;
use dcenet_ebpf::maps::PerCpuArray;

use super::super::EnforcerError;
use crate::compiler::RuleTable;
use crate::ir::RuleId;
use crate::model::{PolicyId, RuleRef};

/// What numbers stand for. Rules that fell out of use keep their names until their number is given to another.
#[derive(Debug, Default)]
pub(crate) struct Names {
    rules: BTreeMap<RuleId, RuleRef>,
    /// Numbers that an earlier owner gave to rules and that now stand for something else.
    taken_back: Vec<RuleId>,
}

impl Names {
    /// Where names are kept for the next owner.
    pub(crate) fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("policy.rules")
    }

    /// The names that an earlier owner has left. A file that cannot be read is as good as none: names are then given anew,
    /// and counters begin at zero.
    pub(crate) fn resume(run_dir: &Path) -> Self {
        let path = Self::path(run_dir);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Self::default(),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the names of rules are lost");
                return Self::default();
            }
        };
        match serde_json::from_slice::<Vec<(u32, RuleRef)>>(&text) {
            Ok(rules) => {
                let rules = rules.into_iter().map(|(id, rule)| (RuleId(id), rule));
                let (rules, taken_back): (BTreeMap<_, _>, BTreeMap<_, _>) =
                    rules.partition(|(id, _)| *id >= RuleId::FIRST);
                Self { rules, taken_back: taken_back.into_keys().collect() }
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the names of rules are lost");
                Self::default()
            }
        }
    }

    /// The rules with their numbers.
    pub(crate) fn rules(&self) -> impl Iterator<Item = (RuleId, RuleRef)> {
        self.rules.iter().map(|(id, rule)| (*id, rule.clone()))
    }

    /// Notes the names of an update, before any program uses the numbers. What gets the number of another rule begins to
    /// count at zero, also where it is no rule: a release may have fewer numbers for rules than the one before it.
    pub(crate) fn learn(
        &mut self,
        table: &RuleTable,
        counters: &PerCpuArray<[u64; 2]>,
        run_dir: &Path,
    ) -> Result<(), EnforcerError> {
        let learnt: Vec<_> = table.iter().filter(|(id, rule)| self.rules.get(id) != Some(*rule)).collect();
        if !learnt.is_empty() || !self.taken_back.is_empty() {
            for id in learnt.iter().map(|(id, _)| *id).chain(self.taken_back.iter().copied()) {
                if id.0 < counters.entries() {
                    counters.store(id.0, &[0; 2]).map_err(|e| EnforcerError::map(abi::RULES, e))?;
                }
            }
            let mut rules = self.rules.clone();
            rules.extend(learnt.into_iter().map(|(id, rule)| (id, rule.clone())));
            let path = Self::path(run_dir);
            let failed = |source| EnforcerError::File { path: path.clone(), source };
            let fresh = run_dir.join("policy.rules,new");
            let text: Vec<(u32, &RuleRef)> = rules.iter().map(|(id, rule)| (id.0, rule)).collect();
            let text = serde_json::to_vec(&text).map_err(|e| failed(e.into()))?;
            fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, &path)).map_err(failed)?;
            // Only now: what is not written down is learnt again by the next attempt.
            *self = Self { rules, taken_back: Vec::new() };
        }
        Ok(())
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = RuleId> + '_ {
        self.rules.keys().copied()
    }

    pub(super) fn policy(&self, id: RuleId) -> Option<PolicyId> {
        self.rules.get(&id).map(|rule| rule.policy.clone())
    }

    pub(super) fn text(&self, id: RuleId) -> String {
        match self.rules.get(&id) {
            Some(rule) => rule.to_string(),
            None => RuleTable::default().name(id),
        }
    }
}
