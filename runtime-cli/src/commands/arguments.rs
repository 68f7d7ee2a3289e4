//! Long options with one dash, as programs written in Go take them: `-bundle` is `--bundle`.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Command};

/// `words`, the program's name first, with two dashes before every long option of `program` or of its
/// verb. What follows a container's name is left as it is: it may be a command for the container.
pub fn with_two_dashes(program: impl FnOnce() -> Command, words: Vec<OsString>) -> Vec<OsString> {
    let is_suspect = |word: &OsString| {
        let bytes = word.as_encoded_bytes();
        bytes.len() > 2 && bytes[0] == b'-' && bytes[1] != b'-'
    };
    // Engines write two, and need not wait for the rest.
    if words.iter().any(is_suspect) { converted(&program(), words) } else { words }
}

fn converted(program: &Command, words: Vec<OsString>) -> Vec<OsString> {
    let mut words = words.into_iter();
    let mut result: Vec<OsString> = words.next().into_iter().collect();
    let mut command = program;
    while let Some(word) = words.next() {
        let text = word.to_string_lossy().into_owned();
        if text == "--" {
            result.push(word);
            break;
        }
        let Some(option) = text.strip_prefix('-').filter(|option| !option.is_empty()) else {
            result.push(word);
            match command.find_subcommand(&text) {
                Some(verb) => command = verb,
                None => break,
            }
            continue;
        };
        let name = option.strip_prefix('-').unwrap_or(option);
        let (name, value) =
            name.split_once('=').map_or((name, None), |(name, it)| (name, Some(it)));
        let long = command.get_arguments().find(|known| known.get_long() == Some(name));
        let is_long = option.starts_with('-') || long.is_some();
        let fix = if is_long && !option.starts_with('-') { "-" } else { "" };
        result.push(format!("{fix}{text}").into());
        // An option's value may look like anything.
        let known = if is_long { long } else { short(command, option) };
        if value.is_none() && known.is_some_and(takes_value) {
            result.extend(words.next());
        }
    }
    result.extend(words);
    result
}

/// The option that the last letter of a group such as `it` stands for.
fn short<'a>(command: &'a Command, group: &str) -> Option<&'a Arg> {
    let letter = group.chars().last();
    command.get_arguments().find(|known| known.get_short().is_some() && known.get_short() == letter)
}

fn takes_value(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::Set | ArgAction::Append)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn line_with_two_dashes(line: &str) -> String {
        let words = line.split(' ').map(OsString::from).collect();
        let words = with_two_dashes(crate::Cli::command, words);
        words.join(" ".as_ref()).into_string().unwrap()
    }

    #[test]
    fn a_long_option_may_have_one_dash() {
        assert_eq!(
            line_with_two_dashes("coracle -root /r -log=/l create -bundle /b box"),
            "coracle --root /r --log=/l create --bundle /b box"
        );
    }

    #[test]
    fn short_options_and_two_dashes_stay() {
        for line in [
            "coracle --root -x create -b /b box",
            "coracle exec -it box sh",
            "coracle exec -u 7 box ls -all",
            "coracle exec -e -tty box",
            "coracle kill -a -- -tty",
            "coracle -v",
        ] {
            assert_eq!(line_with_two_dashes(line), line);
        }
    }

    #[test]
    fn options_of_another_verb_are_not_known() {
        assert_eq!(line_with_two_dashes("coracle kill -bundle box"), "coracle kill -bundle box");
    }
}
