//! `target/bench/summary.json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{Sample, say};

/// Where cargo builds, and what benchmarks write goes.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")), PathBuf::from)
}

/// One figure of one benchmark, beside its peer's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The benchmark, as `make bench ID=` takes it.
    pub id: String,
    /// Which of its conditions.
    pub variant: String,
    /// The unit of `ours`, `peer` and `floor`.
    pub unit: String,
    /// The greatest `ratio` that meets the goal.
    pub goal: f64,
    /// Median of ours.
    pub ours: f64,
    /// Median of the peer's, or a bound that was set beforehand.
    pub peer: f64,
    /// Who the peer is; a bound's name is the bound.
    pub peer_name: String,
    /// Median of what no implementation could go below, where there is such a thing.
    pub floor: Option<f64>,
    /// `ours / peer`.
    pub ratio: f64,
    /// The 10th and 90th percentile of the ratios of the single rounds.
    pub spread: [f64; 2],
    /// Whether `ratio <= goal`.
    pub met: bool,
}

impl Row {
    /// Compares two samples whose values belong together round by round.
    ///
    /// # Panics
    /// If the samples differ in length or are empty.
    pub fn compare(id: &str, variant: &str, goal: f64, ours: &[f64], (peer_name, peer): (&str, &[f64])) -> Self {
        assert_eq!(ours.len(), peer.len(), "ours and the peer's are measured by turns");
        let rounds = Sample::new(ours.iter().zip(peer).map(|(o, p)| o / p).collect());
        let (ours, peer) = (Sample::new(ours.to_vec()).median(), Sample::new(peer.to_vec()).median());
        let ratio = ours / peer;
        Self {
            id: id.to_owned(),
            variant: variant.to_owned(),
            unit: "ms".to_owned(),
            goal,
            ours,
            peer,
            peer_name: peer_name.to_owned(),
            floor: None,
            ratio,
            spread: [rounds.quantile(0.1), rounds.quantile(0.9)],
            met: ratio <= goal,
        }
    }

    /// What ours refuses to do at all misses the goal, by any clock: it has the greatest number that JSON can tell.
    pub fn refused(id: &str, variant: &str, goal: f64, (peer_name, peer): (&str, f64)) -> Self {
        Self::compare(id, variant, goal, &[f64::MAX], (peer_name, &[peer.max(1.0)]))
    }

    /// Says another unit than milliseconds.
    #[must_use]
    pub fn in_unit(self, unit: &str) -> Self {
        Self { unit: unit.to_owned(), ..self }
    }

    /// Adds the floor.
    #[must_use]
    pub fn with_floor(self, floor: f64) -> Self {
        Self { floor: Some(floor), ..self }
    }
}

/// The rows of one benchmark, which replace its older rows in the file.
#[derive(Debug, Default)]
pub struct Summary(Vec<Row>);

impl Summary {
    /// Prints the row and keeps it.
    pub fn add(&mut self, row: Row) {
        let floor = row.floor.map(|f| format!(", floor {f:.2}")).unwrap_or_default();
        let ours = match row.ours {
            f64::MAX => "refused".to_owned(),
            ours => format!("{ours:>8.2} {}", row.unit),
        };
        let ratio = match row.ours {
            f64::MAX => "none".to_owned(),
            _ => format!("{:.2} ({:.2} to {:.2})", row.ratio, row.spread[0], row.spread[1]),
        };
        say(format_args!(
            "{:<12} {:<28} {ours} against {:>8.2} of {}{floor}; ratio {ratio}, goal {:.2}: {}",
            row.id,
            row.variant,
            row.peer,
            row.peer_name,
            row.goal,
            if row.met { "met" } else { "MISSED" },
        ));
        self.0.push(row);
    }

    /// Writes the file.
    ///
    /// # Panics
    /// If it cannot be read, understood or written.
    pub fn write(self) {
        let path = target().join("bench/summary.json");
        std::fs::create_dir_all(path.parent().expect("the path has two parts")).expect("create target/bench");
        let mut rows: Vec<Row> = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).expect("target/bench/summary.json is ours"),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => panic!("{}: {error}", path.display()),
        };
        rows.retain(|old| self.0.iter().all(|new| new.id != old.id));
        rows.extend(self.0);
        let text = serde_json::to_string_pretty(&rows).expect("rows always serialise");
        std::fs::write(&path, text + "\n").unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
}
