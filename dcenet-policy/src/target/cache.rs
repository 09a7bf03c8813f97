//! Lowered policies by their content.

use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::{Artefact, Policies, Target, TargetError};
use crate::compiler::{EndpointPlan, Program};

/// Lowers each pair of rule lists once.
///
/// Rule ids are part of the content. They are stable while in use, so that endpoints under the same policies share an
/// artefact also across updates.
#[derive(Debug)]
pub struct Cache<T> {
    target: T,
    artefacts: HashMap<Key, Arc<Artefact>>,
}

/// Ingress, egress.
#[derive(Debug, Clone)]
struct Key([Arc<Program>; 2]);

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(own, other)| Arc::ptr_eq(own, other) || own.is_same_code(other))
    }
}

impl Eq for Key {}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.iter().for_each(|program| program.list.hash(state));
    }
}

impl<T: Target> Cache<T> {
    /// An empty cache.
    pub fn new(target: T) -> Self {
        Self { target, artefacts: HashMap::new() }
    }

    /// What lowers.
    pub fn target(&self) -> &T {
        &self.target
    }

    /// The artefact of an endpoint; the same one for the same content.
    ///
    /// # Errors
    /// As for [`Target::lower`]; a refusal is not remembered.
    pub fn get(&mut self, plan: &EndpointPlan) -> Result<Arc<Artefact>, TargetError> {
        let key = Key([&plan.ingress, &plan.egress].map(|set| Arc::clone(&set.program)));
        if let Some(artefact) = self.artefacts.get(&key) {
            return Ok(Arc::clone(artefact));
        }
        let artefact = Arc::new(self.target.lower(Policies { ingress: &key.0[0], egress: &key.0[1] })?);
        self.artefacts.insert(key, Arc::clone(&artefact));
        Ok(artefact)
    }

    /// Forgets the artefacts that only the cache still holds.
    pub fn sweep(&mut self) {
        self.artefacts.retain(|_, artefact| Arc::strong_count(artefact) > 1);
    }

    /// How many artefacts there are.
    pub fn len(&self) -> usize {
        self.artefacts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.artefacts.is_empty()
    }
}
