//! The documentation of what differs from runc is what the cases say.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use tests::comparison::{CHAPTERS, differences};

#[test]
fn the_documentation_lists_every_difference() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in the tree");
    let path = root.join("runtime-cli/DIFFERENCES.md");
    let text = differences();
    if std::env::var_os("CORACLE_BLESS").is_some() {
        fs::write(&path, &text).expect("the documentation can be written");
    }

    let written = fs::read_to_string(&path).expect("the documentation is there");

    assert_eq!(written, text, "CORACLE_BLESS=1 cargo test -p tests --test differences writes it");
}

#[test]
fn every_case_has_a_name_of_its_own() {
    let names: Vec<&str> =
        CHAPTERS.iter().flat_map(|chapter| chapter.cases()).map(|case| case.name).collect();

    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
}
