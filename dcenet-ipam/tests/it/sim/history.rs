//! The judge: what callers were told, held against each other and against the store's content.
//!
//! It shares no code with the allocator: addresses are compared as addresses, records are read as plain JSON.

use std::collections::BTreeMap;
use std::net::IpAddr;

use dcenet_core::provider::Lease;
use dcenet_ipam::store::{Entry, Key};
use ipnet::IpNet;
use serde_json::Value;

use super::network::COOLDOWN;

/// One life of a container, from its first ADD to its end.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Life {
    /// The container's id, which a later life may bear again once this one was deleted.
    pub(super) container: String,
    pub(super) number: u64,
    pub(super) workload: Option<String>,
}

/// Where an address may lie, and what is nobody's there.
pub(super) struct Ground {
    pub(super) subnet: IpNet,
    pub(super) gateway: IpAddr,
}

pub(super) struct History {
    ground: Vec<Ground>,
    /// Who surely holds an address: told so, and nobody has begun to take it away.
    holders: BTreeMap<IpAddr, Life>,
    /// When the last sure hold of an address ended, and whose it was.
    ended: BTreeMap<IpAddr, (u64, Life)>,
    /// The addresses of claims that are kept for ever, by workload and family.
    kept: BTreeMap<(String, bool), IpAddr>,
    /// Workloads with a claim.
    claimants: Vec<String>,
    /// Whether clocks run true, so that times can be judged.
    timely: bool,
}

impl History {
    pub(super) fn new(ground: Vec<Ground>, claimants: &[&str], timely: bool) -> Self {
        Self {
            ground,
            holders: BTreeMap::new(),
            ended: BTreeMap::new(),
            kept: BTreeMap::new(),
            claimants: claimants.iter().map(|&c| c.to_owned()).collect(),
            timely,
        }
    }

    /// A caller was told that it has these addresses, at a time.
    pub(super) fn leased(&mut self, life: &Life, lease: &Lease, now: u64) -> Result<(), String> {
        if lease.addresses.len() != self.ground.len() {
            return Err(format!("{life:?} got {} addresses of {}", lease.addresses.len(), self.ground.len()));
        }
        for leased in &lease.addresses {
            let address = leased.address.addr();
            let inside = self.ground.iter().any(|g| g.subnet.contains(&address) && g.gateway != address);
            if !inside {
                return Err(format!("{address} of {life:?} is outside of what may be given"));
            }
            if let Some(other) = self.holders.get(&address)
                && other != life
            {
                return Err(format!("{address} has two holders: {other:?} and {life:?}"));
            }
            let claimant = life.workload.clone().filter(|w| self.claimants.contains(w));
            if let Some((_, owner)) =
                self.kept.iter().find(|(_, kept)| **kept == address).map(|((owner, _), a)| (a, owner))
                && claimant.as_ref() != Some(owner)
            {
                return Err(format!("{address} is kept for {owner}, and {life:?} got it"));
            }
            match &claimant {
                Some(claimant) => {
                    let kept = self.kept.entry((claimant.clone(), address.is_ipv4())).or_insert(address);
                    if *kept != address {
                        return Err(format!("{claimant} had {kept} and got {address}"));
                    }
                }
                None => {
                    if let Some((ended, last)) = self.ended.get(&address)
                        && self.timely
                        && last != life
                        && now.saturating_sub(*ended) < COOLDOWN.as_millis() as u64
                    {
                        return Err(format!("{address} was {last:?}'s {} ms ago, and is given again", now - ended));
                    }
                }
            }
            self.holders.insert(address, life.clone());
        }
        Ok(())
    }

    /// Somebody begins to take away what a life holds, or it has died.
    pub(super) fn ends(&mut self, life: &Life, now: u64) {
        let ended: Vec<IpAddr> = self.holders.iter().filter(|(_, l)| *l == life).map(|(a, _)| *a).collect();
        for address in ended {
            self.holders.remove(&address);
            self.ended.insert(address, (now, life.clone()));
        }
    }

    /// What every sure holder has, the store must show as its own.
    pub(super) fn compare(&self, content: &[(Key, Entry)]) -> Result<(), String> {
        let bound = bound(content)?;
        for (address, life) in &self.holders {
            let by = bound.get(address);
            if by.is_none_or(|by| !by.contains(&format!("/{}/", life.container))) {
                return Err(format!("{life:?} with {address} is alive, and the store says {by:?}"));
            }
        }
        Ok(())
    }

    /// At rest: nothing is bound but what sure holders have.
    pub(super) fn nothing_leaked(&self, content: &[(Key, Entry)]) -> Result<(), String> {
        self.compare(content)?;
        for (address, by) in bound(content)? {
            if !self.holders.contains_key(&address) {
                return Err(format!("{address} has leaked: bound by {by}, which is no more"));
            }
        }
        let attachments = content.iter().filter(|(key, _)| key.starts_with(b"t/")).count();
        let lives: std::collections::BTreeSet<_> = self.holders.values().collect();
        if attachments != lives.len() {
            return Err(format!("{attachments} attachments are recorded, {} live; leaked or lost", lives.len()));
        }
        Ok(())
    }
}

/// The addresses that slots say are bound, and by what.
fn bound(content: &[(Key, Entry)]) -> Result<BTreeMap<IpAddr, String>, String> {
    let mut bound = BTreeMap::new();
    for (key, entry) in content.iter().filter(|(key, _)| key.starts_with(b"s/")) {
        let number: [u8; 16] = key[key.len() - 16..].try_into().expect("16 bytes");
        let number = u128::from_be_bytes(number);
        let address = match key[key.len() - 17] {
            b'4' => IpAddr::from((number as u32).to_be_bytes()),
            _ => IpAddr::from(number.to_be_bytes()),
        };
        let record: Value = serde_json::from_slice(&entry.value).map_err(|e| e.to_string())?;
        if let Some(by) = record.pointer("/bound/by").and_then(Value::as_str) {
            bound.insert(address, by.to_owned());
        }
    }
    Ok(bound)
}
