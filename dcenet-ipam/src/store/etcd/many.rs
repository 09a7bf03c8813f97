//! Many batches in few transactions of etcd: its transactions nest, so batches that have nothing to do with each other go
//! in one, each with its own compares and its own lane, each committed or refused by itself.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::task::JoinSet;

use super::client::Failure;
use super::store::{Inner, Request, Verdict, judge};
use super::wire::{Operation, TxnRequest, TxnResponse, method};
use crate::store::{Batch, Caps, Outcome, StoreError, Write, check};

/// Batches that no order is between: none writes what another guards or writes.
#[derive(Default)]
struct Pack<'b> {
    batches: Vec<(usize, &'b Batch)>,
    written: HashSet<&'b [u8]>,
    guarded: HashSet<&'b [u8]>,
    lanes: HashSet<u128>,
    /// Of the largest batch, its lane included.
    operations: usize,
    bytes: usize,
}

impl<'b> Pack<'b> {
    /// Takes a batch in, if it goes with those that are in.
    fn take(&mut self, at: usize, batch: &'b Batch, lane: u128, most_operations: usize, caps: &Caps) -> bool {
        let written = |key: &[u8]| batch.writes.iter().any(|write| write.key() == key);
        let apart = !self.lanes.contains(&lane)
            && batch.guards.iter().all(|guard| !self.written.contains(guard.key.as_slice()))
            && batch.writes.iter().all(|w| !self.written.contains(w.key()) && !self.guarded.contains(w.key()));
        let operations = self.operations.max(batch.guards.len().max(batch.writes.len()) + 1);
        let values = batch.writes.iter().map(|w| w.key().len() + if let Write::Put(_, v) = w { v.len() } else { 0 });
        let bytes = self.bytes + values.chain(batch.guards.iter().map(|g| g.key.len())).sum::<usize>();
        // etcd counts the operations of the outer transaction against those within each.
        let fits = self.batches.len() + 1 + operations <= most_operations && bytes <= caps.max_bytes;
        // A batch that fits nowhere goes alone.
        let taken = self.batches.is_empty() || apart && fits;
        if !taken {
            return false;
        }
        (self.operations, self.bytes) = (operations, bytes);
        self.lanes.insert(lane);
        self.written.extend(batch.writes.iter().map(Write::key));
        self.guarded.extend(batch.guards.iter().map(|g| g.key.as_slice()).filter(|key| !written(key)));
        self.batches.push((at, batch));
        true
    }
}

type Answers = HashMap<usize, Result<Outcome, StoreError>>;

impl Inner {
    pub(super) async fn commit_many(
        self: Arc<Self>,
        batches: Vec<Batch>,
        caps: &Caps,
    ) -> Vec<Result<Outcome, StoreError>> {
        let mut answers = Answers::new();
        let mut next = 0;
        while next < batches.len() {
            let mut pack = Pack::default();
            while let Some(batch) = batches.get(next) {
                if let Err(error) = check(batch, caps) {
                    answers.insert(next, Err(error));
                } else if batch.writes.is_empty() {
                    // A barrier has seen what went before.
                    if !pack.batches.is_empty() {
                        break;
                    }
                    answers.insert(next, self.barrier(batch).await);
                } else if !pack.take(next, batch, Self::lane_number(batch.request_id), self.most_operations(), caps) {
                    break;
                }
                next += 1;
            }
            self.send(&pack, &mut answers).await;
        }
        let unanswered = || Err(StoreError::Unavailable("a batch was left unanswered".to_owned()));
        (0..batches.len()).map(|at| answers.remove(&at).unwrap_or_else(unanswered)).collect()
    }

    async fn send(self: &Arc<Self>, pack: &Pack<'_>, answers: &mut Answers) {
        let fence = self.newest();
        let mut alone: Vec<(usize, Batch)> = Vec::new();
        let (again, together): (Vec<_>, Vec<_>) =
            pack.batches.iter().copied().partition(|(_, batch)| self.is_known(batch.request_id));
        alone.extend(again.into_iter().map(|(at, batch)| (at, batch.clone())));
        match together.as_slice() {
            [] => {}
            [(at, batch)] => alone.push((*at, (*batch).clone())),
            several => {
                let success =
                    several.iter().map(|(_, batch)| Operation::Txn(self.transaction(batch, fence)).into()).collect();
                let request = TxnRequest { success, ..Default::default() };
                match self.client().attempt::<_, TxnResponse>(method::TXN, &request, self.deadline()).await {
                    Ok(answer) if answer.responses.len() == several.len() => {
                        self.see(answer.header.as_ref());
                        for ((at, batch), response) in several.iter().zip(answer.responses) {
                            let own = TxnResponse { header: answer.header.clone(), ..response.txn.unwrap_or_default() };
                            match judge(own, batch, fence, false) {
                                Verdict::Committed(revision) => {
                                    answers.insert(*at, Ok(self.committed(batch, revision)));
                                }
                                Verdict::Conflict(current) => {
                                    answers.insert(*at, Ok(self.refused(batch, current)));
                                }
                                // Another has used the lane.
                                Verdict::Crossed(_) | Verdict::Forgotten => alone.push((*at, (*batch).clone())),
                            }
                        }
                    }
                    // Each for itself tells which is at fault, or is tried for as long as there is time.
                    Err(Failure::Refused(_) | Failure::Unsent(_) | Failure::Compacted) => {
                        alone.extend(several.iter().map(|(at, batch)| (*at, (*batch).clone())));
                    }
                    Ok(_) | Err(Failure::Lost(_)) => {
                        for (at, batch) in several {
                            self.remember(batch.request_id, Request::Unsettled(fence));
                            alone.push((*at, (*batch).clone()));
                        }
                    }
                }
            }
        }
        // They have no order between them, and one that waits for its member keeps no other waiting.
        let mut tasks = JoinSet::new();
        let ats: Vec<usize> = alone.iter().map(|(at, _)| *at).collect();
        for (at, batch) in alone {
            let this = self.clone();
            tasks.spawn(async move { (at, this.commit(&batch).await) });
        }
        while let Some(ended) = tasks.join_next().await {
            if let Ok((at, answer)) = ended {
                answers.insert(at, answer);
            }
        }
        for at in ats {
            let unknown = || Ok(Outcome::Unknown { reason: "the call to etcd did not end".to_owned() });
            answers.entry(at).or_insert_with(unknown);
        }
    }

    fn newest(&self) -> i64 {
        self.seen.load(Ordering::Relaxed)
    }
}
