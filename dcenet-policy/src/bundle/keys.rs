//! Keys that sign bundles, and those that are trusted.

use std::collections::BTreeMap;
use std::fmt;

use ed25519_dalek::Signer;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePublicKey};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{BundleError, Verified, envelope};

/// A private key of Ed25519.
#[derive(Clone)]
pub struct SigningKey(ed25519_dalek::SigningKey);

impl SigningKey {
    /// Reads PEM of PKCS #8.
    ///
    /// # Errors
    /// [`BundleError::Key`].
    pub fn from_pem(text: &str) -> Result<Self, BundleError> {
        let key = ed25519_dalek::SigningKey::from_pkcs8_pem(text);
        key.map(Self).map_err(|error| BundleError::Key(error.to_string()))
    }

    /// The public key that goes with it.
    pub fn verifying_key(&self) -> VerifyingKey {
        VerifyingKey(self.0.verifying_key())
    }

    pub(super) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SigningKey").field(&self.verifying_key().id()).finish()
    }
}

/// A public key of Ed25519.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyingKey(ed25519_dalek::VerifyingKey);

impl VerifyingKey {
    /// Reads PEM of a SubjectPublicKeyInfo.
    ///
    /// # Errors
    /// [`BundleError::Key`].
    pub fn from_pem(text: &str) -> Result<Self, BundleError> {
        let wrong = |reason: String| BundleError::Key(reason);
        let key = ed25519_dalek::VerifyingKey::from_public_key_pem(text).map_err(|error| wrong(error.to_string()))?;
        // Under such a key anybody can make signatures (RFC 8032, section 5.1.7, leaves it to whoever takes keys).
        if key.is_weak() {
            return Err(wrong("a point of small order".to_owned()));
        }
        Ok(Self(key))
    }

    /// What it is called in envelopes and reports.
    pub fn id(&self) -> KeyId {
        // An Ed25519 key always has an encoding; its bytes alone would do as well.
        let der = self.0.to_public_key_der().map(|der| der.as_bytes().to_vec());
        KeyId(sha256(&der.unwrap_or_else(|_| self.0.to_bytes().to_vec())))
    }

    pub(super) fn has_signed(&self, message: &[u8], signature: &[u8]) -> bool {
        let signature = ed25519_dalek::Signature::from_slice(signature);
        signature.is_ok_and(|signature| self.0.verify_strict(message, &signature).is_ok())
    }
}

/// SHA-256 of a public key's SubjectPublicKeyInfo, in hexadecimal digits: what `openssl pkey -pubout -outform DER | sha256sum`
/// prints of the private one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(String);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The keys of those who may issue bundles, and how many of them must have signed one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trust {
    keys: BTreeMap<KeyId, VerifyingKey>,
    threshold: usize,
}

impl Trust {
    /// Trusts what `threshold` of the keys have signed; a key that is given twice is one.
    ///
    /// # Errors
    /// [`BundleError::Threshold`] where that is none of them, or more than there are.
    pub fn new(keys: Vec<VerifyingKey>, threshold: usize) -> Result<Self, BundleError> {
        let keys: BTreeMap<_, _> = keys.into_iter().map(|key| (key.id(), key)).collect();
        if threshold == 0 || threshold > keys.len() {
            return Err(BundleError::Threshold { threshold, keys: keys.len() });
        }
        Ok(Self { keys, threshold })
    }

    /// Reads an envelope, and what is in it once it is known who signed that.
    ///
    /// # Errors
    /// [`BundleError::Envelope`], [`BundleError::Untrusted`], and [`BundleError::Invalid`] for what was signed and is wrong.
    pub fn open(&self, envelope: &[u8]) -> Result<Verified, BundleError> {
        envelope::open(envelope, &self.keys, self.threshold)
    }
}

/// In hexadecimal digits.
pub(super) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
