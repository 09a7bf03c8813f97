//! Bugs, for the judge to find.

use dcenet_ipam::store::{Batch, Guard, Outcome, Store, StoreError, Write};
use parking_lot::Mutex;

use super::network::{Server, put};
use super::scheduler::Clock;

/// A lock with a term, as leader elections have it.
#[derive(Debug, Default)]
pub(super) struct Lock {
    holder: Option<(usize, u64)>,
}

const TERM: u64 = 1_500;

/// Takes or renews the lock. Who holds it believes so from then on.
pub(super) fn lock(server: &Server, node: usize) -> Result<(), StoreError> {
    if !*server.faulty.lock() {
        return Ok(());
    }
    let now = server.clock.now();
    let mut lock = server.lock.lock();
    match lock.holder {
        Some((holder, until)) if holder != node && until > now => {
            Err(StoreError::Unavailable(format!("node {holder} has the lock")))
        }
        _ => {
            lock.holder = Some((node, now + TERM));
            Ok(())
        }
    }
}

/// Writes a batch in two parts, with time between them for the writer to die.
pub(super) async fn commit_in_halves(server: &Server, batch: &Batch) -> Result<Outcome, StoreError> {
    let half = batch.writes.len() / 2;
    let first = Batch { writes: batch.writes[..half].to_vec(), ..batch.clone() };
    if half == 0 {
        return server.store().commit(batch).await;
    }
    match server.store().commit(&first).await? {
        Outcome::Committed { .. } => {
            server.clock.sleep(5).await;
            let rest = Batch {
                guards: Vec::new(),
                writes: batch.writes[half..].to_vec(),
                request_id: batch.request_id.wrapping_add(1),
            };
            server.store().commit(&rest).await
        }
        outcome => Ok(outcome),
    }
}

/// Every writer also changes one object, whose version it saw when it began to read: as if a pool were one record.
pub(super) async fn commit_with_hot_object(
    store: &dyn Store,
    batch: &Batch,
    seen: &Mutex<Option<u64>>,
) -> Result<Outcome, StoreError> {
    if batch.writes.is_empty() {
        return store.commit(batch).await;
    }
    let mut hot = batch.clone();
    hot.guards.push(Guard { key: HOT.to_vec(), version: *seen.lock() });
    hot.writes.push(Write::Put(HOT.to_vec(), b"all of the pool".to_vec()));
    Ok(match store.commit(&hot).await? {
        Outcome::Conflict(mut current) => {
            *seen.lock() = current.pop().flatten().map(|entry| entry.version);
            Outcome::Conflict(current)
        }
        outcome => outcome,
    })
}

/// What a reader sees of the one object.
pub(super) async fn see_hot_object(store: &dyn Store, seen: &Mutex<Option<u64>>) -> Result<(), StoreError> {
    *seen.lock() = store.read(&[HOT.to_vec()]).await?.remove(0).map(|entry| entry.version);
    Ok(())
}

const HOT: &[u8] = b"z/hot";

/// Loses half of the records of addresses, as a rebuild from a list does that was not complete.
pub(super) fn forget_some(store: &dyn Store, clock: &Clock) {
    let slots = pollster::block_on(store.scan(b"s/", None, usize::MAX)).unwrap();
    let lost = slots.into_iter().filter(|_| clock.dice(5_000)).map(|(key, _)| Write::Delete(key)).collect();
    put(store, lost, u128::from(clock.bits()));
}
