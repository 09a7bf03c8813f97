//! What was given up lately, so that whoever asks again is answered without another attempt.

use std::collections::BTreeMap;
use std::time::Duration;

use super::known::Client;
use crate::enforcer::EnforcerError;
use crate::model::{DomainName, Time};

/// For how long it is remembered.
const REMEMBERED: Duration = Duration::from_secs(5);

/// Of a client of whom so many names were given up within that time no other is tried.
const MOST: usize = 4;

/// Answers that were given up, by who asked.
#[derive(Debug, Default)]
pub(super) struct Refusals(BTreeMap<Client, BTreeMap<DomainName, Refusal>>);

#[derive(Debug)]
struct Refusal {
    at: Time,
    why: Why,
}

#[derive(Debug)]
enum Why {
    NoRoom(String),
    NotInForce(String),
}

impl Refusal {
    fn is_remembered(&self, now: Time) -> bool {
        let until = self.at.saturating_add(REMEMBERED.as_secs().cast_signed());
        (self.at..until).contains(&now)
    }

    fn error(&self) -> EnforcerError {
        match &self.why {
            Why::NoRoom(reason) => EnforcerError::NoRoomForNames { reason: reason.clone() },
            Why::NotInForce(reason) => EnforcerError::NamesNotInForce { reason: reason.clone() },
        }
    }
}

impl Refusals {
    /// Notes an answer that was given up, where the error is of a kind that another answer need not meet.
    pub(super) fn note(&mut self, client: Client, name: &DomainName, error: &EnforcerError, now: Time) {
        let why = match error {
            EnforcerError::NoRoomForNames { reason } => Why::NoRoom(reason.clone()),
            EnforcerError::NamesNotInForce { reason } => Why::NotInForce(reason.clone()),
            _ => return,
        };
        self.0.retain(|_, names| {
            names.retain(|_, refusal| refusal.is_remembered(now));
            !names.is_empty()
        });
        self.0.entry(client).or_default().insert(name.clone(), Refusal { at: now, why });
    }

    /// Why an answer for the client is not tried, if it is not.
    pub(super) fn of(&self, client: Client, name: &DomainName, now: Time) -> Option<EnforcerError> {
        let names = self.0.get(&client)?;
        let own = names.get(name).filter(|refusal| refusal.is_remembered(now));
        let any = || names.values().find(|refusal| refusal.is_remembered(now)).filter(|_| self.is_full(client, now));
        own.or_else(any).map(Refusal::error)
    }

    /// Why the name was given up, whoever asked.
    pub(super) fn of_anybody(&self, name: &DomainName, now: Time) -> Option<EnforcerError> {
        let refusals = self.0.values().filter_map(|names| names.get(name));
        refusals.into_iter().find(|refusal| refusal.is_remembered(now)).map(Refusal::error)
    }

    /// Whether nothing of the client is tried for now.
    pub(super) fn is_full(&self, client: Client, now: Time) -> bool {
        let names = self.0.get(&client).into_iter().flat_map(BTreeMap::values);
        names.filter(|refusal| refusal.is_remembered(now)).count() >= MOST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_up_is_remembered_for_some_seconds_and_much_of_it_for_all_names_of_who_asked() {
        let client = |n: u8| Client::other([192, 0, 2, n].into());
        let name = |n: usize| -> DomainName { format!("n{n}.example.com").parse().unwrap() };
        let (mut refused, over) = (Refusals::default(), REMEMBERED.as_secs().cast_signed());
        let no_room = EnforcerError::NoRoomForNames { reason: "full".to_owned() };
        refused.note(client(1), &name(0), &no_room, 100);
        let is_refused = |refused: &Refusals, n: u8, of: usize, now| refused.of(client(n), &name(of), now).is_some();
        for (now, expected) in [(99, false), (100, true), (99 + over, true), (100 + over, false)] {
            assert_eq!(is_refused(&refused, 1, 0, now), expected, "{now}");
        }
        assert!(!is_refused(&refused, 1, 1, 100) && !is_refused(&refused, 2, 0, 100));
        assert_eq!(refused.of_anybody(&name(0), 100).unwrap().to_string(), no_room.to_string());
        // What is no answer's doing is tried again.
        refused.note(client(2), &name(0), &EnforcerError::Lowering("broken".into()), 100);
        assert!(!is_refused(&refused, 2, 0, 100));
        for n in 1..MOST {
            assert!(!is_refused(&refused, 1, 9, 100));
            refused.note(client(1), &name(n), &no_room, 100);
        }
        assert!(is_refused(&refused, 1, 9, 100) && !is_refused(&refused, 2, 9, 100));
        assert!(!is_refused(&refused, 1, 9, 100 + over));
    }
}
