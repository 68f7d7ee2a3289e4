//! Directories that are read while something changes them (FUSE_READDIR, FUSE_READDIRPLUS).
//!
//! A guest reads a directory in several requests, each from where the last one ended. `rm -r` removes
//! between them what it has read, and file systems whose positions are counts (tmpfs) then skip as many
//! entries when they are sent to the position that came with the last one. So the host's directory is
//! never sent anywhere as long as the guest reads on: what one call of getdents64(2) gave is given to
//! the guest to the end before the next one, which starts where the directory stands.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::io;
use std::sync::{Mutex, MutexGuard};

use fuse_backend_rs::api::filesystem::DirEntry;

/// What takes the entries of a directory: it says how many bytes one took, 0 if it had no room for it.
pub(super) type Take<'a> = &'a mut dyn FnMut(DirEntry) -> io::Result<usize>;

/// The directories that are open and being read, by their handles.
#[derive(Debug, Default)]
pub(super) struct Listings(Mutex<HashMap<u64, Listing>>);

/// Where the reading of a directory stands.
#[derive(Debug)]
struct Listing {
    /// Position after the last entry that the guest took.
    taken: u64,
    /// Position of the host's directory, after the last entry of `ahead`.
    read: u64,
    /// What was read and not taken yet; as much as one answer holds.
    ahead: VecDeque<Listed>,
}

/// An entry.
#[derive(Debug)]
struct Listed {
    inode: u64,
    /// Position after it.
    position: u64,
    kind: u32,
    name: CString,
}

impl Listings {
    /// Hands the entries of `handle` from `position` on to `take`, until it has no room or an error.
    /// `read` reads entries from a position of the host's directory on.
    ///
    /// # Errors
    ///
    /// Those of `read`, and of `take` for the first entry: what was handed over before must be answered.
    pub(super) fn list(
        &self,
        handle: u64,
        position: u64,
        read: impl Fn(u64, Take) -> io::Result<()>,
        mut take: impl FnMut(DirEntry, &CStr) -> io::Result<usize>,
    ) -> io::Result<()> {
        let listing = self.lock().remove(&handle);
        let is_known = listing.is_some();
        let mut listing = listing.filter(|listing| listing.taken == position).unwrap_or(Listing {
            taken: position,
            read: position,
            ahead: VecDeque::new(),
        });
        let result = listing.answer(read, &mut take);
        // A guest may name any handle: one that cannot be read is not kept.
        if is_known || result.is_ok() {
            self.lock().insert(handle, listing);
        }
        result
    }

    /// Forgets a handle that is closed.
    pub(super) fn close(&self, handle: u64) {
        self.lock().remove(&handle);
    }

    /// Forgets all.
    pub(super) fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Listing>> {
        self.0.lock().expect("nothing panics while it looks something up")
    }
}

impl Listing {
    fn answer(
        &mut self,
        read: impl Fn(u64, Take) -> io::Result<()>,
        mut take: impl FnMut(DirEntry, &CStr) -> io::Result<usize>,
    ) -> io::Result<()> {
        loop {
            if self.ahead.is_empty() {
                self.read_ahead(&read)?;
            }
            // An answer without entries is the end, even where all that was read ahead is gone since.
            if self.ahead.is_empty() || self.give(&mut take)? || !self.ahead.is_empty() {
                return Ok(());
            }
        }
    }

    fn read_ahead(&mut self, read: impl Fn(u64, Take) -> io::Result<()>) -> io::Result<()> {
        let ahead = &mut self.ahead;
        read(self.read, &mut |entry| {
            let name = CString::new(entry.name)?;
            let DirEntry { ino: inode, offset: position, type_: kind, .. } = entry;
            ahead.push_back(Listed { inode, position, kind, name });
            Ok(entry.name.len())
        })?;
        self.read = self.ahead.back().map_or(self.read, |last| last.position);
        Ok(())
    }

