//! Runs cases with both runtimes, side by side, and compares what came out.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::case::{Case, Chapter, Difference, Group, Place};
use crate::command::{Outcome, run};

const PRELUDE: &str = include_str!("prelude.sh");

/// Before and after each case's output among that of its group.
const BEGIN: &str = "@@begin ";
const END: &str = "@@end";

/// What `eventually` of the prelude says when it gives up.
const NEVER: &str = "never: ";

/// First port that groups may publish; each has ten of its own for each runtime.
const FIRST_PORT: usize = 18_100;
const PORTS: usize = 10;

const RUNTIMES: [&str; 2] = ["runc", "coracle"];

/// How many groups of a chapter run at the same time with each of them: one computes while another waits.
const AT_ONCE: usize = 2;

/// How long a group may take, in seconds: one that hangs must not hold up the rest for ever.
const LIMIT_S: &str = "600";

/// How one case went with both runtimes.
#[derive(Debug)]
pub struct Report {
    /// Its name.
    pub name: &'static str,
    /// How long the slower of both took for its whole group.
    pub duration: Duration,
    /// What is not as it should be.
    pub complaint: Option<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.complaint.is_some() { "FAILED" } else { "ok" };
        write!(formatter, "{verdict:6} {:4} s  {}", self.duration.as_secs(), self.name)?;
        if let Some(complaint) = &self.complaint {
            write!(formatter, "\n{complaint}")?;
        }
        Ok(())
    }
}

/// What a group's cases gave with one runtime; what the whole script gave instead, if it did not get as
/// far as a case.
struct Run {
    runtime: &'static str,
    outcomes: Vec<Result<Outcome, Outcome>>,
    duration: Duration,
}

/// Runs the groups of a chapter that have a case whose name contains `filter`, or one of its parts between
/// bars, and tells how each case went as soon as its group is over with both runtimes.
pub fn compare(chapter: &'static Chapter, filter: &str, mut tell: impl FnMut(&Report)) {
    let matches = |case: &Case| filter.split('|').any(|part| case.name.contains(part));
    let is_chosen = |group: &&Group| group.cases.iter().any(matches);
    let groups: Vec<_> = chapter.groups.iter().filter(is_chosen).collect();
    let (done, runs) = mpsc::channel();
    let next = RUNTIMES.map(|_| AtomicUsize::new(0));
    thread::scope(|scope| {
        for (runtime, next) in RUNTIMES.iter().zip(&next) {
            for _ in 0..AT_ONCE {
                let (done, groups) = (done.clone(), &groups);
                scope.spawn(move || run_all(groups, next, runtime, &done));
            }
        }
        // The ends of the threads are the last ones.
        drop(done);
        let mut other = HashMap::new();
        for (number, run) in runs {
            let Some(earlier) = other.insert(number, run) else { continue };
            let later = &other[&number];
            let [runc, coracle] = match later.runtime {
                "runc" => [later, &earlier],
                _ => [&earlier, later],
            };
            let duration = runc.duration.max(coracle.duration);
            let outcomes = runc.outcomes.iter().zip(&coracle.outcomes);
            for (case, (runc, coracle)) in groups[number].cases.iter().zip(outcomes) {
                tell(&Report { name: case.name, duration, complaint: judge(case, runc, coracle) });
            }
        }
    });
}

/// Runs one of `groups` after the other, beginning with `next`, which others do as well.
fn run_all(
    groups: &[&Group],
    next: &AtomicUsize,
    runtime: &'static str,
    done: &Sender<(usize, Run)>,
) {
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let Some(group) = groups.get(number) else { return };
        done.send((number, run_group(group, number, runtime))).expect("somebody listens to all");
    }
}

/// What is not as it should be.
fn judge(
    case: &Case,
    runc: &Result<Outcome, Outcome>,
    coracle: &Result<Outcome, Outcome>,
) -> Option<String> {
    let complaint = format!("    runc: {runc:?}\n coracle: {coracle:?}");
    // What fails in the same way with both shows nothing.
    let (Ok(runc), Ok(coracle)) = (runc, coracle) else { return Some(complaint) };
    if runc.stdout.contains(NEVER) {
        return Some(complaint);
    }
    let both = format!("{}{}", coracle.stdout, coracle.stderr);
    let is_right = match case.differs {
        None => runc == coracle,
        Some(Difference { coracle: expected, .. }) => runc != coracle && both.contains(expected),
    };
    (!is_right).then_some(complaint)
}

