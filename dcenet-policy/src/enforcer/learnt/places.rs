//! Who gives way to whom where many addresses are known.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

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

/// Who makes room: what is forgotten, and what is some client's no more and stays for others.
#[derive(Debug, Default)]
pub(super) struct Room {
    pub(super) forgotten: Vec<Pair>,
    pub(super) left: Vec<(Pair, Client)>,
}

/// Who has which places. None: learnt by an owner before.
#[derive(Default)]
struct Places {
    held: BTreeMap<Option<Client>, usize>,
    /// By whose they are, what ends first before the rest.
    due: BTreeMap<Option<Client>, VecDeque<Pair>>,
    not_due: BTreeMap<Option<Client>, VecDeque<Pair>>,
    /// How many have a pair still, where several had.
    shared: BTreeMap<Pair, usize>,
}

impl Places {
    /// Has a client give a pair up; returns whether its place is free. None where it has none to give.
    fn give(&mut self, of: Option<Client>, also_early: bool, room: &mut Room) -> Option<bool> {
        let first = |pairs: &mut BTreeMap<_, VecDeque<Pair>>| pairs.get_mut(&of).and_then(VecDeque::pop_front);
        let early = |places: &mut Self| also_early.then(|| first(&mut places.not_due)).flatten();
        let pair = first(&mut self.due).or_else(|| early(self))?;
        self.held.entry(of).and_modify(|held| *held -= 1);
        let others = self.shared.get_mut(&pair).map_or(0, |holders| {
            *holders -= 1;
            *holders
        });
        match of.filter(|_| others > 0) {
            Some(client) => room.left.push((pair, client)),
            None => room.forgotten.push(pair),
        }
        Some(others == 0)
    }
}

impl Learnt {
    /// What gives way to so many new ones of a client's beside those that leave anyway: once half of all places are taken, a
    /// client beyond its share gives up as many itself; where all are, those do that have most. Nothing is given up before its least
    /// time is over, but where all places are taken, what is beyond somebody's share. What others have, too, stays theirs.
    pub(super) fn make_room(
        &self,
        client: Client,
        found: usize,
        leaving: &BTreeSet<Pair>,
        stays: impl Fn(&DomainName, IpAddr) -> bool,
        now: Time,
    ) -> Result<Room, Full> {
        let (mut room, mut taken) = (Room::default(), self.names.len() - leaving.len() + found);
        if found == 0 || taken <= MOST_LEARNT / 2 {
            return Ok(room);
        }
        let mut places = self.places(leaving, stays, now);
        let held = |places: &Places, of: Option<Client>| places.held.get(&of).copied().unwrap_or(0);
        let own = held(&places, Some(client));
        for _ in 0..(own + found).saturating_sub(SHARE).min(found) {
            let full = Full { limit: SHARE, room: SHARE.saturating_sub(held(&places, Some(client))) };
            taken -= usize::from(places.give(Some(client), false, &mut room).ok_or(full)?);
        }
        let mut spent: BTreeSet<Option<Client>> = BTreeSet::new();
        while taken > MOST_LEARNT {
            let own = held(&places, Some(client)) + found;
            let others =
                places.held.iter().filter(|(of, count)| **of != Some(client) && !spent.contains(*of) && **count > own);
            let most = others.max_by_key(|(_, count)| **count).map(|(of, count)| (*of, *count));
            let given = match most {
                Some((of, count)) => places.give(of, count > SHARE, &mut room),
                None => {
                    let full = Full { limit: MOST_LEARNT, room: MOST_LEARNT.saturating_sub(taken - found) };
                    Some(places.give(Some(client), false, &mut room).ok_or(full)?)
                }
            };
            match (given, most) {
                (Some(is_free), _) => taken -= usize::from(is_free),
                (None, Some((of, _))) => drop(spent.insert(of)),
                (None, None) => {}
            }
        }
        Ok(room)
    }

