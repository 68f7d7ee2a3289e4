//! What a driver asks of a block device, parsed and checked before anything is done; pure.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// Bytes of a sector, whatever the block size of the disk is (virtio 1.2, section 5.2.6).
pub const SECTOR_BYTES: u64 = 512;

/// Bytes of the header that every request starts with.
pub const HEADER_BYTES: usize = 16;

/// Bytes of the answer to [`Request::Id`].
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Bytes of a range to discard or to fill with zeros (virtio 1.2, section 5.2.6).
pub const SEGMENT_BYTES: usize = 16;

/// Most ranges of one request to discard.
pub const MAX_SEGMENTS: usize = 16;

/// Largest range to discard, in sectors (64 MiB), while the other requests wait: a whole request drops at
/// most 1 GiB of the host's page cache, which takes some 50 ms.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 17;

/// Most ranges of one request to fill with zeros. Linux has no use for more.
pub const MAX_ZEROES_SEGMENTS: usize = 1;

/// Largest range to fill with zeros, in sectors (8 MiB): a disk that has no command for it is written to,
/// while the other requests wait. At 200 MB/s that takes some 40 ms.
pub const MAX_ZEROES_SECTORS: u32 = 1 << 14;

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
    /// Forget what is in the ranges the driver sends.
    Discard {
        /// How many ranges.
        segments: usize,
    },
    /// Fill the ranges the driver sends with zeros.
    WriteZeroes {
        /// How many ranges.
        segments: usize,
    },
}

/// A range that fits the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins, in bytes from the start of the disk.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// Whether its storage may be given back.
    pub unmap: bool,
}

/// The ranges of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segments {
    segments: [Segment; MAX_SEGMENTS],
    count: usize,
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
        VIRTIO_BLK_T_DISCARD => {
            Ok(Request::Discard { segments: limits.segments(readable, MAX_SEGMENTS)? })
        }
        VIRTIO_BLK_T_WRITE_ZEROES => {
            Ok(Request::WriteZeroes { segments: limits.segments(readable, MAX_ZEROES_SEGMENTS)? })
        }
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

    /// How many ranges `bytes` of data have, if they are 1 to `most`.
    fn segments(self, bytes: usize, most: usize) -> Result<usize, Status> {
        let segments = bytes / SEGMENT_BYTES;
        let whole = bytes % SEGMENT_BYTES == 0;
        if self.read_only || !whole || !(1..=most).contains(&segments) {
            return Err(Status::IoError);
        }
        Ok(segments)
    }

    /// The range that `segment` says, if it has only flags out of `flags`, is no larger than
    /// `max_sectors` and on the disk.
    fn segment(
        self,
        segment: &[u8; SEGMENT_BYTES],
        flags: u32,
        max_sectors: u32,
    ) -> Result<Segment, Status> {
        let (sector, rest) = segment.split_first_chunk().expect("it is longer than its fields");
        let (sectors, flag_bytes) = rest.split_first_chunk().expect("it is longer than its fields");
        let sectors = u32::from_le_bytes(*sectors);
        let set = u32::from_le_bytes(*flag_bytes.first_chunk().expect("its last field is there"));
        if set & !flags != 0 {
            return Err(Status::Unsupported);
        }
        if sectors > max_sectors {
            return Err(Status::IoError);
        }
        let bytes = u64::from(sectors) * SECTOR_BYTES;
        let length = usize::try_from(bytes).map_err(|_| Status::IoError)?;
        let offset = self.offset(u64::from_le_bytes(*sector), length)?;
        Ok(Segment { offset, bytes, unmap: set & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 })
    }
}

impl Segments {
    /// The ranges in `data` to discard; there are at most [`MAX_SEGMENTS`]. All have to be right.
    pub fn to_discard(data: &[u8], limits: Limits) -> Result<Self, Status> {
        // The one flag is for zeros alone (virtio 1.2, section 5.2.6.2).
        Self::parse(data, |segment| limits.segment(segment, 0, MAX_DISCARD_SECTORS))
    }

