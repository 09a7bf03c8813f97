//! Bundles of policies: made, and looked at.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};

use dcenet_policy::bundle::{Bundle, BundleDocument, BundleError, Digest, KeyId, SigningKey, Trust, VerifyingKey};
use dcenet_policy::sources::kubernetes::Documents;
use serde::Serialize;

use super::files;

/// The envelope of all objects of a directory or file, once they can be read.
pub(super) fn sign(
    resources: &Path,
    name: String,
    generation: u64,
    keys: &[PathBuf],
    err: &mut dyn Write,
) -> Result<String, Box<dyn Error>> {
    let keys: Vec<SigningKey> = read_all(keys, SigningKey::from_pem)?;
    let (texts, notes) = files::texts(resources)?;
    notes.iter().try_for_each(|note| writeln!(err, "policy: {note}"))?;
    let top = if resources.is_dir() { resources } else { resources.parent().unwrap_or(Path::new("")) };
    let document = |(path, text): (PathBuf, String)| {
        BundleDocument::new(path.strip_prefix(top).unwrap_or(&path).display().to_string(), text)
    };
    let bundle = Bundle::new(name, generation, texts.into_iter().map(document).collect())?;
    bundle.add_to(Documents::default())?;
    Ok(bundle.sign(&keys)?)
}

/// What a bundle is.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Told {
    version: u8,
    name: String,
    generation: u64,
    digest: Digest,
    signers: BTreeSet<KeyId>,
    documents: Vec<String>,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} generation {}, {}", self.name, self.generation, self.digest)?;
        self.signers.iter().try_for_each(|key| writeln!(f, "signed by {key}"))?;
        self.documents.iter().try_for_each(|name| writeln!(f, "{name}"))
    }
}

/// Opens a bundle.
pub(super) fn verify(bundle: &Path, keys: &[PathBuf], threshold: usize) -> Result<Told, Box<dyn Error>> {
    let trust = Trust::new(read_all(keys, VerifyingKey::from_pem)?, threshold)?;
    let called = bundle.display();
    let envelope = std::fs::read(bundle).map_err(|error| format!("{called}: {error}"))?;
    let verified = trust.open(&envelope).map_err(|error| format!("{called}: {error}"))?;
    let bundle = verified.bundle;
    Ok(Told {
        version: 1,
        name: bundle.name().to_owned(),
        generation: bundle.generation(),
        digest: verified.digest,
        signers: verified.signers,
        documents: bundle.documents().iter().map(|document| document.name.clone()).collect(),
    })
}

fn read_all<K>(paths: &[PathBuf], read: impl Fn(&str) -> Result<K, BundleError>) -> Result<Vec<K>, String> {
    let read = |path: &PathBuf| {
        let called = path.display();
        let text = std::fs::read_to_string(path).map_err(|error| format!("{called}: {error}"))?;
        read(&text).map_err(|error| format!("{called}: {error}"))
    };
    paths.iter().map(read).collect()
}
