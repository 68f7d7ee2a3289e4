//! What is wrong with a configuration, rule by rule.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;

use super::ConfigError;

/// The rules that a configuration breaks, in the order of its fields.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<ConfigError>);

impl Problems {
    /// One more.
    pub(crate) fn add(&mut self, field: &str, rule: impl Into<String>) {
        self.0.push(ConfigError { field: field.to_owned(), rule: rule.into() });
    }

    /// One more if `outcome` is one, and of a field that has none yet.
    pub(crate) fn add_if<T>(&mut self, outcome: Result<T, ConfigError>) {
        if let Err(error) = outcome {
            if !self.has(&error.field) {
                self.0.push(error);
            }
        }
    }

    /// Whether `field` breaks a rule.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.0.iter().any(|problem| problem.field == field)
    }

    /// All of them.
    pub(crate) fn into_all(self) -> Vec<ConfigError> {
        self.0
    }

    /// The first one, if there is any.
    pub(crate) fn into_result(self) -> Result<(), ConfigError> {
        self.0.into_iter().next().map_or(Ok(()), Err)
    }

    /// A number of `min` to `max`.
    pub(super) fn in_range<T>(&mut self, field: &str, value: T, min: T, max: T)
    where
        T: Copy + PartialOrd + Display,
    {
        if value < min || value > max {
            self.add(field, format!("must be {min} to {max}, not {value}"));
        }
    }

    /// A path.
    pub(super) fn not_empty(&mut self, field: &str, path: &Path) {
        if path.as_os_str().is_empty() {
            self.add(field, "must name a file");
        }
    }

    /// A name the guest or the host knows a device by: printable, short and not used twice.
    pub(super) fn name_of<'a>(
        &mut self,
        field: &str,
        name: &'a str,
        max_bytes: usize,
        seen: &mut BTreeSet<&'a str>,
    ) {
        if name.is_empty() || name.len() > max_bytes {
            self.add(field, format!("must have 1 to {max_bytes} bytes, not {}", name.len()));
        } else if !name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/') {
            let rule = format!("must be printable ASCII without space or slash, not {name:?}");
            self.add(field, rule);
        } else if !seen.insert(name) {
            self.add(field, format!("must be used once, but {name:?} is there twice"));
        }
    }
}
