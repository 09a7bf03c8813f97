//! Which sets of policies are in force on this node, and where, for those who issue them: `GET /policy`, JSON.
//!
//! ```json
//! {
//!   "version": 1,
//!   "node": "n1",
//!   "sets": [{ "name": "production", "generation": 7, "digest": "sha256:..", "signers": ["5b..."] }],
//!   "isPending": false,
//!   "refused": null,
//!   "notes": ["..."],
//!   "endpoints": [{ "attachment": "shop/c1/eth0", "workload": "shop/web", "isCurrent": true, "isEnforced": true,
//!                   "enforcement": "full", "failure": null, "faults": [] }]
//! }
//! ```
//!
//! | Member | Meaning |
//! |---|---|
//! | `sets` | the bundles that the owner was told last; none since its start says nothing of what an earlier one was told |
//! | `isPending` | whether others are being put in force just now |
//! | `refused` | why the directory's present content is not what it was told, if it is not |
//! | `notes` | what of the policies may surprise, rules that are closed among them |
//! | `endpoints[].isCurrent` | whether its verdicts are of these sets; else they may be of earlier ones, and `failure` may say why |
//! | `endpoints[].isEnforced` | whether its verdicts are its own, or still the default |
//! | `endpoints[].enforcement` | what the verdicts hold against the pod itself |
//! | `endpoints[].faults` | what is closed there instead of enforced as written |

use std::collections::BTreeSet;
use std::sync::Arc;

use dcenet_core::provider::Enforcement;
use dcenet_policy::bundle::{Digest, KeyId, Verified};
use dcenet_policy::enforcer::{EndpointStatus, Enforcer, Phase};
use parking_lot::Mutex;
use serde::Serialize;

/// What the owner was told.
#[derive(Debug, Clone)]
pub struct Issued(Arc<Mutex<Told>>);

#[derive(Debug)]
struct Told {
    node: String,
    sets: Vec<Issue>,
    is_pending: bool,
    /// Whether this owner was told anything.
    is_told: bool,
    refused: Option<String>,
    notes: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
struct Issue {
    name: String,
    generation: u64,
    digest: Digest,
    signers: BTreeSet<KeyId>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Page<'a> {
    version: u8,
    node: &'a str,
    sets: &'a [Issue],
    is_pending: bool,
    refused: Option<&'a str>,
    notes: &'a [String],
    endpoints: Vec<Endpoint>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    attachment: String,
    workload: Option<String>,
    is_current: bool,
    is_enforced: bool,
    enforcement: Enforcement,
    failure: Option<String>,
    faults: Vec<String>,
}

impl Issued {
    /// Nothing yet.
    pub fn of(node: &str) -> Self {
        let (sets, notes) = (Vec::new(), Vec::new());
        let told = Told { node: node.to_owned(), sets, is_pending: false, is_told: false, refused: None, notes };
        Self(Arc::new(Mutex::new(told)))
    }

    /// The owner is being told.
    pub fn begin(&self) {
        self.0.lock().is_pending = true;
    }

    /// What the owner was told.
    pub fn tell(&self, bundles: &[Verified], notes: Vec<String>) {
        let issue = |verified: &Verified| Issue {
            name: verified.bundle.name().to_owned(),
            generation: verified.bundle.generation(),
            digest: verified.digest.clone(),
            signers: verified.signers.clone(),
        };
        let mut told = self.0.lock();
        (told.is_pending, told.is_told) = (false, true);
        (told.sets, told.refused, told.notes) = (bundles.iter().map(issue).collect(), None, notes);
    }

    /// What was told before stands.
    pub fn refuse(&self, reason: &str) {
        self.0.lock().refused = Some(reason.to_owned());
    }

    /// The generations of the sets, by name.
    pub fn generations(&self) -> Vec<(String, u64)> {
        self.0.lock().sets.iter().map(|set| (set.name.clone(), set.generation)).collect()
    }

    /// All of it as of now.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn page(&self, enforcer: &Enforcer) -> serde_json::Result<String> {
        // Held meanwhile, so that nothing begins between the two.
        let told = self.0.lock();
        let Told { node, sets, is_pending, is_told, refused, notes } = &*told;
        let are_known = *is_told && !is_pending;
        let endpoint = |status: EndpointStatus| Endpoint {
            attachment: status.attachment.to_string(),
            workload: status.workload.map(|workload| workload.to_string()),
            is_current: are_known && status.is_current,
            is_enforced: status.phase == Phase::Enforced,
            enforcement: status.enforcement,
            failure: status.failure,
            faults: status.faults.iter().map(ToString::to_string).collect(),
        };
        let endpoints = enforcer.endpoints().into_iter().map(endpoint).collect();
        let (is_pending, refused) = (*is_pending, refused.as_deref());
        serde_json::to_string(&Page { version: 1, node, sets, is_pending, refused, notes, endpoints })
    }
}
