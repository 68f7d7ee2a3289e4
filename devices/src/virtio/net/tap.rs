//! A tap: the host's end of a guest's network cable.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::HEADER_BYTES;

/// What a tap must be for a virtio network device: Ethernet frames, each behind a virtio header.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// What to do about a tap that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// Somebody was to make it: say that it is not there.
    Refuse,
    /// Make it; it vanishes with its last descriptor.
    Create,
}

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Longer than 15 bytes, or with a zero byte.
    #[error("{0:?} is no name of a network interface (it has 1 to 15 bytes)")]
    Name(String),
    /// There is no interface of this name in the network namespace.
    #[error("there is no network interface {0:?}")]
    Missing(String),
    /// The host has no taps, or not for us.
    #[error("open /dev/net/tun (is the module tun loaded?)")]
    Open(#[source] io::Error),
    /// The interface exists and is no tap, or somebody else has it open.
    #[error(
        "attach to the tap {name} (it must be a tap in use by nobody else, made with multi_queue \
         for several queue pairs and without for one)"
    )]
    Attach {
        /// Which interface.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The descriptor handed over is something else.
    #[error("use the descriptor handed over as a tap")]
    NoTap(#[source] io::Error),
    /// The descriptor handed over lacks IFF_TAP, IFF_NO_PI or IFF_VNET_HDR.
    #[error(
        "the tap handed over has flags {0:#x}, without some of IFF_TAP, IFF_NO_PI, IFF_VNET_HDR"
    )]
    Flags(libc::c_int),
    /// The kernel does not know such frame headers.
    #[error("set up the frame headers of the tap")]
    Header(#[source] io::Error),
}

/// Where frames go and come from, each behind a [`HEADER_BYTES`] header; one frame per `readv` or
/// `writev`, neither of which blocks.
pub trait Link: AsFd + Send {
    /// Says which frames `readv` may return beside finished ones, as TUN_F_* bits.
    fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()>;

    /// Largest payload of a frame, in bytes, if it is known.
    fn mtu(&self) -> Option<u16>;

    /// Lets frames through, or not: one of several links of a device that its driver does not use
    /// must get none of the frames the host spreads over them.
    fn set_attached(&self, attached: bool) -> io::Result<()>;
}

/// An open tap, or one queue of it.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    mtu: Option<u16>,
}

impl Tap {
    /// Attaches to the tap `name` of the current network namespace.
    pub fn open(name: &str, missing: Missing) -> Result<Self, TapError> {
        let mut request = checked(name, missing)?;
        let is_new = !exists(&request);
        Tap::attach(name, &mut request, FLAGS).map(|tap| tap.made(is_new))
    }

    /// Refuses a `name` that [`Tap::open`] would not attach to, as far as a look can tell.
    pub fn check(name: &str, missing: Missing) -> Result<(), TapError> {
        checked(name, missing).map(drop)
    }

    /// Attaches `count` queues to the tap `name` of the current network namespace, each with frames
    /// of its own (IFF_MULTI_QUEUE).
    pub fn open_queues(name: &str, count: usize, missing: Missing) -> Result<Vec<Self>, TapError> {
        let mut request = checked(name, missing)?;
        let is_new = !exists(&request);
        let flags = FLAGS | libc::IFF_MULTI_QUEUE;
        let attach = |_| Tap::attach(name, &mut request, flags).map(|tap| tap.made(is_new));
        (0..count).map(attach).collect()
    }

    /// What the kernel sets a tap to that `is_new` says nothing about the network behind it, and a guest
    /// that is told of it takes no other.
    fn made(mut self, is_new: bool) -> Self {
        self.mtu = self.mtu.filter(|_| !is_new);
        self
    }

    fn attach(name: &str, request: &mut libc::ifreq, flags: libc::c_int) -> Result<Self, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Open)?;
        request.ifr_ifru.ifru_flags = short(flags);
        ioctl(file.as_fd(), libc::TUNSETIFF, request)
            .map_err(|source| TapError::Attach { name: name.to_owned(), source })?;
        Tap::set_up(file.into(), &mut request.clone())
    }

    /// Uses a tap that somebody else opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, TapError> {
        // SAFETY: an interface request is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        ioctl(fd.as_fd(), libc::TUNGETIFF, &mut request).map_err(TapError::NoTap)?;
        // SAFETY: TUNGETIFF has filled in the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & FLAGS != FLAGS {
            return Err(TapError::Flags(flags));
        }
        // SAFETY: no memory is involved, and the descriptor is open.
        let outcome = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        if outcome < 0 {
            return Err(TapError::NoTap(io::Error::last_os_error()));
        }
        Tap::set_up(fd, &mut request)
    }

    /// The tap that [`Tap::into_parts`] took apart, which may have been in another process.
    pub fn from_parts(fd: OwnedFd, mtu: Option<u16>) -> Self {
        Tap { fd, mtu }
    }

    /// The open tap, and what [`Link::mtu`] says of it.
    pub fn into_parts(self) -> (OwnedFd, Option<u16>) {
        (self.fd, self.mtu)
    }

    fn set_up(fd: OwnedFd, request: &mut libc::ifreq) -> Result<Self, TapError> {
        let mut header = libc::c_int::try_from(HEADER_BYTES).expect("a header is short");
        ioctl(fd.as_fd(), libc::TUNSETVNETHDRSZ, &mut header).map_err(TapError::Header)?;
        Ok(Tap { fd, mtu: mtu(request) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Link for Tap {
    fn set_offloads(&self, offloads: libc::c_uint) -> io::Result<()> {
        // SAFETY: this request takes its argument by value, and the descriptor is open.
        let outcome = unsafe {
            libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads))
        };
        if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        // SAFETY: an interface request is plain data, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        let what = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = short(what);
        ioctl(self.fd.as_fd(), libc::TUNSETQUEUE, &mut request)
    }
}

/// Flags as an interface request holds them.
fn short(flags: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(flags).expect("the flags fit the field they are for")
}

/// A request about the interface `name`, which exists unless it may be made.
fn checked(name: &str, missing: Missing) -> Result<libc::ifreq, TapError> {
    let request = request(name).ok_or_else(|| TapError::Name(name.to_owned()))?;
    if missing == Missing::Refuse && !exists(&request) {
        return Err(TapError::Missing(name.to_owned()));
    }
    Ok(request)
}

fn exists(request: &libc::ifreq) -> bool {
    // SAFETY: the name is terminated: it was shorter than the field, which was zero before.
    unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) != 0 }
}

