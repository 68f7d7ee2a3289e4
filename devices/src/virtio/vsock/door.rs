//! The unix socket through which other processes of the host reach the guest, and the guest them,
//! in the way users of Firecracker know.
//!
//! A client says `CONNECT <port>\n` and reads `OK <host port>\n` once the guest has accepted; from
//! then on the socket is the stream. A connection of the guest to port P of the host goes to the
//! socket `<path>_<P>`, where somebody may listen.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::host::{End, HostStream};
use crate::listener::Listener;

/// Longest first line of a client, in bytes: `CONNECT`, a port, and some room for white space.
const MAX_LINE_BYTES: usize = 32;

/// Most clients that have not said yet which port they want.
const MAX_CALLERS: usize = 1024;

/// Clients let in before the device's other work has its turn.
const CLIENTS_AT_ONCE: usize = 64;

/// Names a client that has not said yet which port it wants; below [`NUMBERS`].
pub(super) type CallerNumber = u32;

/// Numbers of clients, before they start over.
const NUMBERS: CallerNumber = 1 << 31;

/// The listening socket and the clients whose first line is not complete.
pub(super) struct Door {
    listener: Listener,
    /// In the order they came: the numbers only grow.
    callers: BTreeMap<CallerNumber, Caller>,
    next_number: CallerNumber,
}

struct Caller {
    end: End,
    line: Vec<u8>,
}

/// A client that said what it wants.
#[derive(Debug)]
pub(super) struct Call {
    /// Port of the guest.
    pub port: u32,
    /// What the client sent right behind its line.
    pub rest: Vec<u8>,
    /// The client's socket, both ways.
    pub stream: HostStream,
}

/// What came of an attempt to read a client's line.
enum Line {
    Incomplete,
    Wrong,
    Complete(Call),
}

impl Door {
    /// Opens the door; clients are reported to `epoll` with `token`.
    pub fn open(listener: Listener, epoll: &Epoll, token: u64) -> io::Result<Self> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Door { listener, callers: BTreeMap::new(), next_number: 0 })
    }

    /// Lets clients in, to be reported to `epoll` with what `token` makes of their number. Returns
    /// whether there may be more.
    pub fn let_in(
        &mut self,
        epoll: &Arc<Epoll>,
        token: impl Fn(CallerNumber) -> u64,
    ) -> io::Result<bool> {
        for _ in 0..CLIENTS_AT_ONCE {
            let Some(client) = self.listener.accept()? else { return Ok(false) };
            if self.callers.len() >= MAX_CALLERS {
                // Whoever is silent for longest goes, so that silence cannot close the door.
                self.callers.pop_first();
            }
            let number = self.next_number;
            self.next_number = (number + 1) % NUMBERS;
            let end = End::new(client.into(), epoll, EventSet::IN, token(number))?;
            self.callers.insert(number, Caller { end, line: Vec::new() });
        }
        Ok(true)
    }

    /// Listens to client `number`; returns what it wants once its line is complete. A client that
    /// says something else, or hangs up, is gone afterwards.
    pub fn hear(&mut self, number: CallerNumber) -> Option<Call> {
        let caller = self.callers.get_mut(&number)?;
        let line = caller.read_line();
        if matches!(line, Line::Incomplete) {
            return None;
        }
        self.callers.remove(&number);
        match line {
            Line::Complete(call) => Some(call),
            Line::Incomplete | Line::Wrong => None,
        }
    }

    /// Connects to whoever listens for the guest's connections to `port` of the host. Never waits:
    /// who does not keep up with accepting counts as absent.
    pub fn dial(&self, port: u32) -> io::Result<HostStream> {
        let mut path = self.listener.path().as_os_str().to_owned();
        path.push(format!("_{port}"));
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let client = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        connect(client.as_raw_fd(), &UnixAddr::new(&PathBuf::from(path))?)?;
        both_ways(client)
    }
}

impl Caller {
    fn read_line(&mut self) -> Line {
        let mut bytes = [0; MAX_LINE_BYTES];
        loop {
            let room = &mut bytes[self.line.len()..];
            let read = match self.end.read(&mut VolatileSlice::from(room)) {
                Ok(None) => return Line::Incomplete,
                Ok(Some(0)) | Err(_) => return Line::Wrong,
                Ok(Some(read)) => read,
            };
            let start = self.line.len();
            self.line.extend(&bytes[start..start + read]);
            if let Some(end) = self.line.iter().position(|&byte| byte == b'\n') {
                return self.call(end).map_or(Line::Wrong, Line::Complete);
            }
            if self.line.len() == MAX_LINE_BYTES {
                return Line::Wrong;
            }
        }
    }

    /// The call whose line ends at `end`.
    fn call(&mut self, end: usize) -> Option<Call> {
        let rest = self.line.split_off(end + 1);
        let port = port_of(&self.line)?;
        let stream = self.end.duplicate().and_then(both_ways).ok()?;
        Some(Call { port, rest, stream })
    }
}

/// The port in `CONNECT <port>`.
fn port_of(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let is_known = words.next()?.eq_ignore_ascii_case("connect");
    let port = words.next()?.parse().ok()?;
    (is_known && words.next().is_none()).then_some(port)
}

/// A socket as a stream: each direction needs a descriptor of its own in an epoll.
fn both_ways(socket: OwnedFd) -> io::Result<HostStream> {
    Ok(HostStream { input: Some(socket.try_clone()?), output: Some(socket), on_close: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_a_port() {
        assert_eq!(port_of(b"CONNECT 52\n"), Some(52));
        assert_eq!(port_of(b"connect 4294967295\r\n"), Some(u32::MAX));
    }

    #[test]
    fn anything_else_names_none() {
        for line in ["", "\n", "CONNECT\n", "CONNECT x\n", "CONNECT 1 2\n", "GET 52\n"] {
            assert_eq!(port_of(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(port_of(b"CONNECT 4294967296\n"), None);
        assert_eq!(port_of(b"\xff 52\n"), None);
    }
}
