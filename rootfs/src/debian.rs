//! Finds, fetches and unpacks Debian packages without touching the machine's own apt settings.

use crate::program::{self, command, output};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

/// The keys that sign every Debian archive, where Debian's own package puts them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Why a package could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One of apt's programs failed.
    #[error("ask apt about {about}: if it knows too little, run `apt-get update`")]
    Apt {
        /// What was asked for.
        about: String,
        /// The program's own words.
        #[source]
        source: program::Error,
    },
    /// The package index has no such package, or not in the expected form.
    #[error("apt knows no {about}: run `apt-get update`")]
    Unknown {
        /// What was asked for.
        about: String,
    },
    /// No archive to take other suites from.
    #[error(
        "no Debian archive with release {codename} among this machine's apt sources: \
         add one and run `apt-get update`"
    )]
    NoArchive {
        /// The machine's release.
        codename: String,
    },
    /// A file cannot be read or written.
    #[error("access {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The package does not unpack.
    #[error("unpack {path}")]
    Unpack {
        /// The package file.
        path: PathBuf,
        /// The program's own words.
        #[source]
        source: program::Error,
    },
}

/// A package and the one version that is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// apt, with the machine's settings or with our own.
#[derive(Debug)]
pub struct Apt {
    /// Settings that replace the machine's.
    settings: Option<PathBuf>,
}

impl Apt {
    /// apt as the machine has it.
    pub fn of_this_machine() -> Self {
        Self { settings: None }
    }

    /// apt with `suite` of the machine's Debian mirror as its only source, and its state in `folder`.
    pub fn with_suite(suite: &str, folder: &Path) -> Result<Self, Error> {
        Self::private(suite, None, folder)
    }

    /// apt as a machine of this release has it whose `architecture` is another one, as Debian calls it;
    /// its state is in `folder`.
    pub fn of_another_architecture(architecture: &str, folder: &Path) -> Result<Self, Error> {
        Self::private(&codename()?, Some(architecture), folder)
    }

    fn private(suite: &str, architecture: Option<&str>, folder: &Path) -> Result<Self, Error> {
        let codename = codename()?;
        let machine = Self::of_this_machine();
        let targets = run(
            machine.command("apt-get").args(["indextargets", "--format", "$(RELEASE) $(REPO_URI)"]),
            "its archives",
        )?;
        let archive = archive(&targets, &codename).ok_or(Error::NoArchive { codename })?;
        // Proxies and such keep their meaning; a list of sources of its own keeps out the rest.
        let acquire = run(machine.command("apt-config").args(["dump", "Acquire"]), "its settings")?;
        let path = folder.join("apt.conf");
        for subfolder in ["lists/partial", "cache/archives/partial"] {
            let path = folder.join(subfolder);
            fs::create_dir_all(&path).map_err(|source| Error::File { path, source })?;
        }
        write(&folder.join("status"), "")?;
        write(&folder.join("sources.list"), &source_line(archive, suite))?;
        write(&path, &settings(folder, &acquire, architecture))?;
        let apt = Self { settings: Some(path) };
        run(apt.command("apt-get").arg("update"), suite)?;
        Ok(apt)
    }

    /// The package that the metapackage `name` stands for at present.
    pub fn dependency(&self, name: &str) -> Result<Package, Error> {
        let mut command = self.command("apt-cache");
        let text = run(command.args(["show", "--no-all-versions", name]), name)?;
        first_dependency(&text).ok_or_else(|| Error::Unknown { about: name.to_owned() })
    }

    /// Every version of the package `name` that can be had, the newest first.
    pub fn versions(&self, name: &str) -> Result<Vec<String>, Error> {
        let mut command = self.command("apt-cache");
        let text = run(command.args(["madison", name]), name)?;
        Ok(text
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(|v| v.trim().to_owned())
            .collect())
    }

    /// Fetches `package`, its signature checked by apt, into the empty `folder`.
    pub fn download(&self, package: &Package, folder: &Path) -> Result<PathBuf, Error> {
        let wanted = format!("{}={}", package.name, package.version);
        let mut command = self.command("apt-get");
        run(command.args(["download", &wanted]).current_dir(folder), &wanted)?;
        let failed = |source| Error::File { path: folder.to_owned(), source };
        let file = fs::read_dir(folder).map_err(failed)?.next().transpose().map_err(failed)?;
        file.map(|file| file.path()).ok_or(Error::Unknown { about: wanted })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = command(program);
        // Else apt drops to a user of its own, who cannot write where we download to.
        command.args(["-o", "APT::Sandbox::User=root"]);
        if let Some(settings) = &self.settings {
            command.env("APT_CONFIG", settings);
        }
        command
    }
}

