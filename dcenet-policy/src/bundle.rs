//! Sets of policies as one object that is numbered and signed, so that unlike clusters are given the same and each can tell what
//! it has.
//!
//! A [`Bundle`] is a name, a generation that grows, and documents as [`crate::sources`] reads them. Who issues it signs it
//! ([`Bundle::sign`]); each cluster opens it with the keys that it trusts ([`Trust::open`]), and takes it if it is no older than
//! what it took before ([`Accepted`]).
//!
//! # What is signed
//! The envelope is that of DSSE 1.0.2 (Dead Simple Signing Envelope), of the payload type [`PAYLOAD_TYPE`], with signatures by
//! Ed25519 (RFC 8032) over `DSSEv1`, the lengths, the payload type and the payload. Keys are in PEM: private ones as PKCS #8,
//! public ones as SubjectPublicKeyInfo (RFC 8410), as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write
//! them. Other tools can sign and verify the same envelope.
//!
//! # What is refused
//! | Bundle | Why |
//! |---|---|
//! | signed by fewer of the trusted keys than the threshold, each counted once | anybody could have made it |
//! | of a set that is not wanted here | the same key may have signed it for others |
//! | of a lower generation than was taken before, or than the least that is wanted | an old one that lets more pass was put in its place |
//! | none, of a set that is wanted | without its policies everything passes |
//! | of the same generation, with another content | there is one set of a generation |
//! | with members that this release does not know | what they say would be left out |
//! | in an envelope of more than 64 MiB, or with more than 16 signatures | it is read before it is known who made it |
//!
//! A cluster that is given no new bundle cannot know of it: compare what clusters report. Bundles are not kept here: whoever is given
//! one keeps it as long as it is to hold.
//!
//! ```
//! use dcenet_policy::bundle::{Bundle, BundleDocument, SigningKey, Trust};
//!
//! # const PRIVATE: &str = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n-----END PRIVATE KEY-----\n";
//! let key = SigningKey::from_pem(PRIVATE)?;
//! let text = "
//!     apiVersion: networking.k8s.io/v1
//!     kind: NetworkPolicy
//!     metadata: { name: closed, namespace: shop }
//!     spec: { podSelector: {} }
//! ";
//! let bundle = Bundle::new("production", 7, vec![BundleDocument::new("shop.yaml", text)])?;
//! let envelope = bundle.sign(&[key.clone()])?;
//!
//! let trust = Trust::new(vec![key.verifying_key()], 1)?;
//! let verified = trust.open(envelope.as_bytes())?;
//! assert_eq!((verified.bundle.name(), verified.bundle.generation()), ("production", 7));
//! # Ok::<(), dcenet_policy::bundle::BundleError>(())
//! ```

mod accepted;
mod envelope;
mod keys;

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::accepted::{Accepted, AcceptedError, Taken};
pub use self::keys::{KeyId, SigningKey, Trust, VerifyingKey};
use crate::sources::kubernetes::{DocumentError, Documents};

/// The payload type of the envelope: encoding and meaning of the payload.
pub const PAYLOAD_TYPE: &str = "application/vnd.dcenet.policy-bundle.v1+json";

/// A set of policies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Bundle {
    name: String,
    generation: u64,
    documents: Vec<BundleDocument>,
}

/// Objects of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct BundleDocument {
    /// What errors call it, such as the name of the file that it was. One that ends in `.json` is read as JSON, others as YAML.
    pub name: String,
    /// The objects.
    pub text: String,
}

impl BundleDocument {
    /// A document.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into() }
    }
}

impl Bundle {
    /// A bundle. Documents of one bundle have names of their own.
    ///
    /// # Errors
    /// [`BundleError::Invalid`].
    pub fn new(name: impl Into<String>, generation: u64, documents: Vec<BundleDocument>) -> Result<Self, BundleError> {
        let bundle = Self { name: name.into(), generation, documents };
        bundle.check()?;
        Ok(bundle)
    }

    /// The name of the set: what has the same name takes its place.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which of the set's issues it is, from 1.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The documents.
    pub fn documents(&self) -> &[BundleDocument] {
        &self.documents
    }

    /// Adds the objects of all documents to what is known.
    ///
    /// # Errors
    /// The first that cannot be read, by the names of bundle and document.
    pub fn add_to(&self, mut to: Documents) -> Result<Documents, DocumentError> {
        for BundleDocument { name, text } in &self.documents {
            let called = format!("{} {}: {name}", self.name, self.generation);
            to = if name.ends_with(".json") { to.with_json(&called, text) } else { to.with_yaml(&called, text) }?;
        }
        Ok(to)
    }

    /// The envelope, JSON, with a signature by each key.
    ///
    /// # Errors
    /// [`BundleError::Invalid`] without a key.
    pub fn sign(&self, keys: &[SigningKey]) -> Result<String, BundleError> {
        envelope::seal(self, keys)
    }

    fn check(&self) -> Result<(), BundleError> {
        let invalid = |field: &str, reason: &str| {
            Err(BundleError::Invalid { field: field.to_owned(), reason: reason.to_owned() })
        };
        let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        let is_edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
        let Self { name, generation, documents } = self;
        if name.is_empty()
            || name.len() > 253
            || !name.chars().all(is_plain)
            || !name.starts_with(is_edge)
            || !name.ends_with(is_edge)
        {
            let reason = format!(
                "{name:?}: want lower-case letters, digits, - and ., at most 253, as of an object in Kubernetes"
            );
            return invalid("name", &reason);
        }
        if *generation == 0 {
            return invalid("generation", "0: generations count from 1");
        }
        let mut seen = BTreeSet::new();
        for (at, document) in documents.iter().enumerate() {
            if document.name.is_empty() || document.name.contains(char::is_control) {
                return invalid(&format!("documents[{at}].name"), &format!("{:?}: want printable text", document.name));
            }
            if !seen.insert(&document.name) {
                return invalid(&format!("documents[{at}].name"), &format!("{:?}: there are two", document.name));
            }
        }
        Ok(())
    }
}

/// A bundle that trusted keys have signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The bundle.
    pub bundle: Bundle,
    /// Of its payload: what of two clusters is the same has the same.
    pub digest: Digest,
    /// Which of the trusted keys have signed it.
    pub signers: BTreeSet<KeyId>,
}

/// SHA-256 of a payload, written as `sha256:` and 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest(String);

impl Digest {
    fn of(payload: &[u8]) -> Self {
        Self(format!("sha256:{}", keys::sha256(payload)))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why there is no bundle.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BundleError {
    /// A member of the bundle is wrong.
    #[error("{field}: {reason}")]
    Invalid {
        /// Which.
        field: String,
        /// What is wrong, and what would not be.
        reason: String,
    },
    /// It is no envelope, or none of this payload type.
    #[error("not an envelope of a policy bundle: {0}")]
    Envelope(String),
    /// Not enough of the trusted keys have signed it.
    #[error(
        "signed by {valid} of the trusted keys, where {threshold} are needed; sign it with a key of policies.trust, or add the key"
    )]
    Untrusted {
        /// How many have.
        valid: usize,
        /// How many must.
        threshold: usize,
    },
    /// A key cannot be read.
    #[error("not a key: {0}; want PEM of Ed25519, as openssl genpkey -algorithm ed25519 writes it")]
    Key(String),
    /// No bundle can be trusted so.
    #[error("threshold: {threshold} of {keys} keys; want at least 1, and at most as many as there are different keys")]
    Threshold {
        /// How many must sign.
        threshold: usize,
        /// How many different keys there are.
        keys: usize,
    },
}
