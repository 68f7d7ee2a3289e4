//! Mounts: the options of mount(8) and runc to the flags of mount(2), and bind mounts to shares.

use std::path::{Path, PathBuf};

use agent_protocol::Mount;
use libc::{
    MS_BIND, MS_DIRSYNC, MS_I_VERSION, MS_LAZYTIME, MS_MANDLOCK, MS_NOATIME, MS_NODEV,
    MS_NODIRATIME, MS_NOEXEC, MS_NOSUID, MS_POSIXACL, MS_PRIVATE, MS_RDONLY, MS_REC, MS_RELATIME,
    MS_REMOUNT, MS_SHARED, MS_SILENT, MS_SLAVE, MS_STRICTATIME, MS_SYNCHRONOUS, MS_UNBINDABLE,
};
use oci_spec::runtime as oci;

use super::{Bind, Error, ShareBind, text};

/// `MS_NOSYMFOLLOW` (linux/mount.h, since 5.10), which the libc crate lacks for glibc.
const MS_NOSYMFOLLOW: u64 = 1 << 8;

/// Where the guest has its cgroups, as the host does.
const CGROUPS: &str = "/sys/fs/cgroup";

/// What an option does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Sets flags.
    Set(u64),
    /// Clears a flag, also one that a bind mount inherits from its source.
    Clear(u64),
    /// Changes propagation after mounting.
    Propagate(u64),
    /// Copies what is below the mount point into the new file system.
    CopyUp,
    /// Nothing.
    Nothing,
}

use Effect::{Clear, CopyUp, Nothing, Propagate, Set};

/// Every option that is not handed to the file system.
const TABLE: &[(&str, Effect)] = &[
    ("acl", Set(MS_POSIXACL)),
    ("async", Clear(MS_SYNCHRONOUS)),
    ("atime", Clear(MS_NOATIME)),
    ("bind", Set(MS_BIND)),
    ("defaults", Nothing),
    ("dev", Clear(MS_NODEV)),
    ("diratime", Clear(MS_NODIRATIME)),
    ("dirsync", Set(MS_DIRSYNC)),
    ("exec", Clear(MS_NOEXEC)),
    ("iversion", Set(MS_I_VERSION)),
    ("lazytime", Set(MS_LAZYTIME)),
    ("loud", Clear(MS_SILENT)),
    ("mand", Set(MS_MANDLOCK)),
    ("noacl", Clear(MS_POSIXACL)),
    ("noatime", Set(MS_NOATIME)),
    ("nodev", Set(MS_NODEV)),
    ("nodiratime", Set(MS_NODIRATIME)),
    ("noexec", Set(MS_NOEXEC)),
    ("noiversion", Clear(MS_I_VERSION)),
    ("nolazytime", Clear(MS_LAZYTIME)),
    ("nomand", Clear(MS_MANDLOCK)),
    ("norelatime", Clear(MS_RELATIME)),
    ("nostrictatime", Clear(MS_STRICTATIME)),
    ("nosuid", Set(MS_NOSUID)),
    ("nosymfollow", Set(MS_NOSYMFOLLOW)),
    ("private", Propagate(MS_PRIVATE)),
    ("rbind", Set(MS_BIND | MS_REC)),
    ("relatime", Set(MS_RELATIME)),
    ("remount", Set(MS_REMOUNT)),
    ("ro", Set(MS_RDONLY)),
    ("rprivate", Propagate(MS_PRIVATE | MS_REC)),
    ("rshared", Propagate(MS_SHARED | MS_REC)),
    ("rslave", Propagate(MS_SLAVE | MS_REC)),
    ("runbindable", Propagate(MS_UNBINDABLE | MS_REC)),
    ("rw", Clear(MS_RDONLY)),
    ("shared", Propagate(MS_SHARED)),
    ("silent", Set(MS_SILENT)),
    ("slave", Propagate(MS_SLAVE)),
    ("strictatime", Set(MS_STRICTATIME)),
    ("suid", Clear(MS_NOSUID)),
    ("symfollow", Clear(MS_NOSYMFOLLOW)),
    ("sync", Set(MS_SYNCHRONOUS)),
    ("tmpcopyup", CopyUp),
    ("unbindable", Propagate(MS_UNBINDABLE)),
];

