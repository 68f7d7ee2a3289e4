//! `podman --runtime coracle run`.

use tests::{run, shell};

use crate::assert_nothing_left;

/// The id of Docker's busybox image, brought over to Podman.
fn image() -> String {
    let loaded = shell(
        "podman image exists localhost/busybox || docker save busybox | podman load -q >&2; \
         podman images -q | head -n 1",
    );
    loaded.text().to_owned()
}

#[test]
fn podman_runs_a_container_in_a_guest() {
    let image = image();

    let args = ["--runtime", "/usr/local/bin/coracle", "run", "--rm", &image, "uname", "-r"];
    let outcome = run("podman", &args, b"");

    assert_ne!(outcome.text(), run("uname", &["-r"], b"").text());
    assert_nothing_left();
}

#[test]
fn podman_gets_the_exit_code_and_passes_stdin() {
    let image = image();

    let args = [
        "--runtime",
        "/usr/local/bin/coracle",
        "run",
        "-i",
        "--rm",
        &image,
        "sh",
        "-c",
        "wc -c; exit 8",
    ];
    let outcome = run("podman", &args, &[b'x'; 5000]);

    assert_eq!((outcome.code, outcome.stdout.trim()), (8, "5000"), "{outcome:?}");
    assert_nothing_left();
}
