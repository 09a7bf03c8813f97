//! Readers of policy languages; one file each, all translating into [`model`](crate::model).
//!
//! A reader takes text and returns policies; [`kubernetes`] takes the pods and namespaces with them, and knows lines.
//! Reading files is the caller's. Whatever a reader does not understand it
//! refuses, for a policy that is only partly understood is a hole or an outage.

pub mod clusternetworkpolicy;
mod fields;
pub mod kubernetes;
pub mod native;
pub mod networkpolicy;
mod nodes;
mod notes;
mod objects;
mod services;
mod text;

/// Why a text was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// The text is not YAML or JSON.
    #[error("not {format}: {source}")]
    Syntax {
        /// `YAML` or `JSON`.
        format: &'static str,
        /// The parser's complaint, with line and column.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A field has a value that it cannot have.
    #[error("document {document}: {path}: {value}: {reason}")]
    Invalid {
        /// Index of the document in the text, from 0, empty ones not counted.
        document: usize,
        /// The field, such as `spec.ingress[0].ports[1].endPort`.
        path: String,
        /// What it holds, as JSON, shortened; `nothing` where it is missing.
        value: String,
        /// What is wrong and what would be accepted.
        reason: String,
    },
    /// A field that the document's kind does not have.
    #[error("document {document}: {path}: unknown field{}", suggest(suggestion))]
    UnknownField {
        /// Index of the document in the text, from 0, empty ones not counted.
        document: usize,
        /// The field with its path.
        path: String,
        /// The known field that resembles it most.
        suggestion: Option<String>,
    },
    /// The text is fine but larger than this implementation takes.
    #[error("document {document}: {path}: {found} {what}, more than the {limit} that this implementation takes")]
    ImplLimitExceeded {
        /// Index of the document in the text, from 0, empty ones not counted.
        document: usize,
        /// The field that is too large; empty for the text as a whole.
        path: String,
        /// What is counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many there may be.
        limit: usize,
    },
}

fn suggest(suggestion: &Option<String>) -> String {
    match suggestion {
        Some(name) => format!("; did you mean {name:?}?"),
        None => "; remove it".to_owned(),
    }
}
