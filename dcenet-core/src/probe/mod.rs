//! Addresses on a segment that others are on too: is one in use already, who is to be told of it, does its router answer.
//!
//! [`Segment`] is an Ethernet device with the sockets for it, in one network namespace. It does what a host that follows
//! RFC 5227 (IPv4) and RFC 4862, section 5.4 (IPv6) does around the entering of an address, for an address that no device
//! of the namespace has yet: [`Segment::conflicts`] before, [`Segment::announce`] and [`Segment::unreachable`] after. The
//! engine does so for the links whose configuration has an [`Underlay`].
//!
//! All addresses are asked for at once and share one limit; an answer ends the waiting at once, and nothing is polled.
//!
//! # What is a conflict
//! | Frame | Is a conflict | Source |
//! |---|---|---|
//! | ARP of any kind whose sender address is ours | yes | RFC 5227, section 2.1.1 |
//! | ARP probe for ours: its sender address is 0.0.0.0 | yes, another host is about to take it | the same |
//! | neighbour advertisement for ours | yes | RFC 4862, section 5.4.4 |
//! | neighbour solicitation from `::` for ours | yes, as the ARP probe | RFC 4862, section 5.4.3 |
//! | any of them from our own Ethernet address | no | RFC 5227, section 2.1.1 |
//! | a solicitation with our own nonce | no, the segment loops | RFC 7527, section 4.2 |
//! | other solicitations and requests for ours | no, somebody looks for it | the same sections |
//! | any of them with the tag of a virtual LAN, unless the device is for that | no, it is of another segment | IEEE 802.1Q |
//!
//! A frame that finds no room in a queue of this host counts as one that was lost on the way; if no probe for an address
//! found room, nothing is known of it, and that is an error. Who floods the segment cannot make a probe longer, but hide
//! what others answer.
//!
//! An Ethernet address that goes with the address, as a claim's does, is "our own" on every host: a workload that is moved
//! from one to another, and what the first one still sends, is no conflict with itself. Neither is, by the same rule, a
//! second allocator that derives the same Ethernet address from the same address of a network of the same name.
//!
//! ```no_run
//! use dcenet_core::model::IfIndex;
//! use dcenet_core::probe::{Segment, Timing};
//!
//! let (device, mac) = (IfIndex::new(7).expect("not 0"), "02:00:00:00:00:07".parse()?);
//! let wanted = ["192.0.2.7".parse()?, "2001:db8::7".parse()?];
//! let segment = Segment::open(device, mac, &wanted)?;
//! for conflict in segment.conflicts(&wanted, Timing::default())? {
//!     eprintln!("{conflict}");
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod config;
mod frame;
mod judge;
mod segment;
mod sys;
#[cfg(test)]
mod tests;

use std::fmt;
#[cfg(feature = "test-support")]
use std::fs::File;
#[cfg(feature = "test-support")]
use std::io::{self, Write};
use std::net::IpAddr;

pub use self::config::{GatewayProbe, Span, Timing, Underlay};
pub use self::segment::Segment;
#[cfg(feature = "test-support")]
use crate::model::IfIndex;
use crate::model::MacAddr;

/// Reads a frame as every reader of this module would, whatever is in it. For fuzzing: it must not panic.
#[cfg(feature = "test-support")]
pub fn read_hostile(frame: &[u8]) {
    std::hint::black_box(frame::parse(frame));
}

/// Sends a frame by a device of the calling thread's namespace as it is, whatever its EtherType and tags. For tests.
///
/// # Errors
/// Those of socket(2), bind(2) and write(2).
#[cfg(feature = "test-support")]
pub fn transmit(device: IfIndex, frame: &[u8]) -> io::Result<()> {
    File::from(sys::open(frame::ARP, device, &[])?).write_all(frame)
}

/// An address that somebody else on the segment has, or is about to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Conflict {
    /// The address.
    pub address: IpAddr,
    /// Who: the Ethernet address in the message, that of the frame where the message names none.
    pub holder: MacAddr,
    /// How it is known.
    pub evidence: Evidence,
}

/// How a conflict is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Evidence {
    /// It speaks as the address: an answer, or an announcement.
    Used,
    /// It asks, as we do, whether anybody has the address.
    Probed,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, holder, evidence } = self;
        match evidence {
            Evidence::Used => write!(f, "{address} is used by {holder}"),
            Evidence::Probed => write!(f, "{address} is being taken by {holder}"),
        }
    }
}
