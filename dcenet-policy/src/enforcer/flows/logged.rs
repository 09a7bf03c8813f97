//! Flows of rules that are to be logged, and no others.

use std::io;

use super::{Flow, FlowSink, Losses};

/// Hands flows on whose rule wants them marked ([`Flow::log`]). Losses are handed on as they are: which flows they were is
/// not known.
#[derive(Debug, Clone, Default)]
pub struct Logged<S>(
    /// Gets them.
    pub S,
);

impl<S: FlowSink> FlowSink for Logged<S> {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        if flow.log { self.0.flow(flow) } else { Ok(()) }
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        self.0.lost(losses)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{LastFlows, conformance};
    use super::*;

    #[test]
    fn only_flows_of_rules_that_are_logged_go_on() {
        let kept = LastFlows::new(100);
        let mut sink = Logged(&kept);
        let flows = conformance::flows();
        flows.iter().for_each(|flow| sink.flow(flow).unwrap());
        let logged: Vec<Flow> = flows.iter().filter(|flow| flow.log).cloned().collect();
        assert!(!logged.is_empty() && logged.len() < flows.len());
        assert_eq!(kept.flows(), logged);
    }
}
