//! A kernel configuration fragment: parsed, stripped of its comments, compared with what became of it.

use std::collections::BTreeMap;

/// Why a text is not a configuration fragment.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Neither comment nor `CONFIG_NAME=value`.
    #[error("line {line}: expected CONFIG_NAME=value, found {text:?}")]
    NotAnOption {
        /// Counted from one.
        line: usize,
        /// The line.
        text: String,
    },
    /// An option that an earlier line has set.
    #[error("line {line}: {name} is set twice")]
    Twice {
        /// Counted from one.
        line: usize,
        /// The option.
        name: String,
    },
}

/// The options that a kernel must be built with.
#[derive(Debug)]
pub struct Fragment {
    /// `CONFIG_NAME` to its value as written, `n` for off.
    options: BTreeMap<String, String>,
}

impl Fragment {
    /// Parses lines of the kernel's own form; an option is off by `=n`, as `is not set` is a comment.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut options = BTreeMap::new();
        for (line, text) in (1..).zip(text.lines()) {
            if text.is_empty() || text.starts_with("# ") || text == "#" {
                continue;
            }
            let (name, value) =
                option(text).ok_or_else(|| Error::NotAnOption { line, text: text.to_owned() })?;
            if options.insert(name.to_owned(), value.to_owned()).is_some() {
                return Err(Error::Twice { line, name: name.to_owned() });
            }
        }
        Ok(Self { options })
    }

    /// The options alone, sorted: what the kernel build reads and what identifies it.
    pub fn stripped(&self) -> String {
        self.options.iter().map(|(name, value)| format!("{name}={value}\n")).collect()
    }

    /// The options that a finished `.config` has otherwise than wanted, as the fragment has them.
    pub fn dropped(&self, config: &str) -> Vec<String> {
        let set: BTreeMap<&str, &str> = config.lines().filter_map(option).collect();
        let wanted = self.options.iter();
        wanted
            .filter(|(name, value)| {
                set.get(name.as_str()).copied().unwrap_or("n") != value.as_str()
            })
            .map(|(name, value)| format!("{name}={value}"))
            .collect()
    }
}

fn option(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.split_once('=')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let name_is_right = name.strip_prefix("CONFIG_").is_some_and(|rest| rest.chars().all(plain));
    let quoted = value.len() >= 2 && value.starts_with('"') && value.ends_with('"');
    let bare = !value.is_empty() && value.chars().all(|c| plain(c) || c == '-');
    (name_is_right && (quoted || bare)).then_some((name, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# reason\nCONFIG_NET=y\nCONFIG_PCI=n\n\n# name\nCONFIG_LSM=\"landlock\"\n";

    #[test]
    fn comments_and_blank_lines_do_not_count() {
        let fragment = Fragment::parse(TEXT).unwrap();

        assert_eq!(fragment.stripped(), "CONFIG_LSM=\"landlock\"\nCONFIG_NET=y\nCONFIG_PCI=n\n");
    }

    #[test]
    fn a_configuration_with_all_options_drops_none() {
        let config = "CONFIG_NET=y\n# CONFIG_PCI is not set\nCONFIG_LSM=\"landlock\"\nCONFIG_X=y\n";

        assert!(Fragment::parse(TEXT).unwrap().dropped(config).is_empty());
    }

    #[test]
    fn lost_changed_and_switched_on_options_are_named() {
        let config = "CONFIG_PCI=y\nCONFIG_LSM=\"landlock,bpf\"\n";

        assert_eq!(
            Fragment::parse(TEXT).unwrap().dropped(config),
            ["CONFIG_LSM=\"landlock\"", "CONFIG_NET=y", "CONFIG_PCI=n"]
        );
    }

    #[test]
    fn an_option_set_twice_is_an_error() {
        let error = Fragment::parse("CONFIG_A=y\nCONFIG_A=n\n").unwrap_err();

        assert_eq!(error, Error::Twice { line: 2, name: "CONFIG_A".to_owned() });
    }

    #[test]
    fn anything_else_is_an_error_with_its_line() {
        for text in ["CONFIG_A", "A=y", "CONFIG_A=", "CONFIG_A=y # why", "CONFIG_A=\"x"] {
            assert!(
                matches!(Fragment::parse(text), Err(Error::NotAnOption { line: 1, .. })),
                "{text}"
            );
        }
    }
}
