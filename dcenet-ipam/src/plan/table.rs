//! The tree of a space, for people.

use std::fmt;

use super::index::Index;
use super::model::{Prefix, Utilisation};
use crate::model::AddressSpace;

/// The prefixes of a space at one moment, each before what it contains. Its text is a table.
#[derive(Debug, Clone, PartialEq)]
pub struct Tree {
    /// The space.
    pub space: AddressSpace,
    /// The changes that the space had seen.
    pub epoch: u64,
    /// The prefixes.
    pub rows: Vec<Row>,
}

/// A prefix in its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// How many prefixes are around it.
    pub depth: usize,
    /// The prefix.
    pub prefix: Prefix,
    /// How full it is. Of a delegated prefix its parent does not see what is in it.
    pub utilisation: Utilisation,
}

impl Tree {
    pub(crate) fn of(space: &AddressSpace, epoch: u64, index: &Index) -> Self {
        let rows = index
            .iter()
            .filter_map(|(node, _)| {
                let depth = index.chain(node).len() - 1;
                Some(Row { depth, prefix: index.prefix(space, node)?, utilisation: index.utilisation(node)? })
            })
            .collect();
        Self { space: space.clone(), epoch, rows }
    }
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["PREFIX", "LEVEL", "NAME", "OWNER", "PURPOSE", "STATE", "EPOCH", "USED", "LARGEST FREE"];
        let mut lines = vec![head.map(str::to_owned)];
        for Row { depth, prefix, utilisation } in &self.rows {
            // Leaves are used by what is leased in them, or claimed by their owner elsewhere.
            let leaf = utilisation.children == 0;
            let percent = utilisation.percent();
            let used = match leaf {
                true => "-".to_owned(),
                false if percent > 0.0 && percent < 0.1 => "<0.1%".to_owned(),
                false => format!("{percent:.1}%"),
            };
            let largest = match utilisation.largest_free {
                _ if leaf => "-".to_owned(),
                Some(length) => format!("/{length}"),
                None => "full".to_owned(),
            };
            lines.push([
                format!("{:1$}{2}", "", depth * 2, prefix.cidr),
                prefix.level.to_string(),
                prefix.name.clone(),
                prefix.owner.clone(),
                prefix.purpose.to_string(),
                prefix.state.to_string(),
                prefix.epoch.to_string(),
                used,
                largest,
            ]);
        }
        let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or_default();
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        for line in &lines {
            let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}
