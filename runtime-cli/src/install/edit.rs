//! The runtime's entry in each engine's configuration, and where it goes (pure).

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::value::RawValue;

/// Why an entry has no place in a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not what the engine reads.
    #[error("this is no JSON object: correct it first")]
    Json(#[source] serde_json::Error),
    /// There is a runtime of that name.
    #[error("it names a runtime coracle already: take that out first")]
    Present,
    /// The file is of a version that is not known.
    #[error("configuration version {0} is none of 2, 3 and 4: add the runtime by hand")]
    Version(String),
    /// The program's path cannot be written into the file.
    #[error("the path of this program is not UTF-8")]
    Path,
}

/// A piece of text, and where it goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    offset: usize,
    pub(super) text: String,
}

impl Entry {
    pub(super) fn insert_into(&self, text: &str) -> String {
        let (head, tail) = text.split_at(self.offset);
        format!("{head}{}{tail}", self.text)
    }
}

/// In Docker's `daemon.json`: a member of `runtimes`.
pub(super) fn docker(text: &str, program: &Path) -> Result<Entry, Error> {
    let path = serde_json::to_string(program.to_str().ok_or(Error::Path)?).map_err(Error::Json)?;
    let member = format!("\"coracle\": {{ \"path\": {path} }}");
    if text.trim().is_empty() {
        let text = format!("{{\n  \"runtimes\": {{ {member} }}\n}}\n");
        return Ok(Entry { offset: 0, text });
    }
    let members: BTreeMap<String, &RawValue> = serde_json::from_str(text).map_err(Error::Json)?;
    let Some(runtimes) = members.get("runtimes").map(|value| value.get()) else {
        let comma = if members.is_empty() { "" } else { "," };
        let text_of_entry = format!("\n  \"runtimes\": {{ {member} }}{comma}");
        // Nothing but white space precedes the brace that opens the object.
        let offset = text.find('{').map_or(0, |brace| brace + 1);
        return Ok(Entry { offset, text: text_of_entry });
    };
    let known: BTreeMap<String, &RawValue> = serde_json::from_str(runtimes).map_err(Error::Json)?;
    if known.contains_key("coracle") {
        return Err(Error::Present);
    }
    let comma = if known.is_empty() { "" } else { "," };
    // The value is a part of the text, and begins with its brace.
    let offset = runtimes.as_ptr().addr() - text.as_ptr().addr() + 1;
    Ok(Entry { offset, text: format!(" {member}{comma}") })
}

/// A file of its own beside Podman's `containers.conf`. The lists are Podman's own, and the runtime: it
/// writes errors as JSON and needs the host's KVM.
pub(super) fn podman(text: &str, program: &Path) -> Result<Entry, Error> {
    if !text.trim().is_empty() {
        return Err(Error::Present);
    }
    let path = toml_string(program)?;
    let text = format!(
        "[engine]\n\
         runtime_supports_json = [\"crun\", \"runc\", \"kata\", \"runsc\", \"youki\", \"krun\", \"coracle\"]\n\
         runtime_supports_kvm = [\"kata\", \"kata-runtime\", \"kata-qemu\", \"kata-fc\", \"krun\", \"coracle\"]\n\
         \n\
         [engine.runtimes]\n\
         coracle = [{path}]\n"
    );
    Ok(Entry { offset: 0, text })
}

/// At the end of containerd's `config.toml`: a runtime of its Kubernetes plugin, whose name depends on
/// the version of the file.
pub(super) fn containerd(text: &str, program: &Path) -> Result<Entry, Error> {
    let version = text.lines().find_map(|line| {
        let value = line.trim_start().strip_prefix("version")?.trim_start().strip_prefix('=')?;
        Some(value.split('#').next().unwrap_or_default().trim().to_owned())
    });
    let (head, plugin) = match version.as_deref() {
        None if text.trim().is_empty() => ("version = 2\n", "io.containerd.grpc.v1.cri"),
        Some("2") => ("", "io.containerd.grpc.v1.cri"),
        Some("3" | "4") => ("", "io.containerd.cri.v1.runtime"),
        // Without a version it is of the first, whose plugins have other names.
        other => return Err(Error::Version(other.unwrap_or("1").to_owned())),
    };
    if text.contains("containerd.runtimes.coracle") {
        return Err(Error::Present);
    }
    let path = toml_string(program)?;
    let newline = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let table = format!("plugins.\"{plugin}\".containerd.runtimes.coracle");
    let entry = format!(
        "{newline}{head}\n\
         [{table}]\n\
         runtime_type = \"io.containerd.runc.v2\"\n\
         \n\
         [{table}.options]\n\
         BinaryName = {path}\n"
    );
    Ok(Entry { offset: text.len(), text: entry })
}

/// A string of TOML: basic strings have the escapes of JSON.
fn toml_string(path: &Path) -> Result<String, Error> {
    serde_json::to_string(path.to_str().ok_or(Error::Path)?).map_err(Error::Json)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROGRAM: &str = "/usr/bin/coracle";

    fn docker_with(text: &str) -> serde_json::Value {
        let after = docker(text, Path::new(PROGRAM)).unwrap().insert_into(text);
        serde_json::from_str(&after).unwrap_or_else(|error| panic!("{after}: {error}"))
    }

    #[test]
    fn docker_s_file_keeps_what_it_has() {
        for text in ["", " \n", "{}", " { } ", "{\"a\": \"{\"}", "{\"runtimes\": {}}"] {
            assert_eq!(docker_with(text)["runtimes"]["coracle"]["path"], PROGRAM, "{text}");
        }
        let value =
            docker_with("{\"b\": {\"runtimes\": 1}, \"runtimes\": {\"x\": {\"path\": \"y\"}}}");
        assert_eq!(value["runtimes"]["coracle"]["path"], PROGRAM);
        assert_eq!(
            (&value["runtimes"]["x"]["path"], &value["b"]["runtimes"]),
            (&"y".into(), &1.into())
        );
    }

    #[test]
    fn a_runtime_of_that_name_is_left_alone() {
        let text = "{\"runtimes\": {\"coracle\": {\"path\": \"/x\"}}}";

        assert!(matches!(docker(text, Path::new(PROGRAM)), Err(Error::Present)));
        let text =
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.coracle]\n";
        assert!(matches!(containerd(text, Path::new(PROGRAM)), Err(Error::Present)));
        assert!(matches!(podman("[engine]\n", Path::new(PROGRAM)), Err(Error::Present)));
    }

    #[test]
    fn containerd_s_plugin_is_called_as_the_version_of_the_file_has_it() {
        let entry = |text: &str| containerd(text, Path::new(PROGRAM)).map(|entry| entry.text);

        assert!(entry("").unwrap().starts_with("version = 2\n"));
        assert!(entry("version = 2 # two\n").unwrap().contains("io.containerd.grpc.v1.cri"));
        assert!(entry("version=3").unwrap().contains("io.containerd.cri.v1.runtime"));
        assert!(matches!(entry("root = \"/x\"\n"), Err(Error::Version(_))));
    }

    #[test]
    fn paths_are_quoted() {
        let path = Path::new("/odd \"path\"/coracle");

        let text = podman("", path).unwrap().text;

        assert!(text.contains(r#"coracle = ["/odd \"path\"/coracle"]"#), "{text}");
    }
}
