//! Failures told as runc tells them: what was done, a colon, and the kernel's reason in lower case.

use std::fmt::Display;
use std::io;

use agent_protocol::Failed;
use nix::errno::Errno;

/// Turns a system error into the answer the host gets.
pub trait Context<T> {
    /// Names the step that failed.
    fn context(self, step: impl Display) -> Result<T, Failed>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, step: impl Display) -> Result<T, Failed> {
        self.map_err(|error| {
            let error = error.into();
            Failed {
                message: format!("{step}: {}", reason(&error)),
                errno: error.raw_os_error().unwrap_or(0),
            }
        })
    }
}

/// A failure without a system error behind it.
pub fn failed(message: impl Into<String>) -> Failed {
    Failed { message: message.into(), errno: 0 }
}

/// A failure that says `message` alone and carries `errno`.
pub fn failed_with(message: impl Into<String>, errno: Errno) -> Failed {
    Failed { message: message.into(), errno: errno as i32 }
}

/// The kernel's words for `error`, starting in lower case as Go writes them: engines look for
/// "permission denied" and "no such file or directory".
pub fn reason(error: &io::Error) -> String {
    let Some(code) = error.raw_os_error() else { return error.to_string() };
    let text = Errno::from_raw(code).desc();
    let mut letters = text.chars();
    match (letters.next(), letters.next()) {
        (Some(first), Some(second)) if second.is_ascii_lowercase() => {
            format!("{}{}", first.to_ascii_lowercase(), &text[first.len_utf8()..])
        }
        _ => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_starts_in_lower_case_unless_it_is_an_abbreviation() {
        assert_eq!(reason(&Errno::ENOENT.into()), "no such file or directory");
        assert_eq!(reason(&Errno::EIO.into()), "I/O error");
    }

    #[test]
    fn context_keeps_the_error_number() {
        let result: Result<(), Failed> = Err(Errno::EPERM).context("mount /proc");

        let failed = result.unwrap_err();
        assert_eq!(failed.message, "mount /proc: operation not permitted");
        assert_eq!(failed.errno, Errno::EPERM as i32);
    }
}
