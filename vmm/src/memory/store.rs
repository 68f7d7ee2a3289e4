//! What guest RAM is made of: anonymous memory, or a file that outlives the machine.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use devices::listener::check_folder_of;

use super::patchwork::Piece;
use super::{FLAGS, HUGE_PAGE, MemoryError, PROTECTION, map_aligned};
use crate::config::MemoryBacking;

/// Most ranges of a region that are mapped from a file of which others need what it has: each takes a mapping,
/// and so does what is between them, of the 65,530 that Linux lets a process have (vm.max_map_count).
const MAX_RANGES: usize = 1024;

/// The memory of a machine that was saved, for one that goes on with it.
#[derive(Debug)]
pub struct SavedMemory {
    /// The file that it is kept in.
    pub file: File,
    /// What becomes of the file.
    pub sharing: Sharing,
}

/// What becomes of the file with the memory of a saved machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// The new machine goes on writing to it, and can be saved again. It must be the only one.
    Shared,
    /// It stays as it is: what the new machine writes is its own. Any number of machines can go on
    /// from there, and share what none of them writes; what the file has holes for is memory of their
    /// own, unless data and holes alternate thousands of times. They share what their kernels draw random numbers from, too, until each has fresh entropy.
    Private,
}

/// Where the RAM of one machine comes from, region after region.
#[derive(Debug)]
pub struct Store {
    file: Option<File>,
    flags: i32,
    /// Whether the file grows with what is mapped.
    is_new: bool,
    /// Where the next region starts in the file, in bytes.
    next: u64,
}

impl Store {
    /// A fresh store of the kind that a configuration asks for.
    pub fn create(backing: &MemoryBacking) -> Result<Self, MemoryError> {
        let file = match backing {
            MemoryBacking::Anonymous => return Ok(Store::anonymous()),
            MemoryBacking::Memfd => {
                memfd(c"guest memory").map_err(|source| MemoryError::CreateFile { source })?
            }
            MemoryBacking::File(path) => OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
                .map_err(|source| cannot_create(path, source))?,
        };
        Ok(Store { file: Some(file), flags: libc::MAP_SHARED, is_new: true, next: 0 })
    }

    /// Refuses a `path` at which [`Store::create`] could not make a file, as far as a look can tell.
    pub fn check_file(path: &Path) -> Result<(), MemoryError> {
        if path.symlink_metadata().is_ok() {
            return Err(MemoryError::FileExists { path: path.to_owned() });
        }
        check_folder_of(path).map_err(|source| MemoryError::CreateFile { source })
    }

    /// A fresh store of memory that goes with the machine.
    pub fn anonymous() -> Self {
        Store { file: None, flags: FLAGS, is_new: true, next: 0 }
    }

    /// The store that another machine left.
    pub fn of_saved(memory: SavedMemory) -> Self {
        let flags = match memory.sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Private => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        };
        Store { file: Some(memory.file), flags, is_new: false, next: 0 }
    }

    /// The flags of mmap(2) of what is mapped here.
    pub fn flags(&self) -> i32 {
        self.flags
    }

    /// The file, if all that the guest writes reaches it.
    pub fn file(&self) -> Option<&File> {
        self.file.as_ref().filter(|_| self.flags & libc::MAP_SHARED != 0)
    }

    /// Whether what is mapped here goes with the machine, all of it.
    pub fn is_anonymous(&self) -> bool {
        self.file.is_none()
    }

    /// What the next region that is mapped, of `bytes` bytes, is made of.
    pub(super) fn source(&self, bytes: u64) -> io::Result<Source> {
        let file = self.file.as_ref().map(File::try_clone).transpose()?;
        let data = match &file {
            Some(file) if self.flags & libc::MAP_SHARED == 0 => {
                data_in(file, &(self.next..self.next + bytes))?
            }
            _ => Vec::new(),
        };
        Ok(Source { file, flags: self.flags, start: self.next, data })
    }

    /// Maps the next `bytes` bytes at a multiple of [`HUGE_PAGE`].
    pub fn map(&mut self, bytes: usize) -> Result<*mut u8, MemoryError> {
        let map = |source| MemoryError::Map { bytes, source };
        let start = map_aligned(bytes).map_err(map)?;
        let Some(file) = &self.file else { return Ok(start) };
        let range = self.next..self.next + bytes as u64;
        if self.is_new {
            file.set_len(range.end).map_err(|source| MemoryError::CreateFile { source })?;
        }
        let found = file.metadata().map_err(map)?.len();
        if found < range.end {
            return Err(MemoryError::ShortFile { found, needed: range.end });
        }
        self.next = after(&range);
        if self.flags & libc::MAP_SHARED != 0 {
            map_file(file, self.flags, start, &range, &range).map_err(map)?;
            return Ok(start);
        }
        // Where the file has nothing, the fresh memory that is there is as good, and better than pages
        // of the file: it comes in huge ones, and is not copied when it is written to.
        for data in data_in(file, &range).map_err(map)? {
            map_file(file, self.flags, start, &range, &data).map_err(map)?;
        }
        Ok(start)
    }
}