    fn places(&self, leaving: &BTreeSet<Pair>, stays: impl Fn(&DomainName, IpAddr) -> bool, now: Time) -> Places {
        let mut places = Places::default();
        for (_, name, address) in self.names.by_end() {
            let pair = (name.clone(), *address);
            if leaving.contains(&pair) {
                continue;
            }
            let may_go = !stays(name, *address);
            let mut note = |of: Option<Client>, is_due: bool| {
                *places.held.entry(of).or_default() += 1;
                let pairs = if is_due { &mut places.due } else { &mut places.not_due };
                if may_go {
                    pairs.entry(of).or_default().push_back(pair.clone());
                }
            };
            let Some(told) = self.told.get(&pair) else {
                note(None, true);
                continue;
            };
            for (client, at) in told {
                note(Some(*client), until(*at, Duration::ZERO) <= now);
            }
            if told.len() > 1 {
                places.shared.insert(pair, told.len());
            }
        }
        places
    }
}

#[cfg(test)]
mod tests {
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
        learnt.told.values().filter(|told| told.contains_key(&of(client))).count()
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

    fn least() -> Time {
        (LEAST_TTL + GRACE).as_secs().cast_signed()
    }

    #[test]
    fn where_all_places_are_taken_those_who_have_most_make_room() {
        let mut learnt = Learnt::default();
        fill(&mut learnt, 1, 8, 0).unwrap();
        for client in 2..6 {
            fill(&mut learnt, client, 2, 0).unwrap();
        }
        assert_eq!(learnt.names().len(), MOST_LEARNT);
        // What is beyond a share goes at once, also of who has just asked again.
        fill(&mut learnt, 1, 8, least() - 1).unwrap();
        for client in 6..9 {
            fill(&mut learnt, client, 2, least() - 1).unwrap();
        }
        assert_eq!(learnt.names().len(), MOST_LEARNT);
        for client in 1..9 {
            assert_eq!(count(&learnt, client), SHARE, "{client}");
        }
        // What is not waits for its least time, which counts from when it was learnt.
        let error = fill(&mut learnt, 9, 1, least() - 1).unwrap_err().to_string();
        assert!(error.contains("256 addresses more, and 0 of 4096 are left"), "{error}");
        for client in 2..9 {
            fill(&mut learnt, client, 2, least() - 1).unwrap();
        }
        fill(&mut learnt, 9, 1, least()).unwrap();
        assert_eq!((learnt.names().len(), count(&learnt, 9)), (MOST_LEARNT, 256));
        // What is known takes no place, and what an owner before has left gives way like another client's.
        fill(&mut learnt, 9, 1, least()).unwrap();
        assert_eq!(count(&learnt, 9), 256);
        let mut resumed = Learnt::new(learnt.names().clone(), Default::default());
        fill(&mut resumed, 7, 2, 0).unwrap();
        assert_eq!(resumed.names().len(), MOST_LEARNT);
        assert!(
            resumed
                .learn(of(8), &"a.example.org".parse().unwrap(), &[([10, 9, 9, 9].into(), Duration::ZERO)], 0)
                .is_ok()
        );
    }

    /// Whoever asks first for a name that others ask for, too, takes it from nobody.
    #[test]
    fn what_several_have_is_given_up_by_the_last_of_them() {
        let mut learnt = Learnt::default();
        let name: DomainName = "db.example.com".parse().unwrap();
        let db = [([10, 9, 9, 9].into(), LEAST_TTL)];
        for client in [1, 2] {
            learnt.learn(of(client), &name, &db, 0).unwrap();
        }
        fill(&mut learnt, 1, 7, 0).unwrap();
        fill(&mut learnt, 3, 1, 0).unwrap();
        // It ends first of all that the first one has.
        let another: DomainName = "another.example.org".parse().unwrap();
        learnt.learn(of(1), &another, &[([10, 9, 9, 8].into(), MOST_TTL)], least() - 1).unwrap_err();
        learnt.learn(of(1), &another, &[([10, 9, 9, 8].into(), MOST_TTL)], least()).unwrap();
        assert!(learnt.names().addresses(&name).is_some());
        let clients: Vec<Client> = learnt.told[&(name.clone(), db[0].0)].keys().copied().collect();
        assert_eq!(clients, [of(2)]);
        // A clock that was set back has nobody keep a place for longer.
        learnt.expire(-1000);
        assert!(learnt.told.values().flat_map(|told| told.values()).all(|at| *at <= -1000));
    }
}
