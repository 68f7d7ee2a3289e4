//! What is different for a user who is not root: an engine such as Podman runs this program as root of a
//! user namespace, whose rights end at what belongs to the user.

use std::env;
use std::fs;
use std::path::PathBuf;

use crate::state::DEFAULT_ROOT;

/// Where the templates of the host's root are.
const DEFAULT_TEMPLATES: &str = "/var/lib/coracle/templates";

/// First number inside, first number outside, and how many, where no user namespace was made
/// (user_namespaces(7)).
const EVERYBODY: [&str; 3] = ["0", "0", "4294967295"];

/// Whether this process is in a user namespace.
pub fn is_in_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !is_everybody(&map))
}

fn is_everybody(map: &str) -> bool {
    map.split_whitespace().eq(EVERYBODY)
}

/// Where container folders are, unless `--root` says otherwise: below the user's own folder for what runs
/// (XDG_RUNTIME_DIR), where runc has them below it, too.
pub fn state_root() -> PathBuf {
    own_folder().map_or_else(|| DEFAULT_ROOT.into(), |folder| folder.join("coracle"))
}

/// Where templates are, unless the settings say otherwise.
pub fn templates() -> PathBuf {
    let of_user = |folder: PathBuf| folder.join("coracle-templates");
    own_folder().map_or_else(|| DEFAULT_TEMPLATES.into(), of_user)
}

/// The folder for what runs of the user, who is not the host's root.
fn own_folder() -> Option<PathBuf> {
    let is_root = nix::unistd::geteuid().is_root();
    // Root of a user namespace may be the host's root as well, whose name is kept then.
    let is_by_name = env::var("USER").is_ok_and(|name| name == "root");
    let is_own = !is_root || (is_in_user_namespace() && !is_by_name);
    let folder = env::var("XDG_RUNTIME_DIR").ok().filter(|folder| is_own && !folder.is_empty());
    folder.map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_namespace_is_told_by_its_users() {
        assert!(is_everybody("         0          0 4294967295\n"));
        assert!(!is_everybody(
            "         0       1000          1\n         1     100000      65536\n"
        ));
    }
}
