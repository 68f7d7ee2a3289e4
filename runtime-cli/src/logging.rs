//! The log and the final error, in the forms runc writes and engines parse.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Mutex;

use log::{Level, LevelFilter, Log, Metadata, Record};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

pub use vmm::chain;

/// Go's `time.RFC3339`, which logrus writes: no fraction of a second.
const TIME_FORMAT: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");

/// Why logging cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--log-format` is neither of the two.
    #[error("invalid log-format: {0}: use text or json")]
    InvalidFormat(String),
    /// `--log` cannot be opened.
    #[error("open log file {path}")]
    Open {
        /// The log file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// How a line of the log looks (`--log-format`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `time="…" level=error msg="…"`.
    #[default]
    Text,
    /// `{"level":"error","msg":"…","time":"…"}`.
    Json,
}

impl FromStr for LogFormat {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            other => Err(Error::InvalidFormat(other.into())),
        }
    }
}

impl LogFormat {
    /// One line of the log, with its line feed.
    pub fn line(self, level: Level, message: &str, time: &str) -> String {
        let level = level_name(level);
        match self {
            LogFormat::Text => {
                format!("time={} level={level} msg={}\n", quoted(time), text_value(message))
            }
            LogFormat::Json => {
                let entry = JsonLine { level, msg: message, time };
                let mut line = serde_json::to_string(&entry).expect("strings serialize");
                line.push('\n');
                line
            }
        }
    }
}

#[derive(Serialize)]
struct JsonLine<'a> {
    level: &'static str,
    msg: &'a str,
    time: &'a str,
}

/// Where and how to log; the same for a verb and for the sandbox process it starts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogOptions {
    /// `--log`; `None` is stderr.
    pub path: Option<PathBuf>,
    /// `--log-format`.
    pub format: LogFormat,
    /// `--debug`.
    pub debug: bool,
}

impl LogOptions {
    /// Sends what this process logs from now on to the place these options name. Later calls in
    /// the same process do nothing.
    pub fn install(&self) -> Result<(), Error> {
        let sink = match &self.path {
            Some(path) => Sink::File(open(path)?),
            None => Sink::Stderr,
        };
        let level = if self.debug { LevelFilter::Debug } else { LevelFilter::Info };
        let logger = Logger { format: self.format, level, sink: Mutex::new(sink) };
        if log::set_boxed_logger(Box::new(logger)).is_ok() {
            log::set_max_level(level);
        }
        Ok(())
    }

    /// Tells the user that the program failed: one line in the log and, if the log is a file, the
    /// bare message on stderr, which is what runc does.
    pub fn report(&self, error: &(dyn std::error::Error + 'static)) {
        let message = chain(error);
        let line = self.format.line(Level::Error, &message, &now());
        let logged = match &self.path {
            Some(path) => open(path).and_then(|mut file| {
                file.write_all(line.as_bytes())
                    .map_err(|source| Error::Open { path: path.clone(), source })
            }),
            None => {
                to_stderr(&line);
                return;
            }
        };
        to_stderr(&format!("{message}\n"));
        if let Err(error) = logged {
            to_stderr(&format!("{}\n", chain(&error)));
        }
    }
}

/// Writes to stderr, where an engine may have stopped reading: then there is nobody to tell.
fn to_stderr(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

fn open(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|source| Error::Open { path: path.into(), source })
}

enum Sink {
    Stderr,
    File(File),
}

struct Logger {
    format: LogFormat,
    level: LevelFilter,
    sink: Mutex<Sink>,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The file server's library writes what a guest sends it, as often as the guest likes.
        metadata.level() <= self.level && !metadata.target().starts_with("fuse_backend_rs")
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = self.format.line(record.level(), &record.args().to_string(), &now());
        let Ok(mut sink) = self.sink.lock() else { return };
        // A log that cannot be written has nowhere to complain.
        let _ = match &mut *sink {
            Sink::Stderr => io::stderr().write_all(line.as_bytes()),
            Sink::File(file) => file.write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

fn now() -> String {
    OffsetDateTime::now_utc().format(TIME_FORMAT).expect("the format has only date and time")
}

/// The level by logrus's name.
fn level_name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

/// A value of the text form: logrus leaves plain words bare and quotes the rest.
fn text_value(value: &str) -> String {
    let bare = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/@^+".contains(&byte);
    if !value.is_empty() && value.bytes().all(bare) { value.into() } else { quoted(value) }
}

/// Go's `%q` for the characters that matter in a log line.
fn quoted(value: &str) -> String {
    let mut text = String::with_capacity(value.len() + 2);
    text.push('"');
    for character in value.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            control if control.is_control() => {
                text.push_str(&format!("\\u{:04x}", u32::from(control)));
            }
            other => text.push(other),
        }
    }
    text.push('"');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: &str = "2026-11-24T02:19:35Z";

    #[derive(Debug, thiserror::Error)]
    #[error("create bundle")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("no such file")]
    struct Inner;

    #[test]
    fn the_text_form_is_that_of_logrus() {
        let line = LogFormat::Text.line(Level::Error, "container does not exist", TIME);

        let expected =
            "time=\"2026-11-24T02:19:35Z\" level=error msg=\"container does not exist\"\n";
        assert_eq!(line, expected);
    }

    #[test]
    fn the_text_form_leaves_a_word_bare() {
        let line = LogFormat::Text.line(Level::Warn, "word", TIME);

        assert_eq!(line, "time=\"2026-11-24T02:19:35Z\" level=warning msg=word\n");
    }

    #[test]
    fn the_text_form_keeps_a_message_on_one_line() {
        let line = LogFormat::Text.line(Level::Error, "a\n\"b\"\u{1b}", TIME);

        assert!(line.ends_with("msg=\"a\\n\\\"b\\\"\\u001b\"\n"), "{line}");
    }

    #[test]
    fn the_json_form_is_that_of_logrus() {
        let line = LogFormat::Json.line(Level::Error, "container does not exist", TIME);

        let expected = "{\"level\":\"error\",\"msg\":\"container does not exist\",\
                        \"time\":\"2026-11-24T02:19:35Z\"}\n";
        assert_eq!(line, expected);
    }

    #[test]
    fn an_error_is_told_with_its_causes_once() {
        assert_eq!(chain(&Outer(Inner)), "create bundle: no such file");
    }

    #[test]
    fn another_log_format_is_refused_by_name() {
        let error = "xml".parse::<LogFormat>().unwrap_err();

        assert_eq!(error.to_string(), "invalid log-format: xml: use text or json");
    }

    #[test]
    fn an_error_is_appended_to_the_log_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        std::fs::write(&path, "{}\n").unwrap();
        let options =
            LogOptions { path: Some(path.clone()), format: LogFormat::Json, debug: false };

        options.report(&Inner);

        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{}\n{\"level\":\"error\",\"msg\":\"no such file\""), "{text}");
    }
}
