//! Prefixes that pass from one authority to another, and back.

use ipnet::IpNet;

use super::{Reply, Step, Work, check_name};
use crate::plan::block::Block;
use crate::plan::error::PlanError;
use crate::plan::index::Held;
use crate::plan::model::{Grant, Level, Prefix, Receipt, Revocation, State};
use crate::plan::record::{Delta, GrantMark, Node, PrefixRecord};

impl Work<'_> {
    fn known(&self, cidr: &IpNet, level: Level) -> Result<(Node, &Held), PlanError> {
        let node = Node { block: Block::check("cidr", cidr)?, level };
        match self.known.index.get(&node) {
            Some(held) => Ok((node, held)),
            None => Err(PlanError::Unknown { cidr: *cidr, level: Some(level), space: self.space.clone() }),
        }
    }

    fn grant(&self, node: &Node, record: &PrefixRecord) -> Grant {
        let rules = self.registry().spaces.remove(self.space.as_str()).unwrap_or_default();
        Grant {
            space: self.space.clone(),
            unique: rules.unique.into_iter().collect(),
            cidr: node.block.cidr(),
            level: node.level,
            owner: record.owner.clone(),
            purpose: record.purpose,
            path: self.known.index.path(node),
            from: self.authority.to_owned(),
            epoch: record.epoch,
        }
    }

    pub(super) fn delegate(&self, cidr: &IpNet, level: Level) -> Result<Step, PlanError> {
        let (node, held) = self.known(cidr, level)?;
        let holder = || self.known.index.holder(self.space, &node);
        match held.record.state {
            State::Delegated => return Ok(Step::Done(Reply::Grant(Box::new(self.grant(&node, &held.record))))),
            State::Revoking => {
                return Err(PlanError::State { holder: holder(), reason: "is asked back; wait for its receipt" });
            }
            State::Held | State::Draining | State::Lost => {}
        }
        if node.level == Level::Pool {
            let reason = "is a pool: its addresses are leased, and nobody claims in it; delegate what it lies in";
            return Err(PlanError::State { holder: holder(), reason });
        }
        if held.record.grant.is_some() {
            let reason = "was granted as a whole to this authority; delegate prefixes claimed in it";
            return Err(PlanError::State { holder: holder(), reason });
        }
        if held.record.owner == self.authority {
            return Err(PlanError::State { holder: holder(), reason: "is this authority's own already" });
        }
        self.empty(&node)?;
        if let Some(parent) = held.parent {
            self.may_hold(&parent, held.record.purpose)?;
        }
        self.keep_apart(&self.registry(), &node, held.record.purpose, State::Delegated)?;
        let record = PrefixRecord { state: State::Delegated, epoch: self.epoch, ..held.record.clone() };
        let grant = self.grant(&node, &record);
        Ok(self.change(None, vec![self.put(&node, record)], Reply::Grant(Box::new(grant))))
    }

    fn mine(&self, owner: &str) -> Result<(), PlanError> {
        if owner == self.authority {
            return Ok(());
        }
        Err(PlanError::Misdirected { owner: owner.to_owned(), authority: self.authority.to_owned() })
    }

    pub(super) fn accept(&self, grant: &Grant) -> Result<Step, PlanError> {
        self.mine(&grant.owner)?;
        check_name("from", &grant.from)?;
        let name = grant.path.rsplit('/').next().unwrap_or_default();
        check_name("path", name)?;
        let node = Node { block: Block::check("cidr", &grant.cidr)?, level: grant.level };
        let index = &self.known.index;
        if let Some(held) = index.get(&node)
            && let Some(mark) = &held.record.grant
        {
            // Epochs of two parents cannot be compared.
            if mark.from != grant.from {
                return Err(PlanError::Overlap { cidr: grant.cidr, holder: index.holder(self.space, &node) });
            }
            if grant.epoch < mark.epoch {
                let (presented, current) = (grant.epoch, mark.epoch);
                return Err(PlanError::Stale { cidr: grant.cidr, presented, current });
            }
            if grant.epoch == mark.epoch {
                return Ok(Step::Done(self.reply(&node)));
            }
        } else if let Some(other) = index.overlapping(&node.block) {
            return Err(PlanError::Overlap { cidr: grant.cidr, holder: index.holder(self.space, &other) });
        }
        for (block, &current) in &self.known.returned {
            if current >= grant.epoch && block.overlaps(&node.block) {
                return Err(PlanError::Stale { cidr: grant.cidr, presented: grant.epoch, current });
            }
        }
        let mut registry = self.registry();
        let before = registry.clone();
        registry.spaces.entry(self.space.to_string()).or_default().unique.extend(&grant.unique);
        self.keep_apart(&registry, &node, grant.purpose, State::Held)?;
        let record = PrefixRecord {
            name: name.to_owned(),
            owner: grant.owner.clone(),
            purpose: grant.purpose,
            epoch: self.epoch,
            state: State::Held,
            grant: Some(GrantMark { from: grant.from.clone(), epoch: grant.epoch, path: grant.path.clone() }),
        };
        let accepted = Prefix {
            space: self.space.clone(),
            cidr: node.block.cidr(),
            level: grant.level,
            name: record.name.clone(),
            owner: record.owner.clone(),
            purpose: record.purpose,
            path: grant.path.clone(),
            epoch: self.epoch,
            state: State::Held,
        };
        let reply = Reply::Prefix(Box::new(accepted));
        let registry = (registry != before).then_some(registry);
        Ok(self.change(registry.as_ref(), vec![self.put(&node, record)], reply))
    }

    pub(super) fn revoke(&self, cidr: &IpNet, level: Level) -> Result<Step, PlanError> {
        let (node, held) = self.known(cidr, level)?;
        let record = &held.record;
        let revocation = Reply::Revocation(Box::new(Revocation {
            space: self.space.clone(),
            cidr: *cidr,
            level,
            owner: record.owner.clone(),
            epoch: record.epoch,
        }));
        match record.state {
            State::Revoking => Ok(Step::Done(revocation)),
            State::Delegated => {
                let record = PrefixRecord { state: State::Revoking, ..record.clone() };
                Ok(self.change(None, vec![self.put(&node, record)], revocation))
            }
            State::Held | State::Draining | State::Lost => {
                let holder = self.known.index.holder(self.space, &node);
                Err(PlanError::State { holder, reason: "is not delegated; release it" })
            }
        }
    }

    pub(super) fn surrender(&self, revocation: &Revocation, lost: bool) -> Result<Step, PlanError> {
        self.mine(&revocation.owner)?;
        let node = Node { block: Block::check("cidr", &revocation.cidr)?, level: revocation.level };
        let index = &self.known.index;
        let Revocation { space, cidr, level, owner, epoch } = revocation.clone();
        let receipt = Reply::Receipt(Box::new(Receipt { space, cidr, level, owner, epoch }));
        let buried = self.known.returned.get(&node.block).is_some_and(|current| *current >= epoch);
        let tombstone = Delta::Returned { cidr, epoch };
        let Some(held) = index.get(&node) else {
            return Ok(if buried { Step::Done(receipt) } else { self.change(None, vec![tombstone], receipt) });
        };
        let Some(mark) = &held.record.grant else {
            let holder = index.holder(self.space, &node);
            return Err(PlanError::State { holder, reason: "was granted by no parent; release it" });
        };
        if mark.epoch > epoch {
            // That grant is over already, and the prefix was granted again.
            return Err(PlanError::Stale { cidr, presented: epoch, current: mark.epoch });
        }
        if index.child_count(&node) == 0 {
            let deltas = vec![Delta::Delete { cidr, level }, tombstone];
            return Ok(self.change(None, deltas, receipt));
        }
        let state = if lost { State::Lost } else { State::Draining };
        // A prefix once lost stays so, whatever is said later of the same grant.
        let state = if held.record.state == State::Lost { State::Lost } else { state };
        let record = PrefixRecord { state, ..held.record.clone() };
        let mut prefix = match self.reply(&node) {
            Reply::Prefix(prefix) => prefix,
            _ => return Ok(Step::Done(Reply::NotHeld)),
        };
        prefix.state = state;
        if held.record.state == state {
            return Ok(Step::Done(Reply::Draining(prefix)));
        }
        Ok(self.change(None, vec![self.put(&node, record)], Reply::Draining(prefix)))
    }

    pub(super) fn settle(&self, receipt: &Receipt, attested: bool) -> Result<Step, PlanError> {
        let node = Node { block: Block::check("cidr", &receipt.cidr)?, level: receipt.level };
        let index = &self.known.index;
        let Some(held) = index.get(&node) else { return Ok(Step::Done(Reply::NotHeld)) };
        let (presented, current) = (receipt.epoch, held.record.epoch);
        if presented < current && !attested {
            return Ok(Step::Done(Reply::NotHeld));
        }
        if presented != current || held.record.owner != receipt.owner {
            return Err(PlanError::Stale { cidr: receipt.cidr, presented, current });
        }
        match (held.record.state, attested) {
            (State::Revoking, _) | (State::Delegated, false) => {
                let delta = Delta::Delete { cidr: receipt.cidr, level: receipt.level };
                Ok(self.change(None, vec![delta], Reply::Done))
            }
            (State::Delegated, true) => {
                let holder = index.holder(self.space, &node);
                Err(PlanError::State { holder, reason: "was not asked back; revoke it first" })
            }
            (State::Held | State::Draining | State::Lost, _) => {
                let holder = index.holder(self.space, &node);
                Err(PlanError::State { holder, reason: "is not delegated; release it" })
            }
        }
    }
}
