//! Namespaces of the configuration to the `CLONE_NEW*` flags of those to make in the guest.

use oci_spec::runtime::{Linux, LinuxNamespaceType};

use super::Error;

/// Flags of the namespaces to create in the guest.
///
/// One that the configuration leaves out is shared with the guest, as with runc it is shared with
/// the host; a mount namespace is always made, since the guest's own must stay as it is.
pub fn to_create(linux: &Linux) -> Result<u64, Error> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let mut seen = 0;
    let mut flags = flag(LinuxNamespaceType::Mount);
    for namespace in namespaces {
        let kind = namespace.typ();
        if seen & flag(kind) != 0 {
            return Err(Error::DuplicateNamespace(kind));
        }
        seen |= flag(kind);
        match kind {
            // The host's side of the network.
            LinuxNamespaceType::Network => continue,
            // Without mappings other than the identity, which were checked before, and without
            // offsets these two would change nothing inside.
            LinuxNamespaceType::User | LinuxNamespaceType::Time => {}
            _ => flags |= flag(kind),
        }
        let path = namespace.path().as_deref().unwrap_or_else(|| "".as_ref());
        if !path.as_os_str().is_empty() {
            return Err(Error::Unsupported {
                property: format!("{kind} namespace {}", path.display()),
                remedy: "a container in its own machine cannot join a namespace of the host or of \
                         another container; run it with namespaces of its own (only network \
                         namespaces can be joined)",
            });
        }
    }
    Ok(flags)
}

/// The kernel's flag, which is the value of the enum.
fn flag(kind: LinuxNamespaceType) -> u64 {
    kind as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(namespaces: &str) -> Result<u64, Error> {
        let json = format!(r#"{{"namespaces": {namespaces}}}"#);
        to_create(&serde_json::from_str(&json).unwrap())
    }

    fn raw(flag: libc::c_int) -> u64 {
        u64::try_from(flag).unwrap()
    }

    #[test]
    fn a_mount_namespace_is_always_made() {
        assert_eq!(flags("[]").unwrap(), raw(libc::CLONE_NEWNS));
    }

    #[test]
    fn listed_namespaces_are_made_and_the_network_stays_with_the_host() {
        let listed = r#"[{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                         {"type": "mount"}, {"type": "cgroup"}]"#;

        let expected = libc::CLONE_NEWPID
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWNS
            | libc::CLONE_NEWCGROUP;
        assert_eq!(flags(listed).unwrap(), raw(expected));
    }

    #[test]
    fn a_network_namespace_may_have_a_path() {
        assert!(flags(r#"[{"type": "network", "path": "/run/netns/x"}]"#).is_ok());
    }

    #[test]
    fn joining_another_namespace_is_refused_with_a_remedy() {
        let error = flags(r#"[{"type": "pid", "path": "/proc/7/ns/pid"}]"#).unwrap_err();

        assert!(error.to_string().starts_with("pid namespace /proc/7/ns/pid cannot"), "{error}");
        assert!(error.to_string().contains("namespaces of its own"), "{error}");
    }

    #[test]
    fn an_empty_path_is_no_path() {
        assert!(flags(r#"[{"type": "ipc", "path": ""}]"#).is_ok());
    }

    #[test]
    fn a_namespace_listed_twice_is_refused() {
        let error = flags(r#"[{"type": "pid"}, {"type": "pid"}]"#).unwrap_err();

        assert_eq!(error.to_string(), "malformed spec file: duplicated ns pid");
    }
}
