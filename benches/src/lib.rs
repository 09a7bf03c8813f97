//! What the benchmarks share: running CNI plugins as a runtime does, figures, and the summary.
//!
//! A goal is a ratio of ours to a peer, or to a floor, both measured in this run and by turns, so that whatever else
//! the machine does meets both. A peer whose name is a figure, such as `40 ms`, is neither: it is a bound that was set
//! beforehand, where no peer does the same. Against it the machine and its load count, so such a row says how fast it was
//! here and now, and its spread is ours alone.
//!
//! `DCENET_BENCH_QUICK=1` shortens every benchmark to a moment: its figures say that it works, not how well.

mod mounted;
pub mod owner;
pub mod plot;
pub mod plugin;
pub mod policies;
mod summary;

pub use mounted::Mounted;
pub use summary::{Row, Summary, target};

/// The number of rounds to run: few under `DCENET_BENCH_QUICK`.
pub fn rounds(full: usize, quick: usize) -> usize {
    if std::env::var_os("DCENET_BENCH_QUICK").is_some_and(|v| v == "1") { quick } else { full }
}

/// Order statistics of a sample.
#[derive(Debug, Clone)]
pub struct Sample(Vec<f64>);

impl Sample {
    /// Sorts the values.
    ///
    /// # Panics
    /// If there is none.
    pub fn new(mut values: Vec<f64>) -> Self {
        assert!(!values.is_empty(), "a sample holds at least one value");
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The value below which the share `p` of the sample lies, by the nearest rank.
    pub fn quantile(&self, p: f64) -> f64 {
        let rank = (p * self.0.len() as f64).ceil() as usize;
        self.0[rank.clamp(1, self.0.len()) - 1]
    }

    /// The middle value.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

/// Prints a line of a benchmark's report.
pub fn say(line: impl std::fmt::Display) {
    println!("{line}");
}

/// Time that the calling thread has had a processor (clock_gettime(2), `CLOCK_THREAD_CPUTIME_ID`).
///
/// # Panics
/// If the clock went backwards.
pub fn on_cpu() -> std::time::Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    now.try_into().expect("a thread's time is not negative")
}
