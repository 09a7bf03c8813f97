//! The envelope of DSSE 1.0.2: `protocol.md` and `envelope.md` of its specification.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::alphabet::{STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::{Deserialize, Serialize};

use super::{Bundle, BundleError, Digest, KeyId, PAYLOAD_TYPE, SigningKey, Verified, VerifyingKey};

/// What others have added is left out of consideration, as the specification demands.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    payload: String,
    payload_type: String,
    signatures: Vec<Signature>,
}

#[derive(Serialize, Deserialize)]
struct Signature {
    /// A hint that nobody vouches for: every trusted key is tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keyid: Option<KeyId>,
    sig: String,
}

/// Anybody may write so much, and it is read before it is known who did.
const MOST_BYTES: usize = 64 << 20;
/// More than anybody has keys. Each is tried against each trusted key.
const MOST_SIGNATURES: usize = 16;

pub(super) fn seal(bundle: &Bundle, keys: &[SigningKey]) -> Result<String, BundleError> {
    if keys.is_empty() {
        return Err(BundleError::Invalid {
            field: "keys".to_owned(),
            reason: "none; give one to sign with".to_owned(),
        });
    }
    let unwritten = |error: serde_json::Error| BundleError::Envelope(error.to_string());
    let payload = serde_json::to_vec(bundle).map_err(unwritten)?;
    let message = authenticated(PAYLOAD_TYPE, &payload);
    let signature = |key: &SigningKey| Signature {
        keyid: Some(key.verifying_key().id()),
        sig: standard().encode(key.sign(&message)),
    };
    let envelope = Envelope {
        payload: standard().encode(&payload),
        payload_type: PAYLOAD_TYPE.to_owned(),
        signatures: keys.iter().map(signature).collect(),
    };
    serde_json::to_string(&envelope).map_err(unwritten)
}

pub(super) fn open(
    envelope: &[u8],
    keys: &BTreeMap<KeyId, VerifyingKey>,
    threshold: usize,
) -> Result<Verified, BundleError> {
    if envelope.len() > MOST_BYTES {
        let reason = format!("{} bytes; at most {MOST_BYTES} are read, make several sets of it", envelope.len());
        return Err(BundleError::Envelope(reason));
    }
    let envelope: Envelope =
        serde_json::from_slice(envelope).map_err(|error| BundleError::Envelope(error.to_string()))?;
    let Envelope { payload, payload_type, signatures } = envelope;
    if payload_type != PAYLOAD_TYPE {
        return Err(BundleError::Envelope(format!("payloadType: {payload_type:?}; want {PAYLOAD_TYPE:?}")));
    }
    if signatures.len() > MOST_SIGNATURES {
        let reason = format!("signatures: {}; at most {MOST_SIGNATURES} are tried", signatures.len());
        return Err(BundleError::Envelope(reason));
    }
    let payload = decode("payload", &payload)?;
    let message = authenticated(&payload_type, &payload);
    let mut signers = BTreeSet::new();
    for (at, Signature { sig, .. }) in signatures.iter().enumerate() {
        let signature = decode(&format!("signatures[{at}].sig"), sig)?;
        let others: Vec<_> = keys.iter().filter(|(id, _)| !signers.contains(*id)).collect();
        let of = others.into_iter().find(|(_, key)| key.has_signed(&message, &signature));
        signers.extend(of.map(|(id, _)| id.clone()));
    }
    if signers.len() < threshold {
        return Err(BundleError::Untrusted { valid: signers.len(), threshold });
    }
    let invalid =
        |error: serde_json::Error| BundleError::Invalid { field: "payload".to_owned(), reason: error.to_string() };
    let bundle: Bundle = serde_json::from_slice(&payload).map_err(invalid)?;
    bundle.check()?;
    Ok(Verified { bundle, digest: Digest::of(&payload), signers })
}

/// What is signed: the "pre-authentication encoding" of `protocol.md`.
fn authenticated(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut message = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    message.extend_from_slice(payload);
    message
}

fn standard() -> GeneralPurpose {
    GeneralPurpose::new(&STANDARD, PADDED_OR_NOT)
}

/// Either alphabet of RFC 4648 must be taken.
fn decode(field: &str, text: &str) -> Result<Vec<u8>, BundleError> {
    let url_safe = text.contains(['-', '_']);
    let engine = GeneralPurpose::new(if url_safe { &URL_SAFE } else { &STANDARD }, PADDED_OR_NOT);
    engine.decode(text).map_err(|error| BundleError::Envelope(format!("{field}: {error}")))
}

const PADDED_OR_NOT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
