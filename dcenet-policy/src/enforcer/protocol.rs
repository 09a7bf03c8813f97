//! What is said between those who attach endpoints and the owner of the policy state.
//!
//! A client connects to the Unix socket `policy.sock` in the run directory and sends requests; each gets one reply, in
//! order. A message is a length (32 bits, big endian) and as many bytes of JSON:
//!
//! ```json
//! {"version": 1, "body": {"attached": {"endpoint": {"...": "..."}, "default": "deny"}}}
//! {"version": 2, "body": {"attached": {"endpoint": {"...": "...", "place": {"pod": {"...": "..."}}}, "default": "deny"}}}
//! {"version": 4, "body": {"attached": {"endpoint": {"...": "..."}, "default": "deny", "guarded": true}}}
//! {"version": 1, "body": {"gone": {"attachment": {"network": "shop", "container": "c1", "ifname": "eth0"}}}}
//! {"version": 1, "body": {"await": {"attachment": {"...": "..."}, "limit": "5s"}}}
//! ```
//!
//! | Request | Replies |
//! |---|---|
//! | `attached` | `"noted"`, before anything is compiled |
//! | `gone` | `"noted"`, also for an endpoint that nobody knows |
//! | `await` | `{"enforced": {"generation": 7}}` or `{"waiting": {"reason": ".."}}`, within the request's limit |
//! | `enforcement` | `{"holds": {"enforcement": "guarded"}}`, of less with a `"reason"` where more was wanted |
//! | any | `{"refused": {"reason": ".."}}`, or `{"busy": {"reason": ".."}}`: the same later may be taken |
//!
//! A message bears the lowest version that has its meaning, so that releases which differ understand each other as far as they
//! can: version 2 tells of devices in pods ([`Place::Pod`](dcenet_core::provider::Place)), version 3 asks for an endpoint's
//! [`Enforcement`], version 4 wants a guard for one ([`Enforcement::Guarded`]) or tells why there is none, and everything else is
//! of version 1.
//! Each side reads all versions up to [`VERSION`] and refuses others, with both numbers in the reason. Reading is pure and bounded: no input makes it panic or allocate more than
//! [`MAX_MESSAGE`] bytes and what serde makes of them.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::{Endpoint, Enforcement};
use dcenet_ebpf::attach::{Attached, Owner};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use super::config::{DefaultVerdict, Limit};

/// The latest version of this protocol.
pub const VERSION: u32 = WITH_STRANGERS;

/// The first version that tells of devices in pods.
const WITH_PODS: u32 = 2;

/// The first version that asks what policy holds.
const WITH_ENFORCEMENT: u32 = 3;

/// The first version that wants guards.
const WITH_GUARDS: u32 = 4;

/// The first version that tells of programs ahead of a guard.
const WITH_STRANGERS: u32 = 5;

/// The longest message in bytes, its length not counted: room for every label that Kubernetes lets a pod have.
pub const MAX_MESSAGE: usize = 512 * 1024;

/// The socket of a run directory.
pub fn socket_path(run_dir: &Path) -> PathBuf {
    run_dir.join("policy.sock")
}

/// What is sent.
pub trait Message: Serialize {
    /// The lowest version of the protocol that has its meaning.
    fn version(&self) -> u32 {
        FIRST_VERSION
    }
}

impl Message for Request {
    fn version(&self) -> u32 {
        match self {
            Self::Attached { guarded: true, .. } => WITH_GUARDS,
            // A reader of version 1 would look for the device on the host.
            Self::Attached { endpoint, .. } if !endpoint.place.is_host() => WITH_PODS,
            Self::Enforcement { .. } => WITH_ENFORCEMENT,
            Self::Attached { .. } | Self::Gone { .. } | Self::Await { .. } => FIRST_VERSION,
        }
    }
}

impl Message for Reply {
    fn version(&self) -> u32 {
        match self {
            Self::Holds { ahead, .. } if !ahead.is_empty() => WITH_STRANGERS,
            Self::Holds { reason: Some(_), .. } => WITH_GUARDS,
            _ => FIRST_VERSION,
        }
    }
}

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Request {
    /// An endpoint exists, its device is still down, and the default programs are on it.
    Attached {
        /// The endpoint.
        endpoint: Box<Endpoint>,
        /// Which default holds.
        default: DefaultVerdict,
        /// Whether it wants a guard on its parent.
        #[serde(default, skip_serializing_if = "is_false")]
        guarded: bool,
    },
    /// An endpoint is no more, or will not be. Nothing is done for a client that has closed the connection by the time that this is
    /// read: it takes it for not done, and may have put the device under policy again.
    Gone {
        /// Its attachment.
        attachment: AttachmentKey,
    },
    /// Reply when the endpoint's own verdicts are in force.
    Await {
        /// Its attachment.
        attachment: AttachmentKey,
        /// How long the client waits for the reply.
        limit: Limit,
    },
    /// Reply what the endpoint's policy holds against the pod itself.
    Enforcement {
        /// Its attachment.
        attachment: AttachmentKey,
    },
}

