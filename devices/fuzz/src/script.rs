//! An input, taken as the steps of a guest and of the other end of its device.

use serde::{Deserialize, Serialize};

/// Most steps of one input, so that none takes long.
const MOST_STEPS: usize = 256;

/// What happens next. Numbers out of range are taken modulo what there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step<'a> {
    /// A good driver starts the device over, with empty rings.
    Start {
        /// Features it wants, of those that are offered.
        features: u64,
        /// How often the largest size of each queue is halved.
        halved: u8,
    },
    /// A chain as a good driver makes it, with whatever is in it, becomes available.
    Chain {
        /// Its queue.
        queue: u8,
        /// How: a sum of [`INDIRECT`] and [`QUIET`].
        how: u8,
        /// Where the readable bytes are cut into two buffers.
        cut: u16,
        /// Bytes to be read by the device.
        readable: &'a [u8],
        /// Lengths of buffers to be written by the device, in bytes; none if 0.
        writable: [u32; 2],
    },
    /// One entry of a descriptor table.
    Descriptor {
        /// Its queue.
        queue: u8,
        /// Its number.
        index: u16,
        /// Guest-physical address.
        address: u64,
        /// In bytes.
        length: u32,
        /// Any bits.
        flags: u16,
        /// Number of the next one.
        next: u16,
    },
    /// One entry of an available ring.
    Available {
        /// Its queue.
        queue: u8,
        /// Its place in the ring.
        entry: u16,
        /// What it says.
        head: u16,
    },
    /// The index of an available ring jumps, and the driver kicks.
    Jump {
        /// Its queue.
        queue: u8,
        /// How far.
        by: u16,
    },
    /// Something is written into memory.
    Memory {
        /// Guest-physical address.
        address: u32,
        /// What.
        bytes: &'a [u8],
    },
    /// A register is written.
    Write {
        /// Its offset.
        offset: u16,
        /// Its value.
        value: u32,
    },
    /// Registers or the configuration space are written with some other width.
    WriteBytes {
        /// Where.
        offset: u16,
        /// What.
        bytes: &'a [u8],
    },
    /// Registers or the configuration space are read.
    Read {
        /// Where.
        offset: u16,
        /// How much, in bytes.
        length: u8,
    },
    /// A queue is kicked.
    Kick {
        /// Which.
        queue: u8,
    },
    /// The other end of the device does something, which is for the target to say.
    Host {
        /// Who or how.
        what: u8,
        /// With what.
        bytes: &'a [u8],
    },
}

/// The chain is described in a table of its own.
pub const INDIRECT: u8 = 1;
/// The device is not told.
pub const QUIET: u8 = 2;

/// The steps in `input`. Bytes that are no step are passed over, so that whatever mutation has made of
/// an input, the rest of it still counts.
pub fn steps(mut input: &[u8]) -> impl Iterator<Item = Step<'_>> {
    let next = move || {
        while !input.is_empty() {
            match postcard::take_from_bytes(input) {
                Ok((step, rest)) => {
                    input = rest;
                    return Some(step);
                }
                Err(_) => input = &input[1..],
            }
        }
        None
    };
    std::iter::from_fn(next).take(MOST_STEPS)
}

/// An input of these steps.
pub fn input(steps: &[Step<'_>]) -> Vec<u8> {
    let bytes = |step| postcard::to_stdvec(step).expect("every step can be written");
    steps.iter().flat_map(bytes).collect()
}

/// The same for a target whose device has variants, of which the first byte chooses one.
pub fn variant(variant: u8, steps: &[Step<'_>]) -> Vec<u8> {
    [vec![variant], input(steps)].concat()
}

/// A driver's usual start.
pub const START: Step<'_> = Step::Start { features: u64::MAX, halved: 0 };

/// A chain of one readable and one writable buffer, as far as they have any bytes.
pub fn chain(queue: u8, readable: &[u8], writable: u32) -> Step<'_> {
    Step::Chain { queue, how: 0, cut: 0, readable, writable: [writable, 0] }
}

/// A chain whose readable bytes are cut behind a header of `cut` bytes, with room for an answer.
pub fn request(queue: u8, cut: u16, readable: &[u8], writable: [u32; 2]) -> Step<'_> {
    Step::Chain { queue, how: 0, cut, readable, writable }
}

/// `values` as little-endian bytes.
pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// What every guest can do wrong whatever its device is, for queue number `queue`.
pub fn broken_rings(queue: u8) -> Vec<Step<'static>> {
    let descriptor = |index, address, length, flags, next| Step::Descriptor {
        queue,
        index,
        address,
        length,
        flags,
        next,
    };
    vec![
        START,
        // A loop, a buffer beyond memory, one whose end overflows, a table in a table.
        descriptor(0, 0x5_0000, 64, 3, 0),
        Step::Jump { queue, by: 1 },
        descriptor(1, 1 << 40, 64, 2, 0),
        Step::Available { queue, entry: 1, head: 1 },
        Step::Jump { queue, by: 1 },
        descriptor(2, u64::MAX - 8, u32::MAX, 0, 0),
        Step::Available { queue, entry: 2, head: 2 },
        Step::Jump { queue, by: 1 },
        descriptor(3, 0x4000, 32, 4, 0),
        Step::Available { queue, entry: 3, head: 3 },
        Step::Jump { queue, by: 1 },
        // A head that is none, and more chains than there are descriptors.
        Step::Available { queue, entry: 4, head: 0xffff },
        Step::Jump { queue, by: 1 },
        Step::Jump { queue, by: 0x8000 },
        Step::Kick { queue },
        START,
        Step::Chain { queue, how: INDIRECT, cut: 0, readable: b"", writable: [16, 16] },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_its_steps() {
        let wanted = broken_rings(1);

        assert_eq!(steps(&input(&wanted)).collect::<Vec<_>>(), wanted);
    }

    #[test]
    fn bytes_that_are_no_step_are_passed_over() {
        let mut bytes = vec![0xff, 0xff];
        bytes.extend(input(&[Step::Kick { queue: 3 }]));

        assert_eq!(steps(&bytes).collect::<Vec<_>>(), [Step::Kick { queue: 3 }]);
    }
}
