//! An attacher of which another process is always ahead.

use dcenet_core::model::IfIndex;

use super::pair::Pair;
use super::{Subject, verdict};
use crate::attach::{AttachError, Attached, Attacher, Direction, Hook, Owner, Tag, everything};
use crate::program::Program;

/// Replaces ours as soon as it was asked for, so that who asked holds what is old.
struct Overtaken<'a> {
    inner: &'a dyn Attacher,
    next: Program,
}

impl Attacher for Overtaken<'_> {
    fn attach_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Option<Attached>, AttachError> {
        self.inner.attach_tagged(hook, program, tag)
    }

    fn replace_tagged(&self, hook: Hook, program: &Program, tag: Tag<'_>) -> Result<Attached, AttachError> {
        self.inner.replace_tagged(hook, program, tag)
    }

    fn devices(&self) -> Result<Vec<IfIndex>, AttachError> {
        self.inner.devices()
    }

    fn chain(&self, hook: Hook) -> Result<Vec<Attached>, AttachError> {
        self.inner.chain(hook)
    }

    fn detach(&self, hook: Hook) -> Result<bool, AttachError> {
        self.inner.detach(hook)
    }

    fn attached(&self, hook: Hook) -> Result<Option<Attached>, AttachError> {
        let ours = self.inner.attached(hook)?;
        self.inner.replace(hook, &self.next, "next")?;
        Ok(ours)
    }
}

/// Who asks what is ahead of ours, or evicts, while ours is replaced, neither is told that ours is ahead of itself nor
/// takes it off.
///
/// # Panics
/// At the first breach.
pub fn a_replacement_at_the_same_time_is_not_ahead_of_ours(subject: &Subject<'_>) {
    let Subject { attacher: a, .. } = *subject;
    let pair = Pair::new(subject.pair);
    let hook = pair.hook(Direction::Ingress);
    let (first, next) = (subject.deny(), subject.constant("next", verdict::UNSPEC));
    let number = next.info().id;
    let overtaken = Overtaken { inner: a, next };
    pair.on_host(|| {
        a.attach(hook, &first, "first").unwrap();
        assert_eq!(overtaken.before(hook).unwrap(), []);
        let ours = a.attached(hook).unwrap().unwrap();
        assert_eq!((ours.program, ours.owner), (Some(number), Owner::Ours("next".to_owned())), "it was replaced");
        a.replace(hook, &first, "first").unwrap();
        // As one would who has taken ours for a stranger's before.
        let [mut stale] = everything(hook).unwrap().try_into().unwrap();
        stale.owner = Owner::Foreign(None);
        a.replace(hook, &overtaken.next, "next").unwrap();
        assert!(matches!(a.evict(hook, &stale), Err(AttachError::NotForeign { .. })));
        assert!(a.detach(hook).unwrap());
    });
}
