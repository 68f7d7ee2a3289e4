//! A kernel that is looked at in small pieces before it is loaded in large ones.
#![cfg(target_arch = "x86_64")]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Bytes at the start of the file with all headers.
const HEAD_BYTES: usize = 4096;

/// A kernel file whose headers take one system call to read, and not two for each.
pub struct KernelFile<'a> {
    file: &'a File,
    head: Vec<u8>,
    position: u64,
}

impl<'a> KernelFile<'a> {
    /// The file, from its start on, wherever it was read to before.
    pub fn open(file: &'a File) -> io::Result<Self> {
        let mut head = vec![0; HEAD_BYTES];
        let read = file.read_at(&mut head, 0)?;
        head.truncate(read);
        Ok(KernelFile { file, head, position: 0 })
    }

    /// The start of the file, up to its end if that is near.
    pub fn head(&self) -> &[u8] {
        &self.head
    }
}

impl Read for KernelFile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let known = usize::try_from(self.position).ok().and_then(|start| self.head.get(start..));
        let read = match known {
            Some(mut known) if !known.is_empty() => known.read(buffer)?,
            _ => self.file.read_at(buffer, self.position)?,
        };
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for KernelFile<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
            SeekFrom::End(offset) => self.file.metadata()?.len().checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

impl ReadVolatile for KernelFile<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buffer: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut file = self.file;
        file.seek(SeekFrom::Start(self.position)).map_err(VolatileMemoryError::IOError)?;
        let read = file.read_volatile(buffer)?;
        self.position += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;

    const BYTES: usize = HEAD_BYTES + 100;

    fn contents() -> Vec<u8> {
        (0..BYTES).map(|index| u8::try_from(index % 251).unwrap()).collect()
    }

    fn file() -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&contents()).unwrap();
        file
    }

    #[test]
    fn it_reads_the_same_in_pieces_and_in_one_go() {
        let file = file();
        let mut kernel = KernelFile::open(&file).unwrap();
        let mut all = Vec::new();

        for piece in [1, HEAD_BYTES - 2, 2, 90, 9] {
            let mut buffer = vec![0; piece];
            kernel.read_exact(&mut buffer).unwrap();
            all.extend(buffer);
        }

        assert_eq!((all, kernel.read(&mut [0]).unwrap()), (contents(), 0));
    }

    #[test]
    fn it_goes_wherever_it_is_told_to() {
        let file = file();
        let mut kernel = KernelFile::open(&file).unwrap();
        let places = [
            (SeekFrom::Start(7), 7),
            (SeekFrom::Current(3), 11),
            (SeekFrom::End(-1), BYTES - 1),
            (SeekFrom::Current(-(BYTES as i64)), 0),
        ];

        for (to, index) in places {
            kernel.seek(to).unwrap();
            let mut byte = [0];
            kernel.read_exact(&mut byte).unwrap();
            assert_eq!(byte[0], contents()[index], "{to:?}");
        }
        assert!(kernel.seek(SeekFrom::Current(-9)).is_err());
    }

    #[test]
    fn guest_memory_gets_what_comes_next() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        let file = file();
        let mut kernel = KernelFile::open(&file).unwrap();
        kernel.read_exact(&mut [0; 50]).unwrap();

        memory.read_exact_volatile_from(GuestAddress(8), &mut kernel, BYTES - 50).unwrap();

        let mut found = vec![0; BYTES - 50];
        memory.read_slice(&mut found, GuestAddress(8)).unwrap();
        assert!(found == contents()[50..]);
        assert_eq!(kernel.read(&mut [0]).unwrap(), 0);
    }
}
