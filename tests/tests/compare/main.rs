//! What people do with Docker, with runc and with Coracle: run by `make guest-tests`, in the lab where the
//! machine has no hardware virtualization. `CORACLE_CASE` chooses groups of cases by parts of a case's
//! name, with bars between them.

use tests::assert_nothing_left;
use tests::comparison::{CHAPTERS, compare};

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
    assert_nothing_left();
}