/// Options of runc that change a whole tree of mounts with mount_setattr(2).
const RECURSIVE: &[&str] = &[
    "rro",
    "rrw",
    "rnosuid",
    "rsuid",
    "rnodev",
    "rdev",
    "rnoexec",
    "rexec",
    "rnodiratime",
    "rdiratime",
    "rrelatime",
    "rnorelatime",
    "rnoatime",
    "ratime",
    "rstrictatime",
    "rnostrictatime",
    "rnosymfollow",
    "rsymfollow",
    "idmap",
    "ridmap",
];

/// Names of the options that are understood, in ascending order.
pub const OPTIONS: [&str; TABLE.len()] = {
    let mut names = [""; TABLE.len()];
    let mut index = 0;
    while index < TABLE.len() {
        names[index] = TABLE[index].0;
        index += 1;
    }
    names
};

/// The flags that all options of one mount come to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    flags: u64,
    clear_flags: u64,
    propagation: Vec<u64>,
    data: Vec<String>,
    copy_up: bool,
}

impl Options {
    fn parse(options: &[String], destination: &Path) -> Result<Self, Error> {
        let mut parsed = Self::default();
        for option in options {
            if RECURSIVE.contains(&option.as_str()) {
                return Err(Error::Unsupported {
                    property: format!("mount option {option} of {}", destination.display()),
                    remedy: "use the option without recursion, such as ro instead of rro",
                });
            }
            match TABLE.iter().find(|(name, _)| name == option) {
                Some((_, effect)) => parsed.apply(*effect),
                None => parsed.data.push(option.clone()),
            }
        }
        Ok(parsed)
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Set(flags) => {
                self.flags |= flags;
                self.clear_flags &= !flags;
            }
            Clear(flags) => {
                self.flags &= !flags;
                self.clear_flags |= flags;
            }
            Propagate(flags) => self.propagation.push(flags),
            CopyUp => self.copy_up = true,
            Nothing => {}
        }
    }
}

/// The mounts of the configuration in their order; `share` is asked for every bind mount.
pub fn translate(
    mounts: &[oci::Mount],
    bundle: &Path,
    share: &mut ShareBind<'_>,
) -> Result<Vec<Mount>, Error> {
    mounts.iter().map(|mount| translate_one(mount, bundle, share)).collect()
}

fn translate_one(
    mount: &oci::Mount,
    bundle: &Path,
    share: &mut ShareBind<'_>,
) -> Result<Mount, Error> {
    // Engines of old gave relative destinations; runc takes them from the root, too.
    let destination = Path::new("/").join(mount.destination());
    if mount.uid_mappings().as_ref().is_some_and(|mappings| !mappings.is_empty()) {
        return Err(Error::Unsupported {
            property: format!("uidMappings of mount {}", destination.display()),
            remedy: "mount it without id mapping",
        });
    }
    let mut options = Options::parse(mount.options().as_deref().unwrap_or_default(), &destination)?;
    let fstype = mount.typ().as_deref().unwrap_or_default();
    if fstype == "bind" && options.flags & MS_BIND == 0 {
        options.flags |= MS_BIND;
    }
    let (source, fstype) = if options.flags & MS_BIND != 0 {
        let source = bind_source(mount, bundle, &destination)?;
        // An init that is given the cgroups (`-v /sys/fs/cgroup:/sys/fs/cgroup`) is to divide its own
        // kernel's: another kernel's could not be used, and are not a container's to change.
        let is_own = source == Path::new(CGROUPS) && destination == source;
        let source =
            if is_own { CGROUPS.into() } else { shared(&source, &destination, &options, share)? };
        (source, "bind")
    } else {
        match (fstype, mount.source()) {
            ("", _) => return Err(no_type(&destination)),
            ("cgroup" | "cgroup2", _) => ("cgroup".into(), "cgroup"),
            (fstype, Some(source)) => (text(source, "mounts.source")?, fstype),
            (fstype, None) => (fstype.into(), fstype),
        }
    };
    Ok(Mount {
        destination: text(&destination, "mounts.destination")?,
        source,
        fstype: fstype.into(),
        flags: options.flags,
        clear_flags: options.clear_flags,
        propagation: options.propagation,
        data: options.data.join(","),
        copy_up: options.copy_up,
    })
}

