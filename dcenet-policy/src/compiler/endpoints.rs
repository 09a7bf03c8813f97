//! Endpoints with their plans.

use std::collections::{BTreeMap, HashMap};
use std::ops::Index;
use std::sync::Arc;

use super::{EndpointPlan, PolicySet, SetId};
use crate::model::PodId;

/// Endpoints in the order of their names, each with its plan.
///
/// A copy shares the names, and plans are kept once for all endpoints that have the same, so that a copy costs far less than the
/// endpoints are many.
#[derive(Debug, Clone, Default)]
pub struct Endpoints {
    /// To places in `plan_of`.
    places: Arc<BTreeMap<PodId, u32>>,
    /// To places in `plans`.
    plan_of: Vec<u32>,
    plans: Vec<EndpointPlan>,
}

impl Endpoints {
    /// The plan of an endpoint; `None` where the pod is none.
    pub fn get(&self, pod: &PodId) -> Option<&EndpointPlan> {
        self.places.get(pod).map(|place| self.at(*place))
    }

    /// Whether the pod is an endpoint.
    pub fn contains_key(&self, pod: &PodId) -> bool {
        self.places.contains_key(pod)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// All of them, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = (&PodId, &EndpointPlan)> {
        self.places.iter().map(|(pod, place)| (pod, self.at(*place)))
    }

    /// Their names, in order.
    pub fn keys(&self) -> impl Iterator<Item = &PodId> {
        self.places.keys()
    }

    /// Their plans, in the order of their names.
    pub fn values(&self) -> impl Iterator<Item = &EndpointPlan> {
        self.iter().map(|(_, plan)| plan)
    }

    /// Each plan that some endpoint has, once.
    pub(crate) fn plans(&self) -> impl Iterator<Item = &EndpointPlan> {
        let mut used = vec![false; self.plans.len()];
        self.plan_of.iter().for_each(|plan| used[*plan as usize] = true);
        self.plans.iter().zip(used).filter(|(_, used)| *used).map(|(plan, _)| plan)
    }

    /// How many endpoints have each policy set.
    pub(super) fn users(&self) -> HashMap<SetId, u32> {
        let mut users = HashMap::new();
        for plan in self.values() {
            *users.entry(plan.ingress.id).or_default() += 1;
            *users.entry(plan.egress.id).or_default() += 1;
        }
        users
    }

    /// Puts policy sets in the place of those that have their numbers.
    pub(super) fn replace_sets(&mut self, sets: &HashMap<SetId, Arc<PolicySet>>) {
        if sets.is_empty() {
            return;
        }
        for EndpointPlan { ingress, egress } in &mut self.plans {
            for set in [ingress, egress] {
                if let Some(next) = sets.get(&set.id) {
                    *set = Arc::clone(next);
                }
            }
        }
    }

    /// Gives an endpoint another plan.
    pub(super) fn set(&mut self, pod: &PodId, plan: EndpointPlan) {
        let Some(place) = self.places.get(pod) else { return };
        let numbers = |plan: &EndpointPlan| [plan.ingress.id, plan.egress.id];
        let known = self.plans.iter().position(|known| numbers(known) == numbers(&plan));
        let known = known.unwrap_or_else(|| {
            self.plans.push(plan);
            self.plans.len() - 1
        });
        self.plan_of[*place as usize] = known as u32;
    }

    fn at(&self, place: u32) -> &EndpointPlan {
        &self.plans[self.plan_of[place as usize] as usize]
    }
}

impl FromIterator<(PodId, EndpointPlan)> for Endpoints {
    fn from_iter<I: IntoIterator<Item = (PodId, EndpointPlan)>>(endpoints: I) -> Self {
        let (mut places, mut plan_of, mut plans) = (BTreeMap::new(), Vec::new(), Vec::new());
        let mut known: HashMap<[SetId; 2], u32> = HashMap::new();
        for (pod, plan) in endpoints {
            let number = *known.entry([plan.ingress.id, plan.egress.id]).or_insert_with(|| {
                plans.push(plan);
                plans.len() as u32 - 1
            });
            places.insert(pod, plan_of.len() as u32);
            plan_of.push(number);
        }
        Self { places: Arc::new(places), plan_of, plans }
    }
}

impl Index<&PodId> for Endpoints {
    type Output = EndpointPlan;

    /// # Panics
    /// If the pod is no endpoint.
    fn index(&self, pod: &PodId) -> &EndpointPlan {
        self.at(self.places[pod])
    }
}

impl<'a> IntoIterator for &'a Endpoints {
    type Item = (&'a PodId, &'a EndpointPlan);
    type IntoIter = Box<dyn Iterator<Item = Self::Item> + 'a>;

    fn into_iter(self) -> Self::IntoIter {
        Box::new(self.iter())
    }
}
