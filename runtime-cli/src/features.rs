//! What this runtime implements, as the specification's features structure (features.md).

use std::collections::HashMap;

use oci_spec::runtime::{
    Apparmor, Arch, Cgroup, Features, FeaturesBuilder, IntelRdt, LinuxFeatureBuilder,
    LinuxNamespaceType, LinuxSeccompAction, Seccomp, SeccompBuilder, Selinux,
};
use serde_json::Value;

use crate::translate::{CAPABILITIES, MOUNT_OPTIONS};
use crate::{OCI_VERSION, VERSION};

/// Hooks of the specification; all are run.
const HOOKS: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

const OPERATORS: [&str; 7] = [
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
];

const SECCOMP_FLAGS: [&str; 3] =
    ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_LOG"];

/// The features structure, without the properties that would be null.
pub fn features() -> Value {
    let mut value = serde_json::to_value(all()).expect("plain data with string keys serializes");
    remove_nulls(&mut value);
    value
}

fn all() -> Features {
    let mut linux = LinuxFeatureBuilder::default()
        .namespaces(vec![
            LinuxNamespaceType::Cgroup,
            LinuxNamespaceType::Ipc,
            LinuxNamespaceType::Mount,
            LinuxNamespaceType::Network,
            LinuxNamespaceType::Pid,
            LinuxNamespaceType::Uts,
        ])
        .capabilities(CAPABILITIES.map(String::from))
        .seccomp(seccomp())
        .build()
        .expect("every field has a default");
    let mut cgroup = Cgroup::default();
    cgroup
        .set_v1(Some(true))
        .set_v2(Some(true))
        .set_systemd(Some(true))
        .set_systemd_user(Some(false))
        .set_rdma(Some(false));
    let mut apparmor = Apparmor::default();
    let mut selinux = Selinux::default();
    let mut intel_rdt = IntelRdt::default();
    linux
        .set_cgroup(Some(cgroup))
        .set_apparmor(Some(apparmor.set_enabled(Some(false)).clone()))
        .set_selinux(Some(selinux.set_enabled(Some(false)).clone()))
        .set_intel_rdt(Some(intel_rdt.set_enabled(Some(false)).clone()));
    FeaturesBuilder::default()
        .oci_version_min("1.0.0")
        .oci_version_max(OCI_VERSION)
        .hooks(HOOKS.map(String::from))
        .mount_options(MOUNT_OPTIONS.map(String::from))
        .linux(linux)
        .annotations(annotations())
        .build()
        .expect("every field has a default")
}

fn seccomp() -> Seccomp {
    SeccompBuilder::default()
        .enabled(true)
        .actions(vec![
            LinuxSeccompAction::ScmpActAllow,
            LinuxSeccompAction::ScmpActErrno,
            LinuxSeccompAction::ScmpActKill,
            LinuxSeccompAction::ScmpActKillProcess,
            LinuxSeccompAction::ScmpActKillThread,
            LinuxSeccompAction::ScmpActLog,
            LinuxSeccompAction::ScmpActTrace,
            LinuxSeccompAction::ScmpActTrap,
        ])
        .operators(OPERATORS.map(String::from))
        .archs(vec![
            Arch::ScmpArchAarch64,
            Arch::ScmpArchArm,
            Arch::ScmpArchPpc64le,
            Arch::ScmpArchX32,
            Arch::ScmpArchX86,
            Arch::ScmpArchX86_64,
        ])
        .known_flags(SECCOMP_FLAGS.map(String::from))
        .supported_flags(SECCOMP_FLAGS.map(String::from))
        .build()
        .expect("every field has a default")
}

fn annotations() -> HashMap<String, String> {
    let mut annotations = HashMap::from([
        ("io.coracle.version".into(), VERSION.into()),
        ("org.opencontainers.runc.checkpoint.enabled".into(), "false".into()),
    ]);
    if let Ok(version) = libseccomp::ScmpVersion::current() {
        annotations.insert("io.github.seccomp.libseccomp.version".into(), version.to_string());
    }
    annotations
}

fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            fields.values_mut().for_each(remove_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_reads_back_as_the_specification_has_it() {
        let features: Features = serde_json::from_value(features()).unwrap();

        assert_eq!(features.oci_version_min(), "1.0.0");
        assert_eq!(features.oci_version_max(), OCI_VERSION);
    }

    #[test]
    fn what_is_refused_is_not_promised() {
        let text = features().to_string();

        for absent in ["\"rro\"", "SCMP_ACT_NOTIFY", "\"user\"", "\"time\"", "null"] {
            assert!(!text.contains(absent), "{absent}");
        }
    }
}
