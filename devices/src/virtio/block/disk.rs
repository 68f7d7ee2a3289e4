//! The file or block device of the host behind a block device of the guest.

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::host::{self, Alignment};
use super::request::{SECTOR_BYTES, Segment};
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
    /// The file system cannot do without its page cache.
    #[error("open disk {path} for direct I/O")]
    Direct {
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
    /// Another machine writes to the image, or would see what this one writes.
    #[error(
        "disk {path} is in use by another program; one that is `read_only` everywhere can be shared"
    )]
    InUse {
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

/// How a disk is opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Access {
    /// Whether it may only be read.
    pub read_only: bool,
    /// Whether data goes past the host's page cache.
    pub direct: bool,
}

/// The open files of a disk, for a thread that may open none.
#[derive(Debug)]
pub struct DiskFiles {
    /// The image or block device.
    pub file: File,
    /// The same, opened for direct I/O.
    pub direct: Option<File>,
}

/// An open disk of a fixed size.
#[derive(Debug)]
pub struct Disk {
    file: File,
    direct: Option<Direct>,
    is_device: bool,
    read_only: bool,
    /// Whether all that changes the disk lasts before it is over.
    write_through: bool,
    sectors: u64,
}

/// The same file without the page cache. What is not aligned for it goes through the page cache,
/// which the kernel writes back before direct I/O and drops after it.
#[derive(Debug)]
struct Direct {
    file: File,
    alignment: Alignment,
}

impl DiskFiles {
    /// Opens the raw image or block device at `path`.
    ///
    /// An image has one writer, or only readers: its file is locked as long as the disk is open (fcntl(2),
    /// "Open file description locks"), which QEMU and Cloud Hypervisor heed, too. A block device may be one
    /// of a cluster's, and is not.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let is_device = kind(path)?.is_block_device();
        let (mut options, file) = open(path, access.read_only)?;
        if !is_device {
            let locked = fcntl(&file, FcntlArg::F_OFD_SETLK(&lock(access.read_only)));
            // File systems without locks keep nobody from anything.
            if locked == Err(Errno::EAGAIN) {
                return Err(DiskError::InUse { path: path.into() });
            }
        }
        let direct = access.direct.then(|| open_direct(path, &mut options)).transpose()?;
        Ok(DiskFiles { file, direct })
    }
}

