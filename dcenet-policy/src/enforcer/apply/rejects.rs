//! Which rules reject, as the programs know it.

use std::collections::{BTreeMap, BTreeSet};

use dcenet_ebpf::abi;
use dcenet_ebpf::maps::Array;

use crate::enforcer::EnforcerError;
use crate::enforcer::node::NodeMaps;
use crate::ir::RuleId;

/// The map of rules that reject, which is this owner's.
pub(super) struct Rejects {
    map: Array<u64>,
    /// Words that are not zero, by their place.
    written: BTreeMap<u32, u64>,
}

impl Rejects {
    /// Over a map that is all zero.
    pub(super) fn new(maps: &NodeMaps) -> Result<Self, EnforcerError> {
        let map = Array::new(maps.get(abi::REJECTS)?).map_err(failed)?;
        Ok(Self { map, written: BTreeMap::new() })
    }

    /// Has these rules reject, and no other. Programs that are not replaced do so at once; what they deny by a rule that is
    /// over is dropped alone.
    pub(super) fn write(&mut self, rules: &BTreeSet<RuleId>) -> Result<(), EnforcerError> {
        let mut words: BTreeMap<u32, u64> = self.written.keys().map(|place| (*place, 0)).collect();
        // Rules beyond the map's end are counted nowhere either.
        for RuleId(rule) in rules.iter().filter(|rule| rule.0 / 64 < self.map.entries()) {
            *words.entry(rule / 64).or_default() |= 1 << (rule % 64);
        }
        for (place, word) in words {
            if self.written.get(&place).copied().unwrap_or(0) != word {
                self.map.store(place, &word).map_err(failed)?;
                self.written.insert(place, word);
            }
            if word == 0 {
                self.written.remove(&place);
            }
        }
        Ok(())
    }
}

fn failed(error: dcenet_ebpf::maps::MapError) -> EnforcerError {
    EnforcerError::map(abi::REJECTS, error)
}
