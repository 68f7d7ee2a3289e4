//! The control queue: a driver's commands (virtio 1.2, section 5.1.6.5).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::virtio::buffers::Buffers;
use crate::virtio::complaints::Complaints;
use crate::virtio::queue::{Chain, QueueError, Verdict, VirtQueue};
use crate::virtio::state::Position;

/// Class and command, and the longest data of a command there is.
const COMMAND_BYTES: usize = 4;

/// What a driver asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Use this many queue pairs, from the first on; checked by nobody yet.
    UsePairs(u16),
}

impl Command {
    /// The command that these bytes are, or why they are none.
    fn parse(bytes: &[u8]) -> Result<Self, Refusal> {
        let &[class, command, ref data @ ..] = bytes else { return Err(Refusal::Length) };
        match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let pairs = data.try_into().map_err(|_| Refusal::Length)?;
                Ok(Command::UsePairs(u16::from_le_bytes(pairs)))
            }
            _ => Err(Refusal::Unknown { class, command }),
        }
    }
}

/// Why bytes are no command.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("control command of a wrong length")]
    Length,
    #[error("unknown control command {command} of class {class}")]
    Unknown { class: u8, command: u8 },
}

/// The control queue of an active device.
pub struct Control {
    queue: VirtQueue,
    buffers: Buffers,
}

impl Control {
    /// Takes commands from `queue`.
    pub fn new(queue: VirtQueue) -> Self {
        let buffers = Buffers::new(queue.memory().clone());
        Control { queue, buffers }
    }

    /// Where the device stands.
    pub fn position(&self) -> Position {
        self.queue.position(0)
    }

    /// Hands each command to `obey`, and tells the driver whether that said yes.
    pub fn run(
        &mut self,
        complaints: &mut Complaints,
        mut obey: impl FnMut(Command, &mut Complaints) -> bool,
    ) -> Result<(), QueueError> {
        let Control { queue, buffers } = self;
        queue.drain(|chain, _| {
            let done = match read(buffers, chain.clone(), complaints) {
                Some(command) => obey(command, complaints),
                None => false,
            };
            let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            buffers.clear();
            if let Err(error) = buffers.add(chain.writable()) {
                complaints.add(&error);
                return Verdict::Used(0);
            }
            let answer = u8::try_from(answer).expect("both answers are a byte");
            let written = buffers.copy_in(0, &[answer]);
            Verdict::Used(u32::try_from(written).expect("one byte at most"))
        })
    }
}

/// The command in `chain`.
fn read(buffers: &mut Buffers, chain: Chain<'_>, complaints: &mut Complaints) -> Option<Command> {
    buffers.clear();
    if let Err(error) = buffers.add(chain.readable()) {
        complaints.add(&error);
        return None;
    }
    // One byte more, so that a command that is too long shows as one.
    let mut bytes = [0; COMMAND_BYTES + 1];
    let length = buffers.copy_out(0, &mut bytes);
    Command::parse(&bytes[..length]).map_err(|refusal| complaints.add(&refusal)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_pairs_is_two_little_endian_bytes() {
        assert_eq!(Command::parse(&[4, 0, 2, 1]), Ok(Command::UsePairs(0x102)));
        assert_eq!(Command::parse(&[4, 0, 2]), Err(Refusal::Length));
        assert_eq!(Command::parse(&[4, 0, 2, 1, 0]), Err(Refusal::Length));
    }

    #[test]
    fn commands_nobody_offered_are_unknown() {
        assert_eq!(Command::parse(&[0, 0, 1]), Err(Refusal::Unknown { class: 0, command: 0 }));
        assert_eq!(Command::parse(&[4, 1, 0, 0]), Err(Refusal::Unknown { class: 4, command: 1 }));
    }

    #[test]
    fn less_than_a_header_is_no_command() {
        assert_eq!(Command::parse(&[]), Err(Refusal::Length));
        assert_eq!(Command::parse(&[4]), Err(Refusal::Length));
    }
}