impl Disk {
    /// Opens the raw image or block device at `path`, as [`DiskFiles::open`] does. A part of a sector at its
    /// end is not used.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        let files = DiskFiles::open(path, access)?;
        Disk::of(files, access.read_only)
            .map_err(|source| DiskError::Size { path: path.into(), source })
    }

    /// The disk of `files`, which were opened only to be read if it is `read_only`. The error is that its
    /// size cannot be found out.
    pub fn of(files: DiskFiles, read_only: bool) -> io::Result<Self> {
        let DiskFiles { file, direct } = files;
        let is_device = file.metadata()?.file_type().is_block_device();
        let (direct, sectors) = (direct.map(Direct::of), size(&file)? / SECTOR_BYTES);
        Ok(Disk { file, direct, is_device, read_only, write_through: false, sectors })
    }

    /// Refuses a `path` that [`Disk::open`] would not open, as far as a look can tell: it locks nothing,
    /// and opens no block device.
    pub fn check(path: &Path, access: Access) -> Result<(), DiskError> {
        if kind(path)?.is_block_device() {
            return Ok(());
        }
        let (mut options, file) = open(path, access.read_only)?;
        let mut lock = lock(access.read_only);
        // It says what lock is in the way, or that none is.
        let told = fcntl(&file, FcntlArg::F_OFD_GETLK(&mut lock));
        if told.is_ok() && i32::from(lock.l_type) != libc::F_UNLCK {
            return Err(DiskError::InUse { path: path.into() });
        }
        size(&file).map_err(|source| DiskError::Size { path: path.into(), source })?;
        access.direct.then(|| open_direct(path, &mut options)).transpose()?;
        Ok(())
    }

    /// A disk of a file that need not be one.
    #[cfg(test)]
    pub fn endless(file: File) -> Self {
        Disk {
            file,
            direct: None,
            is_device: false,
            read_only: false,
            write_through: false,
            sectors: 1 << 20,
        }
    }

    /// Size of the disk, in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it may only be read.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Makes all that changes the disk last before it is over, or no longer.
    pub fn set_write_through(&mut self, write_through: bool) {
        self.write_through = write_through;
    }

    /// Whether all that changes the disk lasts before it is over.
    pub fn is_write_through(&self) -> bool {
        self.write_through
    }

    /// What requests should be multiples of, in bytes; a power of two of at least a sector.
    pub fn block_bytes(&self) -> u64 {
        let file = self.direct.as_ref().map_or(0, |direct| direct.alignment.file as u64);
        file.max(SECTOR_BYTES)
    }

    /// Whether [`Disk::write_zeroes`] can give storage back.
    pub fn zeroes_may_unmap(&self) -> bool {
        !self.is_device
    }

    /// What data of `buffers` moves through from or to `offset`, in bytes.
    pub fn fd_for(&self, offset: u64, buffers: &Buffers) -> BorrowedFd<'_> {
        match &self.direct {
            Some(direct) if direct.takes(offset, buffers) => direct.file.as_fd(),
            _ => self.file.as_fd(),
        }
    }

    /// What makes written data last.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Fills `buffers`, and uses them up, from the disk at `offset`, in bytes.
    pub fn read(&self, offset: u64, buffers: &mut Buffers) -> io::Result<()> {
        let some =
            |buffers: &Buffers, offset| buffers.read_from_at(self.fd_for(offset, buffers), offset);
        transfer(offset, buffers, some, io::ErrorKind::UnexpectedEof)
    }

    /// Writes `buffers`, and uses them up, to the disk at `offset`, in bytes.
    pub fn write(&self, offset: u64, buffers: &mut Buffers) -> io::Result<()> {
        let some =
            |buffers: &Buffers, offset| buffers.write_to_at(self.fd_for(offset, buffers), offset);
        transfer(offset, buffers, some, io::ErrorKind::WriteZero)?;
        self.changed()
    }

    /// Something was changed.
    fn changed(&self) -> io::Result<()> {
        if self.write_through { self.flush() } else { Ok(()) }
    }

    /// Makes what was written last.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Forgets what is in `segment` and gives its storage back. The error says `Unsupported` if the
    /// host has no way to.
    pub fn discard(&self, segment: &Segment) -> io::Result<()> {
        let discard = if self.is_device { host::discard_device } else { host::punch_hole };
        self.change(segment, discard)
    }

    /// Fills `segment` with zeros; gives its storage back if it may and the disk can. The error says
    /// `Unsupported` if the host has no quick way to.
    pub fn write_zeroes(&self, segment: &Segment) -> io::Result<()> {
        let zero = match (self.is_device, segment.unmap) {
            (true, _) => host::zero_device,
            (false, true) => host::punch_hole,
            (false, false) => host::zero_range,
        };
        self.change(segment, zero)
    }

    fn change(
        &self,
        segment: &Segment,
        change: fn(&File, u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        // The kernel refuses to change nothing.
        if segment.bytes == 0 {
            return Ok(());
        }
        loop {
            match change(&self.file, segment.offset, segment.bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if says_unsupported(&error) => {
                    return Err(io::ErrorKind::Unsupported.into());
                }
                outcome => return outcome.and_then(|()| self.changed()),
            }
        }
    }
}

impl Direct {
    fn of(file: File) -> Self {
        let alignment = host::direct_alignment(&file);
        Direct { file, alignment }
    }

    fn takes(&self, offset: u64, buffers: &Buffers) -> bool {
        let Alignment { memory, file } = self.alignment;
        offset % file as u64 == 0 && buffers.is_aligned(memory, file)
    }
}

/// What is at `path`, before it is opened: opening a pipe would wait for its other end.
fn kind(path: &Path) -> Result<FileType, DiskError> {
    let found =
        fs::metadata(path).map_err(|source| DiskError::Open { path: path.into(), source })?;
    let kind = found.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::Kind { path: path.into() });
    }
    Ok(kind)
}

fn open(path: &Path, read_only: bool) -> Result<(OpenOptions, File), DiskError> {
    let mut options = OpenOptions::new();
    options.read(true).write(!read_only);
    let file =
        options.open(path).map_err(|source| DiskError::Open { path: path.into(), source })?;
    Ok((options, file))
}

/// The same file as [`open`] gave with its `options`, for direct I/O.
fn open_direct(path: &Path, options: &mut OpenOptions) -> Result<File, DiskError> {
    let direct = options.custom_flags(libc::O_DIRECT).open(path);
    direct.map_err(|source| DiskError::Direct { path: path.into(), source })
}

