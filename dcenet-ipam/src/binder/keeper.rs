//! What both sources do alike with their records.

use std::future::Future;
use std::pin::Pin;

use async_trait::async_trait;
use dcenet_core::model::AttachmentKey;
use dcenet_core::provider::LeaseError;

use super::ledger::{Entry, Ledger, Owner, Page, Pages, Stage, overtaken};
use super::{AddressBinder, BindError, Bound, RecordFailure, Recovered, Renewals, concurrent};

/// A source as its records are seen.
#[async_trait]
pub(super) trait Keeper: Send + Sync {
    type Binder: AddressBinder + ?Sized;

    fn ledger(&self) -> &Ledger;

    fn binder(&self) -> &Self::Binder;

    /// Whether the attachment still has the lease that a record is of.
    async fn is_leased(&self, attachment: &AttachmentKey, entry: &Entry) -> Result<bool, LeaseError>;

    /// Whose a record is that names no source.
    async fn whose_unnamed(&self, attachment: &AttachmentKey, entry: &Entry) -> Result<Whose, LeaseError>;

    /// Lets go outside, then inside. `false` if somebody else was faster.
    async fn undo(&self, attachment: &AttachmentKey, entry: Entry) -> Result<bool, LeaseError>;

    /// Finishes what a crash left of one record.
    async fn settle(&self, attachment: &AttachmentKey, entry: Entry, done: &mut Recovered) -> Result<(), LeaseError>;
}

/// Whose a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// This source keeps it.
    Ours,
    /// Another source does, which has the lease as well.
    Others,
    /// It names no source, and its attachment has no lease by which to tell. Who works on the attachment takes it over;
    /// who works on all attachments leaves it alone.
    Nobodys,
}

pub(super) async fn whose(
    keeper: &impl Keeper,
    attachment: &AttachmentKey,
    entry: &Entry,
) -> Result<Whose, LeaseError> {
    match &entry.page.owner {
        Some(owner) if *owner == keeper.ledger().owner => Ok(Whose::Ours),
        Some(_) => Ok(Whose::Others),
        None => keeper.whose_unnamed(attachment, entry).await,
    }
}

/// The record of an attachment.
///
/// # Errors
/// [`LeaseError::Invalid`] for another source's.
pub(super) async fn read(keeper: &impl Keeper, attachment: &AttachmentKey) -> Result<Option<Entry>, LeaseError> {
    let Some(entry) = keeper.ledger().read(attachment).await? else { return Ok(None) };
    match whose(keeper, attachment, &entry).await? {
        Whose::Ours | Whose::Nobodys => Ok(Some(entry)),
        Whose::Others => Err(of_another(attachment, entry.page.owner.as_ref())),
    }
}

