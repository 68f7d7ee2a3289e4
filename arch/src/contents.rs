//! What is in a kernel or an initial RAM disk, on its way into guest memory.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::Deref;

use memmap2::{Advice, Mmap};

/// All of a file. To copy out of the pages that the host's kernel keeps of it takes less than to read
/// it, and no system call for each piece that a loader looks at.
#[derive(Debug)]
pub enum Contents {
    /// These pages.
    Mapped(Mmap),
    /// A copy.
    Read(Vec<u8>),
}

impl Contents {
    /// What is in `file`, wherever it was read to before.
    pub fn of(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is private and not written to. A file that somebody changes while it is
        // loaded is a broken kernel, with which loaders cope; one that is cut off meanwhile, or a disk
        // that fails, ends the process by SIGBUS.
        let Ok(pages) = (unsafe { Mmap::map(file) }) else {
            // Some file systems map no files.
            return read(file);
        };
        // Loaders go from the start to the end, once. Without the advice it takes a little more.
        let _ = pages.advise(Advice::Sequential);
        Ok(Contents::Mapped(pages))
    }
}

impl Deref for Contents {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Contents::Mapped(pages) => pages,
            Contents::Read(bytes) => bytes,
        }
    }
}

fn read(mut file: &File) -> io::Result<Contents> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(Contents::Read(bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_is_the_same_mapped_and_read() {
        for contents in [&b""[..], &[7; 10_000]] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(contents).unwrap();

            assert_eq!(*Contents::of(&file).unwrap(), *contents);
            assert_eq!(*read(&file).unwrap(), *contents);
        }
    }

    #[test]
    fn what_cannot_be_mapped_is_read() {
        let file = File::open("/proc/self/cmdline").unwrap();

        let contents = Contents::of(&file).unwrap();

        assert!(matches!(contents, Contents::Read(bytes) if !bytes.is_empty()));
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        assert!(Contents::of(&File::open("/").unwrap()).is_err());
    }
}
