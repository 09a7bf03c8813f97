//! Dumps of Kubernetes objects.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Origin, PassedOver, SourceError, Unreadable};

/// The notation of a dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DumpFormat {
    /// One JSON value. The parser is several times as fast as that of YAML.
    Json,
    /// YAML 1.2, one document or several.
    Yaml,
}

/// Objects that somebody dumped, such as by `kubectl get ippools.whereabouts.cni.cncf.io -A -o json`.
#[derive(Debug, Clone)]
pub struct Dump {
    file: PathBuf,
    objects: Vec<Value>,
}

/// The most YAML documents in one dump.
const MAX_DOCUMENTS: usize = 100_000;
/// The most YAML nodes in one dump, aliases expanded.
const MAX_NODES: usize = 20_000_000;

impl Dump {
    /// Reads a file: JSON if its name ends so, else YAML.
    ///
    /// # Errors
    /// It cannot be read, or is neither.
    pub fn open(file: impl Into<PathBuf>) -> Result<Self, SourceError> {
        let file = file.into();
        let io = |source| SourceError::Io { doing: format!("reading {}", file.display()), source };
        let text = fs::read_to_string(&file).map_err(io)?;
        let json = file.extension().is_some_and(|extension| extension == "json");
        Self::parse(file, &text, if json { DumpFormat::Json } else { DumpFormat::Yaml })
    }

    /// Reads a text; `file` stands for it in what is told.
    ///
    /// # Errors
    /// [`SourceError::Syntax`].
    pub fn parse(file: impl Into<PathBuf>, text: &str, format: DumpFormat) -> Result<Self, SourceError> {
        let file = file.into();
        let syntax = |line, reason: String| {
            let origin = Origin { file: file.clone(), line, field: String::new() };
            SourceError::Syntax { origin, reason }
        };
        let documents: Vec<Value> = match format {
            DumpFormat::Json => {
                vec![serde_json::from_str(text).map_err(|e| syntax(Some(e.line()), e.to_string()))?]
            }
            DumpFormat::Yaml => {
                // YAML 1.2: a namespace may be called "n" without being false.
                let options = serde_saphyr::options! {
                    strict_booleans: true,
                    budget: serde_saphyr::budget! {
                        max_documents: MAX_DOCUMENTS,
                        max_nodes: MAX_NODES,
                        max_events: 2 * MAX_NODES,
                        max_total_scalar_bytes: 1 << 30,
                    },
                };
                serde_saphyr::from_multiple_with_options(text, options)
                    .map_err(|e| syntax(e.location().and_then(|at| usize::try_from(at.line()).ok()), e.to_string()))?
            }
        };
        let mut objects = Vec::new();
        for document in documents {
            flatten(document, None, &mut objects);
        }
        Ok(Self { file, objects })
    }

    pub(super) fn objects(&self) -> impl Iterator<Item = Object<'_>> {
        self.objects.iter().map(|value| Object { file: &self.file, value })
    }
}

/// Takes lists apart. Items of a typed list need not name their kind.
fn flatten(document: Value, kind: Option<&str>, objects: &mut Vec<Value>) {
    let Value::Object(mut object) = document else {
        if !document.is_null() {
            objects.push(document);
        }
        return;
    };
    let own = object.get("kind").and_then(Value::as_str).map(str::to_owned);
    if let Some(Value::Array(items)) = object.get_mut("items")
        && own.as_ref().is_none_or(|own| own.ends_with("List"))
    {
        let of = own.as_deref().and_then(|own| own.strip_suffix("List")).filter(|of| !of.is_empty());
        for item in std::mem::take(items) {
            flatten(item, of, objects);
        }
        return;
    }
    if let (None, Some(kind)) = (&own, kind) {
        object.insert("kind".to_owned(), kind.into());
    }
    objects.push(Value::Object(object));
}

/// An object of a dump.
#[derive(Clone, Copy)]
pub(super) struct Object<'a> {
    file: &'a Path,
    value: &'a Value,
}

impl<'a> Object<'a> {
    pub(super) fn kind(self) -> &'a str {
        self.text("/kind").unwrap_or_default()
    }

    pub(super) fn name(self) -> &'a str {
        self.text("/metadata/name").unwrap_or_default()
    }

    /// The text at a JSON pointer (RFC 6901).
    pub(super) fn text(self, pointer: &str) -> Option<&'a str> {
        self.value.pointer(pointer)?.as_str()
    }

    /// What is at a JSON pointer, null if nothing is.
    pub(super) fn value(self, pointer: &str) -> &'a Value {
        self.value.pointer(pointer).unwrap_or(&Value::Null)
    }

    pub(super) fn list(self, pointer: &str) -> &'a [Value] {
        self.value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// The map at a JSON pointer. Absent and null stand for an empty one, as Kubernetes writes it.
    pub(super) fn map(self, pointer: &str) -> Result<Option<&'a Map<String, Value>>, Unreadable> {
        match self.value.pointer(pointer) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.unreadable(&dotted(pointer), format!("{} is no map", short(other)))),
        }
    }

    pub(super) fn origin(self, field: &str) -> Origin {
        let name = self.name();
        Origin::new(self.file, format!("{} {name}: {field}", self.kind()))
    }

    pub(super) fn unreadable(self, field: &str, reason: impl Into<String>) -> Unreadable {
        Unreadable { origin: self.origin(field), address: None, reason: reason.into() }
    }

    pub(super) fn passed_over(self, field: &str, what: impl Into<String>) -> PassedOver {
        let origin = if field.is_empty() {
            Origin::new(self.file, format!("{} {}", self.kind(), self.name()))
        } else {
            self.origin(field)
        };
        PassedOver { origin, what: what.into() }
    }

    /// What an object of a kind that the source does not know counts as.
    pub(super) fn stranger(self) -> PassedOver {
        self.passed_over("", "an object of a kind that holds no address in use")
    }
}

fn dotted(pointer: &str) -> String {
    pointer.trim_start_matches('/').replace('/', ".")
}

/// A value as it is shown to people.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

/// A text of a map; absent, null and empty count as none.
pub(super) fn text_of<'a>(value: &'a Value, key: &str) -> Result<Option<&'a str>, String> {
    match value.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) if text.is_empty() => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(format!("{key}: {} is no text", short(other))),
    }
}

/// The same, parsed.
pub(super) fn parsed_of<T: std::str::FromStr<Err = E>, E: std::fmt::Display>(
    value: &Value,
    key: &str,
) -> Result<Option<T>, String> {
    text_of(value, key)?.map(str::parse).transpose().map_err(|error| format!("{key}: {error}"))
}
