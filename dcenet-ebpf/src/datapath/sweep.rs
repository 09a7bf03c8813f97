//! Flows that are over, removed from user space.
//!
//! Programs pass over an entry whose time is up, and write over it when the flow begins anew, but none removes it: a
//! table of [`FullTable::Refuse`](crate::abi::FullTable::Refuse) would stay full for ever, and nobody would hear of the
//! end of a flow that ends by silence, as all of UDP do.

use crate::abi::{Flow, FlowKey};
use crate::maps::{HashTable, MapError};

/// What a sweep found of a flow that it removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Over {
    /// Its time is up.
    Silent,
    /// Its endpoint is gone.
    Orphan,
}

/// Removes the flows that are over at the time `now`, and tells of each. `lives` says whether an endpoint of a slot and
/// tenure is there. Returns how many flows were left.
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
    tell: &mut dyn FnMut(&FlowKey, &Flow, Over),
) -> Result<usize, MapError> {
    let over = |key: &FlowKey, flow: &Flow| {
        if !lives(key.slot, flow.tenure) {
            Some(Over::Orphan)
        } else if now.saturating_sub(flow.last_seen) > flow.timeout {
            Some(Over::Silent)
        } else {
            None
        }
    };
    let mut left = 0;
    for (key, flow) in flows.entries()? {
        left += 1;
        if over(&key, &flow).is_none() {
            continue;
        }
        let Some(flow) = flows.load(&key)? else {
            left -= 1;
            continue;
        };
        if let Some(why) = over(&key, &flow)
            && flows.remove(&key)?
        {
            left -= 1;
            tell(&key, &flow, why);
        }
    }
    Ok(left)
}