fn run_group(group: &Group, number: usize, runtime: &'static str) -> Run {
    let name = format!("cmp-{}-{runtime}", group.name);
    let cases = marked(group.cases);
    let Group { before, after, .. } = group;
    let (cases, inside) = match group.place {
        Place::Host => (cases, String::new()),
        Place::Container(options) => {
            let run = format!("run --rm --name \"$name\" {options} busybox sh -c \"$inside\"");
            (run, cases)
        }
    };
    let port = FIRST_PORT + PORTS * (2 * number + usize::from(runtime == "coracle"));
    let script = format!(
        "runtime={runtime} name={name} port={port} folder=/tmp/compare/{name} inside=$1\n\
         mkdir -p $folder\n{PRELUDE}\n{before}\n{cases}\n{after}\n"
    );
    let begin = Instant::now();
    let args = ["-k", "5", LIMIT_S, "bash", "-c", &script, "bash", &inside];
    let outcome = run("timeout", &args, b"");
    let duration = begin.elapsed();
    let of_case = |number| {
        let whole = || normal(&outcome, &name, runtime);
        cut(&outcome, number).map(|own| normal(&own, &name, runtime)).ok_or_else(whole)
    };
    Run { runtime, outcomes: (0..group.cases.len()).map(of_case).collect(), duration }
}

/// The scripts of `cases`, each in a shell of its own and between marks on both outputs.
fn marked(cases: &[Case]) -> String {
    let one = |(number, case): (usize, &Case)| {
        format!(
            "echo '{BEGIN}{number}'; echo '{BEGIN}{number}' >&2\n(\n{}\n)\ncode=$?\n\
             echo \"{END}\"; echo $code; echo '{END}' >&2\n",
            case.script
        )
    };
    cases.iter().enumerate().map(|(number, case)| one((number, case))).collect()
}

/// What the case `number` gave in the output of all, if the script got that far.
fn cut(outcome: &Outcome, number: usize) -> Option<Outcome> {
    let begin = format!("{BEGIN}{number}\n");
    let end = format!("{END}\n");
    let parts = |text: &'_ str| -> Option<(String, String)> {
        let (own, rest) = text.split_once(&begin)?.1.split_once(&end)?;
        Some((own.to_owned(), rest.lines().next().unwrap_or_default().to_owned()))
    };
    let ((stdout, code), (stderr, _)) = (parts(&outcome.stdout)?, parts(&outcome.stderr)?);
    Some(Outcome { code: code.parse().ok()?, stdout, stderr })
}

/// What is different by nature, such as the container's name, in words that are the same.
fn normal(outcome: &Outcome, name: &str, runtime: &str) -> Outcome {
    let text = |text: &str| {
        let text = text.replace(name, "NAME").replace(&format!("{runtime} "), "RUNTIME ");
        without_ids(&text)
    };
    Outcome { code: outcome.code, stdout: text(&outcome.stdout), stderr: text(&outcome.stderr) }
}

/// `text` with every container id, of 12 or 64 digits, as `ID`.
fn without_ids(text: &str) -> String {
    let is_digit = |character: char| matches!(character, '0'..='9' | 'a'..='f');
    let is_word = |character: char| character.is_ascii_alphanumeric();
    let mut rest = text;
    let mut result = String::new();
    while let Some(start) = rest.find(is_word) {
        let (before, word) = rest.split_at(start);
        let end = word.find(|character| !is_word(character)).unwrap_or(word.len());
        let (word, after) = word.split_at(end);
        let is_id = (word.len() == 12 || word.len() == 64) && word.chars().all(is_digit);
        result += before;
        result += if is_id { "ID" } else { word };
        rest = after;
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_replaced_and_other_words_stay() {
        let id = "0123456789ab".repeat(6)[..64].to_owned();

        assert_eq!(
            without_ids(&format!("a {id}: 0123456789ab, deadbeef.\n")),
            "a ID: ID, deadbeef.\n"
        );
    }

    #[test]
    fn a_case_is_cut_out_of_the_output_of_its_group() {
        let outcome = Outcome {
            code: 0,
            stdout: "x\n@@begin 0\na@@end\n0\n@@begin 1\nb\n@@end\n7\n".into(),
            stderr: "@@begin 0\n@@end\n@@begin 1\nno\n@@end\n".into(),
        };

        let second = cut(&outcome, 1);

        let expected = Outcome { code: 7, stdout: "b\n".into(), stderr: "no\n".into() };
        assert_eq!(second, Some(expected));
        assert_eq!(cut(&outcome, 2), None);
    }

    #[test]
    fn the_marks_go_around_what_a_script_says() {
        let cases = [super::super::case::same("one", "echo out; echo err >&2; exit 3")];

        let outcome = run("bash", &["-c", &marked(&cases)], b"");

        let expected = Outcome { code: 3, stdout: "out\n".into(), stderr: "err\n".into() };
        assert_eq!(cut(&outcome, 0), Some(expected));
    }
}
