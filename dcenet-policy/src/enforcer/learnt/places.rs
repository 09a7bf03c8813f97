//! Who gives way to whom where many addresses are known.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use super::known::{Client, Learnt};
use super::{MOST_LEARNT, SHARE, until};
use crate::model::{DomainName, Time};

/// A name, and an address of it.
type Pair = (DomainName, IpAddr);

/// There is no place.
#[derive(Debug)]
pub(super) struct Full {
    pub(super) limit: usize,
    pub(super) room: usize,
}

impl Learnt {
    /// What gives way to so many new ones of a client's beside those that leave anyway: once half of all places are taken, a
    /// client beyond its share makes room itself; where all are, those do that have most. Nothing is taken before its least time
    /// is over.
    pub(super) fn make_room(
        &self,
        client: Client,
        found: usize,
        leaving: &BTreeSet<Pair>,
        stays: impl Fn(&DomainName, IpAddr) -> bool,
        now: Time,
    ) -> Result<Vec<Pair>, Full> {
        let mut taken = self.names.len() - leaving.len() + found;
        if found == 0 || taken <= MOST_LEARNT / 2 {
            return Ok(Vec::new());
        }
        // None: learnt by an owner before.
        let mut held: BTreeMap<Option<Client>, usize> = BTreeMap::new();
        let mut may_go: BTreeMap<Option<Client>, VecDeque<Pair>> = BTreeMap::new();
        for (_, name, address) in self.names.by_end() {
            let pair = (name.clone(), *address);
            if leaving.contains(&pair) {
                continue;
            }
            let told = self.told.get(&pair);
            let of = told.map(|told| told.client);
            *held.entry(of).or_default() += 1;
            let is_due = told.is_none_or(|told| until(told.at, std::time::Duration::ZERO) <= now);
            if is_due && !stays(name, *address) {
                may_go.entry(of).or_default().push_back(pair);
            }
        }
        let mut give = |of: Option<Client>| may_go.get_mut(&of).and_then(VecDeque::pop_front);
        let mut giving = Vec::new();
        let mut own = held.remove(&Some(client)).unwrap_or(0);
        for _ in 0..(own + found).saturating_sub(SHARE).min(found) {
            let room = SHARE.saturating_sub(own);
            giving.push(give(Some(client)).ok_or(Full { limit: SHARE, room })?);
            own -= 1;
            taken -= 1;
        }
        while taken > MOST_LEARNT {
            let most = held.iter().filter(|(_, count)| **count > own + found).max_by_key(|(_, count)| **count);
            let Some(of) = most.map(|(of, _)| *of) else {
                let room = MOST_LEARNT.saturating_sub(taken - found);
                giving.push(give(Some(client)).ok_or(Full { limit: MOST_LEARNT, room })?);
                own -= 1;
                taken -= 1;
                continue;
            };
            match give(of) {
                Some(pair) => {
                    giving.push(pair);
                    held.entry(of).and_modify(|count| *count -= 1);
                    taken -= 1;
                }
                None => drop(held.remove(&of)),
            }
        }
        Ok(giving)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::enforcer::learnt::{GRACE, LEAST_TTL, LearnError, MOST_ADDRESSES, MOST_TTL};

    /// Answers of 256 addresses each, for this client's own names.
    fn fill(learnt: &mut Learnt, client: u8, names: usize, now: Time) -> Result<(), LearnError> {
        for n in 0..names {
            let name: DomainName = format!("n{n}.c{client}.example.com").parse().unwrap();
            let many: Vec<_> =
                (0..MOST_ADDRESSES).map(|at| (IpAddr::from([10, n as u8, client, at as u8]), MOST_TTL)).collect();
            learnt.learn(of(client), &name, &many, now)?;
        }
        Ok(())
    }

    fn of(client: u8) -> Client {
        Client::other([192, 0, 2, client].into())
    }

    fn count(learnt: &Learnt, client: u8) -> usize {
        learnt.told.values().filter(|told| told.client == of(client)).count()
    }

    #[test]
    fn one_client_takes_no_more_than_its_share_once_half_is_taken() {
        let mut learnt = Learnt::default();
        let error = fill(&mut learnt, 1, 16, 0).unwrap_err().to_string();
        assert_eq!(learnt.names().len(), MOST_LEARNT / 2);
        assert_eq!(
            error,
            "n8.c1.example.com has 256 addresses more, and 0 of 512 are left; use fewer names in policies"
        );
        // Others have room, and it has some anew where its own are past their least time.
        fill(&mut learnt, 2, 2, 0).unwrap();
        fill(&mut learnt, 2, 3, 0).unwrap_err();
        let later = (LEAST_TTL + GRACE).as_secs().cast_signed();
        let name: DomainName = "another.example.com".parse().unwrap();
        assert!(learnt.learn(of(1), &name, &[([10, 9, 9, 9].into(), MOST_TTL)], later - 1).is_err());
        learnt.learn(of(1), &name, &[([10, 9, 9, 9].into(), MOST_TTL)], later).unwrap();
        assert_eq!((count(&learnt, 1), count(&learnt, 2)), (MOST_LEARNT / 2, 512));
    }

    #[test]
    fn where_all_places_are_taken_those_who_have_most_make_room() {
        let mut learnt = Learnt::default();
        fill(&mut learnt, 1, 8, 0).unwrap();
        for client in 2..6 {
            fill(&mut learnt, client, 2, 0).unwrap();
        }
        assert_eq!(learnt.names().len(), MOST_LEARNT);
        let later = (LEAST_TTL + GRACE).as_secs().cast_signed();
        let error = fill(&mut learnt, 9, 1, later - 1).unwrap_err().to_string();
        assert!(error.contains("256 addresses more, and 0 of 4096 are left"), "{error}");
        fill(&mut learnt, 9, 1, later).unwrap();
        assert_eq!(learnt.names().len(), MOST_LEARNT);
        assert_eq!([1, 2, 5, 9].map(|client| count(&learnt, client)), [MOST_LEARNT / 2 - 256, 512, 512, 256]);
        // What is known takes no place, and what an owner before has left gives way like another client's.
        fill(&mut learnt, 9, 1, later).unwrap();
        assert_eq!(count(&learnt, 9), 256);
        let mut resumed = Learnt::new(learnt.names().clone(), Default::default());
        fill(&mut resumed, 7, 2, 0).unwrap();
        assert_eq!((resumed.names().len(), count(&resumed, 7)), (MOST_LEARNT, 512));
        assert!(
            resumed
                .learn(of(8), &"a.example.com".parse().unwrap(), &[([10, 9, 9, 9].into(), Duration::ZERO)], 0)
                .is_ok()
        );
    }
}
