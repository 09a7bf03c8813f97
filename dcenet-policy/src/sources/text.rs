//! From text to documents, and back from a field to its line.

use serde_json::Value;

use super::SourceError;
use super::networkpolicy::{MAX_TEXT, within};

/// Reads all documents of a YAML text but the empty ones.
#[cfg(feature = "yaml")]
pub(super) fn yaml(text: &str) -> Result<Vec<Value>, SourceError> {
    within("", 0, "bytes", text.len(), MAX_TEXT)?;
    located::values(text).map_err(|source| SourceError::Syntax { format: "YAML", source: Box::new(source) })
}

/// Reads a JSON text.
pub(super) fn json(text: &str) -> Result<Value, SourceError> {
    within("", 0, "bytes", text.len(), MAX_TEXT)?;
    serde_json::from_str(text).map_err(|source| SourceError::Syntax { format: "JSON", source: Box::new(source) })
}

#[cfg(feature = "yaml")]
pub(super) use self::located::Lines;

/// Only the YAML reader counts lines.
#[cfg(not(feature = "yaml"))]
pub(super) struct Lines<'a>(std::marker::PhantomData<&'a str>);

#[cfg(not(feature = "yaml"))]
impl<'a> Lines<'a> {
    pub(super) fn new(_: &'a str) -> Self {
        Self(std::marker::PhantomData)
    }

    pub(super) fn line(&self, _: usize, _: &str) -> Option<u64> {
        None
    }
}

#[cfg(feature = "yaml")]
mod located {
    use std::cell::OnceCell;
    use std::fmt;

    use serde::Deserialize;
    use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
    use serde_json::Value;
    use serde_saphyr::{NonFiniteFloatPolicy, Spanned};

    use crate::sources::fields::join_entry;
    use crate::sources::networkpolicy::{MAX_DOCUMENTS, MAX_NODES};

    /// The documents as JSON has them.
    ///
    /// A plain scalar of the form of a float that is beyond `f64`, such as `12e4567`, is its own text: printers of YAML
    /// that find no float in it leave it without quotes (`resolve` in `go.yaml.in/yaml/v2` takes what
    /// `strconv.ParseFloat` finds out of range for text).
    pub(super) fn values(text: &str) -> Result<Vec<Value>, serde_saphyr::Error> {
        let error = match parse(text, NonFiniteFloatPolicy::Reject) {
            Err(error) if matches!(error.without_snippet(), serde_saphyr::Error::NonFiniteFloat { .. }) => error,
            other => return other,
        };
        // The parser does not hand over the text of such a scalar, but says where it is.
        let nodes: Vec<Spanned<Node>> = parse(text, NonFiniteFloatPolicy::PassThrough)?;
        nodes.into_iter().map(|node| value(text, node)).collect::<Option<_>>().ok_or(error)
    }

    fn parse<T: DeserializeOwned>(text: &str, floats: NonFiniteFloatPolicy) -> Result<Vec<T>, serde_saphyr::Error> {
        // YAML 1.2: a namespace may be called "n" without being false.
        let options = serde_saphyr::options! {
            strict_booleans: true,
            non_finite_float_policy: floats,
            budget: serde_saphyr::budget! {
                max_documents: MAX_DOCUMENTS,
                max_nodes: MAX_NODES,
                max_events: 2 * MAX_NODES,
            },
        };
        serde_saphyr::from_multiple_with_options(text, options)
    }

    /// `None` where there is `.inf` or `.nan`, which JSON does not have.
    fn value(text: &str, node: Spanned<Node>) -> Option<Value> {
        Some(match node.value {
            Node::Scalar(value) => value,
            Node::NonFinite => {
                let span = node.defined.span();
                let start = usize::try_from(span.byte_offset()?).ok()?;
                let source = text.get(start..start.checked_add(usize::try_from(span.byte_len()?).ok()?)?)?;
                let digits = source.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
                let infinite = source.parse::<f64>().is_ok_and(f64::is_infinite);
                Some(source).filter(|_| digits && infinite)?.into()
            }
            Node::List(elements) => elements.into_iter().map(|node| value(text, node)).collect::<Option<_>>()?,
            Node::Map(entries) => {
                let entries = entries.into_iter().map(|(key, node)| Some((key.value, value(text, node)?)));
                Value::Object(entries.collect::<Option<_>>()?)
            }
        })
    }

