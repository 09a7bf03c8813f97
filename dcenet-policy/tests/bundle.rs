//! Sets of policies that are numbered and signed. The other reader and writer is openssl, with the encoding that is signed written
//! by hand after `protocol.md` of DSSE 1.0.2.

#![cfg(feature = "bundle")]

use std::path::Path;
use std::process::Command;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use dcenet_core::test_support::{Rung, require_with};
use dcenet_policy::bundle::{
    Accepted, AcceptedError, Bundle, BundleDocument, BundleError, SigningKey, Trust, Verified, VerifyingKey,
};
use dcenet_policy::sources::kubernetes::Documents;
use serde_json::{Value, json};

/// Of RFC 8032, section 7.1, tests 1 and 2, in PKCS #8.
const ONE: &str = "MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g";
const TWO: &str = "MC4CAQAwBQYDK2VwBCIEIEzNCJsoAZYhH2w4x0m52nJDvcTrvuq4SBPKqY6v0kqZ";

const CLOSED: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: closed, namespace: shop }
spec: { podSelector: {} }
";

fn key(base64: &str) -> SigningKey {
    SigningKey::from_pem(&format!("-----BEGIN PRIVATE KEY-----\n{base64}\n-----END PRIVATE KEY-----\n")).unwrap()
}

fn bundle(generation: u64) -> Bundle {
    Bundle::new("production", generation, vec![BundleDocument::new("shop.yaml", CLOSED)]).unwrap()
}

fn trust(keys: &[&SigningKey], threshold: usize) -> Trust {
    Trust::new(keys.iter().map(|key| key.verifying_key()).collect(), threshold).unwrap()
}

fn verified(bundle: &Bundle) -> Verified {
    let key = key(ONE);
    trust(&[&key], 1).open(bundle.sign(&[key]).unwrap().as_bytes()).unwrap()
}

#[test]
fn what_was_signed_is_opened_by_who_trusts_the_key_alone() {
    let (one, two) = (key(ONE), key(TWO));
    let envelope = bundle(7).sign(std::slice::from_ref(&one)).unwrap();
    let opened = trust(&[&one], 1).open(envelope.as_bytes()).unwrap();
    assert_eq!(opened.bundle, bundle(7));
    assert_eq!(opened.signers.iter().collect::<Vec<_>>(), [&one.verifying_key().id()]);
    let documents = opened.bundle.add_to(Documents::default()).unwrap();
    assert_eq!(documents.policies.keys().map(|id| id.name.as_str()).collect::<Vec<_>>(), ["closed"]);

    let refused = trust(&[&two], 1).open(envelope.as_bytes()).unwrap_err();
    assert!(matches!(refused, BundleError::Untrusted { valid: 0, threshold: 1 }), "{refused}");
    // Two of two: one key that signs twice is one.
    let both = trust(&[&one, &two], 2);
    let twice = bundle(7).sign(&[one.clone(), one.clone()]).unwrap();
    assert!(matches!(both.open(twice.as_bytes()), Err(BundleError::Untrusted { valid: 1, threshold: 2 })));
    assert_eq!(both.open(bundle(7).sign(&[one, two]).unwrap().as_bytes()).unwrap().signers.len(), 2);
}

/// Each byte of what is signed, and of the signature.
#[test]
fn what_was_changed_is_not_opened() {
    let key = key(ONE);
    let trust = trust(&[&key], 1);
    let envelope: Value = serde_json::from_str(&bundle(7).sign(&[key]).unwrap()).unwrap();
    let payload = STANDARD.decode(envelope["payload"].as_str().unwrap()).unwrap();
    let signature = STANDARD.decode(envelope["signatures"][0]["sig"].as_str().unwrap()).unwrap();
    let with = |payload: &[u8], signature: &[u8]| {
        let mut envelope = envelope.clone();
        envelope["payload"] = STANDARD.encode(payload).into();
        envelope["signatures"][0]["sig"] = STANDARD.encode(signature).into();
        trust.open(envelope.to_string().as_bytes())
    };
    // The same way of putting it together, with nothing changed.
    with(&payload, &signature).unwrap();
    let flipped = |bytes: &[u8], at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 1;
        bytes
    };
    for at in 0..payload.len() {
        let outcome = with(&flipped(&payload, at), &signature);
        assert!(matches!(outcome, Err(BundleError::Untrusted { valid: 0, .. })), "byte {at} of the payload");
    }
    for at in 0..signature.len() {
        let outcome = with(&payload, &flipped(&signature, at));
        assert!(matches!(outcome, Err(BundleError::Untrusted { valid: 0, .. })), "byte {at} of the signature");
    }
    // A signature of something else that the same key has signed: the type is signed, too.
    let mut other = envelope.clone();
    other["payloadType"] = "application/vnd.in-toto+json".into();
    let refused = trust.open(other.to_string().as_bytes()).unwrap_err().to_string();
    assert!(refused.contains("payloadType: \"application/vnd.in-toto+json\""), "{refused}");
    for whole in ["", "{}", "[]", "{\"payload\":\"?\",\"payloadType\":\"x\",\"signatures\":[]}"] {
        assert!(matches!(trust.open(whole.as_bytes()), Err(BundleError::Envelope(_))), "{whole}");
    }
    let mut many = envelope.clone();
    many["signatures"] = vec![envelope["signatures"][0].clone(); 17].into();
    assert!(trust.open(many.to_string().as_bytes()).unwrap_err().to_string().contains("signatures: 17"));
    // Members of others are none of our business, and either alphabet will do.
    let mut odd = envelope.clone();
    odd["extension"] = json!({ "kind": "x" });
    odd["payload"] = URL_SAFE_NO_PAD.encode(&payload).into();
    odd["signatures"][0]["sig"] = URL_SAFE_NO_PAD.encode(&signature).into();
    odd["signatures"][0]["keyid"] = "not this one".into();
    trust.open(odd.to_string().as_bytes()).unwrap();
}

