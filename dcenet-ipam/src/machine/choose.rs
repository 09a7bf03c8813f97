//! Which pools may give a lease its addresses, and in which order.

use dcenet_core::provider::{LeaseError, LeaseRequest};

use super::Work;
use super::lease::Entitlement;
use crate::model::{Addr, BlockOwner, Family, Pool};
use crate::select::{Subject, glob, is_pattern};

/// One address that a lease is to have.
pub(super) struct Want<'a> {
    /// The pools that may give it, in the order in which they are tried. They are in no other want of the lease.
    pub(super) pools: Vec<&'a Pool>,
    /// The claim that gives it.
    pub(super) claim: Option<Entitlement<'a>>,
    /// The one that the caller insists on.
    pub(super) asked: Option<Addr>,
}

impl Work<'_> {
    /// The addresses that the request is to get, all or none.
    pub(super) fn wants<'a>(
        &'a self,
        request: &LeaseRequest,
        claims: Vec<Entitlement<'a>>,
    ) -> Result<Vec<Want<'a>>, LeaseError> {
        let subject = self.subject(request);
        let mut wants = match request.pools.is_empty() {
            true => self.wants_of_groups(&subject, claims)?,
            false => self.wants_by_name(&subject, &request.pools, claims)?,
        };
        for address in request.addresses.iter().copied().map(Addr::from) {
            self.assign(&subject, &mut wants, address)?;
        }
        let blocks = wants.iter().filter(|w| w.claim.is_none() && w.asked.is_none()).flat_map(|w| &w.pools);
        let of_nodes = blocks.into_iter().find(|p| p.block.is_some_and(|blocks| blocks.owner == BlockOwner::Node));
        if let Some(pool) = of_nodes.filter(|_| self.layout.node.is_none()) {
            let reason = format!(
                "pool {} gives each node blocks of its own, and the node is not known; name it, as {{ \"name\": \"n1\" }}",
                pool.name
            );
            return Err(LeaseError::Invalid { field: "ipam.node".to_owned(), reason });
        }
        Ok(wants)
    }

    fn subject<'a>(&'a self, request: &'a LeaseRequest) -> Subject<'a> {
        Subject {
            workload: request.workload.as_ref(),
            labels: &request.labels,
            network: &request.attachment.network,
            node: self.layout.node.as_ref(),
        }
    }

    fn wants_of_groups<'a>(
        &'a self,
        subject: &Subject<'_>,
        mut claims: Vec<Entitlement<'a>>,
    ) -> Result<Vec<Want<'a>>, LeaseError> {
        let mut wants = Vec::with_capacity(2);
        for family in self.layout.families() {
            let mut groups: Vec<Option<&str>> = Vec::with_capacity(1);
            for pool in self.layout.pools.iter().filter(|p| p.family() == family) {
                if !groups.contains(&pool.group.as_deref()) {
                    groups.push(pool.group.as_deref());
                }
            }
            for group in groups {
                let member = |p: &&Pool| p.family() == family && p.group.as_deref() == group;
                let mut pools: Vec<&Pool> = self.layout.pools.iter().filter(member).collect();
                let claim = claims.iter().position(|c| member(&c.pool)).map(|i| claims.swap_remove(i));
                let all = pools.clone();
                pools.retain(|p| p.mismatch(subject).is_none());
                pools.sort_by_key(|p| p.priority);
                if !pools.is_empty() || claim.is_some() {
                    wants.push(Want { pools, claim, asked: None });
                } else if group.is_none() {
                    return Err(unserved("ipam.pools", &format!("{family} pool"), subject, &all));
                }
            }
        }
        if wants.is_empty() {
            let all: Vec<&Pool> = self.layout.pools.iter().collect();
            return Err(unserved("ipam.pools", "pool", subject, &all));
        }
        Ok(wants)
    }

    fn wants_by_name<'a>(
        &'a self,
        subject: &Subject<'_>,
        names: &[String],
        mut claims: Vec<Entitlement<'a>>,
    ) -> Result<Vec<Want<'a>>, LeaseError> {
        let mut wants: Vec<Want<'a>> = Vec::with_capacity(names.len());
        let mut named: Vec<&str> = Vec::new();
        for (i, name) in names.iter().enumerate() {
            let field = format!("pools[{i}]");
            let matches = |p: &&Pool| if is_pattern(name) { glob(name, &p.name) } else { p.name == *name };
            let all: Vec<&Pool> = self.layout.pools.iter().filter(matches).collect();
            if all.is_empty() {
                let known: Vec<&str> = self.layout.pools.iter().map(|p| p.name.as_str()).collect();
                let reason = format!("{name:?} names no pool of this configuration; there are {}", known.join(", "));
                return Err(LeaseError::Invalid { field, reason });
            }
            if let Some(twice) = all.iter().find(|p| named.contains(&p.name.as_str())) {
                let reason = format!("{name:?} names pool {}, which an entry before it names; drop one", twice.name);
                return Err(LeaseError::Invalid { field, reason });
            }
            named.extend(all.iter().map(|p| p.name.as_str()));
            let before = wants.len();
            for family in [Family::V4, Family::V6] {
                let mut pools: Vec<&Pool> = all.iter().copied().filter(|p| p.family() == family).collect();
                let claim = claims.iter().position(|c| pools.iter().any(|p| p.name == c.pool.name));
                let claim = claim.map(|i| claims.swap_remove(i));
                pools.retain(|p| p.mismatch(subject).is_none());
                pools.sort_by_key(|p| p.priority);
                if !pools.is_empty() || claim.is_some() {
                    wants.push(Want { pools, claim, asked: None });
                }
            }
            if wants.len() == before {
                return Err(unserved(&field, &format!("pool {name:?}"), subject, &all));
            }
        }
        Ok(wants)
    }

    /// Finds the want that the address fulfils.
    fn assign(&self, subject: &Subject<'_>, wants: &mut [Want<'_>], address: Addr) -> Result<(), LeaseError> {
        let ip = address.ip();
        let invalid =
            |reason: String| LeaseError::Invalid { field: "addresses".to_owned(), reason: format!("{ip}: {reason}") };
        let fits = |want: &Want<'_>| {
            want.pools.iter().copied().chain(want.claim.iter().map(|c| c.pool)).any(|p| p.subnet.contains(&ip))
        };
        // A claim is told apart from the address only when it is settled, which names both.
        let claimed = |want: &Want<'_>| want.claim.as_ref().is_some_and(|c| c.pool.family() == address.family);
        let position =
            wants.iter().position(fits).or_else(|| wants.iter().position(claimed)).filter(|_| self.knows(address));
        match position.map(|i| &mut wants[i]) {
            Some(want) if want.asked.is_none() => {
                want.asked = Some(address);
                Ok(())
            }
            Some(_) => Err(invalid("a second address of its family and group; ask for one each".to_owned())),
            None => match self.layout.pools.iter().find(|p| p.subnet.contains(&ip)) {
                None => Err(invalid("in no pool of this configuration; take one from a pool's subnet".to_owned())),
                Some(pool) => Err(invalid(match pool.mismatch(subject) {
                    Some(mismatch) => format!("pool {} does not serve {subject}: {mismatch}", pool.name),
                    None => format!("pool {} is not among those that the request names; name it too", pool.name),
                })),
            },
        }
    }

    fn knows(&self, address: Addr) -> bool {
        self.layout.pools.iter().any(|p| p.subnet.contains(&address.ip()))
    }
}

fn unserved(field: &str, what: &str, subject: &Subject<'_>, pools: &[&Pool]) -> LeaseError {
    let why: Vec<String> =
        pools.iter().filter_map(|p| Some(format!("pool {}: {}", p.name, p.mismatch(subject)?))).collect();
    let reason = format!("no {what} serves {subject} ({}); widen a select, or add a pool without one", why.join("; "));
    LeaseError::Invalid { field: field.to_owned(), reason }
}
