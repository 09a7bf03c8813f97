//! The section `policies`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use dcenet_policy::bundle::{Trust, VerifyingKey};
use serde::Deserialize;

use crate::policies::Directories;

/// Policies in files.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct PoliciesConfig {
    /// A directory of `.yaml`, `.yml` and `.json` files, and of `.bundle` files where issuers are trusted.
    pub directory: PathBuf,
    /// Another such directory, for what is known of the cluster: namespaces, pods, nodes and services.
    pub cluster: Option<PathBuf>,
    /// Whose bundles are taken. The directory is then for bundles alone.
    pub trust: Option<TrustConfig>,
    /// Whether it may take all policies away by having none. It may else be one that is not mounted, or not yet.
    #[serde(default)]
    pub allow_empty: bool,
}

impl PoliciesConfig {
    /// What is read.
    pub fn directories(&self) -> Directories {
        Directories { directory: self.directory.clone(), cluster: self.cluster.clone() }
    }
}

/// Who may issue policies.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustConfig {
    /// Files of public keys: Ed25519, in PEM.
    pub keys: Vec<PathBuf>,
    /// The names of the sets that must be there, each with the least generation that is taken.
    pub sets: BTreeMap<String, u64>,
    /// How many of the keys must have signed a bundle.
    #[serde(default = "one")]
    pub threshold: usize,
}

impl TrustConfig {
    /// What is wrong with the names of sets, if something is.
    pub fn check(&self) -> Result<(), String> {
        if self.sets.is_empty() {
            return Err(
                "policies.trust.sets: none; name those that this node is to have, as in {\"production\": 1}".to_owned()
            );
        }
        match self.sets.keys().find(|name| name.len() > LONGEST_NAME) {
            Some(name) => Err(format!(
                "policies.trust.sets: {name:?}: longer than the {LONGEST_NAME} letters that name a file; issue the set under a shorter name"
            )),
            None => Ok(()),
        }
    }

    /// Reads the keys.
    ///
    /// # Errors
    /// Where one cannot be read, or the threshold cannot be met.
    pub fn read(&self) -> Result<Trust, String> {
        let key = |path: &PathBuf| {
            let failed = |error: String| format!("policies.trust.keys: {}: {error}", path.display());
            let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
            VerifyingKey::from_pem(&text).map_err(|error| failed(error.to_string()))
        };
        let keys = self.keys.iter().map(key).collect::<Result<_, _>>()?;
        Trust::new(keys, self.threshold).map_err(|error| format!("policies.trust.{error}"))
    }
}

fn one() -> usize {
    1
}

/// Bundles are kept in files of their names, of which Linux takes 255 bytes.
const LONGEST_NAME: usize = 240;
