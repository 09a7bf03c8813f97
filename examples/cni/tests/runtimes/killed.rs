//! Runtimes that are killed: their processes, and what they leave.

use std::collections::BTreeSet;

use crate::machine::Machine;

/// Traces, without the names of namespaces, which are podman's.
pub fn ours(machine: &Machine) -> BTreeSet<String> {
    machine.traces().into_iter().filter(|line| !line.starts_with("namespace ")).collect()
}

/// Whether a child of ours has ended, or will not be there again.
pub fn has_ended(id: u32) -> bool {
    let state = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    state.is_empty() || state.contains(") Z ")
}

/// A process, which may have ended.
pub struct Process(u32);

impl Process {
    /// Whether it runs, under this name.
    pub fn is_called(&self, name: &str) -> bool {
        let is = std::fs::read_to_string(format!("/proc/{}/comm", self.0));
        // One that has ended is there until its parent knows.
        let state = std::fs::read_to_string(format!("/proc/{}/stat", self.0)).unwrap_or_default();
        is.is_ok_and(|is| is.trim() == name) && !state.contains(") Z ")
    }

    /// Ends it without a word to it.
    pub fn kill(&self) {
        let id = rustix::process::Pid::from_raw(self.0.try_into().unwrap()).unwrap();
        // It may have ended by itself.
        let _ = rustix::process::kill_process(id, rustix::process::Signal::KILL);
    }
}

/// The processes below one, each behind those below it.
pub fn descendants(id: u32) -> Vec<Process> {
    let threads = std::fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten();
    let lists = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let children: Vec<u32> =
        lists.flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<_>>()).collect();
    let below = children.iter().flat_map(|child| descendants(*child));
    below.chain(children.iter().map(|child| Process(*child))).collect()
}
