//! Writes a tree as a cpio archive of the "newc" form, which the kernel unpacks as its first root.

use crate::tree::{Node, Tree};
use cpio::newc::{Builder, ModeFileType, trailer};
use std::io::{self, Write};

/// Writes `tree` to `output`: entries in path order, inode numbers counted from one, times zero.
pub fn write(tree: &Tree, mut output: impl Write) -> io::Result<()> {
    for ((path, node), inode) in tree.nodes().zip(1..) {
        let contents = contents(node);
        let size = u32::try_from(contents.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{path} is larger than 4 GiB"))
        })?;
        let mut entry = header(path, node).ino(inode).write(&mut output, size);
        entry.write_all(contents)?;
        entry.finish()?;
    }
    trailer(&mut output)?;
    output.flush()
}

fn contents(node: &Node) -> &[u8] {
    match node {
        Node::File { contents, .. } => contents,
        Node::Directory | Node::CharacterDevice { .. } => &[],
    }
}

fn header(path: &str, node: &Node) -> Builder {
    let entry = Builder::new(path);
    match *node {
        Node::Directory => entry.mode(0o755).set_mode_file_type(ModeFileType::Directory).nlink(2),
        Node::File { executable, .. } => {
            let mode = if executable { 0o755 } else { 0o644 };
            entry.mode(mode).set_mode_file_type(ModeFileType::Regular)
        }
        Node::CharacterDevice { major, minor } => entry
            .mode(0o600)
            .set_mode_file_type(ModeFileType::Char)
            .rdev_major(major)
            .rdev_minor(minor),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;

    fn sample() -> Tree {
        let mut tree = Tree::default();
        tree.add_file("init", b"agent".to_vec(), true);
        tree.add_file("modules/order", b"a.ko\n".to_vec(), false);
        tree.add_character_device("dev/console", 5, 1);
        tree
    }

    fn archive(tree: &Tree) -> Vec<u8> {
        let mut bytes = Vec::new();
        write(tree, &mut bytes).unwrap();
        bytes
    }

    /// `(name, mode, inode, contents)` of each entry, as another implementation reads them.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            let mut reader = Reader::new(archive).unwrap();
            if reader.entry().is_trailer() {
                return entries;
            }
            let mut contents = Vec::new();
            io::Read::read_to_end(&mut reader, &mut contents).unwrap();
            let entry = reader.entry();
            entries.push((entry.name().to_owned(), entry.mode(), entry.ino(), contents));
            archive = reader.finish().unwrap();
        }
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes() {
        assert_eq!(archive(&sample()), archive(&sample()));
    }

    #[test]
    fn entries_carry_type_permissions_and_contents() {
        assert_eq!(
            entries(&archive(&sample())),
            [
                ("dev".to_owned(), 0o040_755, 1, Vec::new()),
                ("dev/console".to_owned(), 0o020_600, 2, Vec::new()),
                ("init".to_owned(), 0o100_755, 3, b"agent".to_vec()),
                ("modules".to_owned(), 0o040_755, 4, Vec::new()),
                ("modules/order".to_owned(), 0o100_644, 5, b"a.ko\n".to_vec()),
            ]
        );
    }

    #[test]
    fn owner_and_time_are_fixed() {
        let bytes = archive(&sample());
        let reader = Reader::new(bytes.as_slice()).unwrap();

        let entry = reader.entry();

        assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
    }
}
