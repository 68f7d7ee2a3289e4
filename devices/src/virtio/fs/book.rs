//! Which files the guest knows and has open, and what the file system calls them; pure.
//!
//! In a guest that booted both sides use the same numbers. One that was built anew keeps the numbers
//! it knew, while the file system, which started over, has others for the same files.

use std::collections::BTreeMap;
use std::io;

/// The root directory's number, on both sides (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;

/// Numbers from here on are none of the file system's own: it uses 56 bits.
const FIRST_ALIAS: u64 = 1 << 62;

/// What the guest has open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// The guest's number of the file.
    pub file: u64,
    /// The flags of open(2).
    pub flags: u32,
    /// Whether it is open for its entries.
    pub is_directory: bool,
}

/// The guest's view of the file system. Both kinds of numbers are `u64`; the names of parameters say
/// whose they are.
#[derive(Debug, Default)]
pub struct Book {
    /// How often the guest was told of each file it knows, by its own number.
    known: BTreeMap<u64, u64>,
    /// What the file system calls files for which the guest has another number; nothing for those it
    /// does not have any more.
    aliases: BTreeMap<u64, Option<u64>>,
    /// The same the other way round.
    names: BTreeMap<u64, u64>,
    last_alias: u64,
    open: BTreeMap<u64, Open>,
    /// What the file system calls what was open before it started over; nothing if that is gone.
    reopened: BTreeMap<u64, Option<u64>>,
    /// What the guest's handles are ahead of the file system's.
    handle_lead: u64,
}

impl Book {
    /// The file system's number of a file that the guest calls `guest`; ESTALE if it has it no more.
    pub fn file(&self, guest: u64) -> io::Result<u64> {
        match self.aliases.get(&guest) {
            None => Ok(guest),
            Some(Some(own)) => Ok(*own),
            Some(None) => Err(stale()),
        }
    }

    /// The file system's handle that the guest calls `guest`; ESTALE if it has it no more.
    pub fn handle(&self, guest: u64) -> io::Result<u64> {
        match self.reopened.get(&guest) {
            Some(handle) => handle.ok_or_else(stale),
            None => guest.checked_sub(self.handle_lead).ok_or_else(bad_handle),
        }
    }

    /// The flags with which the guest opened `guest`; EBADF if it has no such handle.
    pub fn flags(&self, guest: u64) -> io::Result<u32> {
        self.open.get(&guest).map(|open| open.flags).ok_or_else(bad_handle)
    }

    /// The guest is told of the file that the file system calls `own`, once more: its number there.
    pub fn tell(&mut self, own: u64) -> u64 {
        let guest = self.name(own);
        let count = self.known.entry(guest).or_default();
        *count = count.saturating_add(1);
        guest
    }

    /// The guest's number of the file that the file system calls `own`.
    pub fn name(&mut self, own: u64) -> u64 {
        if let Some(&guest) = self.names.get(&own) {
            return guest;
        }
        // The guest may know another file by this number.
        if !self.aliases.contains_key(&own) {
            return own;
        }
        self.last_alias = self.last_alias.max(FIRST_ALIAS) + 1;
        let guest = self.last_alias;
        self.alias(guest, Some(own));
        guest
    }

    /// The guest forgot that it was told `count` times of a file. Returns the file system's number if
    /// the guest does not know it any more.
    pub fn forget(&mut self, guest: u64, count: u64) -> Option<u64> {
        let left = self.known.get_mut(&guest)?;
        *left = left.saturating_sub(count);
        if *left > 0 {
            return None;
        }
        self.known.remove(&guest);
        match self.aliases.remove(&guest) {
            None => Some(guest),
            Some(own) => own.inspect(|own| _ = self.names.remove(own)),
        }
    }

    /// The guest opened something that the file system calls `own`: its handle there.
    pub fn open(&mut self, own: u64, open: Open) -> u64 {
        let guest = own.saturating_add(self.handle_lead);
        self.open.insert(guest, open);
        guest
    }

    /// The guest closed `guest`.
    pub fn close(&mut self, guest: u64) {
        self.open.remove(&guest);
        self.reopened.remove(&guest);
    }

    /// Every file that the guest knows, with how often it was told of it.
    pub fn files(&self) -> impl Iterator<Item = (u64, u64)> {
        self.known.iter().map(|(&guest, &count)| (guest, count))
    }

    /// Everything that the guest has open.
    pub fn opened(&self) -> impl Iterator<Item = (u64, Open)> {
        self.open.iter().map(|(&handle, &open)| (handle, open))
    }

