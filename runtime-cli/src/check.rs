//! Whether this host can run virtual machines, and what to do if not.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::path::Path;

use crate::logging::chain;
use crate::sandbox;
use crate::settings::{Root, Settings};

const KVM: &str = "/dev/kvm";

const TUN: &str = "/dev/net/tun";

const CGROUPS: &str = "/sys/fs/cgroup";

/// The only version of the KVM interface there ever was (KVM API documentation, section 4.1).
const KVM_API_VERSION: i32 = 12;

/// What the virtual machine monitor needs of KVM: number and name (linux/kvm.h).
const NEEDED_CAPABILITIES: &[(i32, &str)] = &[
    (3, "KVM_CAP_USER_MEMORY"),
    (25, "KVM_CAP_IRQ_ROUTING"),
    (32, "KVM_CAP_IRQFD"),
    (36, "KVM_CAP_IOEVENTFD"),
    (136, "KVM_CAP_IMMEDIATE_EXIT"),
];

mod ioctl {
    //! KVM's system ioctls that answer questions.

    use nix::{ioctl_write_int_bad, request_code_none};

    ioctl_write_int_bad!(kvm_get_api_version, request_code_none!(0xae, 0x00));
    ioctl_write_int_bad!(kvm_check_extension, request_code_none!(0xae, 0x03));
}

/// How a check ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Fine; what was found.
    Good(String),
    /// Containers run, but not all of them; what is missing and what to do.
    Limited(String, String),
    /// No container can run; what is missing and what to do.
    Bad(String, String),
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub subject: &'static str,
    /// How it is.
    pub verdict: Verdict,
}

impl Finding {
    /// Whether containers can run in spite of it.
    pub fn allows_containers(&self) -> bool {
        !matches!(self.verdict, Verdict::Bad(..))
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let subject = self.subject;
        match &self.verdict {
            Verdict::Good(found) => writeln!(formatter, "ok    {subject}: {found}"),
            Verdict::Limited(missing, remedy) => {
                writeln!(formatter, "warn  {subject}: {missing}\n      {remedy}")
            }
            Verdict::Bad(missing, remedy) => {
                writeln!(formatter, "FAIL  {subject}: {missing}\n      {remedy}")
            }
        }
    }
}

/// Looks at everything that a container needs of this host.
pub fn host(settings: &Settings) -> Vec<Finding> {
    let mut findings = vec![
        ("KVM", kvm(Path::new(KVM))),
        ("guest kernel", guest_file(&settings.kernel, "kernel")),
        match settings.root() {
            Root::Mapped(rootfs) => ("guest rootfs", guest_file(&rootfs, "rootfs")),
            Root::Initrd(initrd) => ("guest initrd", guest_file(&initrd, "initrd")),
        },
        ("network", network(Path::new(TUN))),
        ("cgroup", cgroups(Path::new(CGROUPS))),
    ];
    // The rest says that a guest could run, not that it does.
    if findings.iter().all(|(_, verdict)| !matches!(verdict, Verdict::Bad(..))) {
        findings.push(("guest", guest(settings)));
    }
    findings.into_iter().map(|(subject, verdict)| Finding { subject, verdict }).collect()
}

fn guest(settings: &Settings) -> Verdict {
    match sandbox::boot(settings) {
        Ok(up) => Verdict::Good(up),
        Err(error) => Verdict::Bad(
            format!("it does not boot: {}", chain(&error)),
            "build the guest image anew with coracle-image; if that does not help, KVM does not \
             work here: switch on virtualization in the firmware or, in a virtual machine, nested \
             virtualization"
                .into(),
        ),
    }
}

fn kvm(path: &Path) -> Verdict {
    let device = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(device) => device,
        Err(error) => return kvm_unusable(path, &error),
    };
    // SAFETY: the argument is a number, which must be zero; no memory is moved.
    let version = match unsafe { ioctl::kvm_get_api_version(device.as_raw_fd(), 0) } {
        Ok(version) => version,
        Err(error) => {
            return Verdict::Bad(
                format!("{} is not KVM: {error}", path.display()),
                "remove that file and load the module kvm_intel or kvm_amd".into(),
            );
        }
    };
    if version != KVM_API_VERSION {
        return Verdict::Bad(
            format!("{} has API version {version}, not {KVM_API_VERSION}", path.display()),
            "run a Linux kernel of 2.6.22 or newer".into(),
        );
    }
    let missing = missing_capabilities(&device);
    if missing.is_empty() {
        Verdict::Good(format!("{} with all that is needed", path.display()))
    } else {
        Verdict::Bad(format!("the kernel lacks {}", missing.join(", ")), "update it".into())
    }
}

