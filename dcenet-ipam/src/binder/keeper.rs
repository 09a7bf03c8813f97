//! What both sources do alike with their records.

use std::future::Future;
use std::pin::Pin;

use async_trait::async_trait;
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::LeaseError;

use super::ledger::{Entry, Ledger, overtaken};
use super::{AddressBinder, BindError, RecordFailure, Recovered, Renewals, concurrent};

/// A source as its records are seen.
#[async_trait]
pub(super) trait Keeper: Send + Sync {
    type Binder: AddressBinder + ?Sized;

    fn ledger(&self) -> &Ledger;

    fn binder(&self) -> &Self::Binder;

    /// Whether the attachment still has the lease that a record is of.
    async fn is_leased(&self, attachment: &AttachmentKey, entry: &Entry) -> Result<bool, LeaseError>;

    /// Lets go outside, then inside. `false` if somebody else was faster.
    async fn undo(&self, attachment: &AttachmentKey, entry: Entry) -> Result<bool, LeaseError>;

    /// Finishes what a crash left of one record.
    async fn settle(&self, attachment: &AttachmentKey, entry: Entry, done: &mut Recovered) -> Result<(), LeaseError>;
}

/// Releases the lease with the sequence. `false` if no record is of it.
pub(super) async fn release(
    keeper: &impl Keeper,
    attachment: &AttachmentKey,
    sequence: u64,
) -> Result<bool, LeaseError> {
    for _ in 0..TRIES {
        match keeper.ledger().read(attachment).await? {
            Some(entry) if entry.sequence() == sequence => {
                if keeper.undo(attachment, entry).await? {
                    return Ok(true);
                }
            }
            _ => return Ok(false),
        }
    }
    Err(overtaken(attachment))
}

/// See [`BinderSource::recover`](super::BinderSource::recover).
pub(super) async fn recover(keeper: &impl Keeper) -> Result<Recovered, LeaseError> {
    let all = keeper.ledger().all(None).await?;
    let mut failure = first_unreadable(all.unreadable);
    let mut done = Recovered::default();
    for (attachment, entry) in all.pages {
        if let Err(error) = keeper.settle(&attachment, entry, &mut done).await {
            failure.get_or_insert(error);
        }
    }
    // Listed first and looked for afterwards: an intent comes before its bind.
    for token in keeper.binder().list().await?.unwrap_or_default() {
        let released = match keeper.ledger().read(&token.attachment).await {
            Ok(Some(entry)) if entry.sequence() == token.sequence => continue,
            Ok(_) => keeper.binder().release(&token, None).await.map_err(LeaseError::from),
            // It may name the token.
            Err(error) => Err(error),
        };
        match released {
            Ok(()) => done.remnants += 1,
            Err(error) => drop(failure.get_or_insert(error)),
        }
    }
    failure.map_or(Ok(done), Err)
}

/// The first failure, where some records cannot be read.
pub(super) fn first_unreadable(unreadable: Vec<RecordFailure>) -> Option<LeaseError> {
    unreadable.into_iter().next().map(|failure| LeaseError::Damaged(Box::new(failure)))
}

/// See [`BinderSource::renew_due`](super::BinderSource::renew_due).
pub(super) async fn renew_due(keeper: &impl Keeper, now: u64) -> Result<Renewals, LeaseError> {
    let mut all = keeper.ledger().all(None).await?;
    let mut done = Renewals { failures: std::mem::take(&mut all.unreadable), ..Renewals::default() };
    let (due, next) = all.due(now);
    done.next = next;
    let one = |(attachment, entry): (AttachmentKey, Entry)| -> Pin<Box<dyn Future<Output = Renewals> + Send + '_>> {
        Box::pin(async move {
            let mut one = Renewals::default();
            if let Err(error) = renew(keeper, &attachment, entry, now, &mut one).await {
                one.failures.push(RecordFailure { key: Ledger::name_of(&attachment), error });
            }
            one
        })
    };
    for one in concurrent::each(due.into_iter().map(one), WIDTH).await {
        done.renewed += one.renewed;
        done.released += one.released;
        done.doomed.extend(one.doomed);
        done.failures.extend(one.failures);
        done.next = done.next.into_iter().chain(one.next).min();
    }
    done.doomed.sort();
    Ok(done)
}

async fn renew(
    keeper: &impl Keeper,
    attachment: &AttachmentKey,
    entry: Entry,
    now: u64,
    done: &mut Renewals,
) -> Result<(), LeaseError> {
    let Some(bound) = &entry.page.bound else { return Ok(()) };
    if !keeper.is_leased(attachment, &entry).await? {
        // Released past the source: its time outside is not to be made longer.
        done.released += usize::from(keeper.undo(attachment, entry).await?);
        return Ok(());
    }
    match keeper.binder().renew(bound).await {
        Ok(bound) => {
            let next = bound.renew;
            if keeper.ledger().renewed(attachment, &entry, bound).await? {
                done.renewed += 1;
                done.next = next;
            }
        }
        Err(BindError::Lost { .. }) => done.doomed.push((attachment.clone(), now)),
        Err(error) => {
            done.doomed.extend(bound.until.map(|until| (attachment.clone(), until)));
            return Err(error.into());
        }
    }
    Ok(())
}

/// Times that a call begins anew because others work on the same attachment.
pub(super) const TRIES: u32 = 8;
/// Renewals under way at once.
const WIDTH: usize = 16;
