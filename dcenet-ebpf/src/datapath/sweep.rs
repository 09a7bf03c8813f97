//! Flows that are over, removed from user space.
//!
//! Programs pass over an entry whose time is up, and write over it when the flow begins anew, but none removes it: a
//! table of [`FullTable::Refuse`](crate::abi::FullTable::Refuse) would stay full for ever, and nobody would hear of the
//! end of a flow that ends by silence, as all of UDP do.

use crate::abi::{Flow, FlowKey};
use crate::maps::{HashTable, MapError};

/// What a sweep found of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Found {
    /// It is under way, and was left.
    Live,
    /// Its endpoint is gone; it was removed.
    Orphan,
    /// Its time is up; it was removed.
    Silent,
}

/// Removes the flows that are over at the time `now`, and tells of each flow that it finds. `lives` says whether an
/// endpoint of a slot and tenure is there.
///
/// `now` is CLOCK_MONOTONIC_COARSE in nanoseconds, read before the call.
///
/// A flow that begins anew in the microseconds between the second look at its entry and the removal loses its entry: its
/// next packet is then judged as one without a flow is. Entries that merely wait for their next packet are not touched.
///
/// # Errors
/// What the kernel refuses; flows that were told of before are removed.
pub fn sweep(
    flows: &HashTable<FlowKey, Flow>,
    now: u64,
    lives: &dyn Fn(u16, u16) -> bool,
    tell: &mut dyn FnMut(&FlowKey, &Flow, Found),
) -> Result<(), MapError> {
    let look = |key: &FlowKey, flow: &Flow| {
        if !lives(key.slot, flow.tenure) {
            Found::Orphan
        } else if now.saturating_sub(flow.last_seen) > flow.timeout {
            Found::Silent
        } else {
            Found::Live
        }
    };
    for (key, flow) in flows.entries()? {
        if look(&key, &flow) == Found::Live {
            tell(&key, &flow, Found::Live);
            continue;
        }
        let Some(flow) = flows.load(&key)? else { continue };
        match look(&key, &flow) {
            Found::Live => tell(&key, &flow, Found::Live),
            over => {
                if flows.remove(&key)? {
                    tell(&key, &flow, over);
                }
            }
        }
    }
    Ok(())
}
