//! Virtio-vsock packets: the 44-byte header, and the guest's buffers as a cursor that does not copy.
//!
//! The crate `virtio-vsock` wants a packet's data in one descriptor. A Linux guest spreads it over
//! several as soon as it sends from more than one page, so chains are walked here.

use virtio_queue::DescriptorChainRwIter;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

use crate::virtio::queue::Chain;

/// Size of a packet header, in bytes, as lengths are given on the wire.
pub const HEADER_LENGTH: u32 = 44;
/// Size of a packet header, in bytes.
pub const HEADER_BYTES: usize = HEADER_LENGTH as usize;
/// The context identifier of the host (virtio 1.2, section 5.10.4).
pub const HOST_CID: u64 = 2;
/// The socket type of a byte stream (virtio 1.2, section 5.10.6).
pub const TYPE_STREAM: u16 = 1;
/// SHUTDOWN flag: the sender of the packet will not receive any more (virtio 1.2, 5.10.6.5).
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender of the packet will not send any more (virtio 1.2, 5.10.6.5).
pub const SHUTDOWN_SEND: u32 = 2;

/// What a packet is for (virtio 1.2, section 5.10.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Asks for a connection.
    Request = 1,
    /// Grants one.
    Response = 2,
    /// Ends or refuses one.
    Reset = 3,
    /// Ends one or both directions of one.
    Shutdown = 4,
    /// Carries data.
    Data = 5,
    /// Says how much more data may come.
    CreditUpdate = 6,
    /// Asks for a `CreditUpdate`.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number, if there is one.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// `struct virtio_vsock_hdr` (virtio 1.2, section 5.10.6), as a private copy of what the guest wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Context identifier of the sender.
    pub source_cid: u64,
    /// Context identifier of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes of data behind the header.
    pub length: u32,
    /// Socket type; only [`TYPE_STREAM`] is known.
    pub socket_type: u16,
    /// Number of an [`Op`], or anything else a guest came up with.
    pub op: u16,
    /// Meaning depends on the operation.
    pub flags: u32,
    /// Size of the sender's receive buffer, in bytes.
    pub buffer_bytes: u32,
    /// Bytes the sender has taken out of that buffer so far, modulo 2^32.
    pub forwarded: u32,
}

impl Header {
    /// Reads the wire format (little endian, packed).
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[..];
        Header {
            source_cid: u64::from_le_bytes(take(&mut rest)),
            destination_cid: u64::from_le_bytes(take(&mut rest)),
            source_port: u32::from_le_bytes(take(&mut rest)),
            destination_port: u32::from_le_bytes(take(&mut rest)),
            length: u32::from_le_bytes(take(&mut rest)),
            socket_type: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buffer_bytes: u32::from_le_bytes(take(&mut rest)),
            forwarded: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Writes the wire format.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = &mut bytes[..];
        put(&mut rest, &self.source_cid.to_le_bytes());
        put(&mut rest, &self.destination_cid.to_le_bytes());
        put(&mut rest, &self.source_port.to_le_bytes());
        put(&mut rest, &self.destination_port.to_le_bytes());
        put(&mut rest, &self.length.to_le_bytes());
        put(&mut rest, &self.socket_type.to_le_bytes());
        put(&mut rest, &self.op.to_le_bytes());
        put(&mut rest, &self.flags.to_le_bytes());
        put(&mut rest, &self.buffer_bytes.to_le_bytes());
        put(&mut rest, &self.forwarded.to_le_bytes());
        bytes
    }

    /// The RST that answers this packet.
    pub fn refusal(&self) -> Header {
        Header {
            source_cid: self.destination_cid,
            destination_cid: self.source_cid,
            source_port: self.destination_port,
            destination_port: self.source_port,
            socket_type: self.socket_type,
            op: Op::Reset as u16,
            ..Header::default()
        }
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (head, tail) = rest.split_first_chunk().expect("the fields add up to HEADER_BYTES");
    *rest = tail;
    *head
}

fn put(rest: &mut &mut [u8], field: &[u8]) {
    let (head, tail) = std::mem::take(rest).split_at_mut(field.len());
    head.copy_from_slice(field);
    *rest = tail;
}

/// The buffers of one chain, taken piece by piece in place.
#[derive(Clone)]
pub struct Buffers<'m> {
    memory: &'m GuestMemoryMmap,
    descriptors: DescriptorChainRwIter<&'m GuestMemoryMmap>,
    address: GuestAddress,
    left: usize,
}

