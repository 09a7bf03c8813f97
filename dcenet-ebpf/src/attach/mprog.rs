//! Chains of programs on a device: what tcx and netkit have in common (kernel/bpf/mprog.c).

use std::os::fd::{AsFd, OwnedFd};

use super::links::{Entry, LinkAttacher, Linked, Look, same_program};
use super::pinned::ATTEMPTS;
use super::{AttachError, Attached, Direction, Hook, Via};
use crate::object::ProgramKind;
use crate::pin::Pins;
use crate::program::Program;
use crate::sys::{self, Chain, Position};

/// Where our program goes among those of others when it is attached. It keeps its place when it is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// Ahead of all that are there. Who comes later and asks for the same goes ahead of ours:
    /// [`Attacher::before`](super::Attacher::before) tells.
    #[default]
    First,
    /// Behind all that are there.
    Last,
    /// Ahead of the program of this number.
    Before(u32),
    /// Behind the program of this number.
    After(u32),
}

/// Names a kind of chain: [`Tcx`](super::Tcx) or [`Netkit`](super::Netkit).
pub trait Chained: Send + Sync {
    /// As [`Linked::NAME`].
    const NAME: &'static str;
    /// As [`Linked::LINK_TYPE`].
    const LINK_TYPE: u32;
    /// What is particular to it.
    const KIND: Kind;
}

impl<K: Chained> Linked for K {
    const NAME: &'static str = K::NAME;
    const PROGRAM: ProgramKind = ProgramKind::Classifier;
    const LINK_TYPE: u32 = K::LINK_TYPE;

    type Place = Placement;

    fn entries(hook: Hook, _: &Pins, _: Look) -> Result<Option<Vec<Entry>>, AttachError> {
        K::KIND.entries(hook)
    }

    fn create(hook: Hook, program: &Program, place: Placement) -> Result<OwnedFd, AttachError> {
        K::KIND.create(hook, program, place)
    }
}

impl<K: Chained> LinkAttacher<K> {
    /// A number that each change of the hook's chain raises, whoever makes it; none where there is no such device. For one who
    /// watches whether others still are where they were: while it is the same and something of ours stays on the chain,
    /// [`Attacher::chain`](super::Attacher::chain) is the same. Once the chain was empty it counts from 1 again, so that the
    /// same number may tell of another chain.
    pub fn revision(&self, hook: Hook) -> Result<Option<u64>, AttachError> {
        Ok(K::KIND.query(hook)?.map(|chain| chain.revision))
    }
}

/// A kind of chain.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// What a kernel without it is told to be missing.
    pub(super) missing: &'static str,
    /// `enum bpf_attach_type` of both directions.
    pub(super) ingress: u32,
    pub(super) egress: u32,
    /// How a program is described that the link of this number holds.
    pub(super) via: fn(Option<u32>) -> Via,
    /// What a device must be.
    pub(super) device: &'static str,
}