/// The answer where an attachment has a lease of another source.
pub(super) fn of_another(attachment: &AttachmentKey, owner: Option<&Owner>) -> LeaseError {
    let named = owner.map(|owner| format!(" ({owner})")).unwrap_or_default();
    let reason = format!("{attachment} has a lease of another source{named}; use one source for a network");
    LeaseError::Invalid { field: "attachment".to_owned(), reason }
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
                if whose(keeper, attachment, &entry).await? == Whose::Others {
                    return Err(of_another(attachment, entry.page.owner.as_ref()));
                }
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
    let mut all = keeper.ledger().all(None).await?;
    let mut done = Recovered::default();
    let ours = ours(keeper, &mut all).await;
    let mut failure = first_unreadable(all.unreadable);
    for (attachment, entry) in ours {
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

/// Takes out the records that are this source's for certain. Those of which nobody can tell are added to the unreadable.
async fn ours(keeper: &impl Keeper, all: &mut Pages) -> Vec<(AttachmentKey, Entry)> {
    let mut ours = Vec::new();
    for (attachment, entry) in std::mem::take(&mut all.pages) {
        match whose(keeper, &attachment, &entry).await {
            Ok(Whose::Ours) => ours.push((attachment, entry)),
            Ok(Whose::Others | Whose::Nobodys) => {}
            Err(error) => all.unreadable.push(RecordFailure { key: Ledger::name_of(&attachment), error }),
        }
    }
    ours
}

/// The first failure, where some records cannot be read.
pub(super) fn first_unreadable(unreadable: Vec<RecordFailure>) -> Option<LeaseError> {
    unreadable.into_iter().next().map(|failure| LeaseError::Damaged(Box::new(failure)))
}

/// See [`BinderSource::renew_due`](super::BinderSource::renew_due).
pub(super) async fn renew_due(keeper: &impl Keeper, now: u64) -> Result<Renewals, LeaseError> {
    let mut all = keeper.ledger().all(None).await?;
    all.pages = ours(keeper, &mut all).await;
    let mut done = Renewals { failures: std::mem::take(&mut all.unreadable), ..Renewals::default() };
    let (mut due, next) = all.due(now);
    done.next = next;
    let number = keeper.ledger().sort(&mut due);
    let rest = due.split_off(due.len().min(WIDTH));
    let one = |(attachment, entry): (AttachmentKey, Entry)| -> Pin<Box<dyn Future<Output = _> + Send + '_>> {
        Box::pin(async move {
            let mut one = Renewals::default();
            if let Err(error) = renew(keeper, &attachment, entry, now, &mut one).await {
                one.failures.push(RecordFailure { key: Ledger::name_of(&attachment), error });
            }
            (attachment, one)
        })
    };
    let mut progress = false;
    for (attachment, one) in concurrent::each(due.into_iter().map(one), WIDTH).await {
        let mut failed = keeper.ledger().failed.lock();
        if one.failures.is_empty() && one.doomed.is_empty() {
            failed.remove(&attachment);
            progress = true;
        } else {
            failed.insert(attachment, number);
        }
        done.renewed += one.renewed;
        done.released += one.released;
        done.doomed.extend(one.doomed);
        done.failures.extend(one.failures);
        done.next = done.next.into_iter().chain(one.next).min();
    }
    let failed = keeper.ledger().failed.lock();
    // While all fail, what has failed before comes again with the caller's next call and not at once.
    if rest.iter().any(|(attachment, _)| progress || !failed.contains_key(attachment)) {
        done.next = Some(now);
    }
    drop(failed);
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
        Ok(bound) => match keeper.ledger().renewed(attachment, &entry, bound.clone()).await? {
            Some(entry) => {
                done.renewed += 1;
                done.next = entry.due(attachment);
            }
            None => done.released += usize::from(let_go_again(keeper, attachment, &entry, &bound).await?),
        },
        Err(error) => {
            // Whoever has released it meanwhile needs no warning; an answer that was lost may have bound it again.
            match let_go_again(keeper, attachment, &entry, bound).await {
                Ok(true) => done.released += 1,
                other => {
                    let until = if matches!(error, BindError::Lost { .. }) { Some(now) } else { bound.until };
                    done.doomed.extend(until.map(|until| (attachment.clone(), until)));
                    if !matches!(error, BindError::Lost { .. }) {
                        return Err(error.into());
                    }
                    other?;
                }
            }
        }
    }
    Ok(())
}

/// Lets go of what a renewal has bound that came after a release, for who released let go too early. `false` if the
/// record still is of that lease.
async fn let_go_again(
    keeper: &impl Keeper,
    attachment: &AttachmentKey,
    entry: &Entry,
    bound: &Bound,
) -> Result<bool, LeaseError> {
    let token = entry.token(attachment);
    match keeper.ledger().read(attachment).await? {
        Some(now) if now.sequence() == token.sequence && now.page.stage == Stage::Releasing => {
            let page = Page { bound: Some(bound.clone()), ..now.page };
            keeper.undo(attachment, Entry { page, ..now }).await?;
        }
        Some(now) if now.sequence() == token.sequence => return Ok(false),
        _ => keeper.binder().release(&token, Some(bound)).await?,
    }
    Ok(true)
}

/// Times that a call begins anew because others work on the same attachment.
pub(super) const TRIES: u32 = 8;
/// Renewals under way at once, and the most that one call takes: nobody waits for longer than one renewal takes.
const WIDTH: usize = 16;
