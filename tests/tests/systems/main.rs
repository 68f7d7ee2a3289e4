//! Containers that hold a whole system, and users who are not root: run by `make guest-tests`, in the lab
//! where the machine has no hardware virtualization.
//!
//! What they run comes from the lab's own files, or from the Debian that the tests of the VMM boot.

mod docker;
mod rootless;
mod systemd;

use tests::{Outcome, assert_nothing_left, docker, shell};

/// Runs a script that must succeed within `limit_s` seconds: whole systems start in an emulated guest.
fn within(limit_s: u32, script: &str) -> Outcome {
    let outcome = tests::run("timeout", &[limit_s.to_string().as_str(), "bash", "-c", script], b"");
    assert_eq!(outcome.code, 0, "{outcome:?}");
    outcome
}

/// A container of Docker's, removed by force at the end of the test.
struct System(&'static str);

impl System {
    /// Starts a privileged container on Coracle; `arguments` as a shell reads them.
    fn start(name: &'static str, arguments: &str) -> Self {
        let system = System(name);
        let run = format!("docker run -d --name {name} --runtime coracle --privileged {arguments}");
        let started = shell(&run);
        assert_eq!(started.code, 0, "{started:?}");
        system
    }

    fn inspect(&self, format: &str) -> String {
        docker(&["inspect", "--format", format, self.0]).text().to_owned()
    }

    fn exec(&self, script: &str) -> Outcome {
        docker(&["exec", self.0, "sh", "-c", script])
    }
}

impl Drop for System {
    fn drop(&mut self) {
        docker(&["rm", "-f", "-v", self.0]);
    }
}
