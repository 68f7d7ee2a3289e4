//! Whole configurations, as engines write them.

use super::*;

/// What runc's `spec` and our own write.
const DEFAULT: &str = include_str!("../commands/spec.json");

/// A configuration as Docker 20.10 writes it.
const DOCKER: &str = include_str!("testdata/docker.json");

/// A configuration as Podman 4.3 writes it.
const PODMAN: &str = include_str!("testdata/podman.json");

fn translated(json: &str) -> Result<Container, Error> {
    let spec: oci::Spec = serde_json::from_str(json).unwrap();
    let bundle = Bundle { path: "/bundle".into(), rootfs: "/bundle/rootfs".into(), spec };
    let id = ContainerId::parse("box").unwrap();
    container(&id, &bundle, "/share/rootfs".into(), "{}".into(), &mut |bind| {
        Ok(format!("/share{}", bind.source.display()))
    })
}

fn changed(change: impl FnOnce(&mut serde_json::Value)) -> Result<Container, Error> {
    let mut value = serde_json::from_str(DEFAULT).unwrap();
    change(&mut value);
    translated(&value.to_string())
}

#[test]
fn the_default_configuration_is_translated() {
    let container = translated(DEFAULT).unwrap();

    assert_eq!(container.id, "box");
    assert_eq!(container.rootfs, "/share/rootfs");
    assert!(container.rootfs_readonly);
    assert_eq!(container.hostname.as_deref(), Some("coracle"));
    assert_eq!(container.mounts.len(), 7);
    assert_eq!(container.process.args, ["sh"]);
    assert!(container.masked_paths.contains(&"/proc/kcore".to_string()));
}

#[test]
fn a_configuration_of_docker_is_translated() {
    let container = translated(DOCKER).unwrap();

    let binds: Vec<_> = container
        .mounts
        .iter()
        .filter(|mount| mount.fstype == "bind")
        .map(|mount| mount.destination.as_str())
        .collect();
    assert_eq!(binds, ["/etc/resolv.conf", "/etc/hostname", "/etc/hosts"]);
    assert!(container.process.seccomp.is_some());
    assert_eq!(container.sysctl.len(), 2);
    let limit = ("memory.max".to_string(), "67108864".to_string());
    assert!(container.cgroup.files.contains(&limit));
}

#[test]
fn a_configuration_of_podman_is_translated() {
    let container = translated(PODMAN).unwrap();

    assert!(container.mounts.iter().any(|mount| mount.source == "/share/srv/data"));
    assert!(container.process.seccomp.is_some());
}

#[test]
fn without_a_linux_section_nothing_is_masked_or_limited() {
    let container = changed(|spec| {
        spec.as_object_mut().unwrap().remove("linux");
    })
    .unwrap();

    assert!(container.masked_paths.is_empty() && container.cgroup.files.is_empty());
}

#[test]
fn sysctls_are_in_a_fixed_order() {
    let container = changed(|spec| {
        spec["linux"]["sysctl"] = serde_json::json!({"net.b": "2", "net.a": "1"});
    })
    .unwrap();

    let expected = [("net.a", "1"), ("net.b", "2")].map(|(key, value)| (key.into(), value.into()));
    assert_eq!(container.sysctl, expected);
}

#[test]
fn hooks_inside_the_container_are_handed_over() {
    let container = changed(|spec| {
        spec["hooks"] = serde_json::json!({
            "prestart": [{"path": "/host"}],
            "startContainer": [{"path": "/bin/x", "args": ["x"], "env": [], "timeout": 3}],
        });
    })
    .unwrap();

    let expected =
        Hook { path: "/bin/x".into(), args: vec!["x".into()], env: vec![], timeout_s: Some(3) };
    assert_eq!(container.start_hooks, [expected]);
}

#[test]
fn a_hook_in_the_container_has_the_environment_of_its_process() {
    let container = changed(|spec| {
        spec["process"]["env"] = serde_json::json!(["ONE=two"]);
        spec["hooks"] = serde_json::json!({"startContainer": [{"path": "/x"}]});
    });

    assert_eq!(container.unwrap().start_hooks[0].env, ["ONE=two"]);
}

#[test]
fn a_hook_needs_time() {
    let result = changed(|spec| {
        spec["hooks"] = serde_json::json!({"startContainer": [{"path": "/x", "timeout": 0}]});
    });

    assert!(matches!(result, Err(Error::Invalid { .. })));
}

#[test]
fn remapped_users_are_refused_and_the_identity_is_not() {
    let with_host_id = |host: u32| {
        changed(|spec| {
            spec["linux"]["uidMappings"] =
                serde_json::json!([{"containerID": 0, "hostID": host, "size": 65536}]);
        })
    };

    assert!(with_host_id(0).is_ok());
    let error = with_host_id(100_000).unwrap_err();
    assert!(error.to_string().starts_with("linux.uidMappings cannot be honoured"), "{error}");
}

#[test]
fn host_only_protection_has_no_effect_in_the_guest() {
    let result = changed(|spec| {
        spec["process"]["apparmorProfile"] = "docker-default".into();
        spec["process"]["selinuxLabel"] = "system_u:system_r:container_t:s0".into();
        spec["linux"]["mountLabel"] = "system_u:object_r:container_file_t:s0".into();
        spec["linux"]["intelRdt"] = serde_json::json!({"closID": "guaranteed"});
    });

    assert_eq!(result.unwrap(), translated(DEFAULT).unwrap());
}
