//! Guests that go on from a template instead of booting.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use tempfile::TempDir;
use tests::{Bundle, Outcome, shell};

use crate::assert_nothing_left;

/// Settings with a folder of templates of their own.
struct Host(TempDir);

impl Host {
    fn new() -> Self {
        let host = Host(TempDir::with_prefix("coracle-test-templates-").unwrap());
        host.set(&json!({ "templates": host.folder() }));
        host
    }

    fn set(&self, settings: &serde_json::Value) {
        fs::write(self.0.path().join("config.json"), settings.to_string()).unwrap();
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("made/templates")
    }

    fn templates(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.folder()).map(|entries| entries.flatten().collect());
        entries.unwrap_or_else(|_| Vec::new()).iter().map(fs::DirEntry::path).collect()
    }

    /// The only one.
    fn template(&self) -> PathBuf {
        let templates = self.templates();
        assert_eq!(templates.len(), 1, "{templates:?}");
        templates[0].clone()
    }

    /// Runs `script` in a container; what it prints, and behind that in the errors what coracle logs.
    fn run(&self, script: &str) -> Outcome {
        self.run_bundle(&Bundle::new(&["sh", "-c", script]))
    }

    fn run_bundle(&self, bundle: &Bundle) -> Outcome {
        shell(&format!(
            "CORACLE_CONFIG={}/config.json coracle --log /dev/stderr run -b {} t-template",
            self.0.path().display(),
            bundle.path().display()
        ))
    }
}

fn since_epoch() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

#[test]
fn the_first_guest_boots_and_others_go_on_with_a_clock_and_randomness_of_their_own() {
    let host = Host::new();
    let script = "cat /proc/sys/kernel/random/boot_id; head -c 8 /dev/urandom | od -An -tx1; date +%s; \
                  echo from the guest > /tmp/file; grep MemTotal /proc/meminfo";

    let first = host.run(script);
    let template = host.template();
    let made = fs::metadata(&template).unwrap();
    assert_eq!(made.permissions().mode() & 0o777, 0o600);
    // What matters to the clock: the guest's own stood still for so long.
    std::thread::sleep(Duration::from_secs(3));
    let others = [(), ()].map(|()| {
        let before = since_epoch();
        let other = host.run(script);
        (before, other, since_epoch())
    });

    assert_eq!(first.code, 0, "{first:?}");
    let mut seen: Vec<String> = first.stdout.lines().take(2).map(str::to_owned).collect();
    for (before, other, after) in &others {
        let lines: Vec<&str> = other.text().lines().collect();
        assert!(
            lines[..2].iter().all(|random| !seen.iter().any(|other| other == random)),
            "{seen:?}"
        );
        seen.extend(lines[..2].iter().map(|line| (*line).to_owned()));
        let now = Duration::from_secs(lines[2].parse().unwrap());
        assert!(*before < now + Duration::from_secs(2) && now < *after, "{other:?}");
        assert_eq!(lines[3], first.stdout.lines().last().unwrap());
    }
    // The template is of the first one, and still as it was.
    assert_eq!(host.template(), template);
    assert_eq!(fs::metadata(&template).unwrap().len(), made.len());
    assert_nothing_left();
}

#[test]
fn a_template_that_is_no_good_costs_a_boot_and_is_replaced() {
    let host = Host::new();
    assert_eq!(host.run("echo first").text(), "first");
    let template = host.template();
    let size = fs::metadata(&template).unwrap().len();
    let shorten = |bytes: u64| {
        let file = fs::OpenOptions::new().write(true).open(&template).unwrap();
        file.set_len(bytes).unwrap();
    };

    shorten(size - 5);
    let cut = host.run("echo second");
    assert_eq!(cut.text(), "second");
    assert!(cut.stderr.contains("it is broken: the guest boots without it"), "{cut:?}");
    let whole = host.run("echo whole");
    assert!(whole.text() == "whole" && !whole.stderr.contains("without it"), "{whole:?}");

    fs::set_permissions(&template, fs::Permissions::from_mode(0o666)).unwrap();
    let open = host.run("echo third");
    assert_eq!(open.text(), "third");
    assert!(open.stderr.contains("others may write to it"), "{open:?}");

    shorten(0);
    assert_eq!(host.run("echo fourth").text(), "fourth");
    // What a process that was killed never finished.
    fs::remove_file(&template).unwrap();
    fs::write(template.with_extension("new"), "half").unwrap();
    assert_eq!(host.run("echo fifth").text(), "fifth");
    assert_eq!(host.template(), template);
    assert_nothing_left();
}

#[test]
fn a_host_without_room_for_templates_boots_every_guest() {
    let host = Host::new();
    fs::write(host.0.path().join("made"), "in the way").unwrap();

    let outcome = host.run("echo booted");

    assert_eq!(outcome.text(), "booted");
    assert!(outcome.stderr.contains("no template"), "{outcome:?}");
    assert_nothing_left();
}

#[test]
fn guests_of_other_shapes_have_templates_of_their_own() {
    let host = Host::new();
    let run = |memory_mib: &str| {
        let bundle = Bundle::new(&["grep", "MemTotal", "/proc/meminfo"]);
        bundle
            .edit(|config| config["annotations"] = json!({ "io.coracle.memory_mib": memory_mib }));
        host.run_bundle(&bundle)
    };

    let booted = [run("256"), run("320")];
    assert_eq!(host.templates().len(), 2);
    let gone_on = [run("256"), run("320")];

    assert_eq!(booted[0].text(), gone_on[0].text());
    assert_eq!(booted[1].text(), gone_on[1].text());
    assert_ne!(booted[0].text(), booted[1].text());
    assert_eq!(host.templates().len(), 2);
    assert_nothing_left();
}

#[test]
fn a_guest_image_that_was_replaced_boots_and_has_a_template_of_its_own() {
    let host = Host::new();
    let folder = host.0.path().display();
    host.set(&json!({ "templates": host.folder(), "kernel": format!("{folder}/kernel") }));
    let install = format!(
        "for file in /var/lib/coracle/guest/*; do name={folder}/$(basename $file); \
         cp $file $name.new && mv $name.new $name || exit; done"
    );
    assert_eq!(shell(&install).text(), "");

    let of_first = [host.run("echo booted"), host.run("echo gone on")];
    let first = host.template();
    assert_eq!(shell(&install).text(), "");
    let of_second = [host.run("echo booted"), host.run("echo gone on")];

    for [booted, gone_on] in [of_first, of_second] {
        assert_eq!(booted.text(), "booted");
        assert_eq!(gone_on.text(), "gone on");
    }
    let templates = host.templates();
    assert!(templates.len() == 2 && templates.contains(&first), "{templates:?}");
    assert_nothing_left();
}
