//! Claims, claim sets and history of a configuration.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::pool::raw;
use super::{AddressRange, ConfigError, ConfigFault, PoolConfig};
use crate::model::{Addr, Claim, ClaimKey, ClaimSet, Family, Interval, KeepPolicy, MacWish, Members};

/// A claim, or the claims of all pods of one owner, as written.
///
/// ```json
/// "claims": {
///   "shop/db":    { "address": "10.20.0.11", "keep": "forever", "mac": "from-address" },
///   "shop/cache": { "keep": "72h" },
///   "shop/pg-*":  { "members": "ordinal", "addresses": ["10.20.0.20-10.20.0.22"] },
///   "shop/log-*": { "members": "ordinal", "keep": "workload" },
///   "shop/web-*": { "members": "replica", "addresses": ["10.20.0.30-10.20.0.39"] } }
/// ```
///
/// A workload is `namespace/name`; of a Kubernetes pod its namespace and name, of a virtual machine or process whatever
/// its owner calls it at every start. A claim of exactly that name goes before a set, and either before what was
/// recorded at run time. `shop/pg-0` to `shop/pg-2` have the three addresses in the order written, also after scaling
/// down and up; `shop/pg-3` is refused. Each `shop/log-N` keeps whichever address it got first. Pods of the Deployment
/// `web` take whichever of the ten is free, and the eleventh is refused. What belongs to a set is told by the name; see
/// [`Members`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClaimConfig {
    /// The address; whichever is free at the first lease, and then the same, unless told. It must be in the subnet, and
    /// may be outside the ranges.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// The addresses of a set, at most 1024, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<AddressRange>,
    /// How the members of a set are recognised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub members: Option<Members>,
    /// How long an address is kept once nothing is attached: `forever` (unless told), `workload`, `ephemeral`, or a time
    /// such as `72h`.
    #[serde(default)]
    pub keep: KeepPolicy,
    /// The MAC address that the claim keeps over restarts and migrations: one as text, or `from-address`. Unless told,
    /// each attachment has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacWish>,
}

/// How much is remembered of who held an address.
///
/// Old events of an address go when the address is released, now and then, and with [`Ipam::prune_history`](crate::Ipam::prune_history).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryConfig {
    /// For how long; 720h unless told.
    #[serde(default = "HistoryConfig::default_keep", with = "keep_text")]
    pub keep: Duration,
    /// How many events of each address at most, 2 to 1024; 64 unless told. A bind is one, its release another.
    #[serde(default = "HistoryConfig::default_count")]
    pub count: usize,
}

impl Default for HistoryConfig {
    fn default() -> Self {
        Self { keep: Self::default_keep(), count: Self::default_count() }
    }
}

impl HistoryConfig {
    fn default_keep() -> Duration {
        Duration::from_secs(720 * 3600)
    }

    fn default_count() -> usize {
        64
    }

    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if (2..=1024).contains(&self.count) {
            return Ok(());
        }
        let fault = ConfigFault::Malformed("write 2 to 1024 events".to_owned());
        Err(ConfigError { field: "ipam.history.count".to_owned(), value: self.count.to_string(), fault })
    }
}

mod keep_text {
    use serde::de::Error as _;
    use serde::{Deserializer, Serializer};

    use super::super::duration_text;
    use super::Duration;

    pub(super) fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        duration_text::serialize(&Some(*value), serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        duration_text::deserialize(deserializer)?
            .ok_or_else(|| D::Error::custom("keep is null; write a duration, as 720h, or leave it out"))
    }
}

/// Addresses of one set.
const LIMIT: u128 = 1024;

/// The claims of a pool.
pub(super) struct Checked {
    pub(super) claims: Vec<Claim>,
    pub(super) sets: Vec<ClaimSet>,
    /// The addresses that claims fix.
    pub(super) fixed: Vec<u128>,
}

/// Checks the claims of a pool. `reserved` is what nobody may have, each with its reason.
pub(super) fn check(
    pool: &PoolConfig,
    path: &str,
    reserved: &[(Interval, &'static str)],
) -> Result<Checked, ConfigError> {
    let mut work = Work { pool, path, reserved, holders: BTreeMap::new(), claims: Vec::new() };
    let mut sets = Vec::new();
    for (text, wish) in &pool.claims {
        match text.split_once('/').and_then(|(namespace, rest)| Some((namespace, rest.split_once("-*")?))) {
            Some((namespace, (name, rest))) => sets.push(work.set(text, &format!("{namespace}/{name}{rest}"), wish)?),
            None => work.single(text, wish)?,
        }
    }
    let Work { holders, claims, .. } = work;
    for (i, claim) in claims.iter().enumerate() {
        let twin = claims[..i]
            .iter()
            .find(|c| c.key == claim.key || (matches!(c.mac, Some(MacWish::Fixed(_))) && c.mac == claim.mac));
        if let Some(twin) = twin {
            let field = format!("{path}.claims[{:?}]", claim.key.to_string());
            let same_key = twin.key == claim.key;
            let by =
                if same_key { "another claim or set of the pool".to_owned() } else { format!("claim {}", twin.key) };
            let value =
                if same_key { claim.key.to_string() } else { claim.mac.map_or(String::new(), |m| m.to_string()) };
            return Err(ConfigError { field, value, fault: ConfigFault::Duplicate { by } });
        }
    }
    Ok(Checked { claims, sets, fixed: holders.into_keys().collect() })
}

struct Work<'a> {
    pool: &'a PoolConfig,
    path: &'a str,
    reserved: &'a [(Interval, &'static str)],
    /// Fixed addresses with the claim or set that has them.
    holders: BTreeMap<u128, &'a str>,
    claims: Vec<Claim>,
}