fn cannot_create(path: &Path, error: io::Error) -> MemoryError {
    match error.kind() {
        // It may be the memory of another machine.
        ErrorKind::AlreadyExists => MemoryError::FileExists { path: path.to_owned() },
        ErrorKind::NotFound => {
            let source = check_folder_of(path).err().unwrap_or(error);
            MemoryError::CreateFile { source }
        }
        _ => MemoryError::CreateFile { source: error },
    }
}

/// What one region of RAM is made of, to be mapped in parts.
#[derive(Debug)]
pub(super) struct Source {
    file: Option<File>,
    flags: i32,
    /// Where the region starts in the file, in bytes.
    start: u64,
    /// Where the file, if others go on from there as well, had something at first; in bytes of the file. It is
    /// there again, instead of zeros, when memory was taken out and put in: others need the file as it is, and
    /// this guest has seen it before.
    data: Vec<Range<u64>>,
}

impl Source {
    /// What `part` of the region, in bytes from its start, is made of.
    pub fn pieces(&self, part: &Range<u64>) -> Vec<Piece<'_>> {
        let fresh = |place| Piece { place, flags: FLAGS, file: None };
        let Some(file) = &self.file else { return vec![fresh(part.clone())] };
        let of_file = |place: Range<u64>| {
            let offset = self.start + place.start;
            Piece { place, flags: self.flags, file: Some((file, offset)) }
        };
        if self.is_shared() {
            return vec![of_file(part.clone())];
        }
        // As a store does for a whole region.
        let (mut pieces, mut next) = (Vec::new(), part.start);
        for data in &self.data {
            let data = (data.start - self.start).max(next)..(data.end - self.start).min(part.end);
            if data.is_empty() {
                continue;
            }
            if next < data.start {
                pieces.push(fresh(next..data.start));
            }
            next = data.end;
            pieces.push(of_file(data));
        }
        if next < part.end {
            pieces.push(fresh(next..part.end));
        }
        pieces
    }

    /// How often a file and fresh memory take turns in the whole region, at most.
    pub fn most_seams(&self) -> usize {
        2 * self.data.len()
    }

    /// Whether a file keeps what is written to a mapping after that is gone.
    pub fn is_shared(&self) -> bool {
        self.flags & libc::MAP_SHARED != 0
    }
}

/// Where the region behind the one in `range` starts in a file.
pub fn after(range: &Range<u64>) -> u64 {
    range.end.next_multiple_of(HUGE_PAGE as u64)
}

/// The huge pages with data among those of `file` in `range`, which starts at one; with the smallest holes
/// between them, which the file has zeros for, if there would be too many ranges.
fn data_in(file: &File, range: &Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let (mut all, mut rest) = (Vec::new(), range.clone());
    while let Some(data) = next_data(file, &rest)? {
        rest.start = data.end;
        all.push(data);
    }
    let (mut joined, mut hole_bytes) = (join(&all, 0), HUGE_PAGE as u64);
    while joined.len() > MAX_RANGES {
        joined = join(&joined, hole_bytes);
        hole_bytes *= 2;
    }
    Ok(joined)
}

/// Makes those of `ranges` one, which ascend, that have holes of no more than `hole_bytes` between them.
fn join(ranges: &[Range<u64>], hole_bytes: u64) -> Vec<Range<u64>> {
    let gapless = ranges.chunk_by(|one, next| next.start - one.end <= hole_bytes);
    gapless.filter_map(|all| Some(all.first()?.start..all.last()?.end)).collect()
}

