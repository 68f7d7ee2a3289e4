//! What people do with Docker and Podman, done once with runc and once with Coracle: the outcomes are
//! the same, but for what differs on purpose. The table of cases is here, and so is its description
//! for users, which `runtime-cli/DIFFERENCES.md` is made from.

mod case;
mod files;
mod network;
mod podman;
mod processes;
mod resources;
mod run;
mod security;

pub use case::{Case, Chapter, Difference, Group, Place};
pub use run::{Report, compare};

/// Every case, by the chapters of the documentation.
pub const CHAPTERS: [&Chapter; 6] = [
    &processes::CHAPTER,
    &files::CHAPTER,
    &network::CHAPTER,
    &resources::CHAPTER,
    &security::CHAPTER,
    &podman::CHAPTER,
];

/// The documentation of what differs on purpose, as Markdown.
pub fn differences() -> String {
    let mut text = String::from(INTRODUCTION);
    for chapter in CHAPTERS {
        let mut rows = String::new();
        for case in chapter.cases() {
            if let Some(Difference { why, .. }) = case.differs {
                rows += &format!("| {} | {why} |\n", case.name);
            }
        }
        if !rows.is_empty() {
            text += &format!(
                "\n## {}\n\n| with runc | with Coracle, and why |\n|---|---|\n",
                chapter.title
            );
            text += &rows;
        }
    }
    text
}

const INTRODUCTION: &str = "\
# What differs from runc on purpose

Containers on Coracle run on a kernel of their own. The tests run the cases of `tests/src/comparison`
with runc and with Coracle, and compare exit code, standard output and standard error: they are the
same, but for what is listed here, which is made from that table.
`CORACLE_BLESS=1 cargo test -p tests --test differences` writes it.
";