fn run(command: &mut Command, about: &str) -> Result<String, Error> {
    output(command).map_err(|source| Error::Apt { about: about.to_owned(), source })
}

/// Puts the files of the package file `package` below `folder`.
pub fn unpack(package: &Path, folder: &Path) -> Result<(), Error> {
    output(command("dpkg").arg("-x").args([package, folder]))
        .map(drop)
        .map_err(|source| Error::Unpack { path: package.to_owned(), source })
}

fn codename() -> Result<String, Error> {
    let path = Path::new("/etc/os-release");
    let text =
        fs::read_to_string(path).map_err(|source| Error::File { path: path.to_owned(), source })?;
    let codename = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    Ok(codename.unwrap_or_default().trim_matches('"').to_owned())
}

/// The archive that has the release `codename`, in lines of release and address.
fn archive<'a>(targets: &'a str, codename: &str) -> Option<&'a str> {
    let targets = targets.lines().filter_map(|line| line.split_once(' '));
    targets.filter(|(release, _)| *release == codename).map(|(_, address)| address).next()
}

fn source_line(archive: &str, suite: &str) -> String {
    let signed = Path::new(KEYRING).exists();
    let key = if signed { format!("signed-by={KEYRING} ") } else { String::new() };
    format!("deb [{key}target=Packages] {archive} {suite} main\n")
}

fn settings(folder: &Path, acquire: &str, architecture: Option<&str>) -> String {
    let folder = folder.display();
    let acquire = acquire.lines().filter(|line| !line.starts_with("Acquire::IndexTargets"));
    let mut settings: String = acquire.map(|line| format!("{line}\n")).collect();
    if let Some(name) = architecture {
        settings
            .push_str(&format!("APT::Architecture \"{name}\";\nAPT::Architectures \"{name}\";\n"));
    }
    settings.push_str(&format!(
        "Dir::Etc::main \"/dev/null\";\n\
         Dir::Etc::parts \"/dev/null\";\n\
         Dir::Etc::sourcelist \"{folder}/sources.list\";\n\
         Dir::Etc::sourceparts \"/dev/null\";\n\
         Dir::State::lists \"{folder}/lists\";\n\
         Dir::State::status \"{folder}/status\";\n\
         Dir::Cache \"{folder}/cache\";\n"
    ));
    settings
}

fn first_dependency(text: &str) -> Option<Package> {
    let depends = text.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let (name, version) = depends.split(',').next()?.trim().split_once(" (= ")?;
    Some(Package { name: name.to_owned(), version: version.strip_suffix(')')?.to_owned() })
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|source| Error::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metapackage_names_the_kernel_package() {
        let text = "Package: linux-image-cloud-amd64\nVersion: 6.1.2-1\n\
                    Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1.2-1)\nPriority: optional\n";

        assert_eq!(
            first_dependency(text).unwrap(),
            Package {
                name: "linux-image-6.1.0-9-cloud-amd64".to_owned(),
                version: "6.1.2-1".to_owned()
            }
        );
    }

    #[test]
    fn an_unversioned_dependency_is_not_a_kernel() {
        assert!(first_dependency("Depends: kmod, linux-base\n").is_none());
    }

    #[test]
    fn the_mirror_is_the_one_of_the_release_itself() {
        let targets =
            "bookworm-security http://security.invalid/\nbookworm http://mirror.invalid/\n";

        assert_eq!(archive(targets, "bookworm"), Some("http://mirror.invalid/"));
        assert_eq!(archive(targets, "trixie"), None);
    }

    #[test]
    fn private_settings_keep_proxies_and_leave_the_machines_files() {
        let settings = settings(
            Path::new("/cache/apt"),
            "Acquire::http::Proxy \"http://proxy.invalid\";\nAcquire::IndexTargets::deb::x \"y\";",
            Some("arm64"),
        );

        assert!(settings.contains("http://proxy.invalid"));
        assert!(!settings.contains("IndexTargets"));
        assert!(settings.contains("APT::Architecture \"arm64\";"));
        assert!(settings.contains("Dir::Etc::sourcelist \"/cache/apt/sources.list\";"));
    }
}
