//! Further processes in a running container.

use tests::{Container, coracle, run, shell};

use crate::assert_nothing_left;

fn running(id: &'static str) -> Container {
    Container::running(id, &["sleep", "1000"])
}

#[test]
fn exec_shares_the_container_and_returns_its_own_exit_code() {
    let container = running("t-exec");

    let outcome = coracle(&["exec", "--env", "A=b", "t-exec", "sh", "-c", "echo $A; ps; exit 5"]);

    assert_eq!(outcome.code, 5);
    assert!(outcome.stdout.starts_with("b\n"));
    assert!(outcome.stdout.contains("sleep 1000"), "{outcome:?}");
    drop(container);
    assert_nothing_left();
}

#[test]
fn exec_passes_stdin_and_its_end() {
    let container = running("t-exec-stdin");

    let outcome = run("coracle", &["exec", "t-exec-stdin", "wc", "-c"], &[b'x'; 100_000]);

    assert_eq!(outcome.text(), "100000");
    drop(container);
    assert_nothing_left();
}

#[test]
fn exec_as_another_user_in_another_folder() {
    let container = running("t-exec-user");

    let outcome = coracle(&[
        "exec",
        "--user",
        "65534:65534",
        "--cwd",
        "/tmp",
        "t-exec-user",
        "sh",
        "-c",
        "id -u; pwd",
    ]);

    assert_eq!(outcome.text(), "65534\n/tmp");
    drop(container);
    assert_nothing_left();
}

#[test]
fn exec_of_a_missing_program_says_so_in_runcs_words() {
    let container = running("t-exec-missing");

    let outcome = coracle(&["exec", "t-exec-missing", "nosuchprogram"]);

    assert_ne!(outcome.code, 0);
    // Quoted once more: the text form of the log has the message in quotes.
    let words = r#"exec: \"nosuchprogram\": executable file not found in $PATH"#;
    assert!(outcome.stderr.contains(words), "{outcome:?}");
    drop(container);
    assert_nothing_left();
}

#[test]
fn twenty_execs_at_once_all_answer() {
    let container = running("t-exec-many");

    let script = "for i in $(seq 20); do coracle exec t-exec-many echo answer-$i & done; wait";
    let outcome = shell(script);

    let answers = outcome.stdout.lines().filter(|line| line.starts_with("answer-")).count();
    assert_eq!(answers, 20, "{outcome:?}");
    drop(container);
    assert_nothing_left();
}
