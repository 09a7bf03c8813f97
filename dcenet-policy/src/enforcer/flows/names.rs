//! What the numbers of rules stand for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use dcenet_ebpf::abi;
use dcenet_ebpf::maps::PerCpuArray;

use super::super::EnforcerError;
use super::FlowAudit;
use crate::compiler::{Named, RuleTable};
use crate::ir::RuleId;
use crate::model::PolicyId;

/// What numbers stand for. Rules that fell out of use keep their names until their number is given to another, or they
/// come back with another number.
#[derive(Debug, Default)]
pub(crate) struct Names {
    rules: BTreeMap<RuleId, Named>,
    /// The numbers of the last update.
    used: BTreeSet<RuleId>,
    /// Those of them whose flows are marked.
    logged: BTreeSet<RuleId>,
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
        match serde_json::from_slice::<Vec<(u32, Named)>>(&text) {
            Ok(rules) => {
                let rules = rules.into_iter().map(|(id, rule)| (RuleId(id), rule));
                let (rules, taken_back): (BTreeMap<_, _>, BTreeMap<_, _>) =
                    rules.partition(|(id, _)| *id >= RuleId::FIRST);
                Self {
                    rules,
                    used: BTreeSet::new(),
                    logged: BTreeSet::new(),
                    taken_back: taken_back.into_keys().collect(),
                }
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the names of rules are lost");
                Self::default()
            }
        }
    }

    /// The rules with their numbers.
    pub(crate) fn rules(&self) -> impl Iterator<Item = (RuleId, Named)> {
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
        let named: BTreeSet<&Named> = table.iter().map(|(_, rule)| rule).collect();
        // A rule that comes back may have another number than before, and counts by that one alone.
        let left: BTreeSet<RuleId> = {
            let left = self.rules.iter().filter(|(id, rule)| table.named(**id).is_none() && named.contains(*rule));
            left.map(|(id, _)| *id).collect()
        };
        if !learnt.is_empty() || !left.is_empty() || !self.taken_back.is_empty() {
            for id in learnt.iter().map(|(id, _)| *id).chain(self.taken_back.iter().copied()) {
                if id.0 < counters.entries() {
                    counters.store(id.0, &[0; 2]).map_err(|e| EnforcerError::map(abi::RULES, e))?;
                }
            }
            let mut rules = self.rules.clone();
            rules.retain(|id, _| !left.contains(id));
            rules.extend(learnt.into_iter().map(|(id, rule)| (id, rule.clone())));
            let path = Self::path(run_dir);
            let failed = |source| EnforcerError::File { path: path.clone(), source };
            let fresh = run_dir.join("policy.rules,new");
            let text: Vec<(u32, &Named)> = rules.iter().map(|(id, rule)| (id.0, rule)).collect();
            let text = serde_json::to_vec(&text).map_err(|e| failed(e.into()))?;
            fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, &path)).map_err(failed)?;
            // Only now: what is not written down is learnt again by the next attempt.
            self.rules = rules;
            self.taken_back.clear();
        }
        self.used = table.iter().map(|(id, _)| id).collect();
        self.logged = self.used.iter().copied().filter(|id| table.is_logged(*id)).collect();
        Ok(())
    }

    /// Whether the last update has the rule, or the number stands for no rule of a policy.
    pub(super) fn in_use(&self, id: RuleId) -> bool {
        id < RuleId::FIRST || self.used.contains(&id)
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = RuleId> + '_ {
        self.rules.keys().copied()
    }

    pub(super) fn policy(&self, id: RuleId) -> Option<PolicyId> {
        self.rules.get(&id)?.decider().policy().cloned()
    }

    pub(super) fn text(&self, id: RuleId) -> String {
        match self.rules.get(&id) {
            Some(named) => named.decider().to_string(),
            None => RuleTable::default().name(id),
        }
    }

    /// Whether the rule wants its flows marked.
    pub(super) fn is_logged(&self, id: RuleId) -> bool {
        self.logged.contains(&id)
    }

    /// What would be with the policies in audit, where that is something else.
    pub(super) fn audit(&self, id: RuleId) -> Option<FlowAudit> {
        self.rules.get(&id)?.audit().map(FlowAudit::of)
    }
}

#[cfg(test)]
mod tests {
    use dcenet_core::test_support::{Rung, require};
    use dcenet_ebpf::abi::Sizes;

    use super::super::super::node::create;
    use super::*;
    use crate::compiler::{Audit, Decider};
    use crate::model::{Direction, RuleRef, Verdict};

    fn rule(policy: &str, index: usize) -> Named {
        Named::Rule(RuleRef {
            policy: PolicyId::new("shop", policy),
            direction: Direction::Ingress,
            rule: index,
            peer: None,
            port: None,
        })
    }

    fn table<const N: usize>(rules: [(u32, Named); N]) -> RuleTable {
        rules.into_iter().map(|(id, rule)| (RuleId(id), std::sync::Arc::new(rule))).collect()
    }

    #[test]
    fn a_rule_that_comes_back_with_another_number_leaves_the_old_one() {
        if !require(Rung::Kernel) {
            return;
        }
        let spec = Sizes::small().shared_maps().into_iter().find(|spec| spec.name == abi::RULES).unwrap();
        let counters = PerCpuArray::new(create(&spec).unwrap()).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut names = Names::default();
        let learn = |names: &mut Names, table: RuleTable| {
            names.learn(&table, &counters, directory.path()).unwrap();
            let resumed: Vec<_> = Names::resume(directory.path()).rules().collect();
            assert!(resumed.into_iter().eq(names.rules()), "the next owner has the same");
            let numbers: Vec<_> = names.ids().map(|id| (id.0, names.in_use(id))).collect();
            numbers
        };
        let [a, b, c, d] = [0, 1, 2, 3].map(|n| RuleId::FIRST.0 + n);
        assert_eq!(learn(&mut names, table([(a, rule("a", 0)), (b, rule("a", 1))])), [(a, true), (b, true)]);
        assert_eq!(learn(&mut names, table([(c, rule("b", 0))])), [(a, false), (b, false), (c, true)]);
        assert_eq!(
            learn(&mut names, table([(c, rule("b", 0)), (d, rule("a", 0))])),
            [(b, false), (c, true), (d, true)]
        );
        assert_eq!(learn(&mut names, table([(d, rule("a", 0))])), [(b, false), (c, false), (d, true)]);
        assert!(names.in_use(RuleId::ISOLATED));

        // What no rule decides, and a policy in audit would: it keeps its number, whatever comes and goes beside it.
        let audited = Named::Audited {
            by: Decider::Fixed(RuleId::ISOLATED),
            audit: Audit { verdict: Verdict::Allow, by: rule("c", 0).decider() },
        };
        assert_eq!(learn(&mut names, table([(a, audited.clone()), (d, rule("a", 0))])).len(), 4);
        let kept = learn(&mut names, table([(a, audited.clone()), (b, rule("a", 0))]));
        assert_eq!(kept, [(a, true), (b, true), (c, false)]);
        let told = names.audit(RuleId(a)).unwrap();
        assert_eq!((told.verdict, told.rule.as_str()), (Verdict::Allow, "shop/c ingress[0]"));
        assert_eq!((names.text(RuleId(a)), names.policy(RuleId(a))), ("isolated; no rule matches".to_owned(), None));
    }
}
