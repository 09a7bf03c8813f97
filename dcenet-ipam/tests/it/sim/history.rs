//! The judge: what callers were told, held against each other and against the store's content.
//!
//! It shares no code with the allocator: addresses are compared as addresses, records are read as plain JSON.

use std::collections::BTreeMap;
use std::net::IpAddr;

use dcenet_core::provider::Lease;
use dcenet_ipam::store::{Entry, Key};
use ipnet::IpNet;
use serde_json::Value;

use super::network::{COOLDOWN, KEPT};

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
    /// Who surely holds an address: told so, and nobody has begun to take it away. Two only in a handover.
    holders: BTreeMap<IpAddr, Vec<Life>>,
    /// Who may hold what another holds.
    handovers: Vec<(Life, Life)>,
    /// Addresses that surely are in quarantine: since when, and at least until when.
    quarantined: BTreeMap<IpAddr, (u64, u64)>,
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
            handovers: Vec::new(),
            quarantined: BTreeMap::new(),
            ended: BTreeMap::new(),
            kept: BTreeMap::new(),
            claimants: claimants.iter().map(|&c| c.to_owned()).collect(),
            timely,
        }
    }

    /// Somebody begins to declare a handover.
    pub(super) fn declares(&mut self, from: &Life, to: &Life) {
        self.handovers.push((from.clone(), to.clone()));
    }

    /// One of the two has ended.
    pub(super) fn is_over(&mut self, from: &Life, to: &Life) {
        self.handovers.retain(|pair| *pair != (from.clone(), to.clone()));
    }

    /// Somebody begins to put an address into quarantine, which takes it from a claim that may have any.
    pub(super) fn may_be_lost(&mut self, address: IpAddr) {
        self.kept.retain(|_, kept| *kept != address);
    }

    /// It was told that an address is in quarantine until a time.
    pub(super) fn is_quarantined(&mut self, address: IpAddr, now: u64, until: u64) {
        self.quarantined.insert(address, (now, until));
    }

    /// Somebody begins to lift a quarantine.
    pub(super) fn is_lifted(&mut self, address: IpAddr) {
        self.quarantined.remove(&address);
    }

    /// A caller was told that it has these addresses, which it asked for at a time.
    pub(super) fn leased(&mut self, life: &Life, lease: &Lease, asked: u64, now: u64) -> Result<(), String> {
        if lease.addresses.len() != self.ground.len() {
            return Err(format!("{life:?} got {} addresses of {}", lease.addresses.len(), self.ground.len()));
        }
        for leased in &lease.addresses {
            let address = leased.address.addr();
            let inside = self.ground.iter().any(|g| g.subnet.contains(&address) && g.gateway != address);
            if !inside {
                return Err(format!("{address} of {life:?} is outside of what may be given"));
            }
            for other in self.holders.get(&address).into_iter().flatten().filter(|other| *other != life) {
                let declared = self.handovers.iter().any(|(from, to)| from == other && to == life);
                if !declared {
                    return Err(format!("{address} has two holders: {other:?} and {life:?}"));
                }
            }
            if let Some((since, until)) = self.quarantined.get(&address)
                && asked >= *since
                && now < *until
            {
                return Err(format!("{address} is in quarantine, and {life:?} got it"));
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
                    let for_a_time = |life: &Life| life.workload.as_deref() == Some(KEPT_FOR_A_TIME);
                    if let Some((ended, last)) = self.ended.get(&address)
                        && self.timely
                        && last != life
                        // Its claim may find what it had again at any time.
                        && !(for_a_time(last) && for_a_time(life))
                        && now.saturating_sub(*ended)
                            < if for_a_time(last) { KEPT } else { COOLDOWN }.as_millis() as u64
                    {
                        let ago = now - ended;
                        return Err(format!("{address} was {last:?}'s {ago} ms ago, and is given again: to {life:?}"));
                    }
                }
            }
            let holders = self.holders.entry(address).or_default();
            if !holders.contains(life) {
                holders.push(life.clone());
            }
        }
        Ok(())
    }

    /// Somebody begins to take away what a life holds, or it has died.
    pub(super) fn ends(&mut self, life: &Life, now: u64) {
        let ended: Vec<IpAddr> = self.holders.iter().filter(|(_, l)| l.contains(life)).map(|(a, _)| *a).collect();
        for address in ended {
            if let Some(holders) = self.holders.get_mut(&address) {
                holders.retain(|l| l != life);
            }
            self.ended.insert(address, (now, life.clone()));
        }
        self.holders.retain(|_, holders| !holders.is_empty());
    }

    /// What every sure holder has, the store must show as its own.
    pub(super) fn compare(&self, content: &[(Key, Entry)]) -> Result<(), String> {
        let bound = bound(content)?;
        for (address, life) in self.holders.iter().flat_map(|(a, lives)| lives.iter().map(move |l| (a, l))) {
            let by = bound.get(address);
            if by.is_none_or(|by| !by.iter().any(|by| life.is(by))) {
                return Err(format!("{life:?} with {address} is alive, and the store says {by:?}"));
            }
        }
        Ok(())
    }

    /// At rest: nothing is bound but what sure holders have.
    pub(super) fn nothing_leaked(&self, content: &[(Key, Entry)]) -> Result<(), String> {
        self.compare(content)?;
        for (address, by) in bound(content)?.into_iter().flat_map(|(a, by)| by.into_iter().map(move |by| (a, by))) {
            if !self.holders.get(&address).is_some_and(|lives| lives.iter().any(|life| life.is(&by))) {
                return Err(format!("{address} has leaked: bound by {by}, which is no more"));
            }
        }
        let attachments = content.iter().filter(|(key, _)| key.starts_with(b"t/")).count();
        let lives: std::collections::BTreeSet<_> = self.holders.values().flatten().collect();
        if attachments != lives.len() {
            return Err(format!("{attachments} attachments are recorded, {} live; leaked or lost", lives.len()));
        }
        Ok(())
    }
}

impl Life {
    /// Whether an attachment, as records write it, is this.
    fn is(&self, attachment: &str) -> bool {
        attachment.contains(&format!("/{}/", self.container))
    }
}

/// The workload of the claim that is kept for a time only.
pub(super) const KEPT_FOR_A_TIME: &str = "shop/temp";

/// The addresses that slots say are in use, and by what: by two once the second has joined a handover.
fn bound(content: &[(Key, Entry)]) -> Result<BTreeMap<IpAddr, Vec<String>>, String> {
    let mut bound = BTreeMap::new();
    for (key, entry) in content.iter().filter(|(key, _)| key.starts_with(b"s/")) {
        let number: [u8; 16] = key[key.len() - 16..].try_into().expect("16 bytes");
        let number = u128::from_be_bytes(number);
        let address = match key[key.len() - 17] {
            b'4' => IpAddr::from((number as u32).to_be_bytes()),
            _ => IpAddr::from(number.to_be_bytes()),
        };
        let record: Value = serde_json::from_slice(&entry.value).map_err(|e| e.to_string())?;
        let second = record["handover"]["to"].as_str().filter(|_| record["handover"]["joined"] == true);
        let by = [record["bound"]["by"].as_str(), record["handover"]["by"].as_str(), second];
        let by: Vec<String> = by.into_iter().flatten().map(str::to_owned).collect();
        if !by.is_empty() {
            bound.insert(address, by);
        }
    }
    Ok(bound)
}
