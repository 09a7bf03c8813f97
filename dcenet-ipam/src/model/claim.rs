//! Claims: what belongs to a workload, whatever container runs it.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use dcenet_core::model::{IfName, MacAddr, ParseError, Workload};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Addr, Family};

/// Whom a claim is for: a workload, and which of its interfaces. It outlives containers.
///
/// As text `namespace/name`, or `namespace/name/interface`. The claims that a set of replicas shares
/// ([`Members::Replica`]) are numbered: `namespace/name#2`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimKey {
    /// The workload.
    pub workload: Workload,
    /// The place in a set whose addresses any replica of the workload may use.
    pub place: Option<u32>,
    /// The interface inside the container; `None` for whichever interface is attached.
    pub ifname: Option<IfName>,
}

impl ClaimKey {
    /// Of a workload with whichever interface.
    pub fn new(workload: Workload) -> Self {
        Self { workload, place: None, ifname: None }
    }

    /// The same on one interface.
    #[must_use]
    pub fn on(self, ifname: IfName) -> Self {
        Self { ifname: Some(ifname), ..self }
    }
}

impl fmt::Display for ClaimKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.workload.fmt(f)?;
        if let Some(place) = self.place {
            write!(f, "#{place}")?;
        }
        match &self.ifname {
            Some(ifname) => write!(f, "/{ifname}"),
            None => Ok(()),
        }
    }
}

impl FromStr for ClaimKey {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let fault = |reason| ParseError { kind: "claim", value: s.to_owned(), reason };
        let mut parts = s.splitn(3, '/');
        let (namespace, name) = (parts.next().unwrap_or_default(), parts.next());
        let name = name.ok_or_else(|| fault("not of the form namespace/name or namespace/name/interface"))?;
        let (name, place) = match name.split_once('#') {
            Some((name, place)) => {
                (name, Some(number(place).ok_or_else(|| fault("has no number after '#', as in shop/web#2"))?))
            }
            None => (name, None),
        };
        let workload = Workload::new(namespace, name)?;
        Ok(Self { workload, place, ifname: parts.next().map(str::parse).transpose()? })
    }
}

/// A decimal number in its one form: without sign and leading zeros.
fn number(text: &str) -> Option<u32> {
    let number = text.parse().ok()?;
    (u32::to_string(&number) == text).then_some(number)
}

impl Serialize for ClaimKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ClaimKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// How long a claim keeps its address once nothing is attached.
///
/// As JSON `"ephemeral"`, `"workload"`, a duration as `"72h"` or `{ "for": "72h" }`, or `"forever"`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeepPolicy {
    /// Not at all: the address goes back when its attachment goes.
    Ephemeral,
    /// While the workload exists: until somebody says that it is gone ([`Ipam::workload_gone`](crate::Ipam::workload_gone),
    /// or a [`Reclaimer`](crate::reclaim::Reclaimer) that is shown all workloads).
    Workload,
    /// For this time after the release, in whole milliseconds. Then the address counts as released, though its claim
    /// finds it again as long as nobody else took it. Only clocks tell when; one that jumps delays or hastens the end
    /// and can do nothing else: whoever takes the address does so under the guard of its slot.
    For(Duration),
    /// Until the claim is forgotten.
    #[default]
    Forever,
}

impl Serialize for KeepPolicy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Ephemeral => serializer.serialize_str("ephemeral"),
            Self::Workload => serializer.serialize_str("workload"),
            Self::For(time) => serializer.collect_str(&format_args!("{}ms", time.as_millis())),
            Self::Forever => serializer.serialize_str("forever"),
        }
    }
}

impl<'de> Deserialize<'de> for KeepPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "keep is neither a text nor an object; write forever, workload, ephemeral, 72h \
                                       or { \"for\": \"72h\" }"
        )]
        enum Written {
            Text(String),
            Timed(Timed),
        }
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Timed {
            #[serde(rename = "for")]
            time: String,
        }
        let text = match Written::deserialize(deserializer)? {
            Written::Text(text) => match text.as_str() {
                "ephemeral" => return Ok(Self::Ephemeral),
                "workload" => return Ok(Self::Workload),
                "forever" => return Ok(Self::Forever),
                _ => text,
            },
            Written::Timed(Timed { time }) => time,
        };
        let time = crate::config::parse_duration(&text).filter(|time| !time.is_zero());
        time.map(Self::For).ok_or_else(|| {
            D::Error::custom(format!(
                "keep {text:?} is not accepted; write forever, workload, ephemeral, or a time with ms, s, m or h, as 72h"
            ))
        })
    }
}