impl Kind {
    fn attach_type(&self, direction: Direction) -> u32 {
        match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        }
    }

    /// The chain; none where there is no such device.
    fn query(&self, hook: Hook) -> Result<Option<Chain>, AttachError> {
        match sys::query_chain(hook.device.get(), self.attach_type(hook.direction)) {
            Ok(chain) => Ok(Some(chain)),
            Err(e) if e.is(libc::ENODEV) => Ok(None),
            Err(e) if e.is(libc::EINVAL) => Err(AttachError::Unsupported { feature: self.missing }),
            Err(e) if e.is(libc::ENXIO) || e.is(libc::EACCES) => Err(self.wrong_device(hook)),
            Err(e) => Err(e.into()),
        }
    }

    fn wrong_device(&self, hook: Hook) -> AttachError {
        AttachError::WrongDevice { device: hook.device, want: self.device }
    }

    fn entries(&self, hook: Hook) -> Result<Option<Vec<Entry>>, AttachError> {
        let entry = |(program, link): (u32, u32)| {
            let link = (link != 0).then_some(link);
            Entry { program, link, via: (self.via)(link) }
        };
        Ok(self.query(hook)?.map(|chain| chain.programs.into_iter().map(entry).collect()))
    }

    /// The chain as others would see it: nothing in it is ours.
    pub(super) fn foreign_chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        match self.entries(hook) {
            Ok(None) | Err(AttachError::Unsupported { .. } | AttachError::WrongDevice { .. }) => Ok(Vec::new()),
            Ok(Some(entries)) => entries.into_iter().enumerate().map(|(place, entry)| entry.foreign(place)).collect(),
            Err(e) => Err(e),
        }
    }

    fn create(&self, hook: Hook, program: &Program, placement: Placement) -> Result<OwnedFd, AttachError> {
        let position = match placement {
            Placement::First => Position { side: sys::BEFORE, relative: None },
            Placement::Last => Position { side: sys::AFTER, relative: None },
            Placement::Before(program) => Position { side: sys::BEFORE, relative: Some(program) },
            Placement::After(program) => Position { side: sys::AFTER, relative: Some(program) },
        };
        let attach_type = self.attach_type(hook.direction);
        sys::create_link(program.as_fd(), hook.device.get(), attach_type, position).map_err(|e| {
            match position.relative {
                _ if e.is(libc::ENODEV) => AttachError::NoDevice(hook.device),
                _ if e.is(libc::EEXIST) => same_program(hook),
                Some(program) if e.is(libc::ENOENT) => AttachError::NoNeighbour { hook, program },
                _ => e.into(),
            }
        })
    }

    /// Takes exactly this program off, if it is there still, through its link or without one.
    pub(super) fn evict(&self, hook: Hook, program: u32, link: Option<u32>) -> Result<bool, AttachError> {
        let attach_type = self.attach_type(hook.direction);
        for _ in 0..ATTEMPTS {
            let chain = match sys::query_chain(hook.device.get(), attach_type) {
                Ok(chain) => chain,
                Err(e) if e.is(libc::ENODEV) || e.is(libc::EINVAL) => return Ok(false),
                Err(e) => return Err(e.into()),
            };
            if !chain.programs.contains(&(program, link.unwrap_or(0))) {
                return Ok(false);
            }
            let taken = match link {
                Some(link) => sys::link_by_id(link).and_then(|link| sys::detach_link(link.as_fd())),
                None => sys::program_by_id(program).and_then(|program| {
                    sys::detach_program(program.as_fd(), hook.device.get(), attach_type, chain.revision)
                }),
            };
            match taken {
                Ok(()) => return Ok(true),
                Err(e) if e.is(libc::ENOENT) || e.is(libc::ENODEV) => return Ok(false),
                // Somebody else has changed the chain: look again whether it is there.
                Err(e) if e.is(libc::ESTALE) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Err(AttachError::Raced { hook })
    }
}

#[cfg(test)]
mod tests {
    use dcenet_core::test_support::{Rung, require_with};

    use super::*;
    use crate::attach::conformance::{Pair, constant, deny};
    use crate::attach::{Attacher, ClsactAttacher, TcxAttacher, everything, verdict};
    use crate::probe::Features;

    /// Goes also when a test fails.
    struct Mounted(Pins);

    impl Drop for Mounted {
        fn drop(&mut self) {
            // What stays mounted is found by its directory, which then stays too.
            let _ = self.0.clone().unmount();
        }
    }

    /// Programs without a link are taken off by a command of their own, which is told the chain's revision.
    #[test]
    fn a_program_without_a_link_is_evicted_alone() {
        let no_tcx =
            || (!Features::probe().is_ok_and(|f| f.tcx)).then(|| "the kernel has no tcx (Linux 6.6)".to_owned());
        if !require_with(Rung::Kernel, no_tcx) {
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let mounted = Mounted(Pins::open(directory.path().join("bpf")).expect("pins"));
        let ours = TcxAttacher::new(mounted.0.clone());
        let pair = Pair::default();
        let hook = pair.hook(Direction::Ingress);
        let (one, two) = (constant("one", verdict::OK), constant("two", verdict::UNSPEC));
        pair.on_host(|| {
            let device = hook.device.get();
            let attach = |program: &Program| sys::attach_program(program.as_fd(), device, sys::TCX_INGRESS);
            attach(&one).expect("attached without a link");
            ours.attach(hook, &deny(), "ours").expect("attached");
            attach(&two).expect("attached without a link");
            let all = everything(hook).expect("the chain");
            let foreign: Vec<_> = all.iter().filter(|a| a.via == Via::Tcx { link: None }).collect();
            assert_eq!(foreign.iter().map(|a| a.program).collect::<Vec<_>>(), [one.info().id, two.info().id].map(Some));
            // An old revision is refused: what has changed since is not known to who names it.
            let chain = sys::query_chain(device, sys::TCX_INGRESS).expect("the chain");
            let stale = sys::detach_program(one.as_fd(), device, sys::TCX_INGRESS, chain.revision - 1);
            assert!(stale.is_err_and(|e| e.is(libc::ESTALE)));
            assert!(ours.evict(hook, foreign[0]).expect("evicted"));
            assert!(!ClsactAttacher.evict(hook, foreign[0]).expect("asked"), "it is gone");
            assert_eq!(
                ours.chain(hook).expect("the chain").iter().map(|a| a.program).collect::<Vec<_>>(),
                [ours.attached(hook).expect("ours").and_then(|a| a.program), Some(two.info().id)]
            );
            assert!(ours.detach(hook).expect("detached"));
            assert_eq!(everything(hook).expect("the chain").len(), 1, "what nobody named stays");
        });
    }
}
