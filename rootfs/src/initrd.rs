//! Assembles the guest's first and only root: the agent, the modules of its kernel, mount points.

use crate::modules::Module;
use crate::tree::Tree;
use crate::{archive, compression};
use std::io;

/// Folders that the agent mounts something on, or writes to.
pub const FOLDERS: &[&str] = &["dev", "proc", "run", "sys", "tmp"];

/// How the finished archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Compression {
    /// As it is: nothing to unpack at boot.
    None,
    /// Smaller on disk and in the host's page cache, slower at boot.
    Zstd,
}

/// The initrd with `agent` as `/init` and, below `/modules`, what it loads in the order of
/// `/modules/order`: one file name a line.
pub fn build(
    agent: Vec<u8>,
    modules: Vec<Module>,
    compression: Compression,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    archive::write(&tree(agent, modules), &mut bytes)?;
    match compression {
        Compression::None => Ok(bytes),
        Compression::Zstd => compression::compress_zstd(&bytes),
    }
}

fn tree(agent: Vec<u8>, modules: Vec<Module>) -> Tree {
    let mut tree = Tree::default();
    for folder in FOLDERS {
        tree.add_directory(folder);
    }
    // The kernel opens it for init before devtmpfs is mounted.
    tree.add_character_device("dev/console", 5, 1);
    // Where the console's driver is a module, the kernel cannot open it: the agent starts without
    // standard streams, and Rust's runtime aborts unless it can open this in their place.
    tree.add_character_device("dev/null", 1, 3);
    tree.add_file("init", agent, true);
    if !modules.is_empty() {
        let order: String = modules.iter().map(|module| module.file_name.clone() + "\n").collect();
        tree.add_file("modules/order", order.into_bytes(), false);
    }
    for module in modules {
        tree.add_file(&format!("modules/{}", module.file_name), module.contents, false);
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Node;

    fn modules() -> Vec<Module> {
        let module =
            |name: &str| Module { file_name: name.to_owned(), contents: name.as_bytes().to_vec() };
        vec![module("virtio_ring.ko"), module("fuse.ko")]
    }

    fn file(tree: &Tree, path: &str) -> Option<Vec<u8>> {
        tree.nodes().find_map(|(name, node)| match node {
            Node::File { contents, .. } if name == path => Some(contents.clone()),
            _ => None,
        })
    }

    #[test]
    fn modules_keep_their_load_order() {
        let tree = tree(b"agent".to_vec(), modules());

        assert_eq!(file(&tree, "modules/order").unwrap(), b"virtio_ring.ko\nfuse.ko\n");
        assert_eq!(file(&tree, "modules/fuse.ko").unwrap(), b"fuse.ko");
    }

    #[test]
    fn an_agent_without_a_console_finds_something_to_open() {
        let tree = tree(b"agent".to_vec(), modules());

        let null = tree.nodes().find(|(path, _)| *path == "dev/null").unwrap().1;

        assert_eq!(*null, Node::CharacterDevice { major: 1, minor: 3 });
    }

    #[test]
    fn a_kernel_without_modules_gets_no_module_folder() {
        let tree = tree(b"agent".to_vec(), Vec::new());

        assert!(tree.nodes().all(|(path, _)| !path.starts_with("modules")));
    }

    #[test]
    fn the_same_inputs_give_the_same_bytes_packed_or_not() {
        for compression in [Compression::None, Compression::Zstd] {
            let once = build(b"agent".to_vec(), modules(), compression).unwrap();
            let twice = build(b"agent".to_vec(), modules(), compression).unwrap();

            assert_eq!(once, twice);
        }
    }
}