/// A program of somebody else on a guarded parent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stranger {
    /// What the kernel calls it, where it has a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The hash of its instructions, where it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<[u8; 8]>,
    /// The program and its place, for who reads it.
    pub text: String,
}

impl From<&Attached> for Stranger {
    fn from(attached: &Attached) -> Self {
        let name = match &attached.owner {
            Owner::Foreign(name) => name.clone(),
            _ => None,
        };
        Self { name, tag: attached.tag, text: attached.to_string() }
    }
}

/// What the owner answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Reply {
    /// It is recorded.
    Noted,
    /// The endpoint's own verdicts are in force.
    Enforced {
        /// The endpoint's generation: grows with each change of its verdicts.
        generation: u32,
    },
    /// What the endpoint's policy holds against the pod itself.
    Holds {
        /// How much it is now.
        enforcement: Enforcement,
        /// Why it is not what was wanted, where that will not change by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
        /// What its frames meet on the parent before the guard.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ahead: Vec<Stranger>,
    },
    /// The limit has passed, or waiting is useless, and the verdicts before stand.
    Waiting {
        /// What is being waited for, or what failed.
        reason: String,
    },
    /// The request was not understood or not allowed.
    Refused {
        /// Why.
        reason: String,
    },
    /// The request was not looked at; the same one may be taken later.
    Busy {
        /// Why.
        reason: String,
    },
}

fn is_false(value: &bool) -> bool {
    !value
}

/// Why a message cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The length in front of a message is beyond the limit; the connection is of no more use.
    #[error("a message of {length} bytes, more than the {MAX_MESSAGE} that are allowed")]
    TooLong {
        /// The length.
        length: usize,
    },
    /// The other side speaks another version.
    #[error(
        "protocol version {theirs}, and this side speaks those up to {VERSION}; run the same release of both programs"
    )]
    Version {
        /// What it speaks.
        theirs: u32,
    },
    /// The bytes are no message.
    #[error("not a message of the policy protocol: {0}")]
    Malformed(#[source] serde_json::Error),
    /// The connection failed, or ended inside a message.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<T> {
    version: u32,
    body: T,
}

/// The message as JSON, without its length.
///
/// # Errors
/// [`ProtocolError::TooLong`].
pub fn encode<T: Message>(body: &T) -> Result<Vec<u8>, ProtocolError> {
    let bytes = serde_json::to_vec(&Envelope { version: body.version(), body }).map_err(ProtocolError::Malformed)?;
    if bytes.len() > MAX_MESSAGE { Err(ProtocolError::TooLong { length: bytes.len() }) } else { Ok(bytes) }
}

/// Reads a message from its JSON.
///
/// # Errors
/// [`ProtocolError::TooLong`], [`ProtocolError::Version`] and [`ProtocolError::Malformed`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ProtocolError> {
    if bytes.len() > MAX_MESSAGE {
        return Err(ProtocolError::TooLong { length: bytes.len() });
    }
    // Another version's body may look like anything: its number is read first.
    let version = serde_json::from_slice::<Envelope<IgnoredAny>>(bytes).map_err(ProtocolError::Malformed)?.version;
    if !(FIRST_VERSION..=VERSION).contains(&version) {
        return Err(ProtocolError::Version { theirs: version });
    }
    Ok(serde_json::from_slice::<Envelope<T>>(bytes).map_err(ProtocolError::Malformed)?.body)
}

/// Sends a message in one write.
///
/// # Errors
/// [`ProtocolError::TooLong`] and [`ProtocolError::Io`].
pub fn send<T: Message>(to: &mut impl Write, body: &T) -> Result<(), ProtocolError> {
    let bytes = encode(body)?;
    let length = u32::try_from(bytes.len()).map_err(|_| ProtocolError::TooLong { length: bytes.len() })?;
    let mut message = Vec::with_capacity(LENGTH + bytes.len());
    message.extend_from_slice(&length.to_be_bytes());
    message.extend_from_slice(&bytes);
    Ok(to.write_all(&message)?)
}

/// Receives a message; none where the other side has closed the connection between two.
///
/// # Errors
/// Those of [`decode`], and [`ProtocolError::Io`]; the connection can go on after [`ProtocolError::Version`] and
/// [`ProtocolError::Malformed`].
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>, ProtocolError> {
    let mut length = [0; LENGTH];
    match from.read(&mut length[..1]) {
        Ok(0) => return Ok(None),
        Ok(_) => {}
        Err(e) => return Err(e.into()),
    }
    from.read_exact(&mut length[1..])?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(ProtocolError::TooLong { length });
    }
    // Grows as bytes arrive: a length alone makes nobody allocate.
    let mut bytes = Vec::new();
    let read = from.take(length as u64).read_to_end(&mut bytes)?;
    if read < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    decode(&bytes).map(Some)
}

