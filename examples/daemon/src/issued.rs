//! Which sets of policies are in force on this node, and where, for those who issue them: `GET /policy`, JSON.
//!
//! ```json
//! {
//!   "version": 1,
//!   "node": "n1",
//!   "sets": [{ "name": "production", "generation": 7, "digest": "sha256:..", "signers": ["5b..."] }],
//!   "refused": null,
//!   "notes": ["..."],
//!   "endpoints": [{ "attachment": "shop/c1/eth0", "workload": "shop/web", "isCurrent": true, "isEnforced": true,
//!                   "enforcement": "full", "failure": null, "faults": [] }]
//! }
//! ```
//!
//! | Member | Meaning |
//! |---|---|
//! | `sets` | the bundles that the owner was told last |
//! | `refused` | why the directory's present content is not what it was told, if it is not |
//! | `notes` | what of the policies may surprise, rules that are closed among them |
//! | `endpoints[].isCurrent` | whether its verdicts are of these sets; else `failure` says why they are of earlier ones |
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
        Self(Arc::new(Mutex::new(Told { node: node.to_owned(), sets, refused: None, notes })))
    }

    /// What the owner is told now.
    pub fn tell(&self, bundles: &[Verified], notes: Vec<String>) {
        let issue = |verified: &Verified| Issue {
            name: verified.bundle.name().to_owned(),
            generation: verified.bundle.generation(),
            digest: verified.digest.clone(),
            signers: verified.signers.clone(),
        };
        let mut told = self.0.lock();
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
        let endpoints = enforcer.endpoints().into_iter().map(endpoint).collect();
        let Told { node, sets, refused, notes } = &*self.0.lock();
        serde_json::to_string(&Page { version: 1, node, sets, refused: refused.as_deref(), notes, endpoints })
    }
}

fn endpoint(status: EndpointStatus) -> Endpoint {
    Endpoint {
        attachment: status.attachment.to_string(),
        workload: status.workload.map(|workload| workload.to_string()),
        is_current: status.failure.is_none() && status.phase == Phase::Enforced,
        is_enforced: status.phase == Phase::Enforced,
        enforcement: status.enforcement,
        failure: status.failure,
        faults: status.faults.iter().map(ToString::to_string).collect(),
    }
}
