//! The file or block device of the host behind a block device of the guest.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::request::SECTOR_BYTES;
use crate::virtio::buffers::Buffers;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file, or it may not be used this way.
    #[error("open disk {path}")]
    Open {
        /// Which disk.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe or the like.
    #[error("disk {path} is neither a regular file nor a block device")]
    Kind {
        /// Which disk.
        path: PathBuf,
    },
    /// The size cannot be found out.
    #[error("find the size of disk {path}")]
    Size {
        /// Which disk.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// An open disk of a fixed size.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
}

impl Disk {
    /// Opens the raw image or block device at `path`. A part of a sector at its end is not used.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(|source| DiskError::Open { path: path.into(), source })?;
        let size = |source| DiskError::Size { path: path.into(), source };
        let kind = file.metadata().map_err(size)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::Kind { path: path.into() });
        }
        // The metadata of a block device has no size; its end has a position.
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(size)?;
        Ok(Disk { file, sectors: bytes / SECTOR_BYTES })
    }

    /// Size of the disk, in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Fills `buffers`, and uses them up, from the disk at `offset`, in bytes.
    pub fn read(&self, offset: u64, buffers: &mut Buffers) -> io::Result<()> {
        let whole = |buffers: &Buffers, offset| buffers.read_from_at(self.file.as_fd(), offset);
        transfer(offset, buffers, whole, io::ErrorKind::UnexpectedEof)
    }

    /// Writes `buffers`, and uses them up, to the disk at `offset`, in bytes.
    pub fn write(&self, offset: u64, buffers: &mut Buffers) -> io::Result<()> {
        let whole = |buffers: &Buffers, offset| buffers.write_to_at(self.file.as_fd(), offset);
        transfer(offset, buffers, whole, io::ErrorKind::WriteZero)
    }

    /// Makes what was written last.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Repeats `step` until all of `buffers` moved; one that moves nothing is the error `stuck`.
fn transfer(
    mut offset: u64,
    buffers: &mut Buffers,
    step: impl Fn(&Buffers, u64) -> io::Result<usize>,
    stuck: io::ErrorKind,
) -> io::Result<()> {
    while buffers.bytes() > 0 {
        match step(buffers, offset) {
            Ok(0) => return Err(stuck.into()),
            Ok(moved) => {
                buffers.skip(moved);
                offset += moved as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_in_whole_sectors() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * SECTOR_BYTES + 1).unwrap();
        assert_eq!(Disk::open(file.path(), true).unwrap().sectors(), 3);
    }

    #[test]
    fn a_missing_disk_is_named() {
        let error = Disk::open(Path::new("/nowhere/disk"), true).unwrap_err();
        assert_eq!(error.to_string(), "open disk /nowhere/disk");
    }

    #[test]
    fn a_directory_is_no_disk() {
        let directory = tempfile::tempdir().unwrap();
        let error = Disk::open(directory.path(), true).unwrap_err();
        assert!(matches!(error, DiskError::Kind { .. }));
    }
}
