//! What a guest knows and has open, saved by name, and found again by name.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{Context, FileSystem, FsOptions};
use serde::{Deserialize, Serialize};

use super::book::{Open, ROOT};
use super::ledger::Ledger;
use super::tree::Tree;

/// Flags of open(2) that had their effect when the guest opened a file.
const DONE: u32 = (libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY) as u32;

/// What a guest knows of a shared directory and has open there. Files are told by their names below
/// the directory, so another one with the same files does as well. The default is a guest that knows nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What the guest's kernel said it can do (FUSE_INIT); nothing if it has not mounted it.
    capable: Option<u64>,
    files: Vec<KnownFile>,
    open: Vec<OpenFile>,
}

/// A file that the guest knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct KnownFile {
    number: u64,
    /// How often the guest was told of it.
    count: u64,
    /// Bits of its mode that say what it is.
    kind: u32,
    /// Path below the directory; nothing if it has no name any more.
    path: Option<Vec<u8>>,
}

/// A file or directory that the guest has open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct OpenFile {
    handle: u64,
    file: u64,
    flags: u32,
    is_directory: bool,
}

impl Tree {
    /// Where a file is, as this process sees it, and its attributes with the host's inode number.
    fn path_and_attributes(&self, inode: u64) -> io::Result<(PathBuf, stat64)> {
        let path = self.files.readlinkat_proc_file(inode)?;
        let (attributes, _) = self.files.getattr(&Context::default(), inode, None)?;
        Ok((path, attributes))
    }
}

impl Ledger {
    /// What the guest knows and has open.
    pub fn save(&self, root: &File) -> State {
        let capable = self.capable.lock().expect("nothing panics while it holds this");
        let book = self.book();
        let file = |(number, count)| {
            let found = book.file(number).and_then(|own| self.tree.path_and_attributes(own)).ok();
            KnownFile {
                number,
                count,
                kind: found.as_ref().map_or(0, |(_, attributes)| kind(attributes.st_mode)),
                path: found.and_then(|(path, attributes)| name_below(root, &path, &attributes)),
            }
        };
        State {
            capable: capable.map(|options| options.bits()),
            files: book.files().map(file).collect(),
            open: book
                .opened()
                .map(|(handle, Open { file, flags, is_directory })| OpenFile {
                    handle,
                    file,
                    flags,
                    is_directory,
                })
                .collect(),
        }
    }

    /// Finds again what the guest knew and had open. Where that fails the guest is told ESTALE when it
    /// asks.
    pub fn restore(&self, state: &State) -> io::Result<()> {
        let Some(capable) = state.capable else { return Ok(()) };
        let capable = FsOptions::from_bits_truncate(capable);
        self.tree.init(capable)?;
        self.set_capable(Some(capable));
        let mut search = Search { ledger: self, found: BTreeMap::from([(PathBuf::new(), ROOT)]) };
        for file in &state.files {
            let own = file.path.as_ref().and_then(|path| {
                search.find(Path::new(OsStr::from_bytes(path)), Some(file.kind)).ok()
            });
            self.book().take_file(file.number, file.count, own);
        }
        search.forget_what_is_not_known(state);
        for open in &state.open {
            let &OpenFile { handle, file, flags, is_directory } = open;
            let open = Open { file, flags: flags & !DONE, is_directory };
            let own = self.reopen(open).ok().flatten();
            self.book().take_handle(handle, open, own);
        }
        Ok(())
    }

    fn reopen(&self, open: Open) -> io::Result<Option<u64>> {
        let file = self.book().file(open.file)?;
        let context = Context::default();
        if open.is_directory {
            return Ok(self.tree.opendir(&context, file, open.flags)?.0);
        }
        Ok(self.tree.open(&context, file, open.flags, 0)?.0)
    }
}

/// Files looked up so far, each once, by their paths.
struct Search<'a> {
    ledger: &'a Ledger,
    found: BTreeMap<PathBuf, u64>,
}

impl Search<'_> {
    /// The tree's number of the file at `path`, which must be of this `kind` if one is named.
    fn find(&mut self, path: &Path, kind_wanted: Option<u32>) -> io::Result<u64> {
        if let Some(&number) = self.found.get(path) {
            return Ok(number);
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let parent = self.find(parent, None)?;
        let name = CString::new(name.as_bytes())?;
        let context = Context::default();
        let entry = self.ledger.tree.lookup(&context, parent, &name)?;
        if kind_wanted.is_some_and(|wanted| wanted != kind(entry.attr.st_mode)) {
            self.ledger.tree.forget(&context, entry.inode, 1);
            return Err(io::Error::from_raw_os_error(libc::ESTALE));
        }
        self.found.insert(path.to_owned(), entry.inode);
        Ok(entry.inode)
    }

    /// Forgets the directories that were only on the way.
    fn forget_what_is_not_known(self, state: &State) {
        let mut on_the_way = self.found;
        for path in state.files.iter().filter_map(|file| file.path.as_ref()) {
            on_the_way.remove(Path::new(OsStr::from_bytes(path)));
        }
        for number in on_the_way.into_values().filter(|&number| number != ROOT) {
            self.ledger.tree.forget(&Context::default(), number, 1);
        }
    }
}

fn kind(mode: u32) -> u32 {
    mode & libc::S_IFMT
}

/// The path below `root` of a file with these attributes that was seen at `path`; nothing if it is not
/// there.
fn name_below(root: &File, path: &Path, attributes: &stat64) -> Option<Vec<u8>> {
    let root = PathBuf::from(format!("/proc/self/fd/{}", root.as_raw_fd()));
    let path = path.strip_prefix(fs::read_link(&root).ok()?).ok()?;
    // A file without a name is shown with the one that it had, and something appended.
    let found = fs::symlink_metadata(root.join(path)).ok()?;
    let is_same = (found.dev(), found.ino()) == (attributes.st_dev, attributes.st_ino);
    is_same.then(|| path.as_os_str().to_owned().into_vec())
}
