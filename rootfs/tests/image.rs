//! Runs the built `coracle-image` as its users do.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const ELF: &[u8] = b"\x7fELF";

fn coracle_image(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_coracle-image"))
        .current_dir(folder)
        .env("CORACLE_CACHE", folder.join("cache"))
        .args(arguments)
        .output()
        .unwrap()
}

fn succeed(folder: &Path, arguments: &[&str]) {
    let output = coracle_image(folder, arguments);

    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_same_agent_gives_the_same_initrd() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("agent"), "agent").unwrap();

    succeed(folder.path(), &["initrd", "--agent", "agent", "--output", "first"]);
    succeed(folder.path(), &["initrd", "--agent", "agent", "--output", "second"]);

    let [first, second] =
        ["first", "second"].map(|name| fs::read(folder.path().join(name)).unwrap());
    assert_eq!(first, second);
}

#[test]
fn a_missing_agent_is_named() {
    let folder = tempfile::tempdir().unwrap();

    let output = coracle_image(folder.path(), &["initrd", "--agent", "nowhere", "--output", "x"]);

    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("read the agent nowhere"), "{error}");
    assert!(!output.status.success());
}

#[test]
fn the_printed_configuration_has_options_and_reasons() {
    let folder = tempfile::tempdir().unwrap();

    let output = coracle_image(folder.path(), &["kernel-config", "--architecture", "ppc64le"]);

    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("\nCONFIG_PPC_PSERIES=y\n"));
    assert!(text.contains("\n# Container roots on virtio-blk"));
}

#[test]
#[ignore = "needs the program cpio"]
fn cpio_lists_what_was_packed() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("agent"), "agent").unwrap();
    succeed(folder.path(), &["initrd", "--agent", "agent", "--output", "initrd"]);

    let archive = fs::File::open(folder.path().join("initrd")).unwrap();
    let output = Command::new("cpio").arg("-t").stdin(archive).output().unwrap();

    let names = String::from_utf8(output.stdout).unwrap();
    assert_eq!(names, "dev\ndev/console\ndev/null\ninit\nproc\nrun\nsys\ntmp\n");
}

#[test]
#[ignore = "downloads a kernel package"]
fn the_distro_kernel_is_an_elf_file_and_the_same_each_time() {
    let first = tempfile::tempdir().unwrap();
    let second = tempfile::tempdir().unwrap();
    let arguments = ["build", "--kind", "distro", "--agent", "agent", "--output", "guest"];

    for folder in [&first, &second] {
        fs::write(folder.path().join("agent"), "agent").unwrap();
        fs::create_dir(folder.path().join("guest")).unwrap();
        fs::write(folder.path().join("guest/rootfs.erofs"), "another kernel's").unwrap();
        succeed(folder.path(), &arguments);
        assert!(!folder.path().join("guest/rootfs.erofs").exists());
    }

    for name in ["kernel", "initrd", "manifest.json"] {
        let [one, two] = [&first, &second]
            .map(|folder| fs::read(folder.path().join("guest").join(name)).unwrap());
        assert!(one == two, "{name} differs");
    }
    assert!(fs::read(first.path().join("guest/kernel")).unwrap().starts_with(ELF));
}