#[test]
fn what_is_signed_and_wrong_is_refused_by_its_field() {
    let refused = |name: &str, generation, documents: Vec<BundleDocument>| {
        Bundle::new(name, generation, documents).unwrap_err().to_string()
    };
    let document = |name: &str| BundleDocument::new(name, CLOSED);
    assert!(refused("Production", 1, vec![]).starts_with("name: \"Production\": want lower-case"));
    assert!(refused("a/b", 1, vec![]).starts_with("name: "));
    assert!(refused("-a", 1, vec![]).starts_with("name: "));
    assert!(refused("", 1, vec![]).starts_with("name: "));
    assert!(refused(&"a".repeat(254), 1, vec![]).starts_with("name: "));
    assert_eq!(refused("a", 0, vec![]), "generation: 0: generations count from 1");
    assert_eq!(refused("a", 1, vec![document("x"), document("x")]), "documents[1].name: \"x\": there are two");
    assert!(refused("a", 1, vec![document("x\n")]).starts_with("documents[0].name: "));
    assert!(bundle(1).sign(&[]).unwrap_err().to_string().starts_with("keys: none"));

    let wrong = Bundle::new("a", 1, vec![BundleDocument::new("db.yaml", CLOSED.replace("podSelector", "podSelectr"))]);
    let error = wrong.unwrap().add_to(Documents::default()).unwrap_err().to_string();
    assert!(error.starts_with("a 1: db.yaml") && error.contains("podSelectr"), "{error}");

    assert!(VerifyingKey::from_pem("no key").unwrap_err().to_string().contains("openssl genpkey"));
    assert!(SigningKey::from_pem("no key").is_err());
    // The neutral element, under which anybody's signature is good for most messages.
    let neutral = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAAQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n-----END PUBLIC KEY-----\n";
    assert!(VerifyingKey::from_pem(neutral).unwrap_err().to_string().contains("small order"));
    let one = key(ONE).verifying_key();
    assert!(matches!(Trust::new(vec![one.clone()], 0), Err(BundleError::Threshold { .. })));
    assert!(matches!(Trust::new(vec![one.clone(), one], 2), Err(BundleError::Threshold { threshold: 2, keys: 1 })));
}

/// A later release may say more in a bundle; this one must not take it without what it does not know.
#[test]
fn a_bundle_with_more_in_it_than_is_known_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let without = || Command::new("openssl").arg("version").output().is_err().then(|| "there is no openssl".to_owned());
    if !require_with(Rung::Services, without) {
        return;
    }
    let pem = openssl_key(directory.path());
    let trust = Trust::new(vec![VerifyingKey::from_pem(&pem).unwrap()], 1).unwrap();
    let payload = |more: &str| format!("{{\"name\":\"a\",\"generation\":1,\"documents\":[]{more}}}");
    let opened = |payload: &str| trust.open(signed_by_openssl(directory.path(), payload).as_bytes());
    opened(&payload("")).unwrap();
    let refused = opened(&payload(",\"expires\":1")).unwrap_err().to_string();
    assert!(refused.contains("unknown field `expires`"), "{refused}");
}

