//! Walks a document and knows where it is, so that every refusal names its place.

use serde_json::{Map, Value};

use super::SourceError;

/// A value at its place in a document.
#[derive(Clone)]
pub(super) struct At<'a> {
    pub(super) document: usize,
    pub(super) path: String,
    /// `None` where the field is missing or null, which the Kubernetes API does not distinguish.
    pub(super) value: Option<&'a Value>,
}

impl<'a> At<'a> {
    pub(super) fn root(document: usize, value: &'a Value) -> Self {
        Self { document, path: String::new(), value: Some(value) }
    }

    pub(super) fn invalid(&self, reason: impl Into<String>) -> SourceError {
        let value = match self.value {
            None => "nothing".to_owned(),
            Some(value) => shorten(value.to_string()),
        };
        let path = if self.path.is_empty() { "the document".to_owned() } else { self.path.clone() };
        SourceError::Invalid { document: self.document, path, value, reason: reason.into() }
    }

    /// The fields of an object; none if it is missing.
    ///
    /// Refuses fields that are not `known`.
    pub(super) fn fields(&self, known: &'static [&'static str]) -> Result<Fields<'a>, SourceError> {
        let map = match self.value {
            None => None,
            Some(Value::Object(map)) => Some(map),
            Some(_) => return Err(self.invalid(format!("must be an object with fields of {known:?}"))),
        };
        for key in map.into_iter().flat_map(Map::keys) {
            if !known.contains(&key.as_str()) {
                let closest = known
                    .iter()
                    .map(|name| (strsim::jaro_winkler(&key.to_lowercase(), &name.to_lowercase()), *name))
                    .filter(|(likeness, _)| *likeness > 0.8)
                    .max_by(|left, right| left.0.total_cmp(&right.0));
                return Err(SourceError::UnknownField {
                    document: self.document,
                    path: self.join(key),
                    suggestion: closest.map(|(_, name)| name.to_owned()),
                });
            }
        }
        Ok(Fields { at: self.clone(), map })
    }

    /// The fields of an object of which only some matter; none if it is missing.
    pub(super) fn some_fields(&self) -> Result<Fields<'a>, SourceError> {
        match self.value {
            None => Ok(Fields { at: self.clone(), map: None }),
            Some(Value::Object(map)) => Ok(Fields { at: self.clone(), map: Some(map) }),
            Some(_) => Err(self.invalid("must be an object")),
        }
    }

    /// The elements of a list; none if it is missing.
    pub(super) fn elements(&self) -> Result<Vec<At<'a>>, SourceError> {
        match self.value {
            None => Ok(Vec::new()),
            Some(Value::Array(elements)) => Ok(elements
                .iter()
                .enumerate()
                .map(|(index, value)| At {
                    document: self.document,
                    path: join_index(&self.path, index),
                    value: Some(value).filter(|value| !value.is_null()),
                })
                .collect()),
            Some(_) => Err(self.invalid("must be a list")),
        }
    }

    /// A map of text to text; none if it is missing.
    pub(super) fn text_map(&self) -> Result<Vec<(&'a str, At<'a>)>, SourceError> {
        match self.value {
            None => Ok(Vec::new()),
            Some(Value::Object(map)) => Ok(map
                .iter()
                .map(|(key, value)| {
                    let path = join_entry(&self.path, key);
                    (key.as_str(), At { document: self.document, path, value: Some(value) })
                })
                .collect()),
            Some(_) => Err(self.invalid("must be an object")),
        }
    }

    pub(super) fn text(&self) -> Result<&'a str, SourceError> {
        match self.value {
            Some(Value::String(text)) => Ok(text),
            None => Err(self.invalid("is required")),
            Some(_) => Err(self.invalid("must be text; quote it")),
        }
    }

    fn join(&self, name: &str) -> String {
        join(&self.path, name)
    }
}

/// The path of an object's field.
pub(super) fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// The path of a map's entry, whose key may hold dots.
pub(super) fn join_entry(path: &str, key: &str) -> String {
    format!("{path}[{key:?}]")
}

/// The path of a list's element.
pub(super) fn join_index(path: &str, index: usize) -> String {
    format!("{path}[{index}]")
}

/// The fields of an object.
pub(super) struct Fields<'a> {
    at: At<'a>,
    map: Option<&'a Map<String, Value>>,
}

impl<'a> Fields<'a> {
    /// The names of all fields that are set, known or not.
    pub(super) fn set(&self) -> impl Iterator<Item = &'a str> {
        let set = |(name, value): (&'a String, &'a Value)| (!value.is_null()).then_some(name.as_str());
        self.map.into_iter().flatten().filter_map(set)
    }

    pub(super) fn field(&self, name: &str) -> At<'a> {
        let value = self.map.and_then(|map| map.get(name)).filter(|value| !value.is_null());
        At { document: self.at.document, path: self.at.join(name), value }
    }
}

fn shorten(text: String) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
