//! From text to documents, and back from a field to its line.

use serde_json::Value;

use super::SourceError;
use super::networkpolicy::{MAX_TEXT, within};

/// Reads all documents of a YAML text but the empty ones.
#[cfg(feature = "yaml")]
pub(super) fn yaml(text: &str) -> Result<Vec<Value>, SourceError> {
    within("", 0, "bytes", text.len(), MAX_TEXT)?;
    located::parse(text).map_err(|source| SourceError::Syntax { format: "YAML", source: Box::new(source) })
}

/// Reads a JSON text.
pub(super) fn json(text: &str) -> Result<Value, SourceError> {
    within("", 0, "bytes", text.len(), MAX_TEXT)?;
    serde_json::from_str(text).map_err(|source| SourceError::Syntax { format: "JSON", source: Box::new(source) })
}

#[cfg(feature = "yaml")]
pub(super) use self::located::line;

#[cfg(feature = "yaml")]
mod located {
    use std::fmt;

    use serde::Deserialize;
    use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
    use serde_saphyr::Spanned;

    use crate::sources::fields::{join, join_entry, join_index};
    use crate::sources::networkpolicy::{MAX_DOCUMENTS, MAX_NODES};

    pub(super) fn parse<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, serde_saphyr::Error> {
        // YAML 1.2: a namespace may be called "n" without being false.
        let options = serde_saphyr::options! {
            strict_booleans: true,
            budget: serde_saphyr::budget! {
                max_documents: MAX_DOCUMENTS,
                max_nodes: MAX_NODES,
                max_events: 2 * MAX_NODES,
            },
        };
        serde_saphyr::from_multiple_with_options(text, options)
    }

    /// The line, from 1, of a field of a document, or of the nearest thing around it where it is missing. JSON is read as
    /// the YAML that it is. The text is parsed once more for it, so that only errors pay for lines.
    pub(in crate::sources) fn line(text: &str, document: usize, path: &str) -> Option<u64> {
        let documents: Vec<Spanned<Shape>> = parse(text).ok()?;
        let mut at = &documents.get(document)?.value;
        let mut found = documents.get(document)?.referenced.line();
        let mut here = String::new();
        loop {
            let next = match at {
                Shape::Scalar => None,
                Shape::List(elements) => (0..)
                    .zip(elements)
                    .map(|(index, element)| (join_index(&here, index), element.referenced.line(), &element.value))
                    .find(|(inner, ..)| leads_to(inner, path)),
                Shape::Map(entries) => entries
                    .iter()
                    .flat_map(|(key, value)| {
                        let line = key.referenced.line();
                        [(join(&here, &key.value), line, value), (join_entry(&here, &key.value), line, value)]
                    })
                    .find(|(inner, ..)| leads_to(inner, path)),
            };
            match next {
                Some((inner, line, value)) => (here, found, at) = (inner, line, value),
                None => return Some(found).filter(|line| *line > 0),
            }
        }
    }

    fn leads_to(inner: &str, path: &str) -> bool {
        path.strip_prefix(inner).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    }

    /// A document without its values.
    enum Shape {
        Scalar,
        List(Vec<Spanned<Shape>>),
        Map(Vec<(Spanned<String>, Shape)>),
    }

    impl<'de> Deserialize<'de> for Shape {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(ShapeVisitor)
        }
    }

    struct ShapeVisitor;

    impl<'de> Visitor<'de> for ShapeVisitor {
        type Value = Shape;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("anything")
        }

        fn visit_bool<E>(self, _: bool) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_i64<E>(self, _: i64) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_u64<E>(self, _: u64) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_i128<E>(self, _: i128) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_u128<E>(self, _: u128) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_f64<E>(self, _: f64) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_str<E>(self, _: &str) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_bytes<E>(self, _: &[u8]) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_none<E>(self) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_unit<E>(self) -> Result<Shape, E> {
            Ok(Shape::Scalar)
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Shape, D::Error> {
            Shape::deserialize(deserializer)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Shape, A::Error> {
            let mut elements = Vec::new();
            while let Some(element) = list.next_element()? {
                elements.push(element);
            }
            Ok(Shape::List(elements))
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shape, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(Shape::Map(entries))
        }
    }
}