    /// Says whether any entry was taken.
    fn give(
        &mut self,
        mut take: impl FnMut(DirEntry, &CStr) -> io::Result<usize>,
    ) -> io::Result<bool> {
        let mut any = false;
        while let Some(Listed { inode, position, kind, name }) = self.ahead.front() {
            let entry =
                DirEntry { ino: *inode, offset: *position, type_: *kind, name: name.to_bytes() };
            match take(entry, name) {
                Ok(0) => break,
                Ok(_) => any = true,
                // It is gone since, which is nothing to stop at.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) if !any => return Err(error),
                Err(_) => break,
            }
            self.taken = *position;
            self.ahead.pop_front();
        }
        Ok(any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of `a`, `b` and so on, whose positions are counts.
    fn read(names: &str, from: u64, take: Take) -> io::Result<()> {
        let all = names.as_bytes().chunks(1).zip(1..);
        for (name, number) in all.skip_while(|(_, number)| *number <= from) {
            take(DirEntry { ino: number, offset: number, type_: 8, name })?;
        }
        Ok(())
    }

    /// What the guest gets in an answer with room for `room` entries.
    fn answer(listings: &Listings, names: &str, position: u64, room: usize) -> (String, u64) {
        let mut answer = (String::new(), position);
        let take = |entry: DirEntry, name: &CStr| {
            if answer.0.len() == room {
                return Ok(0);
            }
            answer.0 += name.to_str().unwrap();
            answer.1 = entry.offset;
            Ok(1)
        };
        let all = |from, take: Take| read(names, from, take);
        listings.list(7, position, all, take).unwrap();
        answer
    }

    #[test]
    fn what_is_removed_meanwhile_hides_nothing() {
        let listings = Listings::default();

        let (first, position) = answer(&listings, "abcdef", 0, 2);
        // Those two are removed, and every other one is at another position now.
        let (second, position) = answer(&listings, "cdef", position, 3);
        let (third, _) = answer(&listings, "f", position, 3);

        assert_eq!([first, second, third], ["ab", "cde", "f"]);
    }

    #[test]
    fn what_comes_after_entries_that_are_all_gone_is_still_given() {
        let listings = Listings::default();
        answer(&listings, "ab", 0, 1);
        let mut given = String::new();
        let take = |_: DirEntry, name: &CStr| {
            if name == c"b" {
                return Err(io::ErrorKind::NotFound.into());
            }
            given += name.to_str().unwrap();
            Ok(1)
        };

        listings.list(7, 1, |from, take| read("abc", from, take), take).unwrap();

        assert_eq!(given, "c");
    }

    #[test]
    fn a_handle_that_cannot_be_read_is_not_kept() {
        let listings = Listings::default();

        let read = |_, _: Take| Err(io::Error::from_raw_os_error(libc::EBADF));
        listings.list(7, 0, read, |_, _| Ok(1)).unwrap_err();

        assert!(listings.lock().is_empty());
    }

    #[test]
    fn who_goes_elsewhere_gets_what_is_there() {
        let listings = Listings::default();
        answer(&listings, "abcdef", 0, 2);

        assert_eq!(answer(&listings, "abcdef", 4, 9).0, "ef");
        assert_eq!(answer(&listings, "xyz", 0, 9).0, "xyz");
    }

    #[test]
    fn a_handle_that_is_closed_is_forgotten() {
        let listings = Listings::default();
        answer(&listings, "abc", 0, 1);

        listings.close(7);

        assert!(listings.lock().is_empty());
    }

    #[test]
    fn what_is_gone_is_passed_over_and_other_errors_end_the_answer() {
        let listings = Listings::default();
        let mut given = String::new();
        let take = |_: DirEntry, name: &CStr| match name.to_bytes() {
            b"b" => Err(io::ErrorKind::NotFound.into()),
            b"d" => Err(io::ErrorKind::PermissionDenied.into()),
            _ => {
                given += name.to_str().unwrap();
                Ok(1)
            }
        };

        listings.list(7, 0, |from, take| read("abcde", from, take), take).unwrap();

        assert_eq!(given, "ac");
        let refuse = |_: DirEntry, _: &CStr| Err(io::ErrorKind::PermissionDenied.into());
        assert!(listings.list(7, 3, |from, take| read("abcde", from, take), refuse).is_err());
    }
}