/// Which MAC address a claim keeps with its address.
///
/// As JSON `"from-address"`, or an address as `"02:00:00:00:00:07"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MacWish {
    /// Told by the address, so that no two of a link are alike: `0a:58` and the four bytes of an IPv4 address, or `0e`
    /// and the last five bytes of an IPv6 address, which differ between the addresses of a link where interface
    /// identifiers (RFC 4291, section 2.5.1) differ in their last 40 bits. Both are locally administered.
    FromAddress,
    /// This one.
    Fixed(MacAddr),
}

impl MacWish {
    /// The MAC address that comes with an address.
    pub fn of(self, address: Addr) -> MacAddr {
        match self {
            Self::Fixed(mac) => mac,
            Self::FromAddress => {
                let bytes = address.bits.to_be_bytes();
                let [.., v, w, x, y, z] = bytes;
                MacAddr::new(match address.family {
                    Family::V4 => [0x0a, 0x58, w, x, y, z],
                    Family::V6 => [0x0e, v, w, x, y, z],
                })
            }
        }
    }
}

impl FromStr for MacWish {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        if s == "from-address" { Ok(Self::FromAddress) } else { MacAddr::for_device(s).map(Self::Fixed) }
    }
}

impl fmt::Display for MacWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FromAddress => f.write_str("from-address"),
            Self::Fixed(mac) => mac.fmt(f),
        }
    }
}

impl Serialize for MacWish {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacWish {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A workload's wish for an address of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// For whom.
    pub key: ClaimKey,
    /// The address; `None` for whichever is free at the first lease, from then on the same.
    pub address: Option<Addr>,
    /// What becomes of the address after release.
    pub keep: KeepPolicy,
    /// The MAC address that comes with it, over restarts and migrations; `None` for one of the attachment's own.
    pub mac: Option<MacWish>,
}

/// How the members of a claim set are recognised. All that is known of a workload is its `namespace/name`, so the name
/// tells, in the forms that Kubernetes gives to pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Members {
    /// `NAME-0`, `NAME-1` and so on, the pods of a StatefulSet: each has an address of its own. Those of ordinals that
    /// were scaled down are kept.
    Ordinal,
    /// `NAME-RANDOM` or `NAME-HASH-RANDOM`, the pods of a ReplicaSet, DaemonSet or Deployment: 5 random characters and a
    /// hash of up to 10, of the consonants and digits that Kubernetes draws from (`bcdfghjklmnpqrstvwxz2456789`). All
    /// share the addresses of the set; whichever is free is taken. A rolling update needs as many addresses more as it
    /// surges.
    Replica,
}

/// Claims for all pods of a StatefulSet or Deployment. As text `namespace/name-*`, or `namespace/name-*/interface`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimSet {
    /// The name of what owns the pods, and which interface of theirs.
    pub owner: ClaimKey,
    /// Which workloads belong to it.
    pub members: Members,
    /// How many addresses it has, each a claim of the pool; `None` if each member keeps whichever it got first.
    pub size: Option<u32>,
    /// As of a claim.
    pub keep: KeepPolicy,
    /// As of a claim.
    pub mac: Option<MacWish>,
}

impl ClaimSet {
    /// Whether a workload is a member.
    pub fn has(&self, workload: &Workload) -> bool {
        let owner = &self.owner.workload;
        workload.namespace() == owner.namespace()
            && workload.name().strip_prefix(owner.name()).and_then(|rest| rest.strip_prefix('-')).is_some_and(
                |suffix| match self.members {
                    Members::Ordinal => number(suffix).is_some(),
                    Members::Replica => is_replica_suffix(suffix),
                },
            )
    }

    /// The claim of the member with this ordinal.
    pub(crate) fn ordinal(&self, ordinal: u32) -> Result<ClaimKey, ParseError> {
        let owner = &self.owner.workload;
        let workload = Workload::new(owner.namespace(), &format!("{}-{ordinal}", owner.name()))?;
        Ok(ClaimKey { workload, place: None, ifname: self.owner.ifname.clone() })
    }
}

impl fmt::Display for ClaimSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-*", self.owner.workload)?;
        match &self.owner.ifname {
            Some(ifname) => write!(f, "/{ifname}"),
            None => Ok(()),
        }
    }
}

/// The name of what owns a pod, told by the pod's name in the forms of [`Members`]; the name itself where it has none of
/// them. The last part of a name may be a hash as well as the end of the owner's: only one of at least 6 characters, as
/// all but one of 40,000 are, is taken for a hash.
pub(crate) fn pod_owner(name: &str) -> &str {
    let Some((rest, last)) = name.rsplit_once('-') else { return name };
    match rest.rsplit_once('-') {
        Some((owner, hash)) if hash.len() >= 6 && is_replica_suffix(&name[owner.len() + 1..]) => owner,
        _ if number(last).is_some() || is_replica_suffix(last) => rest,
        _ => name,
    }
}