const LENGTH: usize = size_of::<u32>();
const FIRST_VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use dcenet_core::netns::NetNsId;
    use dcenet_core::provider::Place;
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;

    fn key(container: &str) -> AttachmentKey {
        AttachmentKey {
            network: "shop".parse().unwrap(),
            container: container.parse().unwrap(),
            ifname: "eth0".parse().unwrap(),
        }
    }

    fn a_pod() -> Place {
        Place::Pod { path: "/run/netns/c1".into(), netns: NetNsId { dev: 4, inode: 4_026_532_000 } }
    }

    fn requests() -> impl Strategy<Value = Request> {
        let labels = btree_map("[a-z./-]{0,20}", ".{0,20}", 0..5);
        let addresses = vec(any::<std::net::IpAddr>(), 0..3);
        let attached = ("[a-z0-9]{1,20}", labels, addresses, 1u32.., any::<bool>(), any::<[bool; 2]>()).prop_map(
            |(container, labels, addresses, index, named, [inside, guarded])| Request::Attached {
                endpoint: Box::new(Endpoint {
                    attachment: key(&container),
                    ifindex: dcenet_core::model::IfIndex::new(index).unwrap(),
                    ifname: "dc0".parse().unwrap(),
                    place: if inside { a_pod() } else { Place::Host },
                    link_local: inside.then(|| "fe80::1".parse().unwrap()),
                    mac: key(&container).mac(),
                    addresses,
                    workload: named.then(|| "shop/web".parse().unwrap()),
                    labels,
                }),
                default: DefaultVerdict::Deny,
                guarded,
            },
        );
        prop_oneof![
            attached,
            "[a-z0-9]{1,20}".prop_map(|c| Request::Gone { attachment: key(&c) }),
            "[a-z0-9]{1,20}".prop_map(|c| Request::Enforcement { attachment: key(&c) }),
            ("[a-z0-9]{1,20}", 0u64..600_000).prop_map(|(c, ms)| Request::Await {
                attachment: key(&c),
                limit: Limit::saturating(std::time::Duration::from_millis(ms)),
            }),
        ]
    }

    proptest! {
        #[test]
        fn what_is_sent_is_received(sent in vec(requests(), 1..4)) {
            let mut wire = Vec::new();
            for request in &sent {
                send(&mut wire, request).unwrap();
            }
            let mut from = wire.as_slice();
            for request in &sent {
                let received = receive::<Request>(&mut from).unwrap();
                prop_assert_eq!(received.as_ref(), Some(request));
            }
            prop_assert!(receive::<Request>(&mut from).unwrap().is_none());
        }

        #[test]
        fn a_cut_message_is_an_error_and_never_a_message(request in requests(), part in 0.0..1.0f64) {
            let mut wire = Vec::new();
            send(&mut wire, &request).unwrap();
            let cut = 1 + ((wire.len() - 1) as f64 * part) as usize;
            prop_assume!(cut < wire.len());
            let error = receive::<Request>(&mut &wire[..cut]).unwrap_err();
            prop_assert!(matches!(&error, ProtocolError::Io(e) if e.kind() == io::ErrorKind::UnexpectedEof));
        }

        #[test]
        fn any_bytes_are_a_message_or_an_error(bytes in vec(any::<u8>(), 0..200)) {
            let _ = receive::<Request>(&mut bytes.as_slice());
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Reply>(&bytes);
        }

        #[test]
        fn a_spoilt_message_does_no_harm(request in requests(), at in any::<prop::sample::Index>(), to in any::<u8>()) {
            let mut wire = Vec::new();
            send(&mut wire, &request).unwrap();
            let at = at.index(wire.len());
            wire[at] = to;
            let _ = receive::<Request>(&mut wire.as_slice());
        }
    }

    #[test]
    fn the_text_is_what_the_documentation_says() {
        let text = |request: &Request| String::from_utf8(encode(request).unwrap()).unwrap();
        assert_eq!(
            text(&Request::Await { attachment: key("c1"), limit: "5s".parse().unwrap() }),
            r#"{"version":1,"body":{"await":{"attachment":{"network":"shop","container":"c1","ifname":"eth0"},"limit":"5s"}}}"#
        );
        assert_eq!(encode(&Reply::Noted).unwrap(), br#"{"version":1,"body":"noted"}"#);
        let enforced = Reply::Enforced { generation: 7 };
        assert_eq!(encode(&enforced).unwrap(), br#"{"version":1,"body":{"enforced":{"generation":7}}}"#);
    }

    #[test]
    fn what_version_1_can_say_is_of_version_1() {
        let attached = |place: Place, guarded: bool| {
            let endpoint = Endpoint {
                attachment: key("c1"),
                ifindex: dcenet_core::model::IfIndex::new(7).unwrap(),
                ifname: "dc0".parse().unwrap(),
                place,
                link_local: None,
                mac: dcenet_core::model::MacAddr::new([2, 0, 0, 0, 0, 1]),
                addresses: vec!["10.0.0.1".parse().unwrap()],
                workload: None,
                labels: Default::default(),
            };
            Request::Attached { endpoint: Box::new(endpoint), default: DefaultVerdict::Deny, guarded }
        };
        // The very bytes of a release that knew no places.
        let old = concat!(
            r#"{"version":1,"body":{"attached":{"endpoint":{"attachment":{"network":"shop","container":"c1","ifname":"eth0"},"#,
            r#""ifindex":7,"ifname":"dc0","mac":"02:00:00:00:00:01","addresses":["10.0.0.1"],"workload":null,"labels":{}},"#,
            r#""default":"deny"}}}"#
        );
        assert_eq!(String::from_utf8(encode(&attached(Place::Host, false)).unwrap()).unwrap(), old);
        assert_eq!(decode::<Request>(old.as_bytes()).unwrap(), attached(Place::Host, false));
        let new = String::from_utf8(encode(&attached(a_pod(), false)).unwrap()).unwrap();
        assert!(new.starts_with(r#"{"version":2,"#) && !new.contains("guarded"), "{new}");
        let wanted = encode(&attached(a_pod(), true)).unwrap();
        assert!(wanted.starts_with(br#"{"version":4,"#) && wanted.ends_with(br#""guarded":true}}}"#), "{wanted:?}");
        let asked = encode(&Request::Enforcement { attachment: key("c1") }).unwrap();
        assert!(asked.starts_with(br#"{"version":3,"body":{"enforcement":{"attachment":{"#), "{asked:?}");
        let holds =
            encode(&Reply::Holds { enforcement: Enforcement::Guarded, reason: None, ahead: Vec::new() }).unwrap();
        assert_eq!(holds, br#"{"version":1,"body":{"holds":{"enforcement":"guarded"}}}"#);
        let why = Reply::Holds {
            enforcement: Enforcement::EgressBypassable,
            reason: Some("no".to_owned()),
            ahead: Vec::new(),
        };
        let not = br#"{"version":4,"body":{"holds":{"enforcement":"egressBypassable","reason":"no"}}}"#;
        assert_eq!(encode(&why).unwrap(), not);
        assert_eq!(decode::<Reply>(not).unwrap(), why);
        let tracer = Stranger { name: Some("tracer".to_owned()), tag: None, text: "tracer on tcx".to_owned() };
        let met = Reply::Holds { enforcement: Enforcement::Guarded, reason: None, ahead: vec![tracer] };
        let told = encode(&met).unwrap();
        assert!(told.starts_with(br#"{"version":5,"#) && told.ends_with(br#""text":"tracer on tcx"}]}}}"#), "{told:?}");
        assert_eq!(decode::<Reply>(&told).unwrap(), met);
        let none = decode::<Request>(br#"{"version":0,"body":"noted"}"#).unwrap_err();
        assert!(matches!(none, ProtocolError::Version { theirs: 0 }));
    }

    #[test]
    fn another_version_is_named_whatever_its_body() {
        let error = decode::<Request>(br#"{"version":6,"body":{"something":["new"]}}"#).unwrap_err();
        assert!(matches!(error, ProtocolError::Version { theirs: 6 }));
        let error = decode::<Request>(br#"{"version":2,"body":{"something":["new"]}}"#).unwrap_err();
        assert!(matches!(error, ProtocolError::Malformed(_)));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_its_bytes_are_read() {
        let mut wire: &[u8] = &[0xff; 8];
        let error = receive::<Request>(&mut wire).unwrap_err();
        assert!(matches!(error, ProtocolError::TooLong { length: 0xffff_ffff }));
        assert_eq!(wire.len(), 4);
        let labels = [("a".to_owned(), "x".repeat(MAX_MESSAGE))].into();
        let endpoint = Endpoint {
            attachment: key("c1"),
            ifindex: dcenet_core::model::IfIndex::new(1).unwrap(),
            ifname: "dc0".parse().unwrap(),
            place: Place::Host,
            link_local: None,
            mac: key("c1").mac(),
            addresses: Vec::new(),
            workload: None,
            labels,
        };
        let request = Request::Attached { endpoint: Box::new(endpoint), default: DefaultVerdict::Deny, guarded: false };
        assert!(matches!(send(&mut Vec::new(), &request), Err(ProtocolError::TooLong { .. })));
    }
}