/// A request about the interface `name`.
fn request(name: &str) -> Option<libc::ifreq> {
    let name = CString::new(name).ok().filter(|name| !name.is_empty())?;
    // SAFETY: an interface request is plain data, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    let bytes = name.as_bytes_with_nul();
    let field = request.ifr_name.get_mut(..bytes.len())?;
    for (to, from) in field.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    Some(request)
}

/// What the interface `request` names is set to. It may live in another network namespace, if its
/// descriptor was handed over, and is not found then.
fn mtu(request: &mut libc::ifreq) -> Option<u16> {
    // SAFETY: no memory is involved.
    let socket = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if socket < 0 {
        return None;
    }
    // SAFETY: the kernel has just given us this descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    ioctl(socket.as_fd(), libc::SIOCGIFMTU, request).ok()?;
    // SAFETY: SIOCGIFMTU has filled in the MTU.
    u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).ok()
}

fn ioctl<T>(fd: BorrowedFd<'_>, number: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: the descriptor is open, and every caller's argument is of the type the request reads
    // and writes: an interface request, or an int.
    let outcome = unsafe { libc::ioctl(fd.as_raw_fd(), number, argument) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "sixteen-bytes-16", "zero\0byte"] {
            let error = Tap::open(name, Missing::Create).unwrap_err();
            assert!(matches!(error, TapError::Name(_)), "{name:?}");
        }
    }

    #[test]
    fn a_tap_that_must_exist_is_not_made() {
        let error = Tap::check("coracle-none", Missing::Refuse).unwrap_err();
        assert!(matches!(error, TapError::Missing(_)));
        let error = Tap::open("coracle-none", Missing::Refuse).unwrap_err();
        assert_eq!(error.to_string(), "there is no network interface \"coracle-none\"");
    }

    #[test]
    fn a_file_is_no_tap() {
        let file = File::open("/dev/null").unwrap();
        assert!(matches!(Tap::from_fd(file.into()), Err(TapError::NoTap(_))));
    }

    #[test]
    #[ignore = "needs root and /dev/net/tun"]
    fn a_tap_takes_every_offload_that_is_offered() {
        let tap = Tap::open("coracle%d", Missing::Create).unwrap();
        assert_eq!(tap.mtu(), None);
        tap.set_offloads(0x1f).unwrap();
        tap.set_offloads(0).unwrap();
    }

    #[test]
    #[ignore = "needs root and /dev/net/tun"]
    fn a_tap_in_use_is_refused() {
        let _tap = Tap::open("coracle-used", Missing::Create).unwrap();
        let error = Tap::open("coracle-used", Missing::Refuse).unwrap_err();
        assert!(matches!(error, TapError::Attach { .. }));
    }

    #[test]
    #[ignore = "needs root and /dev/net/tun"]
    fn a_tap_may_be_handed_over() {
        let tap = Tap::open("coracle-hand", Missing::Create).unwrap();
        assert_eq!(Tap::from_fd(tap.fd).unwrap().mtu(), Some(1500));
    }

    #[test]
    #[ignore = "needs root and /dev/net/tun"]
    fn the_queues_of_a_tap_come_and_go() {
        let queues = Tap::open_queues("coracle-many", 3, Missing::Create).unwrap();

        queues[1].set_attached(false).unwrap();
        assert!(queues[1].set_attached(false).is_err());
        queues[1].set_attached(true).unwrap();
        assert!(queues[1].set_attached(true).is_err());
    }

    #[test]
    #[ignore = "needs root and /dev/net/tun"]
    fn the_only_queue_of_a_tap_stays() {
        let tap = Tap::open("coracle-one", Missing::Create).unwrap();
        assert!(tap.set_attached(false).is_err());
    }
}