/// Whether Kubernetes may have made it: `SafeEncodeString` and `String` of `k8s.io/apimachinery/pkg/util/rand`.
fn is_replica_suffix(suffix: &str) -> bool {
    let drawn = |text: &str| text.bytes().all(|b| b"bcdfghjklmnpqrstvwxz2456789".contains(&b));
    match suffix.split_once('-') {
        Some((hash, random)) => (1..=10).contains(&hash.len()) && random.len() == 5 && drawn(hash) && drawn(random),
        None => suffix.len() == 5 && drawn(suffix),
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn a_mac_address_told_by_the_address_differs_where_the_address_does() {
        let mac = |ip: &str| MacWish::FromAddress.of(Addr::from(ip.parse::<IpAddr>().unwrap())).to_string();
        assert_eq!(mac("10.20.0.11"), "0a:58:0a:14:00:0b");
        assert_eq!(mac("fd00::1:203:405"), "0e:01:02:03:04:05");
        assert_ne!(mac("fd00::1"), mac("fd00::2"));
        assert_eq!("02:00:00:00:00:07".parse::<MacWish>().unwrap().to_string(), "02:00:00:00:00:07");
        "01:00:5e:00:00:01".parse::<MacWish>().unwrap_err();
    }

    #[test]
    fn members_of_a_set_are_told_by_the_names_that_their_owner_gives_them() {
        let set = |members| ClaimSet {
            owner: "shop/web".parse().unwrap(),
            members,
            size: None,
            keep: KeepPolicy::Forever,
            mac: None,
        };
        let has = |members, name: &str| set(members).has(&name.parse().unwrap());
        for member in ["shop/web-0", "shop/web-17"] {
            assert!(has(Members::Ordinal, member), "{member}");
        }
        for stranger in ["shop/web", "shop/web-00", "shop/web-1-2", "shop/web-x", "ops/web-0", "shop/webs-0"] {
            assert!(!has(Members::Ordinal, stranger), "{stranger}");
        }
        for member in ["shop/web-7d9f8c6b5-x2x4z", "shop/web-x2x4z"] {
            assert!(has(Members::Replica, member), "{member}");
        }
        // Another Deployment's name may begin alike.
        for stranger in ["shop/web-admin-7d9f8c6b5-x2x4z", "shop/web-0", "shop/web-abcde", "shop/web-admin-x2x4z"] {
            assert!(!has(Members::Replica, stranger), "{stranger}");
        }
    }

    #[test]
    fn the_owner_of_a_pod_is_told_by_its_name() {
        for (pod, owner) in [
            ("db-0", "db"),
            ("db-12", "db"),
            ("web-7d9f8c6b5-x2x4z", "web"),
            ("web-x2x4z", "web"),
            ("web-db-x2x4z", "web-db"),
            ("web", "web"),
            ("web-admin", "web-admin"),
            ("web-01", "web-01"),
            ("web-abcde", "web-abcde"),
        ] {
            assert_eq!(pod_owner(pod), owner, "{pod}");
        }
    }

    #[test]
    fn keep_policies_are_read_in_every_form_and_written_in_one() {
        let read = |json: &str| serde_json::from_str::<KeepPolicy>(json);
        let days = KeepPolicy::For(Duration::from_secs(72 * 3600));
        for (json, policy) in [
            (r#""forever""#, KeepPolicy::Forever),
            (r#""workload""#, KeepPolicy::Workload),
            (r#""ephemeral""#, KeepPolicy::Ephemeral),
            (r#""72h""#, days),
            (r#"{ "for": "72h" }"#, days),
        ] {
            assert_eq!(read(json).unwrap(), policy);
            assert_eq!(read(&serde_json::to_string(&policy).unwrap()).unwrap(), policy);
        }
        for bad in [r#""always""#, r#""0s""#, r#"{ "for": 3 }"#, r#"{ "for": "3d" }"#, "7", r#""72""#] {
            let error = read(bad).unwrap_err().to_string();
            assert!(error.contains("72h"), "{bad}: {error}");
        }
    }

    #[test]
    fn claims_name_a_workload_and_perhaps_an_interface() {
        for good in ["shop/db", "shop/db-0.replica/net1", "shop/web#2", "shop/web#0/net1"] {
            assert_eq!(good.parse::<ClaimKey>().unwrap().to_string(), good);
        }
        for bad in ["shop", "shop/", "shop/db/", "shop/db/a/b", "Shop/db", "shop/web#", "shop/web#01", "shop/web#x"] {
            bad.parse::<ClaimKey>().unwrap_err();
        }
    }
}