impl<'m> Buffers<'m> {
    /// The buffers the device may read.
    pub fn readable(chain: Chain<'m>, memory: &'m GuestMemoryMmap) -> Self {
        Buffers { memory, descriptors: chain.readable(), address: GuestAddress(0), left: 0 }
    }

    /// The buffers the device may write.
    pub fn writable(chain: Chain<'m>, memory: &'m GuestMemoryMmap) -> Self {
        Buffers { memory, descriptors: chain.writable(), address: GuestAddress(0), left: 0 }
    }

    /// The next piece, between 1 and `most` bytes long (`most` is not 0); `None` at the end of the
    /// chain or where it points outside of guest memory.
    pub fn next_slice(&mut self, most: usize) -> Option<VolatileSlice<'m>> {
        while self.left == 0 {
            let descriptor = self.descriptors.next()?;
            self.address = descriptor.addr();
            self.left = descriptor.len() as usize;
        }
        let slice = self.memory.get_slices(self.address, self.left.min(most)).next()?.ok()?;
        // Past the last byte of the address space nothing is left, so the sum is not used then.
        self.address = GuestAddress(self.address.0.wrapping_add(slice.len() as u64));
        self.left -= slice.len();
        Some(slice)
    }

    /// Takes a packet header off the front.
    pub fn read_header(&mut self) -> Option<Header> {
        let mut bytes = [0; HEADER_BYTES];
        let mut done = 0;
        while done < HEADER_BYTES {
            done += self.next_slice(HEADER_BYTES - done)?.copy_to(&mut bytes[done..]);
        }
        Some(Header::decode(&bytes))
    }

    /// Splits off the front, which will hold the header; `None` if no data would fit behind it.
    pub fn split_header(self) -> Option<(HeaderRoom<'m>, Self)> {
        let mut data = self.clone();
        let mut skipped = 0;
        while skipped < HEADER_BYTES {
            skipped += data.next_slice(HEADER_BYTES - skipped)?.len();
        }
        data.clone().next_slice(1)?;
        Some((HeaderRoom(self), data))
    }
}

/// Where the header of a packet to the guest goes; known to be large enough.
pub struct HeaderRoom<'m>(Buffers<'m>);

impl HeaderRoom<'_> {
    /// Writes `header` in front of its data.
    pub fn write(mut self, header: &Header) {
        let bytes = header.encode();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            // A guest that rewrites its descriptors meanwhile gets a packet without a whole header.
            let Some(slice) = self.0.next_slice(rest.len()) else { return };
            slice.copy_from(rest);
            rest = &rest[slice.len()..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        let header = Header {
            source_cid: 3,
            destination_cid: HOST_CID,
            source_port: 0x1234_5678,
            destination_port: 1024,
            length: 77,
            socket_type: TYPE_STREAM,
            op: Op::Shutdown as u16,
            flags: SHUTDOWN_SEND,
            buffer_bytes: 1 << 18,
            forwarded: u32::MAX,
        };

        assert_eq!(Header::decode(&header.encode()), header);
    }

    #[test]
    fn fields_are_where_the_standard_puts_them() {
        let header = Header { op: 0x0706, socket_type: 0x0504, ..Header::default() };

        assert_eq!(header.encode()[28..32], [4, 5, 6, 7]);
    }

    #[test]
    fn every_operation_has_its_number() {
        for number in 1..=7 {
            assert_eq!(Op::from_number(number).map(|op| op as u16), Some(number));
        }
        assert_eq!(Op::from_number(0), None);
        assert_eq!(Op::from_number(8), None);
    }
}
