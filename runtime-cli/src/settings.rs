//! Host-wide settings: the guest's files and size, from `/etc/coracle/config.json`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::rootless;

/// Where settings are read from, unless [`PATH_VARIABLE`] names another file.
pub const DEFAULT_PATH: &str = "/etc/coracle/config.json";

/// Environment variable that names the settings file.
pub const PATH_VARIABLE: &str = "CORACLE_CONFIG";

/// Container annotation that overrides [`Settings::vcpus`].
pub const VCPUS_ANNOTATION: &str = "io.coracle.vcpus";

/// Container annotation that overrides [`Settings::memory_mib`].
pub const MEMORY_ANNOTATION: &str = "io.coracle.memory_mib";

/// Least guest memory that the guest kernel, its root and the agent start in, in MiB.
pub const MIN_MEMORY_MIB: u32 = 64;

/// Most virtual processors of one guest.
pub const MAX_VCPUS: u8 = 64;

/// What `coracle-image` calls a kernel, and the root that this one maps.
const KERNEL: &str = "kernel";
const ROOTFS: &str = "rootfs.erofs";

/// Guest initrd of this host.
const INITRD: &str = "/var/lib/coracle/guest/initrd";

/// Prefix of the annotations that are ours; one that is not known is an error, as it is a typo.
const ANNOTATION_PREFIX: &str = "io.coracle.";

/// Why settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is there but cannot be read.
    #[error("read settings {path}")]
    Read {
        /// The settings file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is no settings file.
    #[error("settings {path}")]
    Parse {
        /// The settings file.
        path: PathBuf,
        /// Line, column and cause.
        #[source]
        source: serde_json::Error,
    },
    /// The environment names a file that does not exist.
    #[error("settings file {0} does not exist: create it or unset {PATH_VARIABLE}")]
    Missing(PathBuf),
    /// Only one of two can be.
    #[error("rootfs and initrd are both set: the guest has one root, remove one of them")]
    TwoRoots,
    /// A value is out of its range.
    #[error("{name} is {value}: it must be {rule}")]
    Range {
        /// Setting or annotation.
        name: String,
        /// What it was set to.
        value: String,
        /// What is allowed.
        rule: &'static str,
    },
    /// An annotation with our prefix that means nothing.
    #[error(
        "unknown annotation {0}: known are {VCPUS_ANNOTATION} and {MEMORY_ANNOTATION}; remove it \
         or correct its name"
    )]
    UnknownAnnotation(String),
}

/// What the guest's first root comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    /// A file system that it maps.
    Mapped(PathBuf),
    /// An archive that it unpacks.
    Initrd(PathBuf),
}

/// What every sandbox on this host starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Guest root file system (erofs) with the agent as `/init`, which all guests map, so that it must only be
    /// replaced, never written to; their kernel must be able to. Without this and `initrd` it is
    /// `rootfs.erofs` beside a kernel of the name `kernel`, if that is there.
    pub rootfs: Option<PathBuf>,
    /// Guest initrd, with the agent as `/init`, instead of `rootfs`.
    pub initrd: Option<PathBuf>,
    /// Virtual processors of a guest; without it as many as the host has, up to 8, or fewer where the
    /// container's limits allow no more.
    pub vcpus: Option<u8>,
    /// Memory that a guest without a memory limit starts with, in MiB.
    pub memory_mib: u32,
    /// How long a guest may take until its agent answers, in seconds.
    pub boot_timeout_s: u32,
    /// Whether the guest kernel logs early messages on a serial console.
    pub debug_console: bool,
    /// Folder of the templates that guests start from instead of booting; without one, null, each boots.
    /// Guests of one template have their kernels at the same random addresses.
    pub templates: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kernel: "/var/lib/coracle/guest/kernel".into(),
            rootfs: None,
            initrd: None,
            vcpus: None,
            memory_mib: 256,
            boot_timeout_s: 60,
            debug_console: false,
            templates: Some(rootless::templates()),
        }
    }
}

impl Settings {
    /// The settings of this host: the file named by [`PATH_VARIABLE`], else [`DEFAULT_PATH`] if it
    /// exists, else the defaults.
    pub fn load() -> Result<Self, Error> {
        match std::env::var_os(PATH_VARIABLE) {
            Some(path) => {
                let path = PathBuf::from(path);
                Self::read(&path)?.ok_or(Error::Missing(path))
            }
            None => Ok(Self::read(Path::new(DEFAULT_PATH))?.unwrap_or_default()),
        }
    }