    /// Finds lines of fields. JSON is read as the YAML that it is. The text is parsed once more for it, when the first line
    /// is asked for, so that only what is wrong or closed pays for lines.
    pub(in crate::sources) struct Lines<'a> {
        text: &'a str,
        documents: OnceCell<Vec<Spanned<Node>>>,
    }

    impl<'a> Lines<'a> {
        pub(in crate::sources) fn new(text: &'a str) -> Self {
            Self { text, documents: OnceCell::new() }
        }

        /// The line, from 1, of a field of a document, or of the nearest thing around it where it is missing; none where
        /// the text is no YAML.
        pub(in crate::sources) fn line(&self, document: usize, path: &str) -> Option<u64> {
            let parsed = || parse(self.text, NonFiniteFloatPolicy::PassThrough).unwrap_or_default();
            let root = self.documents.get_or_init(parsed).get(document)?;
            let (mut at, mut found, mut rest) = (&root.value, root.referenced.line(), path);
            loop {
                let next = match at {
                    Node::Scalar(_) | Node::NonFinite => None,
                    Node::List(elements) => element(rest).and_then(|(index, rest)| {
                        let element = elements.get(index)?;
                        Some((element.referenced.line(), &element.value, rest))
                    }),
                    Node::Map(entries) => {
                        let field = rest.strip_prefix('.').unwrap_or(rest);
                        entries.iter().find_map(|(key, node)| {
                            let rest = after(field, &key.value).or_else(|| after(rest, &join_entry("", &key.value)))?;
                            Some((key.referenced.line(), &node.value, rest))
                        })
                    }
                };
                match next {
                    Some(next) => (found, at, rest) = next,
                    None => return Some(found).filter(|line| *line > 0),
                }
            }
        }
    }

    /// The index at the beginning of a path, and the rest.
    fn element(path: &str) -> Option<(usize, &str)> {
        let (index, rest) = path.strip_prefix('[')?.split_once(']')?;
        Some((index.parse().ok()?, rest))
    }

    /// What follows in a path, where it leads to `first` or into it.
    fn after<'a>(path: &'a str, first: &str) -> Option<&'a str> {
        path.strip_prefix(first).filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    }

    enum Node {
        Scalar(Value),
        /// A float that `f64` has no finite number for.
        NonFinite,
        List(Vec<Spanned<Node>>),
        Map(Vec<(Spanned<String>, Spanned<Node>)>),
    }

    impl<'de> Deserialize<'de> for Node {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            deserializer.deserialize_any(NodeVisitor)
        }
    }

    struct NodeVisitor;

    impl<'de> Visitor<'de> for NodeVisitor {
        type Value = Node;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("anything")
        }

        fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
            Ok(Node::Scalar(value.into()))
        }

        fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
            Ok(Node::Scalar(value.into()))
        }

        fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
            Ok(Node::Scalar(value.into()))
        }

        fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
            Ok(if value.is_finite() { Node::Scalar(value.into()) } else { Node::NonFinite })
        }

        fn visit_str<E>(self, value: &str) -> Result<Node, E> {
            Ok(Node::Scalar(value.into()))
        }

        fn visit_string<E>(self, value: String) -> Result<Node, E> {
            Ok(Node::Scalar(value.into()))
        }

        fn visit_none<E>(self) -> Result<Node, E> {
            Ok(Node::Scalar(Value::Null))
        }

        fn visit_unit<E>(self) -> Result<Node, E> {
            Ok(Node::Scalar(Value::Null))
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
            Node::deserialize(deserializer)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
            let mut elements = Vec::new();
            while let Some(element) = list.next_element()? {
                elements.push(element);
            }
            Ok(Node::List(elements))
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
            let mut entries = Vec::new();
            while let Some(entry) = map.next_entry()? {
                entries.push(entry);
            }
            Ok(Node::Map(entries))
        }
    }
}
