//! What a reader of a report should know of what was read.

use std::fmt;

use serde::Serialize;

use super::kubernetes::Documents;

/// Something that a verdict does not show and that may surprise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Of what kind it is.
    pub kind: NoteKind,
    /// In words, for people.
    pub text: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Kinds of [`Note`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NoteKind {
    /// A pod takes no part ([`Documents::left_out`]).
    LeftOut,
    /// A namespace is not given ([`Documents::assumed_namespaces`]).
    AssumedNamespace,
    /// A rule is closed ([`Documents::closed`]).
    ClosedRule,
    /// A policy names a tier that is not given ([`Documents::unknown_tiers`]).
    UnknownTier,
    /// Policies share a priority ([`Documents::ties`]).
    Tie,
    /// Objects of a kind do not count ([`Documents::unused`]).
    Unused,
    /// A file or directory is not read. [`Documents::notes`] has none of these: they are of whoever reads files.
    NotRead,
}

impl Documents {
    /// All that may surprise, in the order of [`NoteKind`].
    pub fn notes(&self) -> Vec<Note> {
        let left_out = self.left_out.iter();
        let left_out = left_out.map(|(pod, reason)| (NoteKind::LeftOut, format!("pod {pod} is left out: {reason}")));
        let assumed = self.assumed_namespaces().into_iter().map(|namespace| {
            let text = format!("namespace {namespace} is not given: it has no label but its name");
            (NoteKind::AssumedNamespace, text)
        });
        let closed = self.closed.iter().map(|closed| (NoteKind::ClosedRule, format!("closed: {closed}")));
        let unknown = self.unknown_tiers().map(|id| {
            let text =
                format!("{id}: there is no tier {}: the pods that the policy governs are closed; add a Tier", id.tier);
            (NoteKind::UnknownTier, text)
        });
        let ties = self.ties().into_iter().map(|tied| {
            let names: Vec<String> = tied.iter().map(ToString::to_string).collect();
            let names = names.join(", ");
            (NoteKind::Tie, format!("{names} have one priority: the first by name counts, elsewhere any may"))
        });
        let unused = self.unused.iter();
        let unused = unused.map(|(kind, count)| (NoteKind::Unused, format!("not used: {kind} ({count})")));
        let all = left_out.chain(assumed).chain(closed).chain(unknown).chain(ties).chain(unused);
        all.map(|(kind, text)| Note { kind, text }).collect()
    }
}
