//! Console device (virtio 1.2, section 5.3): a stream of characters in each direction, one port.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::buffers::Buffers;
use super::complaints::Complaints;
use super::config_space::ConfigSpace;
use super::queue::{QueueError, Verdict, VirtQueue};
use super::state::{DeviceState, Position, RestoreError};
use super::{ActivateError, Activation, Backend, DeviceTraits, VirtioDevice, copy_config};
use crate::interrupt::Interrupt;

/// Queue numbers of port 0 (virtio 1.2, section 5.3.2).
const RECEIVE: usize = 0;

/// Feature bit: the configuration space has columns and rows (virtio 1.2, section 5.3.3).
const VIRTIO_CONSOLE_F_SIZE: u64 = 0;

/// Most bytes moved with one chain. A chain may name the same page many times over, so its length
/// is no bound on what a guest can print, or take of what is typed, with one kick.
const MAX_CHAIN_BYTES: usize = 64 << 10;

const TRAITS: DeviceTraits = DeviceTraits {
    device_type: VIRTIO_ID_CONSOLE,
    features: 1 << VIRTIO_CONSOLE_F_SIZE,
    queue_sizes: &[16, 32],
};

/// A console between a file descriptor that is typed into and a writer that shows.
pub struct Console {
    input: Option<OwnedFd>,
    output: Box<dyn Write + Send>,
    size: [u8; 4],
    shown: ConfigSpace,
    complaints: Complaints,
    active: Option<Active>,
}

struct Active {
    receive: VirtQueue,
    transmit: VirtQueue,
    buffers: Buffers,
    interrupt: Arc<dyn Interrupt>,
}

impl Console {
    /// Creates an idle console. `input` must not block, which is what O_NONBLOCK is for; `output`
    /// must not block either, and what it does not take is lost.
    pub fn new(input: Option<OwnedFd>, output: Box<dyn Write + Send>) -> Self {
        let complaints = Complaints::of("console");
        let shown = ConfigSpace::default();
        Console { input, output, size: [0; 4], shown, complaints, active: None }
    }

    /// Tells the guest how large the terminal is, in characters. Zero means unknown.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        self.size[..2].copy_from_slice(&columns.to_le_bytes());
        self.size[2..].copy_from_slice(&rows.to_le_bytes());
        self.shown.show(&self.size);
        if let Some(active) = &self.active {
            active.interrupt.config_changed();
        }
    }

    /// Moves what was typed into the guest, until there is no more of it or no room for it.
    fn receive(&mut self) -> Result<(), QueueError> {
        let Console { input, complaints, active, .. } = self;
        let (Some(fd), Some(Active { receive, buffers, .. })) = (&*input, active) else {
            return Ok(());
        };
        let mut ended = false;
        receive.drain(|chain, _| {
            buffers.clear();
            if let Err(error) = buffers.add(chain.writable()) {
                complaints.add(&error);
                return Verdict::Used(0);
            }
            if buffers.bytes() == 0 {
                return Verdict::Used(0);
            }
            buffers.truncate(MAX_CHAIN_BYTES);
            match buffers.read_from(fd.as_fd()) {
                Ok(0) => ended = true,
                Ok(bytes) => return Verdict::Used(u32::try_from(bytes).unwrap_or(u32::MAX)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    complaints.add(&format_args!("input ended: {error}"));
                    ended = true;
                }
            }
            Verdict::Keep
        })?;
        if ended {
            *input = None;
        }
        Ok(())
    }

    /// Shows what the guest printed.
    fn transmit(&mut self) -> Result<(), QueueError> {
        let Console { output, complaints, active, .. } = self;
        let Some(Active { transmit, .. }) = active else { return Ok(()) };
        transmit.drain(|chain, memory| {
            let shown = chain
                .reader(memory)
                .map_err(io::Error::other)
                .and_then(|bytes| io::copy(&mut bytes.take(MAX_CHAIN_BYTES as u64), output));
            if let Err(error) = shown {
                complaints.add(&format_args!("output lost: {error}"));
            }
            Verdict::Used(0)
        })
    }
}

