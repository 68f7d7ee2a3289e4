//! What a driver reads of a register block: a page that is right at any time. So it can be shown to the
//! guest as memory that it cannot write, and no read leaves the guest.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION};
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap, VolatileMemory};

use super::MMIO_WINDOW;

/// Words of a page.
const WORDS: Range<u32> = 0..1024;

/// What has to be done after a store before a guest reads it that takes the page for registers.
pub type Publish = fn(&AtomicU32);

/// Memory for the register blocks of a machine, a page each.
#[derive(Clone)]
pub struct RegisterPages {
    memory: Arc<GuestRegionMmap>,
    publish: Publish,
}

/// One of the pages. A guest may read it at any time; all who have a clone may write it.
#[derive(Clone)]
pub struct RegisterPage {
    pages: RegisterPages,
    /// Where in there it starts.
    start: usize,
}

impl RegisterPages {
    /// Those in `memory`, which is all zeros and nobody else's.
    pub fn new(memory: Arc<GuestRegionMmap>, publish: Publish) -> Self {
        RegisterPages { memory, publish }
    }

    /// Where the guest sees them.
    pub fn addresses(&self) -> Range<u64> {
        let start = self.memory.start_addr().0;
        start..start + self.memory.len()
    }

    /// The one that the guest sees at `address`.
    pub fn page(&self, address: u64) -> RegisterPage {
        let start = usize::try_from(address - self.addresses().start).expect("it is in memory");
        RegisterPage { pages: self.clone(), start }
    }
}

impl RegisterPage {
    /// One that no guest sees as memory.
    pub fn alone() -> io::Result<Self> {
        let bytes = usize::try_from(MMIO_WINDOW).expect("a page is small");
        let memory = GuestRegionMmap::from_range(GuestAddress(0), bytes, None);
        let memory = Arc::new(memory.map_err(io::Error::other)?);
        Ok(RegisterPages::new(memory, |_| ()).page(0))
    }

    /// What a driver reads at `offset`. Behind the page are zeros.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (byte, index) in data.iter_mut().zip(0..) {
            let at = offset.saturating_add(index);
            let word = u32::try_from(at / 4).unwrap_or(u32::MAX);
            let word = if WORDS.contains(&word) { self.get(word * 4) } else { 0 };
            *byte = word.to_le_bytes()[usize::try_from(at % 4).expect("it is less than 4")];
        }
    }

    /// Shows `space` as the configuration space. One thread may do so at a time.
    pub fn set_config(&self, space: &[u8]) {
        let words = (VIRTIO_MMIO_CONFIG..).step_by(4).zip(space.chunks(4)).map(|(at, part)| {
            let mut word = [0; 4];
            word[..part.len()].copy_from_slice(part);
            (at, u32::from_le_bytes(word))
        });
        let mut changes = words.filter(|&(at, word)| self.get(at) != word).peekable();
        if changes.peek().is_some() {
            // Whoever read something before the first change, or ends with the last one, has to start again.
            // Who reads all of it in between is interrupted for it afterwards, and reads it again.
            self.next_generation();
            changes.for_each(|(at, word)| self.set(at, word));
            self.next_generation();
        }
    }

    /// Tells a driver that what it has read of the configuration space may not fit what it reads next.
    pub(super) fn next_generation(&self) {
        self.update(VIRTIO_MMIO_CONFIG_GENERATION, |generation| generation.wrapping_add(1));
    }

    /// Makes all of it zeros.
    pub(in crate::virtio) fn clear(&self) {
        WORDS.for_each(|word| self.set(word * 4, 0));
    }

    pub(super) fn get(&self, register: u32) -> u32 {
        u32::from_le(self.word(register).load(Ordering::Acquire))
    }

    pub(in crate::virtio) fn set(&self, register: u32, value: u32) {
        self.update(register, |_| value);
    }

    /// Adds `bits`. Returns what there was before.
    pub(super) fn add_bits(&self, register: u32, bits: u32) -> u32 {
        self.update(register, |before| before | bits)
    }

    pub(super) fn remove_bits(&self, register: u32, bits: u32) {
        self.update(register, |before| before & !bits);
    }

    /// Makes of a word what `change` says, and returns what there was. Most words stay as they are most
    /// times, and are not stored then.
    fn update(&self, register: u32, change: impl Fn(u32) -> u32) -> u32 {
        let word = self.word(register);
        let changed = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |before| {
            let (before, after) = (u32::from_le(before), change(u32::from_le(before)));
            (after != before).then_some(after.to_le())
        });
        if changed.is_ok() {
            (self.pages.publish)(word);
        }
        u32::from_le(changed.unwrap_or_else(|before| before))
    }

    fn word(&self, register: u32) -> &AtomicU32 {
        let offset = self.start + register as usize;
        self.pages.memory.get_atomic_ref(offset).expect("a register is a word of its page")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    fn read(page: &RegisterPage, offset: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0xee; bytes];
        page.read(offset, &mut data);
        data
    }

    #[test]
    fn a_page_is_read_in_any_width_and_has_zeros_behind_it() {
        let page = RegisterPage::alone().unwrap();
        page.set(0x70, 0x0403_0201);
        page.set(0xffc, u32::MAX);

        assert_eq!(read(&page, 0x71, 2), [2, 3]);
        assert_eq!(read(&page, 0x6e, 8), [0, 0, 1, 2, 3, 4, 0, 0]);
        assert_eq!(read(&page, 0xfff, 3), [0xff, 0, 0]);
        assert_eq!(read(&page, u64::MAX, 1), [0]);
    }

    #[test]
    fn a_changed_configuration_space_is_another_generation_and_the_same_one_is_not() {
        let page = RegisterPage::alone().unwrap();

        page.set_config(b"config");
        let first = page.get(VIRTIO_MMIO_CONFIG_GENERATION);
        page.set_config(b"config");
        assert_eq!(page.get(VIRTIO_MMIO_CONFIG_GENERATION), first);
        page.set_config(b"confiG");

        assert_ne!(page.get(VIRTIO_MMIO_CONFIG_GENERATION), first);
        assert_eq!(read(&page, 0x100, 8), b"confiG\0\0");
    }

    #[test]
    fn pages_of_one_machine_lie_behind_one_another_and_what_changes_there_is_published() {
        static PUBLISHED: AtomicUsize = AtomicUsize::new(0);
        let memory = GuestRegionMmap::from_range(GuestAddress(0xc000_0000), 0x3000, None).unwrap();
        let publish: Publish = |word| {
            let word = usize::try_from(word.load(Ordering::Relaxed)).unwrap();
            PUBLISHED.fetch_add(word, Ordering::Relaxed);
        };
        let pages = RegisterPages::new(Arc::new(memory), publish);
        assert_eq!(pages.addresses(), 0xc000_0000..0xc000_3000);

        pages.page(0xc000_1000).set(8, 5);
        pages.page(0xc000_1000).set(8, 5);
        pages.page(0xc000_2000).set(8, 7);

        let all = pages.page(0xc000_0000);
        assert_eq!([all.get(8), all.get(0x1008), all.get(0x2008)], [0, 5, 7]);
        assert_eq!(PUBLISHED.load(Ordering::Relaxed), 12);
    }
}
