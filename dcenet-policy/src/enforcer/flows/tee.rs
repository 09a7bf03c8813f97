//! Several sinks at once.

use std::fmt;
use std::io;

use super::{Flow, FlowSink, Losses};

/// Hands flows to several sinks, of which one that fails does not keep the others from theirs.
///
/// A sink that fails is left alone until the end of the drain, where [`FlowSink::flush`] tells of it by [`TeeError`]. What
/// it has missed by then it is told of as [`Losses::undelivered`], and from the next drain on it takes part again. Losses
/// that it could not be told of are told to it later. Nothing else fails: a drain into a tee always hands over everything,
/// and its error at the end says that some sink missed some of it.
#[derive(Default)]
pub struct Tee<'a> {
    branches: Vec<Branch<'a>>,
}

struct Branch<'a> {
    name: String,
    sink: Box<dyn FlowSink + Send + 'a>,
    /// Why it takes no part in this drain any more.
    failed: Option<io::Error>,
    /// What it is still to be told of.
    missed: Losses,
}

impl Branch<'_> {
    fn fail(&mut self, error: io::Error) {
        self.failed.get_or_insert(error);
    }

    fn tell_missed(&mut self) -> io::Result<()> {
        if self.missed != Losses::default() {
            self.sink.lost(self.missed)?;
            self.missed = Losses::default();
        }
        Ok(())
    }
}

impl<'a> Tee<'a> {
    /// With no sink, which takes everything and does nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// With one more sink. The name says in errors which one it is.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, sink: impl FlowSink + Send + 'a) -> Self {
        let (name, sink) = (name.into(), Box::new(sink));
        self.branches.push(Branch { name, sink, failed: None, missed: Losses::default() });
        self
    }
}

impl fmt::Debug for Tee<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.branches.iter().map(|branch| (&branch.name, branch.missed))).finish()
    }
}

impl FlowSink for Tee<'_> {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        for branch in &mut self.branches {
            if branch.failed.is_none()
                && let Err(error) = branch.sink.flow(flow)
            {
                branch.fail(error);
            }
            if branch.failed.is_some() {
                branch.missed.undelivered = branch.missed.undelivered.saturating_add(1);
            }
        }
        Ok(())
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        for branch in &mut self.branches {
            branch.missed += losses;
            if branch.failed.is_none()
                && let Err(error) = branch.tell_missed()
            {
                branch.fail(error);
            }
        }
        Ok(())
    }

    /// # Errors
    /// A [`TeeError`] with every sink that has failed since the last call, or fails now.
    fn flush(&mut self) -> io::Result<()> {
        let mut failed = Vec::new();
        for branch in &mut self.branches {
            // One that has failed may work again, and then its own output says what it lacks; its first error tells why.
            if let Err(error) = branch.tell_missed().and_then(|()| branch.sink.flush()) {
                branch.fail(error);
            }
            failed.extend(branch.failed.take().map(|error| (branch.name.clone(), error)));
        }
        match failed.first() {
            None => Ok(()),
            Some((_, first)) => Err(io::Error::new(first.kind(), TeeError { failed })),
        }
    }
}

/// Which sinks of a [`Tee`] failed, and each one's first error of the drain.
#[derive(Debug)]
pub struct TeeError {
    failed: Vec<(String, io::Error)>,
}

impl TeeError {
    /// The sinks by name, with their errors.
    pub fn failed(&self) -> &[(String, io::Error)] {
        &self.failed
    }
}

impl fmt::Display for TeeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, error)) in self.failed.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{name}: {error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for TeeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.failed.first().map(|(_, error)| error as _)
    }
}

#[cfg(test)]
mod tests {
    use super::super::LastFlows;
    use super::super::conformance::{FlakySink, Shown, conforms, flows};
    use super::*;

    fn shown(last: &LastFlows) -> Shown {
        Shown { flows: last.flows().len() as u64, losses: last.losses().total() }
    }

    #[test]
    fn a_tee_conforms() {
        let (one, two) = (LastFlows::new(1000), LastFlows::new(1000));
        conforms(Tee::new().with("one", &one).with("two", &two), |_| {
            assert_eq!(one.flows(), two.flows());
            assert_eq!(one.losses(), two.losses());
            shown(&one)
        });
        conforms(Tee::new().with("inner", Tee::new().with("one", &two)), {
            let before = shown(&two);
            let two = &two;
            move |_| Shown { flows: shown(two).flows - before.flows, losses: shown(two).losses - before.losses }
        });
    }

    /// At whichever call one sink fails, the others get all, the error names it, and it hears of what it has missed.
    #[test]
    fn a_sink_that_fails_stops_no_other() {
        let flows = flows();
        let flow = &flows[0];
        let losses = Losses { full: 7, ..Losses::default() };
        // Three flows, losses and the end of a drain; then all again.
        for call in 0..10 {
            let [before, flaky, after] = [(); 3].map(|()| LastFlows::new(1000));
            let mut tee = Tee::new()
                .with("before", &before)
                .with("flaky", FlakySink::failing_at(&flaky, call))
                .with("after", &after);
            let mut errors = Vec::new();
            for _ in 0..3 {
                for _ in 0..3 {
                    tee.flow(flow).unwrap();
                }
                tee.lost(losses).unwrap();
                errors.extend(tee.flush().err());
            }
            let [error] = &errors[..] else { panic!("call {call}: {errors:?}") };
            assert_eq!(error.to_string(), "flaky: the sink is broken");
            let told = error.get_ref().and_then(|e| e.downcast_ref::<TeeError>()).unwrap();
            assert_eq!(told.failed().iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["flaky"]);
            for whole in [&before, &after] {
                assert_eq!(shown(whole), Shown { flows: 9, losses: 21 }, "call {call}");
            }
            let Shown { flows, .. } = shown(&flaky);
            assert_eq!(flaky.losses().undelivered, 9 - flows, "call {call}");
            assert_eq!(flaky.losses().full, 21, "call {call}");
        }
    }

    /// It fails, and fails again where it is to be told of that.
    #[test]
    fn what_a_sink_could_not_be_told_of_it_is_told_when_it_works_again() {
        let last = LastFlows::new(1000);
        let mut tee = Tee::new().with("flaky", FlakySink::failing_at(FlakySink::failing_at(&last, 0), 0));
        let flow = &flows()[0];
        tee.flow(flow).unwrap();
        assert_eq!(tee.flush().unwrap_err().to_string(), "flaky: the sink is broken");
        assert_eq!((last.flows().len(), last.losses().undelivered), (0, 0));
        // Nobody reports losses in the drain that follows.
        tee.flow(flow).unwrap();
        tee.flush().unwrap();
        assert_eq!((last.flows().len(), last.losses().undelivered), (1, 1));
    }

    #[test]
    fn all_that_fail_are_told_at_once() {
        let last = LastFlows::new(1000);
        let mut tee = Tee::new()
            .with("a", FlakySink::failing_at(&last, 0))
            .with("b", FlakySink::failing_at(&last, 0))
            .with("c", &last);
        tee.flow(&flows()[0]).unwrap();
        assert_eq!(tee.flush().unwrap_err().to_string(), "a: the sink is broken; b: the sink is broken");
        tee.flush().unwrap();
    }
}
