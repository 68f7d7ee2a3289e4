//! The files of a guest image, in memory and sorted by path: the same files give the same image.

use std::collections::BTreeMap;

/// One entry of the image; its owner is root and its time the epoch, always.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A folder that root writes and all read.
    Directory,
    /// A regular file.
    File {
        /// What the file holds.
        contents: Vec<u8>,
        /// Whether it may be run.
        executable: bool,
    },
    /// A character device that only root opens.
    CharacterDevice {
        /// The driver's number.
        major: u32,
        /// The device's number within the driver.
        minor: u32,
    },
}

/// A file tree, root not included; paths are relative and separated by `/`.
#[derive(Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// Adds a folder and the folders above it.
    pub fn add_directory(&mut self, path: &str) {
        self.add(path, Node::Directory);
    }

    /// Adds a regular file and the folders above it.
    pub fn add_file(&mut self, path: &str, contents: Vec<u8>, executable: bool) {
        self.add(path, Node::File { contents, executable });
    }

    /// Adds a character device and the folders above it.
    pub fn add_character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.add(path, Node::CharacterDevice { major, minor });
    }

    /// Every entry with its path; a folder comes before what it holds.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    fn add(&mut self, path: &str, node: Node) {
        for (end, _) in path.match_indices('/') {
            self.nodes.insert(path[..end].to_owned(), Node::Directory);
        }
        self.nodes.insert(path.to_owned(), node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(tree: &Tree) -> Vec<&str> {
        tree.nodes().map(|(path, _)| path).collect()
    }

    #[test]
    fn the_order_of_additions_does_not_show() {
        let mut forwards = Tree::default();
        forwards.add_file("init", vec![1], true);
        forwards.add_directory("proc");
        let mut backwards = Tree::default();
        backwards.add_directory("proc");
        backwards.add_file("init", vec![1], true);

        assert!(forwards.nodes().eq(backwards.nodes()));
    }

    #[test]
    fn folders_above_an_entry_appear_before_it() {
        let mut tree = Tree::default();

        tree.add_file("usr/lib/firmware/x", Vec::new(), false);

        assert_eq!(paths(&tree), ["usr", "usr/lib", "usr/lib/firmware", "usr/lib/firmware/x"]);
    }
}