/// Size of `file`, in bytes. The metadata of a block device has none; its end has a position.
fn size(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// A lock of a whole file.
fn lock(read_only: bool) -> libc::flock {
    let kind = if read_only { libc::F_RDLCK } else { libc::F_WRLCK };
    let small = |constant: i32| i16::try_from(constant).expect("a small number");
    libc::flock {
        l_type: small(kind),
        l_whence: small(libc::SEEK_SET),
        l_start: 0,
        l_len: 0, // to the end, wherever that is
        l_pid: 0,
    }
}

/// Whether a file system or a device does not know what it was asked for.
fn says_unsupported(error: &io::Error) -> bool {
    let codes = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENOTTY];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
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
    use std::os::fd::{AsRawFd, FromRawFd};
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::process::Command;

    use tempfile::NamedTempFile;
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::testing::memory;

    const READ_ONLY: Access = Access { read_only: true, direct: false };
    const DIRECT: Access = Access { read_only: false, direct: true };
    const KIB_64: u64 = 64 << 10;
    const BYTES: usize = 64 << 10;

    /// 64 KiB of data.
    fn full() -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&[7; BYTES], 0).unwrap();
        file.as_file().sync_all().unwrap();
        file
    }

    fn first_and_last_byte(file: &NamedTempFile) -> [u8; 2] {
        let mut bytes = [0; BYTES];
        file.as_file().read_exact_at(&mut bytes, 0).unwrap();
        [bytes[0], bytes[BYTES - 1]]
    }

    /// `length` bytes of guest memory at `address`.
    fn buffers(address: u64, length: u32) -> Buffers {
        let memory = memory();
        memory.write_slice(&vec![3; length as usize], GuestAddress(address)).unwrap();
        let mut buffers = Buffers::new(memory);
        buffers.add([Descriptor::new(address, length, 0, 0)].into_iter()).unwrap();
        buffers
    }

    #[test]
    fn size_is_in_whole_sectors() {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(3 * SECTOR_BYTES + 1).unwrap();
        assert_eq!(Disk::open(file.path(), READ_ONLY).unwrap().sectors(), 3);
    }

    #[test]
    fn a_missing_disk_is_named() {
        let error = Disk::open(Path::new("/nowhere/disk"), READ_ONLY).unwrap_err();
        assert_eq!(error.to_string(), "open disk /nowhere/disk");
    }

    #[test]
    fn a_pipe_is_no_disk_and_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pipe");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();

        assert!(matches!(Disk::open(&path, READ_ONLY), Err(DiskError::Kind { .. })));
        assert!(matches!(Disk::check(&path, READ_ONLY), Err(DiskError::Kind { .. })));
    }

    #[test]
    fn a_look_at_a_disk_sees_its_lock_and_takes_none() {
        let file = full();
        let writing = Access::default();

        Disk::check(file.path(), writing).unwrap();
        let _reader = Disk::open(file.path(), READ_ONLY).unwrap();

        Disk::check(file.path(), READ_ONLY).unwrap();
        let error = Disk::check(file.path(), writing).unwrap_err();
        assert!(matches!(error, DiskError::InUse { .. }));
    }

    #[test]
    fn a_file_without_a_size_is_no_disk() {
        let path = Path::new("/proc/self/mem");

        assert!(matches!(Disk::open(path, READ_ONLY), Err(DiskError::Size { .. })));
        assert!(matches!(Disk::check(path, READ_ONLY), Err(DiskError::Size { .. })));
    }

    #[test]
    fn a_directory_is_no_disk() {
        let directory = tempfile::tempdir().unwrap();
        let error = Disk::open(directory.path(), READ_ONLY).unwrap_err();
        assert!(matches!(error, DiskError::Kind { .. }));
    }

    #[test]
    fn an_image_has_one_writer_or_only_readers() {
        let file = full();
        let open = |access| Disk::open(file.path(), access);
        let in_use = |access| matches!(open(access).unwrap_err(), DiskError::InUse { .. });

        let writer = open(DIRECT).unwrap();
        assert!(in_use(Access::default()));
        assert!(in_use(READ_ONLY));
        drop(writer);

        let readers = (open(READ_ONLY).unwrap(), open(READ_ONLY).unwrap());
        assert!(in_use(Access::default()));
        drop(readers);
        open(Access::default()).unwrap();
    }

    #[test]
    fn a_discard_gives_storage_back_and_keeps_the_size() {
        let file = full();
        let disk = Disk::open(file.path(), Access::default()).unwrap();
        let blocks = || file.as_file().metadata().unwrap().blocks();
        let before = blocks();

        disk.discard(&Segment { offset: 0, bytes: KIB_64 / 2, unmap: false }).unwrap();

        assert_eq!(first_and_last_byte(&file), [0, 7]);
        assert!(blocks() < before, "{} < {before}", blocks());
        assert_eq!(file.as_file().metadata().unwrap().len(), KIB_64);
    }

    #[test]
    fn zeros_that_may_unmap_are_a_hole() {
        let file = full();
        let disk = Disk::open(file.path(), Access::default()).unwrap();

        disk.write_zeroes(&Segment { offset: 0, bytes: KIB_64 / 2, unmap: true }).unwrap();

        assert_eq!(first_and_last_byte(&file), [0, 7]);
    }

    #[test]
    fn zeros_that_keep_their_storage_are_written_or_not_supported() {
        let file = full();
        let disk = Disk::open(file.path(), Access::default()).unwrap();

        let outcome = disk.write_zeroes(&Segment { offset: 0, bytes: KIB_64 / 2, unmap: false });

        // Not every file system can.
        let first = match outcome {
            Ok(()) => 0,
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::Unsupported);
                7
            }
        };
        assert_eq!(first_and_last_byte(&file), [first, 7]);
    }

    #[test]
    fn what_the_host_cannot_is_unsupported() {
        // SAFETY: the name is a C string; the descriptor is owned by nobody else.
        let memory = unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), 0)) };
        memory.set_len(KIB_64).unwrap();
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let disk = Disk::open(Path::new(&path), Access::default()).unwrap();

        let error =
            disk.write_zeroes(&Segment { offset: 0, bytes: 512, unmap: false }).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    #[ignore = "needs root and loop devices"]
    fn a_block_device_discards_zeroes_and_goes_past_the_page_cache() {
        let file = full();
        let losetup = |arguments: &[&str]| {
            let output = Command::new("losetup").args(arguments).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
        };
        let device = losetup(&["--find", "--show", file.path().to_str().unwrap()]);
        let disk = Disk::open(Path::new(&device), DIRECT).unwrap();
        assert_eq!(disk.sectors(), KIB_64 / SECTOR_BYTES);

        disk.discard(&Segment { offset: 0, bytes: KIB_64 / 2, unmap: false }).unwrap();
        let after_discard = first_and_last_byte(&file);
        disk.write(0, &mut buffers(0x1_0000, 4096)).unwrap();
        let zeros = Segment { offset: KIB_64 / 2, bytes: KIB_64 / 2, unmap: false };
        disk.write_zeroes(&zeros).unwrap();
        disk.flush().unwrap();
        losetup(&["--detach", &device]);

        assert_eq!(after_discard, [0, 7]);
        assert_eq!(first_and_last_byte(&file), [3, 0]);
    }

    #[test]
    fn nothing_is_discarded_without_the_host() {
        let disk = Disk::open(full().path(), Access::default()).unwrap();
        disk.discard(&Segment { offset: 0, bytes: 0, unmap: false }).unwrap();
    }

    #[test]
    fn aligned_data_goes_past_the_page_cache_and_other_data_does_not() {
        let file = full();
        let disk = Disk::open(file.path(), DIRECT).unwrap();
        let direct = disk.direct.as_ref().unwrap().file.as_raw_fd();

        assert_eq!(disk.fd_for(4096, &buffers(0x1_0000, 4096)).as_raw_fd(), direct);
        for (offset, address, length) in
            [(4097, 0x1_0000, 4096), (4096, 0x1_0001, 4096), (4096, 0x1_0000, 100)]
        {
            assert_ne!(disk.fd_for(offset, &buffers(address, length)).as_raw_fd(), direct);
        }
    }

    #[test]
    fn direct_and_cached_writes_see_each_other() {
        let file = full();
        let disk = Disk::open(file.path(), DIRECT).unwrap();

        disk.write(0, &mut buffers(0x1_0001, 512)).unwrap();
        disk.write(KIB_64 - 4096, &mut buffers(0x1_0000, 4096)).unwrap();

        assert_eq!(first_and_last_byte(&file), [3, 3]);
    }
}