/// Source of a bind mount, a relative one being below the bundle.
fn bind_source(mount: &oci::Mount, bundle: &Path, destination: &Path) -> Result<PathBuf, Error> {
    match mount.source() {
        Some(source) if !source.as_os_str().is_empty() => Ok(bundle.join(source)),
        _ => Err(Error::Invalid {
            property: format!("source of mount {}", destination.display()),
            value: String::new(),
            rule: "a bind mount needs a path on the host",
        }),
    }
}

fn shared(
    source: &Path,
    destination: &Path,
    options: &Options,
    share: &mut ShareBind<'_>,
) -> Result<String, Error> {
    let propagation = options.propagation.last().copied().unwrap_or_default();
    let bind = Bind {
        source,
        destination,
        recursive: options.flags & MS_REC != 0,
        read_only: options.flags & MS_RDONLY != 0,
        private: propagation & (MS_PRIVATE | MS_UNBINDABLE) != 0,
    };
    share(&bind).map_err(|error| Error::Share {
        source_path: source.into(),
        destination: destination.into(),
        source: error,
    })
}

fn no_type(destination: &Path) -> Error {
    Error::Invalid {
        property: format!("type of mount {}", destination.display()),
        value: String::new(),
        rule: "a mount that is no bind mount needs a file system type",
    }
}