impl<'a> Work<'a> {
    fn error(&self, field: &str, value: &dyn fmt::Display, fault: ConfigFault) -> ConfigError {
        ConfigError { field: format!("{}.{field}", self.path), value: value.to_string(), fault }
    }

    fn malformed(&self, field: &str, value: &dyn fmt::Display, reason: &str) -> ConfigError {
        self.error(field, value, ConfigFault::Malformed(reason.to_owned()))
    }

    fn key(&self, field: &str, text: &str, written: &str) -> Result<ClaimKey, ConfigError> {
        let key: ClaimKey =
            written.parse().map_err(|e: dcenet_core::model::ParseError| self.malformed(field, &text, e.reason))?;
        if key.place.is_some() {
            let remedy = "places of a set are made by the set; write namespace/name-* with members and addresses";
            return Err(self.malformed(field, &text, remedy));
        }
        Ok(key)
    }

    fn single(&mut self, text: &'a str, wish: &ClaimConfig) -> Result<(), ConfigError> {
        let field = format!("claims[{text:?}]");
        let key = self.key(&field, text, text)?;
        if wish.members.is_some() || !wish.addresses.is_empty() {
            let (name, value) = match &wish.addresses.first() {
                Some(range) => ("addresses", range.to_string()),
                None => ("members", "members".to_owned()),
            };
            let remedy =
                "only sets have it; write namespace/name-* for the pods of one owner, or address for one claim";
            return Err(self.malformed(&format!("{field}.{name}"), &value, remedy));
        }
        if let Some(address) = wish.address {
            self.hold(&format!("{field}.address"), text, address)?;
        }
        self.claims.push(Claim { key, address: wish.address.map(Addr::from), keep: wish.keep, mac: wish.mac });
        Ok(())
    }

    fn set(&mut self, text: &'a str, owner: &str, wish: &ClaimConfig) -> Result<ClaimSet, ConfigError> {
        let field = format!("claims[{text:?}]");
        let owner = self.key(&field, text, owner)?;
        let Some(members) = wish.members else {
            let remedy = "a set must say how its members are recognised; add members with ordinal or replica";
            return Err(self.malformed(&field, &text, remedy));
        };
        if let Some(address) = &wish.address {
            return Err(self.malformed(&format!("{field}.address"), address, "a set has several; write addresses"));
        }
        if let Some(MacWish::Fixed(mac)) = &wish.mac {
            let remedy = "members cannot share one MAC address; write from-address";
            return Err(self.malformed(&format!("{field}.mac"), mac, remedy));
        }
        if members == Members::Replica && wish.addresses.is_empty() {
            let remedy = "replicas share the addresses of their set; write addresses";
            return Err(self.malformed(&field, &text, remedy));
        }
        let size = (!wish.addresses.is_empty()).then(|| self.size(&field, &wish.addresses)).transpose()?;
        let set = ClaimSet { owner, members, size, keep: wish.keep, mac: wish.mac };
        let mut place = 0;
        for (i, range) in wish.addresses.iter().enumerate() {
            for number in raw(range.first)..=raw(range.last) {
                let address = Addr { family: Family::of(&self.pool.subnet), bits: number };
                self.hold(&format!("{field}.addresses[{i}]"), text, address.ip())?;
                let key = match members {
                    Members::Ordinal => set.ordinal(place).map_err(|e| self.malformed(&field, &text, e.reason))?,
                    Members::Replica => ClaimKey { place: Some(place), ..set.owner.clone() },
                };
                self.claims.push(Claim { key, address: Some(address), keep: wish.keep, mac: wish.mac });
                place += 1;
            }
        }
        Ok(set)
    }

    /// How many addresses there are, checked before anything loops over them.
    fn size(&self, field: &str, ranges: &[AddressRange]) -> Result<u32, ConfigError> {
        let mut size: u128 = 0;
        for (i, range) in ranges.iter().enumerate() {
            let field = format!("{field}.addresses[{i}]");
            let subnet = self.pool.subnet;
            if !subnet.contains(&range.first) || !subnet.contains(&range.last) {
                return Err(self.error(&field, range, ConfigFault::OutsideSubnet { subnet }));
            }
            if raw(range.first) > raw(range.last) {
                return Err(self.error(&field, range, ConfigFault::Reversed));
            }
            size = size.saturating_add((raw(range.last) - raw(range.first)).saturating_add(1));
            if size > LIMIT {
                let remedy = format!("a set has at most {LIMIT} addresses; give the workload a pool of its own");
                return Err(self.malformed(&field, range, &remedy));
            }
        }
        Ok(size as u32)
    }

    /// Enters an address that a claim fixes.
    fn hold(&mut self, field: &str, holder: &'a str, address: IpAddr) -> Result<(), ConfigError> {
        let subnet = self.pool.subnet;
        if !subnet.contains(&address) {
            return Err(self.error(field, &address, ConfigFault::OutsideSubnet { subnet }));
        }
        let number = raw(address);
        if let Some((_, what)) = self.reserved.iter().find(|((low, high), _)| (*low..=*high).contains(&number)) {
            return Err(self.error(field, &address, ConfigFault::Reserved { what, subnet }));
        }
        match self.holders.insert(number, holder) {
            Some(other) => Err(self.error(field, &address, ConfigFault::Duplicate { by: format!("claim {other}") })),
            None => Ok(()),
        }
    }
}