    /// The ranges in `data` to fill with zeros; there are at most [`MAX_ZEROES_SEGMENTS`]. All have to
    /// be right.
    pub fn to_zero(data: &[u8], limits: Limits) -> Result<Self, Status> {
        let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        Self::parse(data, |segment| limits.segment(segment, flags, MAX_ZEROES_SECTORS))
    }

    fn parse(
        data: &[u8],
        parse: impl Fn(&[u8; SEGMENT_BYTES]) -> Result<Segment, Status>,
    ) -> Result<Self, Status> {
        let mut segments = [Segment::default(); MAX_SEGMENTS];
        let mut count = 0;
        for (segment, bytes) in segments.iter_mut().zip(data.chunks_exact(SEGMENT_BYTES)) {
            *segment = parse(bytes.try_into().expect("a chunk has this size"))?;
            count += 1;
        }
        Ok(Segments { segments, count })
    }

    /// Each range, in the driver's order.
    pub fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.segments[..self.count].iter()
    }

    /// Length of all ranges, in bytes.
    pub fn bytes(&self) -> u64 {
        self.iter().map(|segment| segment.bytes).sum()
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

    fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    fn only(segments: Result<Segments, Status>) -> Result<Segment, Status> {
        segments.map(|segments| *segments.iter().next().unwrap())
    }

    #[test]
    fn a_discard_has_one_to_sixteen_whole_ranges() {
        let parsed = |bytes| parse(&header(VIRTIO_BLK_T_DISCARD, 0), bytes, 0, LIMITS);

        assert_eq!(parsed(16), Ok(Request::Discard { segments: 1 }));
        assert_eq!(parsed(256), Ok(Request::Discard { segments: 16 }));
        for bytes in [0, 15, 17, 272] {
            assert_eq!(parsed(bytes), Err(Status::IoError));
        }
    }

    #[test]
    fn zeros_have_one_whole_range() {
        let parsed = |bytes| parse(&header(VIRTIO_BLK_T_WRITE_ZEROES, 0), bytes, 0, LIMITS);

        assert_eq!(parsed(16), Ok(Request::WriteZeroes { segments: 1 }));
        for bytes in [0, 15, 32] {
            assert_eq!(parsed(bytes), Err(Status::IoError));
        }
    }

    #[test]
    fn a_read_only_disk_is_neither_discarded_nor_zeroed() {
        let limits = Limits { read_only: true, ..LIMITS };
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(parse(&header(kind, 0), 16, 0, limits), Err(Status::IoError));
        }
    }

    #[test]
    fn a_range_is_on_the_disk() {
        let discard =
            |sector, sectors| only(Segments::to_discard(&segment(sector, sectors, 0), LIMITS));

        let last = Segment { offset: 7 * 512, bytes: 512, unmap: false };
        assert_eq!(discard(7, 1), Ok(last));
        assert_eq!(discard(7, 2), Err(Status::IoError));
        assert_eq!(discard(u64::MAX, 1), Err(Status::IoError));
    }

    #[test]
    fn one_bad_range_spoils_the_request() {
        let data = [segment(0, 1, 0), segment(8, 1, 0)].concat();
        assert_eq!(Segments::to_discard(&data, LIMITS), Err(Status::IoError));
    }

    #[test]
    fn a_range_larger_than_the_limit_fails() {
        let limits = Limits { sectors: 1 << 30, ..LIMITS };
        let zero = |sectors| only(Segments::to_zero(&segment(0, sectors, 0), limits));

        assert!(zero(MAX_ZEROES_SECTORS).is_ok());
        assert_eq!(zero(MAX_ZEROES_SECTORS + 1), Err(Status::IoError));
    }

    #[test]
    fn only_zeros_may_say_unmap_and_nothing_else() {
        let with = |flags| segment(0, 1, flags);

        assert!(only(Segments::to_zero(&with(1), LIMITS)).unwrap().unmap);
        assert_eq!(Segments::to_zero(&with(2), LIMITS), Err(Status::Unsupported));
        assert_eq!(Segments::to_discard(&with(1), LIMITS), Err(Status::Unsupported));
    }
}
