//! Loading what endpoints are to get.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use dcenet_core::model::AttachmentKey;
use dcenet_ebpf::attach::Direction as HookDirection;
use dcenet_ebpf::datapath::Slot;
use dcenet_ebpf::datapath::guard::FROM_GUARDED;
use dcenet_ebpf::loader::{LoadRequest, Loaded as LoadedObject};
use dcenet_ebpf::maps::Put;
use dcenet_ebpf::program::Program as Loaded;

use super::{
    Applier, NO_WORKLOAD, Outcomes, PolicyKey, ProgramKey, Programs, Switch, Templates, Walked, local_ids_name,
    policy_key,
};
use crate::compiler::{EndpointPlan, Update};
use crate::enforcer::node::program_name;
use crate::enforcer::state::{Known, Outcome, Shared};
use crate::enforcer::{EnforcerError, LoweredObject};
use crate::model::Direction;

impl Applier {
    /// Loads what is missing. An endpoint whose programs cannot be loaded goes on with those it has: their policy sets
    /// are kept up to date until the compiler is told that nobody uses them. For names alone nothing that has failed is
    /// tried again: pods choose when names are asked for.
    pub(super) fn load<'a>(
        &mut self,
        shared: &Shared,
        update: &'a Update,
        endpoints: &'a BTreeMap<AttachmentKey, Known>,
        by_names: bool,
        outcomes: &mut Outcomes,
    ) -> Vec<Switch<'a>> {
        let mut switches = Vec::new();
        let mut refused: HashMap<ProgramKey, String> = HashMap::new();
        let mut templates = Templates::new();
        for (key, known) in endpoints {
            let Some(plan) = known.pod().and_then(|pod| update.endpoints.get(&pod)) else {
                outcomes.push((key.clone(), Outcome::Hopeless { reason: NO_WORKLOAD.to_owned() }));
                continue;
            };
            if by_names && let Some(reason) = known.failure.clone() {
                outcomes.push((key.clone(), Outcome::Failed { reason, phase: known.phase }));
                continue;
            }
            let slot = if known.endpoint.place.is_host() {
                None
            } else {
                match shared.cells.lock().reserve(&known.endpoint) {
                    Ok(slot) => Some(slot),
                    Err(error) => {
                        let reason = error.to_string();
                        outcomes.push((key.clone(), Outcome::Failed { reason, phase: known.phase }));
                        continue;
                    }
                }
            };
            let wanted = ProgramKey { policy: policy_key(plan), slot, guarded: slot.is_some() && known.guarded };
            let in_force = self.endpoints.get(key);
            if in_force
                .is_some_and(|e| !e.is_mixed && e.programs.key == wanted && e.addresses == known.endpoint.addresses)
            {
                continue;
            }
            let cached = self.programs.get(&wanted).and_then(Weak::upgrade);
            let loaded = match (cached, refused.get(&wanted)) {
                (Some(programs), _) => Ok(programs),
                (None, Some(reason)) => Err(reason.clone()),
                (None, None) => self.load_one(shared, plan, wanted, &mut templates).map_err(|e| e.to_string()),
            };
            match loaded {
                Ok(programs) => {
                    self.programs.insert(wanted, Arc::downgrade(&programs));
                    switches.push(Switch { key, known, programs });
                }
                Err(reason) => {
                    refused.insert(wanted, reason.clone());
                    outcomes.push((key.clone(), Outcome::Failed { reason, phase: known.phase }));
                }
            }
        }
        switches
    }

    fn load_one(
        &mut self,
        shared: &Shared,
        plan: &EndpointPlan,
        key: ProgramKey,
        templates: &mut Templates,
    ) -> Result<Arc<Programs>, EnforcerError> {
        let lowering = &*shared.tools.lowering;
        let slot = key.slot.map_or(Slot::Class, Slot::Constant);
        let object = match (key.slot, templates.get(&key.policy)) {
            (Some(slot), Some(template)) => {
                let no_slot = || EnforcerError::Lowering("the object of a constant slot has none".into());
                LoweredObject { elf: template.of_slot(slot).ok_or_else(no_slot)?, ..template.clone() }
            }
            _ => lowering.endpoint_object(plan, slot).map_err(EnforcerError::Lowering)?,
        };
        if key.slot.is_some() && object.slot_places.is_some() {
            templates.entry(key.policy).or_insert_with(|| object.clone());
        }
        let walked = self.walked.get(&key.policy).and_then(Weak::upgrade);
        let (mut loaded, walked) = self.load_object(shared, plan, &object, walked)?;
        self.walked.insert(key.policy, Arc::downgrade(&walked));
        let mut take = |direction| {
            let name = program_name(direction, slot);
            let missing = || EnforcerError::Lowering(format!("the object has no program {name:?}").into());
            loaded.take_program(name).ok_or_else(missing)
        };
        let (from_pod, to_pod) = (take(HookDirection::Ingress)?, take(HookDirection::Egress)?);
        let guarded = if key.guarded { Some(self.load_guarded(shared, plan, key.policy, &walked)?) } else { None };
        Ok(Arc::new(Programs { from_pod, to_pod, guarded, key, _walked: walked, plan: plan.clone() }))
    }

    /// What a guard calls about the pods that have these policies.
    fn load_guarded(
        &mut self,
        shared: &Shared,
        plan: &EndpointPlan,
        key: PolicyKey,
        walked: &Arc<Walked>,
    ) -> Result<Arc<Loaded>, EnforcerError> {
        if let Some(known) = self.guarded.get(&key).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let object = shared.tools.lowering.endpoint_object(plan, Slot::Guarded).map_err(EnforcerError::Lowering)?;
        let (mut loaded, _) = self.load_object(shared, plan, &object, Some(Arc::clone(walked)))?;
        let missing = || EnforcerError::Lowering(format!("the object has no program {FROM_GUARDED:?}").into());
        let program = Arc::new(loaded.take_program(FROM_GUARDED).ok_or_else(missing)?);
        self.guarded.insert(key, Arc::downgrade(&program));
        Ok(program)
    }

    /// Loads an object with the maps of the node and of the policy sets, and with the tables that others walk by the same
    /// policies.
    fn load_object(
        &self,
        shared: &Shared,
        plan: &EndpointPlan,
        object: &LoweredObject,
        walked: Option<Arc<Walked>>,
    ) -> Result<(LoadedObject, Arc<Walked>), EnforcerError> {
        let has = |name: &str| object.maps.iter().any(|m| m == name);
        let mut maps: Vec<_> =
            shared.maps.all().filter(|(name, _)| has(name)).map(|(name, map)| (name, map.as_fd())).collect();
        for direction in Direction::ALL {
            let name = local_ids_name(direction);
            let id = plan.set(direction).id;
            if let Some(set) = self.sets.get(&id)
                && has(name)
            {
                maps.push((name, set.map.as_fd()));
            }
        }
        let others = walked.as_deref().map_or(&[][..], |walked| &walked.maps);
        maps.extend(others.iter().filter(|(name, _)| has(name)).map(|(name, map)| (name.as_str(), map.as_fd())));
        let mut loaded = shared.tools.loader.load(&object.elf, &LoadRequest { maps: &maps })?;
        let mut own = Walked::default();
        for content in object.contents.iter().filter(|content| others.iter().all(|(name, _)| *name != content.map)) {
            let missing = || EnforcerError::Lowering(format!("the object has no map {:?}", content.map).into());
            let map = loaded.take_map(&content.map).ok_or_else(missing)?;
            for (index, value) in content.values() {
                map.update(&index.to_ne_bytes(), value, Put::Any).map_err(|e| EnforcerError::map(&content.map, e))?;
            }
            own.maps.push((content.map.clone(), map));
        }
        Ok((loaded, walked.unwrap_or_else(|| Arc::new(own))))
    }
}
