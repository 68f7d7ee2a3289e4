//! JSON from people: errors name the field, by its path, and the rule it breaks.

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::ConfigError;

/// Reads a `T`; fields it does not know are refused if it says so. The error is the first one found.
pub fn from_json<T: DeserializeOwned + Serialize>(text: &str) -> Result<T, ConfigError> {
    let mut reader = serde_json::Deserializer::from_str(text);
    let error = |field: String, source: serde_json::Error| {
        // The last name may not be known yet where the text ends or is no JSON. One that is empty is no
        // path either.
        let field = match field.trim_end_matches('?').trim_end_matches('.') {
            "" => "(document)".to_owned(),
            known => known.to_owned(),
        };
        ConfigError { field, rule: source.to_string() }
    };
    let value: T = serde_path_to_error::deserialize(&mut reader)
        .map_err(|wrong| error(wrong.path().to_string(), wrong.into_inner()))?;
    reader.end().map_err(|source| error(".".to_owned(), source))?;
    // Serde takes a list of values for an object, too: what nobody means, and no field has a name in.
    let whole = |source| error(".".to_owned(), source);
    let given = serde_json::from_str(text).map_err(whole)?;
    let known = serde_json::to_value(&value).map_err(whole)?;
    match list_for_object(&given, &known) {
        None => Ok(value),
        Some(path) => {
            let field = path.trim_start_matches('.');
            let field = if field.is_empty() { "(document)" } else { field };
            Err(ConfigError { field: field.to_owned(), rule: "must be an object".to_owned() })
        }
    }
}

/// Where `given` has a list for what is an object in `known`.
fn list_for_object(given: &Value, known: &Value) -> Option<String> {
    match (given, known) {
        (Value::Array(_), Value::Object(_)) => Some(String::new()),
        (Value::Object(given), Value::Object(known)) => given.iter().find_map(|(name, value)| {
            list_for_object(value, known.get(name)?).map(|path| format!(".{name}{path}"))
        }),
        (Value::Array(given), Value::Array(known)) => {
            (0..).zip(given).zip(known).find_map(|((index, given), known)| {
                list_for_object(given, known).map(|path| format!("[{index}]{path}"))
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmConfig;

    fn refused(text: &str) -> String {
        from_json::<VmConfig>(text).unwrap_err().to_string()
    }

    #[test]
    fn an_unknown_field_is_named_with_its_path() {
        let error = refused(r#"{"boot": {"kernel": "/k", "intrd": "/i"}}"#);

        assert!(error.starts_with("boot.intrd: unknown field `intrd`, expected one of"), "{error}");
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_place_in_a_list() {
        let error = refused(r#"{"boot": {"kernel": "/k"}, "disks": [{"id": 5, "path": "/d"}]}"#);

        assert!(error.starts_with("disks[0].id: invalid type: integer `5`"), "{error}");
    }

    #[test]
    fn a_missing_field_is_named() {
        let error = refused(r#"{"boot": {}}"#);

        assert!(error.starts_with("boot: missing field `kernel`"), "{error}");
    }

    #[test]
    fn a_field_without_a_name_is_refused_in_the_name_of_the_document() {
        let error = refused(r#"{"": 1, "boot": {"kernel": "/k"}}"#);

        assert!(error.starts_with("(document): unknown field ``"), "{error}");
    }

    #[test]
    fn text_that_ends_too_early_is_named_as_far_as_it_is_known() {
        assert!(refused("{").starts_with("(document): EOF while parsing an object"));
        assert!(refused(r#"{"boot": {"kern"#).starts_with("boot: EOF while parsing a string"));
    }

    #[test]
    fn a_list_is_no_object() {
        let error = refused(r#"{"boot": {"kernel": "/k"}, "disks": [["a", "/d"]]}"#);
        assert_eq!(error, "disks[0]: must be an object");
        assert_eq!(refused(r#"{"boot": ["/k"]}"#), "boot: must be an object");
        assert_eq!(refused(r#"[1, 1, [64], ["/k"]]"#), "(document): must be an object");
    }

    #[test]
    fn text_behind_the_document_is_refused() {
        let error = refused(r#"{"boot": {"kernel": "/k"}} {}"#);

        assert!(error.starts_with("(document): trailing characters"), "{error}");
    }
}