fn openssl(directory: &Path, arguments: &[&str]) {
    let output = Command::new("openssl").current_dir(directory).args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes a pair of keys, and returns the public one.
fn openssl_key(directory: &Path) -> String {
    openssl(directory, &["genpkey", "-algorithm", "ed25519", "-out", "key.pem"]);
    openssl(directory, &["pkey", "-in", "key.pem", "-pubout", "-out", "public.pem"]);
    std::fs::read_to_string(directory.join("public.pem")).unwrap()
}

const TYPE: &str = "application/vnd.dcenet.policy-bundle.v1+json";

fn signed_by_openssl(directory: &Path, payload: &str) -> String {
    let message = format!("DSSEv1 44 {TYPE} {} {payload}", payload.len());
    std::fs::write(directory.join("message"), message).unwrap();
    openssl(directory, &["pkeyutl", "-sign", "-rawin", "-inkey", "key.pem", "-in", "message", "-out", "signature"]);
    let signature = std::fs::read(directory.join("signature")).unwrap();
    let signatures = json!([{ "sig": STANDARD.encode(signature) }]);
    json!({ "payload": STANDARD.encode(payload), "payloadType": TYPE, "signatures": signatures }).to_string()
}

#[test]
fn openssl_opens_what_is_signed_here_and_the_other_way_round() {
    let directory = tempfile::tempdir().unwrap();
    let without = || Command::new("openssl").arg("version").output().is_err().then(|| "there is no openssl".to_owned());
    if !require_with(Rung::Services, without) {
        return;
    }
    let public = openssl_key(directory.path());
    let key = SigningKey::from_pem(&std::fs::read_to_string(directory.path().join("key.pem")).unwrap()).unwrap();
    assert_eq!(key.verifying_key(), VerifyingKey::from_pem(&public).unwrap());
    openssl(directory.path(), &["pkey", "-in", "key.pem", "-pubout", "-outform", "DER", "-out", "public.der"]);
    let digest =
        Command::new("openssl").current_dir(directory.path()).args(["dgst", "-sha256", "-r", "public.der"]).output();
    let id = key.verifying_key().id().to_string();
    assert!(String::from_utf8(digest.unwrap().stdout).unwrap().starts_with(&id), "{id}");

    let trust = Trust::new(vec![key.verifying_key()], 1).unwrap();
    let text = serde_json::to_string(CLOSED).unwrap();
    let payload = format!(
        "{{ \"generation\": 7, \"name\": \"production\", \"documents\": [ {{ \"name\": \"shop.yaml\", \"text\": {text} }} ] }}"
    );
    assert_eq!(trust.open(signed_by_openssl(directory.path(), &payload).as_bytes()).unwrap().bundle, bundle(7));

    let envelope: Value = serde_json::from_str(&bundle(7).sign(&[key]).unwrap()).unwrap();
    let payload = STANDARD.decode(envelope["payload"].as_str().unwrap()).unwrap();
    let message = [format!("DSSEv1 44 {TYPE} {} ", payload.len()).into_bytes(), payload].concat();
    std::fs::write(directory.path().join("message"), message).unwrap();
    let signature = STANDARD.decode(envelope["signatures"][0]["sig"].as_str().unwrap()).unwrap();
    std::fs::write(directory.path().join("signature"), signature).unwrap();
    let verify =
        ["pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", "public.pem", "-in", "message", "-sigfile", "signature"];
    openssl(directory.path(), &verify);
}

#[test]
fn nothing_older_takes_the_place_of_what_was_taken() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state/policy-sets");
    let wanted = |sets: &[(&str, u64)]| sets.iter().map(|(name, least)| ((*name).to_owned(), *least)).collect();
    let production = wanted(&[("production", 1)]);
    let mut accepted = Accepted::read(&path).unwrap();
    // The guard removed: before anything was taken, the old one may come.
    accepted.check(&[verified(&bundle(6))], &production).unwrap();
    let refused = accepted.check(&[verified(&bundle(6))], &wanted(&[("production", 7)])).unwrap_err();
    assert!(matches!(refused, AcceptedError::Older { generation: 6, taken: 7, .. }), "{refused}");
    accepted.take(&[verified(&bundle(7))], &production).unwrap();
    drop(accepted);

    let mut accepted = Accepted::read(&path).unwrap();
    assert_eq!(accepted.sets()["production"].generation, 7);
    let refused = accepted.take(&[verified(&bundle(6))], &production).unwrap_err();
    assert!(matches!(refused, AcceptedError::Older { generation: 6, taken: 7, .. }), "{refused}");
    accepted.take(&[verified(&bundle(7))], &production).unwrap();
    let other = Bundle::new("production", 7, vec![]).unwrap();
    assert!(matches!(
        accepted.take(&[verified(&other)], &production),
        Err(AcceptedError::Another { generation: 7, .. })
    ));
    let twice = [verified(&bundle(8)), verified(&bundle(9))];
    assert!(matches!(accepted.take(&twice, &production), Err(AcceptedError::Twice { generations: [8, 9], .. })));
    assert!(matches!(accepted.take(&[], &production), Err(AcceptedError::Missing { .. })));
    // By the same key, for others.
    let staging = [verified(&bundle(8)), verified(&Bundle::new("staging", 1, vec![]).unwrap())];
    assert!(matches!(accepted.take(&staging, &production), Err(AcceptedError::Unwanted { .. })));
    assert_eq!(Accepted::read(&path).unwrap().sets().len(), 1);
    let both = wanted(&[("production", 1), ("staging", 1)]);
    assert!(matches!(accepted.take(&staging[..1], &both), Err(AcceptedError::Missing { .. })));
    accepted.take(&staging, &both).unwrap();
    // Nobody wants it for a while.
    accepted.take(&[verified(&bundle(9))], &production).unwrap();
    assert_eq!(Accepted::read(&path).unwrap().sets()["staging"].generation, 1);

    // Without it an old one would pass.
    std::fs::write(&path, "{").unwrap();
    assert!(matches!(Accepted::read(&path), Err(AcceptedError::File { .. })));
}