    /// The settings in `path`, or `None` if there is no such file.
    fn read(path: &Path) -> Result<Option<Self>, Error> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Read { path: path.into(), source }),
        };
        let settings: Self = serde_json::from_slice(&text)
            .map_err(|source| Error::Parse { path: path.into(), source })?;
        settings.check("")?;
        Ok(Some(settings))
    }

    /// These settings as the annotations of one container change them.
    pub fn with_annotations(
        mut self,
        annotations: &BTreeMap<String, String>,
    ) -> Result<Self, Error> {
        for (name, value) in annotations {
            match name.as_str() {
                VCPUS_ANNOTATION => self.vcpus = Some(number(name, value)?),
                MEMORY_ANNOTATION => self.memory_mib = number(name, value)?,
                other if other.starts_with(ANNOTATION_PREFIX) => {
                    return Err(Error::UnknownAnnotation(other.into()));
                }
                _ => {}
            }
        }
        self.check(ANNOTATION_PREFIX)?;
        Ok(self)
    }

    /// What the guest's root comes from.
    pub fn root(&self) -> Root {
        match (&self.rootfs, &self.initrd) {
            (Some(rootfs), _) => Root::Mapped(rootfs.clone()),
            (None, Some(initrd)) => Root::Initrd(initrd.clone()),
            // The image builder puts it there for a kernel that can map it.
            (None, None) => Some(self.kernel.with_file_name(ROOTFS))
                .filter(|_| self.kernel.file_name() == Some(KERNEL.as_ref()))
                // One that cannot be looked at is for who opens it to complain of.
                .filter(|rootfs| rootfs.try_exists().unwrap_or(true))
                .map_or_else(|| Root::Initrd(INITRD.into()), Root::Mapped),
        }
    }

    fn check(&self, prefix: &str) -> Result<(), Error> {
        if self.rootfs.is_some() && self.initrd.is_some() {
            return Err(Error::TwoRoots);
        }
        let range = |name: &str, value: &dyn ToString, rule| {
            Err(Error::Range { name: format!("{prefix}{name}"), value: value.to_string(), rule })
        };
        if let Some(vcpus) = self.vcpus.filter(|vcpus| !(1..=MAX_VCPUS).contains(vcpus)) {
            return range("vcpus", &vcpus, "1 to 64");
        }
        if self.memory_mib < MIN_MEMORY_MIB {
            return range("memory_mib", &self.memory_mib, "at least 64");
        }
        if self.boot_timeout_s == 0 {
            return range("boot_timeout_s", &self.boot_timeout_s, "at least 1");
        }
        Ok(())
    }
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, Error> {
    value.parse().map_err(|_| Error::Range {
        name: name.into(),
        value: format!("{value:?}"),
        rule: "a whole number in range, as a string",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotated(name: &str, value: &str) -> Result<Settings, Error> {
        Settings::default().with_annotations(&BTreeMap::from([(name.into(), value.into())]))
    }

    #[test]
    fn an_absent_file_is_no_settings() {
        assert_eq!(Settings::read(Path::new("/nonexistent/config.json")).unwrap(), None);
    }

    #[test]
    fn what_the_file_does_not_say_stays_at_its_default() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, r#"{"vcpus": 2}"#).unwrap();

        let settings = Settings::read(&path).unwrap().unwrap();

        assert_eq!(settings, Settings { vcpus: Some(2), ..Settings::default() });
    }

    #[test]
    fn an_unknown_setting_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        std::fs::write(&path, r#"{"vcpu": 2}"#).unwrap();

        let Error::Parse { source, .. } = Settings::read(&path).unwrap_err() else {
            panic!("not a parse error")
        };

        assert!(source.to_string().contains("unknown field `vcpu`"), "{source}");
    }

    #[test]
    fn annotations_override_the_size_of_the_guest() {
        assert_eq!(annotated(VCPUS_ANNOTATION, "3").unwrap().vcpus, Some(3));
        assert_eq!(annotated(MEMORY_ANNOTATION, "512").unwrap().memory_mib, 512);
    }

    #[test]
    fn the_root_beside_the_kernel_is_mapped_if_it_can_be() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings { kernel: folder.path().join("kernel"), ..Settings::default() };
        let unpacked = settings.root();
        std::fs::write(folder.path().join(ROOTFS), "").unwrap();

        assert_eq!(unpacked, Root::Initrd(INITRD.into()));
        assert_eq!(settings.root(), Root::Mapped(folder.path().join(ROOTFS)));
    }

    #[test]
    fn a_kernel_of_another_name_has_nothing_to_do_with_the_root_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(ROOTFS), "").unwrap();
        let settings = Settings { kernel: folder.path().join("vmlinux"), ..Settings::default() };

        assert_eq!(settings.root(), Root::Initrd(INITRD.into()));
    }

    #[test]
    fn a_root_that_is_named_is_the_guest_s() {
        let initrd = Settings { initrd: Some("/a".into()), ..Settings::default() };
        let rootfs = Settings { rootfs: Some("/b".into()), ..Settings::default() };
        let both = Settings { rootfs: Some("/b".into()), ..initrd.clone() };

        assert_eq!(initrd.root(), Root::Initrd("/a".into()));
        assert_eq!(rootfs.root(), Root::Mapped("/b".into()));
        assert!(matches!(both.check(""), Err(Error::TwoRoots)));
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(annotated(VCPUS_ANNOTATION, "0").is_err());
        assert!(annotated(VCPUS_ANNOTATION, "300").is_err());
        assert!(annotated(MEMORY_ANNOTATION, "1").is_err());
    }

    #[test]
    fn a_misspelt_annotation_of_ours_is_refused_and_others_are_not_ours() {
        assert!(matches!(annotated("io.coracle.vcpu", "1"), Err(Error::UnknownAnnotation(_))));
        assert!(annotated("io.kubernetes.cri.sandbox-id", "x").is_ok());
    }
}
