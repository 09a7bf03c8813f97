//! What a frame means to somebody who is about to take addresses.

use std::net::IpAddr;

use super::frame::{Nonce, Said, parse};
use super::{Conflict, Evidence};
use crate::model::MacAddr;

/// Who asks, and for what.
#[derive(Debug)]
pub(super) struct Judge<'a> {
    /// The Ethernet address that the addresses are to have.
    pub(super) mac: MacAddr,
    /// The addresses.
    pub(super) addresses: &'a [IpAddr],
    /// What our solicitations bear.
    pub(super) nonce: Nonce,
}

impl Judge<'_> {
    /// The conflict that a frame tells of.
    pub(super) fn judge(&self, frame: &[u8]) -> Option<Conflict> {
        let (address, holder, evidence) = match parse(frame)? {
            Said::Is { address, mac } => (address, mac, Evidence::Used),
            Said::Probes { nonce: Some(nonce), .. } if nonce == self.nonce => return None,
            Said::Probes { address, mac, .. } => (address, mac, Evidence::Probed),
        };
        let conflict = holder != self.mac && self.addresses.contains(&address);
        conflict.then_some(Conflict { address, holder, evidence })
    }
}
