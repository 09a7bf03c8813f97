//! Reading our own sections of a configuration: strict, with the path of the wrong key and the likely right one.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// A value in a configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct SectionError {
    /// Path from the top of the configuration, such as `link.mtu` or `ipam.pools[0].subnet`.
    pub field: String,
    /// What is wrong and what would be right.
    pub reason: String,
}

/// Reads a section into its type. `path` is where the section stands, for errors.
///
/// # Errors
/// Names the innermost wrong field. For an unknown key the message proposes the known key that is spelled most alike.
pub fn read<T: DeserializeOwned>(path: &str, value: &Value) -> Result<T, SectionError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string();
        let field = match inner.as_str() {
            "." => path.to_owned(),
            _ if inner.starts_with('[') => format!("{path}{inner}"),
            _ => format!("{path}.{inner}"),
        };
        let reason = with_suggestion(error.into_inner().to_string());
        SectionError { field, reason }
    })
}

/// The known word that is most like `word`, if one is alike at all.
pub fn suggestion<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = strsim::damerau_levenshtein;
    known
        .into_iter()
        // Of names that differ in their case alone, as aliases do, the one that is written as the word is.
        .map(|one| (distance(&word.to_lowercase(), &one.to_lowercase()), distance(word, one), one))
        .filter(|(distance, _, candidate)| *distance <= 1 + candidate.len() / 4)
        .min()
        .map(|(_, _, candidate)| candidate)
}

/// Serde quotes names in backticks: the first is the unknown one, the others are those that it expected.
fn with_suggestion(message: String) -> String {
    if !message.starts_with("unknown field") && !message.starts_with("unknown variant") {
        return message;
    }
    let mut names = message.split('`').skip(1).step_by(2);
    let Some(unknown) = names.next() else { return message };
    match suggestion(unknown, names) {
        Some(known) => format!("{message}; did you mean `{known}`?"),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only the errors are looked at")]
    struct Outer {
        pools: Vec<Inner>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only the errors are looked at")]
    struct Inner {
        subnet: u8,
        gateway: Option<u8>,
    }

    #[test]
    fn errors_name_the_path_and_propose_the_likely_key() {
        let error = read::<Outer>("ipam", &json!({"pools": [{"subnet": 1}, {"subnet": 1, "gatewey": 2}]})).unwrap_err();
        assert_eq!(error.field, "ipam.pools[1].gatewey");
        assert!(error.reason.contains("did you mean `gateway`?"), "{error}");

        let error = read::<Outer>("ipam", &json!({"pools": [{"subnet": 300}]})).unwrap_err();
        assert_eq!(error.field, "ipam.pools[0].subnet");

        let error = read::<Outer>("ipam", &json!({"zzz": 1})).unwrap_err();
        assert!(!error.reason.contains("did you mean"), "{error}");

        let error = read::<Outer>("ipam", &json!(3)).unwrap_err();
        assert_eq!(error.field, "ipam");
    }
}
