//! What ties a container to a network now.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{ContainerId, IfName, MacAddr, NetworkName, ParseError, serde_by_text};

/// One interface of one container on one network: what a CNI ADD makes and a DEL removes.
///
/// It is short-lived. The stable identity behind it is a [`Workload`](super::Workload) with an interface name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachmentKey {
    /// The network configuration's name.
    pub network: NetworkName,
    /// The container.
    pub container: ContainerId,
    /// The interface's name inside the container.
    pub ifname: IfName,
}

impl AttachmentKey {
    /// The short form that fits an interface name.
    pub fn id(&self) -> AttachmentId {
        let digest = self.digest();
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[..8]);
        AttachmentId(u64::from_be_bytes(bytes) >> (64 - AttachmentId::BITS))
    }

    /// A MAC address that is the same each time this attachment is made and differs from those of others
    /// with all but negligible probability (46 bits of SHA-256).
    pub fn mac(&self) -> MacAddr {
        let digest = self.digest();
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&digest[8..14]);
        MacAddr::local(bytes)
    }

    fn digest(&self) -> [u8; 32] {
        // None of the parts can hold a '/', so that the join is unambiguous.
        Sha256::digest(format!("{}/{}/{}", self.network, self.container, self.ifname)).into()
    }
}

impl fmt::Display for AttachmentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.network, self.container, self.ifname)
    }
}

/// 52 bits derived from an [`AttachmentKey`], printed as 13 hexadecimal digits, so that a host device can carry them
/// in its 15-byte name. Two attachments may share an id with probability n^2/2^53; whoever makes something under an
/// id records the whole key beside it and refuses a different one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AttachmentId(u64);

impl AttachmentId {
    const BITS: u32 = 52;

    /// The id as a number below 2^52.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The name of the device on the host through which goes what the attachment sends, where that is limited: `db` and the
    /// 13 digits.
    pub fn shaper_ifname(self) -> IfName {
        format!("db{self}").parse().expect("15 bytes of letters and digits are an interface name")
    }

    /// The name of the attachment's device on the host's side: `dc` and the 13 digits.
    pub fn host_ifname(self) -> IfName {
        format!("dc{self}").parse().expect("15 bytes of letters and digits are an interface name")
    }
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:013x}", self.0)
    }
}

impl FromStr for AttachmentId {
    type Err = ParseError;

    fn from_str(s: &str) -> Result<Self, ParseError> {
        let ok = s.len() == 13 && s.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let value = if ok { u64::from_str_radix(s, 16).ok() } else { None };
        value.map(Self).ok_or(ParseError::new("attachment id", s, "not 13 lower-case hexadecimal digits"))
    }
}

serde_by_text!(AttachmentId);

#[cfg(test)]
mod tests {
    use super::*;

    fn key(network: &str, container: &str, ifname: &str) -> AttachmentKey {
        AttachmentKey {
            network: network.parse().unwrap(),
            container: container.parse().unwrap(),
            ifname: ifname.parse().unwrap(),
        }
    }

    #[test]
    fn the_id_is_stable_across_versions() {
        // Devices and records of an older binary are found by this id: it may never change.
        let key = key("shop", "c1", "eth0");
        assert_eq!(key.id().to_string().len(), 13);
        assert_eq!(key.id().to_string(), "c682d0864ae24");
        assert_eq!(key.id().host_ifname().as_str(), format!("dc{}", key.id()));
        assert_eq!(key.id().to_string().parse::<AttachmentId>().unwrap(), key.id());
    }

    #[test]
    fn any_part_changes_id_and_mac() {
        let keys = [key("a", "c1", "eth0"), key("b", "c1", "eth0"), key("a", "c2", "eth0"), key("a", "c1", "net1")];
        for (i, left) in keys.iter().enumerate() {
            assert!(left.mac().is_device_address());
            for right in &keys[i + 1..] {
                assert_ne!(left.id(), right.id());
                assert_ne!(left.mac(), right.mac());
            }
        }
    }
}
