//! What people do with Docker and Podman, with runc and with Coracle: run by `make guest-tests`, in the
//! lab where the machine has no hardware virtualization. `CORACLE_CASE` chooses cases by a part of
//! their names.

use tests::comparison::{CHAPTERS, compare};
use tests::leftovers;

#[test]
fn outcomes_are_the_same_but_for_what_differs_on_purpose() {
    let filter = std::env::var("CORACLE_CASE").unwrap_or_default();
    let mut failed = Vec::new();

    for chapter in CHAPTERS {
        println!("== {}", chapter.title);
        compare(chapter, &filter, |report| {
            println!("{report}");
            failed.extend(report.complaint.as_ref().map(|_| report.name));
        });
    }

    assert!(failed.is_empty(), "{} cases: {failed:#?}", failed.len());
}

#[test]
fn nothing_is_left_of_the_cases() {
    let left = leftovers();

    assert!(left.is_empty(), "left behind: {left:#?}");
}
