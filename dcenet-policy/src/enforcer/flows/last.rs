//! The last flows, in memory.

use std::collections::VecDeque;
use std::io;

use parking_lot::Mutex;

use super::{Flow, FlowSink, Losses};

/// Keeps the last flows in memory.
#[derive(Debug)]
pub struct LastFlows {
    room: usize,
    kept: Mutex<(VecDeque<Flow>, Losses)>,
}

impl LastFlows {
    /// Keeps at most `room`.
    pub fn new(room: usize) -> Self {
        Self { room, kept: Mutex::default() }
    }

    /// The flows, oldest first.
    pub fn flows(&self) -> Vec<Flow> {
        self.kept.lock().0.iter().cloned().collect()
    }

    /// All losses so far.
    pub fn losses(&self) -> Losses {
        self.kept.lock().1
    }
}

impl FlowSink for &LastFlows {
    fn flow(&mut self, flow: &Flow) -> io::Result<()> {
        let kept = &mut self.kept.lock().0;
        if kept.len() >= self.room {
            kept.pop_front();
        }
        kept.push_back(flow.clone());
        Ok(())
    }

    fn lost(&mut self, losses: Losses) -> io::Result<()> {
        self.kept.lock().1 += losses;
        Ok(())
    }
}
