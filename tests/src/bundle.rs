//! A throw-away OCI bundle around a busybox root file system.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::{coracle, run};

/// Longest time a test waits for something that happens in an emulated guest.
pub const RESULT_TIMEOUT: Duration = Duration::from_secs(60);

/// A root file system with busybox under every name it answers to; shared by all bundles of a run.
pub fn rootfs() -> &'static Path {
    static ROOTFS: OnceLock<TempDir> = OnceLock::new();
    ROOTFS
        .get_or_init(|| {
            let tree = TempDir::with_prefix("coracle-test-rootfs-").expect("a temporary folder");
            let root = tree.path();
            for directory in ["bin", "etc", "tmp", "root", "proc", "sys", "dev", "home"] {
                fs::create_dir(root.join(directory)).expect("a fresh folder");
            }
            fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static installed");
            let applets = run("/bin/busybox", &["--list"], b"");
            for applet in applets.text().lines().filter(|name| *name != "busybox") {
                symlink("busybox", root.join("bin").join(applet)).expect("a fresh name");
            }
            let users = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n";
            fs::write(root.join("etc/passwd"), users).expect("a fresh file");
            fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n").expect("a file");
            tree
        })
        .path()
}

/// A bundle: what `coracle spec` writes, made to run one command without a terminal.
#[derive(Debug)]
pub struct Bundle {
    directory: TempDir,
}

impl Bundle {
    /// A bundle that runs `args`.
    pub fn new(args: &[&str]) -> Self {
        let directory = TempDir::with_prefix("coracle-test-bundle-").expect("a temporary folder");
        let spec = coracle(&["spec".as_ref(), "--bundle".as_ref(), directory.path().as_os_str()]);
        assert_eq!(spec.code, 0, "{spec:?}");
        let bundle = Bundle { directory };
        bundle.edit(|config| {
            config["process"]["terminal"] = json!(false);
            config["process"]["args"] = json!(args);
            config["process"]["env"] = json!(["PATH=/bin", "TERM=xterm"]);
            config["root"] = json!({ "path": rootfs(), "readonly": false });
        });
        bundle
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Its `config.json`.
    pub fn config(&self) -> PathBuf {
        self.path().join("config.json")
    }

    /// Changes `config.json`.
    pub fn edit(&self, change: impl FnOnce(&mut Value)) {
        let text = fs::read_to_string(self.config()).expect("config.json is there");
        let mut config = serde_json::from_str(&text).expect("config.json is JSON");
        change(&mut config);
        fs::write(self.config(), config.to_string()).expect("config.json can be written");
    }
}
