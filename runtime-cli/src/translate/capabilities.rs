//! Capability names to the bit masks of the kernel (capabilities(7)).

use std::collections::HashSet;
use std::hash::BuildHasher;

use agent_protocol::Capabilities;
use oci_spec::runtime as oci;

/// Every capability by its number, as Linux 5.9 and newer know them.
pub const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The sets of a process; a configuration without any means a process without any.
pub fn translate(capabilities: Option<&oci::LinuxCapabilities>) -> Capabilities {
    let Some(sets) = capabilities else { return Capabilities::default() };
    Capabilities {
        bounding: mask(sets.bounding().as_ref()),
        effective: mask(sets.effective().as_ref()),
        inheritable: mask(sets.inheritable().as_ref()),
        permitted: mask(sets.permitted().as_ref()),
        ambient: mask(sets.ambient().as_ref()),
    }
}

/// The bit of one capability, by its name with or without `CAP_`, in any case.
pub fn mask_of(name: &str) -> Option<u64> {
    let name = name.to_ascii_uppercase();
    let bare = name.strip_prefix("CAP_").unwrap_or(&name);
    NAMES.iter().position(|known| &known[4..] == bare).map(|number| 1 << number)
}

fn mask<S: BuildHasher>(set: Option<&HashSet<oci::Capability, S>>) -> u64 {
    let bit = |capability: &oci::Capability| {
        mask_of(&capability.to_string()).expect("NAMES has all that the specification has")
    };
    set.into_iter().flatten().map(bit).fold(0, |mask, bit| mask | bit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(json: &str) -> Capabilities {
        translate(Some(&serde_json::from_str(json).unwrap()))
    }

    #[test]
    fn numbers_are_those_of_the_kernel() {
        assert_eq!(mask_of("CAP_CHOWN"), Some(1));
        assert_eq!(mask_of("CAP_NET_RAW"), Some(1 << 13));
        assert_eq!(mask_of("CAP_SYS_ADMIN"), Some(1 << 21));
        assert_eq!(mask_of("CAP_CHECKPOINT_RESTORE"), Some(1 << 40));
    }

    #[test]
    fn a_name_may_lack_its_prefix() {
        assert_eq!(mask_of("net_admin"), mask_of("CAP_NET_ADMIN"));
        assert_eq!(mask_of("CAP_NOSUCH"), None);
    }

    #[test]
    fn every_capability_of_the_specification_has_a_number() {
        let all = format!(r#"{{"bounding": {:?}}}"#, NAMES);

        assert_eq!(sets(&all).bounding, (1 << NAMES.len()) - 1);
    }

    #[test]
    fn each_set_is_its_own() {
        let sets = sets(r#"{"effective": ["CAP_KILL"], "ambient": ["CAP_CHOWN"]}"#);

        assert_eq!(sets, Capabilities { effective: 1 << 5, ambient: 1, ..Default::default() });
    }

    #[test]
    fn no_capabilities_are_no_capabilities() {
        assert_eq!(translate(None), Capabilities::default());
    }
}