fn missing_capabilities(device: &File) -> Vec<&'static str> {
    let absent = |(number, _): &&(i32, &str)| {
        // SAFETY: the argument is a number; no memory is moved.
        let answer = unsafe { ioctl::kvm_check_extension(device.as_raw_fd(), *number) };
        !answer.is_ok_and(|answer| answer > 0)
    };
    NEEDED_CAPABILITIES.iter().filter(absent).map(|(_, name)| *name).collect()
}

fn kvm_unusable(path: &Path, error: &io::Error) -> Verdict {
    let path = path.display();
    let remedy = match error.kind() {
        ErrorKind::NotFound => {
            "load the module (modprobe kvm_intel, kvm_amd or kvm_hv); if that fails, switch on \
             virtualization in the firmware or, in a virtual machine, nested virtualization"
        }
        ErrorKind::PermissionDenied => {
            "run as root or as a member of the group kvm; in a container, pass the device \
             (--device /dev/kvm)"
        }
        _ => "look in the kernel log (dmesg) for lines with kvm",
    };
    Verdict::Bad(format!("open {path}: {error}"), remedy.into())
}

fn guest_file(path: &Path, kind: &str) -> Verdict {
    match File::open(path).and_then(|file| file.metadata()) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {
            Verdict::Good(path.display().to_string())
        }
        Ok(_) => Verdict::Bad(format!("{} is no {kind}", path.display()), image_remedy(kind)),
        Err(error) => Verdict::Bad(format!("open {}: {error}", path.display()), image_remedy(kind)),
    }
}

fn image_remedy(kind: &str) -> String {
    format!(
        "build the guest image with coracle-image, or name another {kind} in {}",
        crate::settings::DEFAULT_PATH
    )
}

fn network(path: &Path) -> Verdict {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Verdict::Good(path.display().to_string()),
        Err(error) => Verdict::Limited(
            format!("open {}: {error}", path.display()),
            "only containers without network run; load the module tun and run as root".into(),
        ),
    }
}

fn cgroups(path: &Path) -> Verdict {
    if path.join("cgroup.controllers").exists() {
        return Verdict::Good("version 2".into());
    }
    if path.join("memory").is_dir() || path.join("unified").is_dir() {
        return Verdict::Good("version 1".into());
    }
    Verdict::Limited(
        format!("no cgroups at {}", path.display()),
        format!("what a container costs the host is not limited; mount cgroup2 at {CGROUPS}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remedy(verdict: Verdict) -> String {
        match verdict {
            Verdict::Good(found) => panic!("good: {found}"),
            Verdict::Limited(_, remedy) | Verdict::Bad(_, remedy) => remedy,
        }
    }

    #[test]
    fn without_the_device_the_module_has_to_be_loaded() {
        assert!(remedy(kvm(Path::new("/nonexistent/kvm"))).starts_with("load the module"));
    }

    #[test]
    fn a_forbidden_device_needs_root_or_the_group() {
        let verdict = kvm_unusable(Path::new(KVM), &ErrorKind::PermissionDenied.into());

        assert!(remedy(verdict).starts_with("run as root or as a member of the group kvm"));
    }

    #[test]
    fn another_file_in_its_place_is_not_kvm() {
        assert!(remedy(kvm(Path::new("/dev/null"))).starts_with("remove that file"));
    }

    #[test]
    fn a_missing_or_empty_kernel_says_what_builds_one() {
        let empty = tempfile::NamedTempFile::new().unwrap();

        for path in [Path::new("/nonexistent/kernel"), empty.path(), Path::new("/")] {
            assert!(remedy(guest_file(path, "kernel")).contains("coracle-image"), "{path:?}");
        }
    }

    #[test]
    fn a_host_without_tun_still_runs_containers_without_network() {
        let verdict = network(Path::new("/nonexistent/tun"));

        assert!(Finding { subject: "network", verdict }.allows_containers());
    }

    #[test]
    fn both_versions_of_cgroups_are_found() {
        let directory = tempfile::tempdir().unwrap();

        assert!(matches!(cgroups(directory.path()), Verdict::Limited(..)));
        std::fs::create_dir(directory.path().join("memory")).unwrap();
        assert_eq!(cgroups(directory.path()), Verdict::Good("version 1".into()));
        std::fs::write(directory.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(cgroups(directory.path()), Verdict::Good("version 2".into()));
    }

    #[test]
    fn a_failure_shows_its_remedy_on_a_line_of_its_own() {
        let verdict = Verdict::Bad("gone".into(), "bring it back".into());

        let text = Finding { subject: "KVM", verdict }.to_string();

        assert_eq!(text, "FAIL  KVM: gone\n      bring it back\n");
    }
}