/// The next huge pages with data among those of `file` in `range`, which starts at one.
fn next_data(file: &File, range: &Range<u64>) -> io::Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    let data = match seek(file, range.start, libc::SEEK_DATA) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        data => data?,
    };
    if data >= range.end {
        return Ok(None);
    }
    let hole = seek(file, data, libc::SEEK_HOLE)?;
    let huge = HUGE_PAGE as u64;
    Ok(Some(data - data % huge..hole.next_multiple_of(huge).min(range.end)))
}

fn seek(file: &File, from: u64, whence: i32) -> io::Result<u64> {
    let from = i64::try_from(from).map_err(io::Error::other)?;
    // SAFETY: the call takes numbers, and `file` keeps the descriptor open.
    let found = unsafe { libc::lseek(file.as_raw_fd(), from, whence) };
    u64::try_from(found).map_err(|_| io::Error::last_os_error())
}

/// Maps `part` of `file` in its place in the mapping from `start` on, which has room for `whole`. That must
/// be a mapping which was just made, and is known to nobody else.
fn map_file(
    file: &File,
    flags: i32,
    start: *mut u8,
    whole: &Range<u64>,
    part: &Range<u64>,
) -> io::Result<()> {
    assert!(whole.start <= part.start && part.start <= part.end && part.end <= whole.end);
    let size = |bytes: u64| usize::try_from(bytes).expect("no larger than a mapping");
    let place = start.wrapping_add(size(part.start - whole.start)).cast();
    let length = size(part.end - part.start);
    let offset = i64::try_from(part.start).map_err(io::Error::other)?;
    // SAFETY: the new mapping replaces a part of one that was just made and is known to nobody else:
    // the callers made it with the size of `whole`, in which `part` is.
    let mapped = unsafe {
        libc::mmap(place, length, PROTECTION, flags | libc::MAP_FIXED, file.as_raw_fd(), offset)
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A new file in memory.
pub(super) fn memfd(name: &CStr) -> io::Result<File> {
    // SAFETY: the name is a string that the call only reads.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made, and nobody else knows of it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::FileExt;

    use arch::machine::MemoryMap;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::MemoryConfig;
    use crate::memory::GuestRam;

    const FIRST: GuestAddress = GuestAddress(0x10);
    const SECOND: GuestAddress = GuestAddress((1 << 32) + 0x20);

    /// Two regions, of 3 and 1 MiB.
    fn ram(store: Store) -> Result<GuestRam, MemoryError> {
        let regions = vec![(GuestAddress(0), 3 << 20), (GuestAddress(1 << 32), 1 << 20)];
        let map = MemoryMap { regions, device_window: 0..0, extension_window: 0..0 };
        GuestRam::allocate(&map, &MemoryConfig::default(), store)
    }

    fn read(ram: &GuestRam, address: GuestAddress) -> u8 {
        ram.memory().read_obj(address).unwrap()
    }

    /// The file of a machine that wrote 1 to its first region and 2 to its second.
    fn saved() -> File {
        let ram = ram(Store::create(&MemoryBacking::Memfd).unwrap()).unwrap();
        ram.memory().write_obj(1u8, FIRST).unwrap();
        ram.memory().write_obj(2u8, SECOND).unwrap();
        ram.file().unwrap().try_clone().unwrap()
    }

    fn on(file: &File, sharing: Sharing) -> Result<GuestRam, MemoryError> {
        ram(Store::of_saved(SavedMemory { file: file.try_clone().unwrap(), sharing }))
    }

    #[test]
    fn what_a_machine_wrote_is_there_for_the_next() {
        let file = saved();

        let first = on(&file, Sharing::Shared).unwrap();
        assert_eq!([read(&first, FIRST), read(&first, SECOND)], [1, 2]);
        first.memory().write_obj(3u8, FIRST).unwrap();
        drop(first);

        let second = on(&file, Sharing::Shared).unwrap();
        assert_eq!([read(&second, FIRST), read(&second, SECOND)], [3, 2]);
    }

    #[test]
    fn a_template_stays_as_it_is() {
        let file = saved();

        let first = on(&file, Sharing::Private).unwrap();
        first.memory().write_obj(3u8, FIRST).unwrap();

        assert_eq!(read(&on(&file, Sharing::Private).unwrap(), FIRST), 1);
        assert_eq!(read(&first, FIRST), 3);
        assert!(first.file().is_none());
    }

    #[test]
    fn what_a_template_has_no_data_for_is_fresh_memory() {
        let file = saved();
        file.set_len(8 << 20).unwrap();

        let data = |range| next_data(&file, &range).unwrap();

        assert_eq!(data(0..3 << 20), Some(0..2 << 20));
        assert_eq!(data(2 << 20..3 << 20), None);
        assert_eq!(data(4 << 20..5 << 20), Some(4 << 20..5 << 20));
        assert_eq!(data(6 << 20..8 << 20), None);
        let ram = on(&file, Sharing::Private).unwrap();
        ram.memory().write_obj(4u8, GuestAddress(2 << 20)).unwrap();
        assert_eq!(data(2 << 20..3 << 20), None);
        assert_eq!(read(&ram, GuestAddress(2 << 20)), 4);
    }

    #[test]
    fn a_template_in_which_data_and_holes_alternate_is_mapped_in_few_pieces() {
        let file = memfd(c"test").unwrap();
        let huge = HUGE_PAGE as u64;
        // Holes of one huge page each, and every 100th has three.
        let place = |number: u64| number * 2 * huge + number / 100 * 2 * huge;
        (0..3000).for_each(|number| file.write_all_at(&[7], place(number)).unwrap());
        file.set_len(place(3000)).unwrap();
        let saved = SavedMemory { file: file.try_clone().unwrap(), sharing: Sharing::Private };

        let source = Store::of_saved(saved).source(place(3000)).unwrap();
        let pieces = source.pieces(&(0..place(3000)));

        assert_eq!(pieces.len(), 60);
        assert!(pieces.len() <= source.most_seams());
        let ends = pieces.iter().map(|piece| piece.place.end);
        let starts = pieces.iter().skip(1).map(|piece| piece.place.start);
        assert!(ends.eq(starts.chain([place(3000)])));
        let holes = pieces.iter().filter(|piece| piece.file.is_none());
        for Piece { place: hole, .. } in holes {
            assert_eq!(next_data(&file, hole).unwrap(), None);
        }
    }

    #[test]
    fn few_holes_of_a_template_are_all_left_out() {
        let file = memfd(c"test").unwrap();
        let huge = HUGE_PAGE as u64;
        // Huge pages with data next to each other count once.
        for number in [0, 1, 3, 4, 5, 9] {
            file.write_all_at(&[7], number * huge).unwrap();
        }
        file.set_len(10 * huge).unwrap();

        let data = data_in(&file, &(0..10 * huge)).unwrap();

        assert_eq!(data, [0..2 * huge, 3 * huge..6 * huge, 9 * huge..10 * huge]);
    }

    #[test]
    fn memory_that_is_gone_holds_no_file_and_reads_as_zeros() {
        let file = saved();
        let ram = on(&file, Sharing::Shared).unwrap();
        let clone = ram.memory().clone();

        drop(ram);
        clone.write_obj(9u8, FIRST).unwrap();

        assert_eq!(clone.read_obj::<u8>(SECOND).unwrap(), 0);
        let mut byte = [0];
        file.read_exact_at(&mut byte, FIRST.0).unwrap();
        assert_eq!(byte, [1]);
    }

    #[test]
    fn a_file_that_lacks_a_part_is_refused() {
        let file = saved();
        file.set_len(4 << 20).unwrap();

        let error = on(&file, Sharing::Private).err().unwrap().to_string();

        assert_eq!(error, "the file with guest RAM has 4194304 bytes, of at least 5242880");
    }

    #[test]
    fn a_file_that_is_there_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("memory");
        std::fs::write(&path, "precious").unwrap();

        let error = Store::create(&MemoryBacking::File(path.clone())).unwrap_err();

        assert!(error.to_string().contains("must not exist yet"));
        let look = Store::check_file(&path).unwrap_err();
        assert_eq!(look.to_string(), error.to_string());
        let mut kept = String::new();
        File::open(path).unwrap().read_to_string(&mut kept).unwrap();
        assert_eq!(kept, "precious");
    }
}
