//! A container that is deleted by force when a test is over, whatever the test's outcome.

use std::fs;

use crate::{Bundle, coracle, shell};

/// A created container and its bundle.
#[derive(Debug)]
pub struct Container {
    id: &'static str,
    bundle: Bundle,
}

impl Container {
    /// Creates a container that will run `args`.
    pub fn create(id: &'static str, args: &[&str]) -> Self {
        Container::launch("create", id, Bundle::new(args))
    }

    /// Creates and starts a container that runs `args`.
    pub fn running(id: &'static str, args: &[&str]) -> Self {
        Container::launch("run --detach", id, Bundle::new(args))
    }

    /// Creates and starts the container of `bundle`.
    pub fn running_bundle(id: &'static str, bundle: Bundle) -> Self {
        Container::launch("run --detach", id, bundle)
    }

    fn launch(verb: &str, id: &'static str, bundle: Bundle) -> Self {
        let container = Container { id, bundle };
        let bundle = container.bundle.path().display().to_string();
        // A file and no pipe of ours: the workload would hold that open until it ends.
        let launched = shell(&format!(
            "coracle {verb} --bundle {bundle} --pid-file {bundle}/pid {id} \
             < /dev/null > {bundle}/out 2>&1"
        ));
        assert_eq!(launched.code, 0, "{launched:?} {}", container.output());
        container
    }

    /// What the container has printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(self.bundle.path().join("out")).expect("the output is a file")
    }

    /// The content of the pid file.
    pub fn pid(&self) -> String {
        fs::read_to_string(self.bundle.path().join("pid")).expect("a pid file was asked for")
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        coracle(&["delete", "--force", self.id]);
    }
}
