//! What a driver asks of a block device, parsed and checked before anything is done; pure.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};

/// Bytes of a sector, whatever the block size of the disk is (virtio 1.2, section 5.2.6).
pub const SECTOR_BYTES: u64 = 512;

/// Bytes of the header that every request starts with.
pub const HEADER_BYTES: usize = 16;

/// Bytes of the answer to [`Request::Id`].
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// How a request ended, as the last byte of its chain says (virtio 1.2, section 5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It was done.
    Ok,
    /// It was not or only partly done.
    IoError,
    /// The device does not know such requests.
    Unsupported,
}

impl Status {
    /// The byte the driver sees.
    pub fn byte(self) -> u8 {
        let value = match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoError => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        value.to_le_bytes()[0]
    }
}

/// A request that fits the disk. Offsets are in bytes from the start of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Fill the writable buffers from the disk.
    Read {
        /// Where to begin.
        offset: u64,
    },
    /// Write the readable buffers to the disk.
    Write {
        /// Where to begin.
        offset: u64,
    },
    /// Make all that was written before last.
    Flush,
    /// Say the name of the disk.
    Id,
}

/// What a request is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Size of the disk.
    pub sectors: u64,
    /// Whether writes fail.
    pub read_only: bool,
}

/// Parses `header`. `readable` is the length of the data the driver sends, `writable` of the room
/// for data it wants, both in bytes and without header and status.
pub fn parse(
    header: &[u8; HEADER_BYTES],
    readable: usize,
    writable: usize,
    limits: Limits,
) -> Result<Request, Status> {
    // The second word is reserved, and was a priority before virtio 1.0.
    let (kind, rest) = header.split_first_chunk().expect("a header is longer than its first field");
    let sector = rest.last_chunk().expect("a header is longer than its last field");
    let sector = u64::from_le_bytes(*sector);
    match u32::from_le_bytes(*kind) {
        VIRTIO_BLK_T_IN => Ok(Request::Read { offset: limits.offset(sector, writable)? }),
        VIRTIO_BLK_T_OUT if limits.read_only => Err(Status::IoError),
        VIRTIO_BLK_T_OUT => Ok(Request::Write { offset: limits.offset(sector, readable)? }),
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID if writable < ID_BYTES => Err(Status::IoError),
        VIRTIO_BLK_T_GET_ID => Ok(Request::Id),
        _ => Err(Status::Unsupported),
    }
}

impl Limits {
    /// Where `bytes` of data from `sector` on begin, if they are whole sectors of the disk.
    fn offset(self, sector: u64, bytes: usize) -> Result<u64, Status> {
        let bytes = bytes as u64;
        let end = sector.checked_add(bytes / SECTOR_BYTES).ok_or(Status::IoError)?;
        if bytes % SECTOR_BYTES != 0 || end > self.sectors {
            return Err(Status::IoError);
        }
        // No more than the size of the disk in bytes, which is known to fit.
        Ok(sector * SECTOR_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { sectors: 8, read_only: false };

    fn header(kind: u32, sector: u64) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn read(sector: u64, bytes: usize) -> Result<Request, Status> {
        parse(&header(VIRTIO_BLK_T_IN, sector), 0, bytes, LIMITS)
    }

    fn write(sector: u64, bytes: usize, read_only: bool) -> Result<Request, Status> {
        let limits = Limits { read_only, ..LIMITS };
        parse(&header(VIRTIO_BLK_T_OUT, sector), bytes, 0, limits)
    }

    #[test]
    fn the_last_sector_may_be_read() {
        assert_eq!(read(7, 512), Ok(Request::Read { offset: 7 * 512 }));
    }

    #[test]
    fn a_read_past_the_end_fails() {
        assert_eq!(read(7, 1024), Err(Status::IoError));
    }

    #[test]
    fn a_sector_that_overflows_fails() {
        assert_eq!(read(u64::MAX, 512), Err(Status::IoError));
        assert_eq!(read(u64::MAX / 512 + 1, 512), Err(Status::IoError));
    }

    #[test]
    fn a_part_of_a_sector_fails() {
        assert_eq!(read(0, 511), Err(Status::IoError));
    }

    #[test]
    fn a_write_to_a_read_only_disk_fails() {
        assert_eq!(write(0, 512, true), Err(Status::IoError));
        assert_eq!(write(0, 512, false), Ok(Request::Write { offset: 0 }));
    }

    #[test]
    fn a_write_past_the_end_fails() {
        assert_eq!(write(8, 512, false), Err(Status::IoError));
    }

    #[test]
    fn a_flush_needs_no_data() {
        assert_eq!(parse(&header(VIRTIO_BLK_T_FLUSH, 0), 0, 0, LIMITS), Ok(Request::Flush));
    }

    #[test]
    fn an_id_needs_room() {
        let header = header(VIRTIO_BLK_T_GET_ID, 0);
        assert_eq!(parse(&header, 0, ID_BYTES - 1, LIMITS), Err(Status::IoError));
        assert_eq!(parse(&header, 0, ID_BYTES, LIMITS), Ok(Request::Id));
    }

    #[test]
    fn an_unknown_request_is_unsupported() {
        assert_eq!(parse(&header(4711, 0), 0, 0, LIMITS), Err(Status::Unsupported));
    }
}
