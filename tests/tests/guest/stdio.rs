//! Bytes in, bytes out, and terminals.

use tests::{Bundle, coracle, run, shell};

use crate::assert_nothing_left;

#[test]
fn ten_megabytes_come_back_as_they_went() {
    let bundle = Bundle::new(&["cat"]);
    let bytes: String = (0..10_000_000_u32).map(|i| char::from(b'a' + (i % 25) as u8)).collect();

    let args = ["run", "-b", bundle.path().to_str().unwrap(), "t-cat"];
    let outcome = run("coracle", &args, bytes.as_bytes());

    assert_eq!(outcome.code, 0);
    assert!(outcome.stdout == bytes, "{} bytes came back", outcome.stdout.len());
    assert_nothing_left();
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let bundle = Bundle::new(&["sh", "-c", "echo out; echo err >&2"]);

    let outcome = coracle(&["run", "-b", bundle.path().to_str().unwrap(), "t-apart"]);

    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
    assert_nothing_left();
}

#[test]
fn a_reader_that_goes_away_ends_the_writer() {
    let bundle = Bundle::new(&["sh", "-c", "yes; echo status $? >&2"]);

    let script = format!("coracle run -b {} t-yes | head -n 1", bundle.path().display());
    let outcome = shell(&script);

    assert_eq!(outcome.stdout, "y\n");
    assert_nothing_left();
}

#[test]
fn a_terminal_has_the_size_of_ours_and_echoes() {
    let bundle = Bundle::new(&["sh", "-c", "tty; stty size; read line; echo got $line"]);
    bundle.edit(|config| config["process"]["terminal"] = serde_json::json!(true));

    let command = format!("stty rows 33 cols 99; coracle run -b {} t-tty", bundle.path().display());
    let outcome = run("script", &["-qec", &command, "/dev/null"], b"hello\n");

    assert_eq!(outcome.code, 0, "{outcome:?}");
    assert!(outcome.stdout.contains("/dev/pts/0"), "{outcome:?}");
    assert!(outcome.stdout.contains("33 99"), "{outcome:?}");
    assert!(outcome.stdout.contains("got hello"), "{outcome:?}");
    assert_nothing_left();
}