    /// Takes over a file that the guest knows as `guest`; `own` is what the file system, which started
    /// over, calls it, if it still has it.
    pub fn take_file(&mut self, guest: u64, count: u64, own: Option<u64>) {
        self.known.insert(guest, count);
        // Two files that have become one cannot be told apart when one of them is forgotten.
        let own = own.filter(|own| !self.names.contains_key(own));
        self.alias(guest, own);
    }

    /// Takes over what the guest has open as `guest`, in the same way.
    pub fn take_handle(&mut self, guest: u64, open: Open, own: Option<u64>) {
        self.open.insert(guest, open);
        self.reopened.insert(guest, own);
        self.handle_lead = self.handle_lead.max(guest);
    }

    fn alias(&mut self, guest: u64, own: Option<u64>) {
        self.aliases.insert(guest, own);
        if let Some(own) = own {
            self.names.insert(own, guest);
        }
        if guest >= FIRST_ALIAS {
            self.last_alias = self.last_alias.max(guest);
        }
    }
}

fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

fn bad_handle() -> io::Error {
    io::Error::from_raw_os_error(libc::EBADF)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Open = Open { file: 7, flags: 0, is_directory: false };

    fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    #[test]
    fn a_guest_that_booted_uses_the_file_systems_numbers() {
        let mut book = Book::default();

        assert_eq!(book.tell(7), 7);
        assert_eq!(book.file(7).unwrap(), 7);
        assert_eq!(book.open(3, OPEN), 3);
        assert_eq!(book.handle(3).unwrap(), 3);
    }

    #[test]
    fn what_is_open_has_its_flags_until_it_is_closed() {
        let mut book = Book::default();
        book.open(3, Open { flags: 2, ..OPEN });

        assert_eq!(book.flags(3).unwrap(), 2);
        book.close(3);
        assert_eq!(errno(book.flags(3)), Some(libc::EBADF));
    }

    #[test]
    fn a_file_is_forgotten_with_the_last_time_it_was_told_of() {
        let mut book = Book::default();
        book.tell(7);
        book.tell(7);

        assert_eq!(book.forget(7, 1), None);
        assert_eq!(book.forget(7, 1), Some(7));
        assert_eq!(book.forget(7, 1), None);
    }

    #[test]
    fn a_file_taken_over_keeps_its_number() {
        let mut book = Book::default();

        book.take_file(7, 2, Some(100));

        assert_eq!(book.file(7).unwrap(), 100);
        assert_eq!(book.tell(100), 7);
        assert_eq!(book.forget(7, 3), Some(100));
        assert_eq!(book.tell(100), 100);
    }

    #[test]
    fn another_file_with_a_number_in_use_gets_one_of_its_own() {
        let mut book = Book::default();
        book.take_file(7, 1, Some(100));

        let number = book.tell(7);

        assert_ne!(number, 7);
        assert_eq!(book.file(number).unwrap(), 7);
        assert_eq!(book.tell(7), number);
        assert_eq!(book.forget(number, 2), Some(7));
    }

    #[test]
    fn a_file_that_is_gone_is_stale_until_it_is_forgotten() {
        let mut book = Book::default();
        book.take_file(7, 1, None);

        assert_eq!(errno(book.file(7)), Some(libc::ESTALE));
        assert_eq!(book.forget(7, 1), None);
        assert_eq!(book.tell(7), 7);
    }

    #[test]
    fn two_files_that_became_one_are_not_mixed_up() {
        let mut book = Book::default();

        book.take_file(7, 1, Some(100));
        book.take_file(8, 1, Some(100));

        assert_eq!(book.file(7).unwrap(), 100);
        assert_eq!(errno(book.file(8)), Some(libc::ESTALE));
        assert_eq!(book.forget(8, 1), None);
        assert_eq!(book.tell(100), 7);
    }

    #[test]
    fn a_new_handle_is_none_of_those_taken_over() {
        let mut book = Book::default();
        book.take_handle(5, OPEN, Some(1));
        book.take_handle(6, OPEN, None);

        let new = book.open(2, OPEN);

        assert!(new > 6);
        assert_eq!(book.handle(5).unwrap(), 1);
        assert_eq!(errno(book.handle(6)), Some(libc::ESTALE));
        assert_eq!(book.handle(new).unwrap(), 2);
        book.close(5);
        assert_eq!(errno(book.handle(5)), Some(libc::EBADF));
    }
}