/// `linux.rootfsPropagation` as flags; 0 for the default.
pub fn rootfs_propagation(name: Option<&str>) -> Result<u64, Error> {
    let name = name.unwrap_or_default();
    if name.is_empty() {
        return Ok(0);
    }
    match TABLE.iter().find(|(known, _)| *known == name) {
        Some((_, Propagate(flags))) => Ok(*flags),
        _ => Err(Error::Invalid {
            property: "linux.rootfsPropagation".into(),
            value: name.into(),
            rule: "it must be shared, slave, private or unbindable, or one of these with an r \
                   before it",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translated(json: &str) -> Result<Mount, Error> {
        let mount = serde_json::from_str(json).unwrap();
        let share: &mut ShareBind<'_> =
            &mut |bind: &Bind<'_>| Ok(format!("/share{}", bind.source.display()));
        translate_one(&mount, Path::new("/bundle"), share)
    }

    #[test]
    fn cgroups_are_those_of_the_guest_s_kernel() {
        let bind = |destination: &str| {
            let json = format!(
                r#"{{"destination": "{destination}", "source": "/sys/fs/cgroup", "options": ["rbind"]}}"#
            );
            translated(&json).unwrap().source
        };

        assert_eq!(bind("/sys/fs/cgroup"), "/sys/fs/cgroup");
        assert_eq!(bind("/host/cgroup"), "/share/sys/fs/cgroup");
    }

    #[test]
    fn a_tmpfs_keeps_its_own_options_as_data() {
        let mount = translated(
            r#"{"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}"#,
        )
        .unwrap();

        assert_eq!((mount.source.as_str(), mount.fstype.as_str()), ("tmpfs", "tmpfs"));
        assert_eq!(mount.flags, MS_NOSUID | MS_STRICTATIME);
        assert_eq!(mount.data, "mode=755,size=65536k");
    }

    #[test]
    fn a_volume_is_a_bind_mount_from_its_share() {
        let mount = translated(
            r#"{"destination": "/data", "type": "bind", "source": "/srv/data",
                "options": ["rbind", "ro", "rprivate"]}"#,
        )
        .unwrap();

        assert_eq!((mount.source.as_str(), mount.fstype.as_str()), ("/share/srv/data", "bind"));
        assert_eq!(mount.flags, MS_BIND | MS_REC | MS_RDONLY);
        assert_eq!(mount.propagation, [MS_PRIVATE | MS_REC]);
        assert_eq!(mount.data, "");
    }

    #[test]
    fn the_option_decides_what_a_bind_mount_is_and_the_bundle_where_it_starts() {
        let mount = translated(
            r#"{"destination": "/x", "type": "none", "source": "files/x", "options": ["bind"]}"#,
        )
        .unwrap();

        assert_eq!(
            (mount.source.as_str(), mount.fstype.as_str()),
            ("/share/bundle/files/x", "bind")
        );
        assert_eq!(mount.flags, MS_BIND);
    }

    #[test]
    fn the_share_is_told_what_the_options_allow() {
        let json = r#"[{"destination": "/x", "source": "/y", "options": ["rbind", "ro"]},
                       {"destination": "/z", "source": "/y", "options": ["bind", "rprivate"]}]"#;
        let mounts: Vec<oci::Mount> = serde_json::from_str(json).unwrap();
        let mut asked = Vec::new();

        translate(&mounts, Path::new("/"), &mut |bind| {
            asked.push((bind.recursive, bind.read_only, bind.private));
            Ok(String::new())
        })
        .unwrap();

        assert_eq!(asked, [(true, true, false), (false, false, true)]);
    }

    #[test]
    fn a_share_that_fails_names_both_ends() {
        let json = r#"[{"destination": "/x", "source": "/y", "options": ["bind"]}]"#;
        let mounts: Vec<oci::Mount> = serde_json::from_str(json).unwrap();

        let error =
            translate(&mounts, Path::new("/"), &mut |_| Err("no such file".into())).unwrap_err();

        assert_eq!(crate::logging::chain(&error), "mount /y to /x: no such file");
    }

    #[test]
    fn options_that_undo_others_are_kept_for_inherited_flags() {
        let options = Options::parse(&["nosuid", "suid", "exec"].map(String::from), Path::new("/"));

        let options = options.unwrap();
        assert_eq!((options.flags, options.clear_flags), (0, MS_NOSUID | MS_NOEXEC));
    }

    #[test]
    fn copy_up_is_no_data() {
        let mount =
            translated(r#"{"destination": "/run", "type": "tmpfs", "options": ["tmpcopyup"]}"#)
                .unwrap();

        assert!(mount.copy_up && mount.data.is_empty());
    }

    #[test]
    fn both_cgroup_types_are_the_view_of_the_cgroup() {
        for fstype in ["cgroup", "cgroup2"] {
            let json = format!(r#"{{"destination": "/sys/fs/cgroup", "type": "{fstype}"}}"#);

            assert_eq!(translated(&json).unwrap().fstype, "cgroup");
        }
    }

    #[test]
    fn a_recursive_attribute_is_refused_by_name() {
        let error =
            translated(r#"{"destination": "/x", "source": "/y", "options": ["rbind", "rro"]}"#)
                .unwrap_err();

        assert!(error.to_string().starts_with("mount option rro of /x"), "{error}");
    }

    #[test]
    fn a_mount_without_type_or_source_is_refused() {
        assert!(translated(r#"{"destination": "/x"}"#).is_err());
        assert!(translated(r#"{"destination": "/x", "options": ["bind"]}"#).is_err());
    }

    #[test]
    fn a_relative_destination_starts_at_the_root() {
        let mount = translated(r#"{"destination": "proc", "type": "proc"}"#).unwrap();

        assert_eq!((mount.destination.as_str(), mount.source.as_str()), ("/proc", "proc"));
    }

    #[test]
    fn options_are_listed_in_ascending_order() {
        assert!(OPTIONS.is_sorted());
    }

    #[test]
    fn propagation_of_the_root_is_one_of_eight_names() {
        assert_eq!(rootfs_propagation(None).unwrap(), 0);
        assert_eq!(rootfs_propagation(Some("rslave")).unwrap(), MS_SLAVE | MS_REC);
        assert!(rootfs_propagation(Some("ro")).is_err());
    }
}