impl VirtioDevice for Console {
    fn traits(&self) -> DeviceTraits {
        TRAITS
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.size, offset, data);
    }

    fn show_config_in(&mut self, space: ConfigSpace) {
        self.shown = space;
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let interrupt = activation.interrupt.clone();
        let [receive, transmit] = activation.into_queues()?;
        let buffers = Buffers::new(receive.memory().clone());
        self.active = Some(Active { receive, transmit, buffers, interrupt });
        Ok(())
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn queue_ready(&mut self, index: usize) -> Result<(), QueueError> {
        if index == RECEIVE { self.receive() } else { self.transmit() }
    }

    fn backends(&self) -> Vec<Backend> {
        let backend = |fd: &OwnedFd| Backend { fd: fd.as_raw_fd(), events: EventSet::IN };
        self.input.iter().map(backend).collect()
    }

    fn backend_ready(&mut self, _index: usize, _events: EventSet) -> Result<(), QueueError> {
        self.receive()
    }

    fn quiesce(&mut self) -> Result<Vec<Position>, QueueError> {
        let Some(active) = &self.active else { return Ok(Vec::new()) };
        Ok(vec![active.receive.position(0), active.transmit.position(0)])
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console { size: self.size }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Console { size } = state else { return Err(RestoreError::Kind) };
        self.size = *size;
        self.shown.show(&self.size);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use virtio_queue::desc::split::Descriptor;

    use super::*;
    use crate::virtio::testing::{Driver, assert_shown, config_page, memory};

    /// A console on a terminal that shows and types through the returned socket.
    fn active(driver: &Driver<'_>) -> (Console, UnixStream) {
        let (terminal, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        terminal.set_nonblocking(true).unwrap();
        let output = ours.try_clone().unwrap();
        let mut console = Console::new(Some(ours.into()), Box::new(output));
        console.activate(driver.activation()).unwrap();
        (console, terminal)
    }

    fn shown(terminal: &mut UnixStream) -> Vec<u8> {
        let mut data = vec![0; 1 << 20];
        let length = terminal.read(&mut data).unwrap_or(0);
        data.truncate(length);
        data
    }

    #[test]
    fn what_the_guest_prints_is_shown() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, mut terminal) = active(&driver);

        driver.offer(1, &[b"hello ", b"world"], &[]);
        console.queue_ready(1).unwrap();

        assert_eq!(shown(&mut terminal), b"hello world");
        assert_eq!(driver.used_of(1), [(0, 0)]);
    }

    #[test]
    fn what_is_typed_reaches_the_guest() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, mut terminal) = active(&driver);

        driver.offer(0, &[], &[2]);
        driver.offer(0, &[], &[64]);
        terminal.write_all(b"typed").unwrap();
        console.backend_ready(0, EventSet::IN).unwrap();

        assert_eq!(driver.written(0, 0), b"ty");
        assert_eq!(driver.written(0, 1), b"ped");
    }

    #[test]
    fn a_chain_without_end_takes_a_bounded_part_of_the_input() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 30).unwrap();
        let mut console = Console::new(Some(file.into()), Box::new(io::sink()));
        console.activate(driver.activation()).unwrap();

        // Written many times over.
        let page = Descriptor::new(0x10_0000, 1 << 20, 2, 0);
        driver.offer_descriptors(0, &[page; 16]);
        console.queue_ready(0).unwrap();

        assert_eq!(driver.used(), [(0, 64 << 10)]);
    }

    #[test]
    fn what_was_typed_early_waits_for_a_buffer() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, mut terminal) = active(&driver);

        terminal.write_all(b"early").unwrap();
        console.backend_ready(0, EventSet::IN).unwrap();
        driver.offer(0, &[], &[64]);
        console.queue_ready(0).unwrap();

        assert_eq!(driver.written(0, 0), b"early");
    }

    #[test]
    fn a_buffer_waits_for_what_is_typed() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, _terminal) = active(&driver);

        driver.offer(0, &[], &[64]);
        console.queue_ready(0).unwrap();

        assert_eq!(driver.used_of(0), []);
    }

    #[test]
    fn the_end_of_input_leaves_output_alone() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, mut terminal) = active(&driver);

        terminal.shutdown(std::net::Shutdown::Write).unwrap();
        driver.offer(0, &[], &[64]);
        console.backend_ready(0, EventSet::IN).unwrap();
        driver.offer(1, &[b"still here"], &[]);
        console.queue_ready(1).unwrap();

        assert_eq!(shown(&mut terminal), b"still here");
        assert_eq!(driver.used_of(0), []);
    }

    #[test]
    fn one_chain_prints_at_most_64_kib() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, mut terminal) = active(&driver);

        let page = Descriptor::new(0x2_0000, 2048, 0, 0);
        driver.offer_descriptors(1, &[page; 60]);
        console.queue_ready(1).unwrap();

        assert_eq!(shown(&mut terminal).len(), 64 << 10);
    }

    #[test]
    fn buffers_outside_memory_come_back_empty() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, mut terminal) = active(&driver);

        driver.offer_descriptors(0, &[Descriptor::new(1 << 40, 8, 2, 0)]);
        driver.offer_descriptors(1, &[Descriptor::new(1 << 40, 8, 0, 0)]);
        terminal.write_all(b"x").unwrap();
        console.queue_ready(0).unwrap();
        console.queue_ready(1).unwrap();

        assert_eq!(driver.used_of(0), [(0, 0)]);
        assert_eq!(driver.used_of(1), [(0, 0)]);
    }

    #[test]
    fn a_buffer_without_room_does_not_end_the_input() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, mut terminal) = active(&driver);

        driver.offer(0, &[b"wrong direction"], &[]);
        driver.offer(0, &[], &[8]);
        terminal.write_all(b"x").unwrap();
        console.queue_ready(0).unwrap();

        assert_eq!(driver.written(0, 1), b"x");
    }

    #[test]
    fn a_resize_changes_the_configuration_and_says_so() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, _terminal) = active(&driver);

        console.resize(132, 43);

        let mut config = [0; 4];
        console.read_config(0, &mut config);
        assert_eq!(config, [132, 0, 43, 0]);
        assert_eq!(driver.config_changes(), 1);
    }

    #[test]
    fn a_resize_is_shown_at_once_whether_or_not_there_is_a_driver() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, _terminal) = active(&driver);
        let page = config_page(&mut console);

        console.resize(132, 43);
        assert_shown(&console, &page);
        console.reset();
        console.resize(80, 25);

        assert_shown(&console, &page);
    }

    #[test]
    fn is_silent_before_activation_and_after_reset() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut console, mut terminal) = active(&driver);

        console.reset();
        console.reset();
        console.resize(1, 1);
        driver.offer(1, &[b"x"], &[]);
        console.queue_ready(1).unwrap();

        assert_eq!(shown(&mut terminal), b"");
    }

    #[test]
    fn a_console_built_anew_types_and_shows_what_comes_next() {
        let memory = memory();
        let driver = Driver::with_queues(&memory, 2);
        let (mut old, mut old_terminal) = active(&driver);
        old.resize(80, 25);
        driver.offer(0, &[], &[64]);
        driver.offer(1, &[b"old"], &[]);
        old.queue_ready(1).unwrap();
        old.queue_ready(0).unwrap();

        let (mut terminal, ours) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        terminal.set_nonblocking(true).unwrap();
        let output = ours.try_clone().unwrap();
        let mut new = Console::new(Some(ours.into()), Box::new(output));
        driver.hand_over(0, &mut old, &mut new);
        driver.offer(1, &[b"new"], &[]);
        terminal.write_all(b"typed").unwrap();
        new.queue_ready(0).unwrap();
        new.queue_ready(1).unwrap();

        assert_eq!(shown(&mut old_terminal), b"old");
        assert_eq!(shown(&mut terminal), b"new");
        assert_eq!(driver.written(0, 0), b"typed");
        let mut config = [0; 4];
        new.read_config(0, &mut config);
        assert_eq!(config, [80, 0, 25, 0]);
    }
}
