//! The engine's name server, asked for the guest: it listens on the loopback of the container's network
//! namespace, where this process is and the guest is not.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_protocol::{DOMAIN_PORT, RESOLVER};

use crate::bundle::Bundle;

/// Where programs look which name server to ask.
const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Most queries asked at a time; more are not answered, as if they had been lost on the way.
const MAX_QUERIES: usize = 256;

/// How long an answer may take, which may come from far away.
const PATIENCE: Duration = Duration::from_secs(20);

/// Largest DNS message (RFC 1035, section 4.2.2).
const MAX_MESSAGE_BYTES: usize = 65_535;

/// The file on the host that the container of `bundle` has as its `resolv.conf`, if it is one of the
/// engine's.
pub(super) fn resolv_conf(bundle: &Bundle) -> Option<PathBuf> {
    let mut mounts = bundle.spec.mounts().iter().flatten();
    let mount = mounts.find(|mount| mount.destination() == Path::new(RESOLV_CONF))?;
    mount.source().clone()
}

/// Whether the engine's name server is asked by who goes by this file.
pub(super) fn is_named_in(resolv_conf: &Path) -> bool {
    names_resolver(&fs::read_to_string(resolv_conf).unwrap_or_default())
}

/// Whether `resolv.conf` names the engine's name server.
fn names_resolver(text: &str) -> bool {
    let resolver = RESOLVER.to_string();
    text.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver") && words.next() == Some(&resolver)
    })
}

/// Queries that wait for their answers.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    queries: Vec<Query>,
}

#[derive(Debug)]
struct Query {
    number: u32,
    socket: Transport,
    deadline: Instant,
}

#[derive(Debug)]
enum Transport {
    Datagram(UdpSocket),
    Stream(TcpStream, Vec<u8>),
}

impl Resolver {
    /// Asks the name server of this thread's network namespace.
    pub(super) fn ask(&mut self, number: u32, stream: bool, query: &[u8]) -> io::Result<()> {
        if self.queries.len() >= MAX_QUERIES {
            return Err(ErrorKind::QuotaExceeded.into());
        }
        let socket = Transport::open(stream, query)?;
        self.queries.push(Query { number, socket, deadline: Instant::now() + PATIENCE });
        Ok(())
    }

    /// Where answers arrive.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queries.iter().map(|query| match &query.socket {
            Transport::Datagram(socket) => socket.as_fd(),
            Transport::Stream(stream, _) => stream.as_fd(),
        })
    }

    /// When the first query is given up.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.queries.iter().map(|query| query.deadline).min()
    }

    /// The answers that are there, and nothing for queries that nobody answers.
    pub(super) fn answers(&mut self) -> Vec<(u32, Option<Vec<u8>>)> {
        if self.queries.is_empty() {
            return Vec::new();
        }
        let now = Instant::now();
        let mut bytes = vec![0; MAX_MESSAGE_BYTES];
        let mut answers = Vec::new();
        self.queries.retain_mut(|query| {
            let answer = match query.socket.receive(&mut bytes) {
                Ok(None) if now < query.deadline => return true,
                Ok(answer) => answer,
                Err(_) => None,
            };
            answers.push((query.number, answer));
            false
        });
        answers
    }
}

impl Transport {
    /// Neither kind blocks: the name server is on the loopback of the namespace, if anywhere, and a query
    /// fits the buffers of its socket.
    fn open(stream: bool, query: &[u8]) -> io::Result<Self> {
        if stream {
            let mut stream = TcpStream::connect_timeout(
                &(RESOLVER, DOMAIN_PORT).into(),
                Duration::from_secs(1),
            )?;
            stream.set_nonblocking(true)?;
            let length = u16::try_from(query.len()).map_err(|_| ErrorKind::InvalidData)?;
            stream.write_all(&[&length.to_be_bytes(), query].concat())?;
            return Ok(Self::Stream(stream, Vec::new()));
        }
        let socket = UdpSocket::bind(("127.0.0.1", 0))?;
        socket.set_nonblocking(true)?;
        socket.connect((RESOLVER, DOMAIN_PORT))?;
        socket.send(query)?;
        Ok(Self::Datagram(socket))
    }

    /// The answer, once it is there; `bytes` has room for the largest.
    fn receive(&mut self, bytes: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
        let waiting = |error: io::Error| match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(None),
            _ => Err(error),
        };
        match self {
            Self::Datagram(socket) => match socket.recv(bytes) {
                Ok(count) => Ok(Some(bytes[..count].to_vec())),
                Err(error) => waiting(error),
            },
            Self::Stream(stream, received) => {
                match stream.read(bytes) {
                    Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                    Ok(count) => received.extend_from_slice(&bytes[..count]),
                    Err(error) => return waiting(error),
                }
                Ok(message(received))
            }
        }
    }
}

/// The first message in what arrived over TCP, if it is whole.
fn message(received: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = received.split_first_chunk()?;
    rest.get(..u16::from_be_bytes(*length).into()).map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn the_engine_s_name_server_is_found_among_others() {
        assert!(names_resolver("search lan\nnameserver 127.0.0.11\noptions ndots:0\n"));
        assert!(!names_resolver("#nameserver 127.0.0.11\nnameserver 127.0.0.1\n"));
    }

    #[test]
    fn a_message_is_as_long_as_it_says() {
        assert_eq!(message(b"\0\x03abcd"), Some(b"abc".to_vec()));
        assert_eq!(message(b"\0\x03ab"), None);
        assert_eq!(message(b"\0"), None);
    }

    /// A resolver on a thread whose network namespace has nothing but loopback.
    fn in_new_namespace(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
            assert!(up.unwrap().success());
            test();
        });
        thread.join().unwrap();
    }

    fn answer(resolver: &mut Resolver) -> (u32, Option<Vec<u8>>) {
        loop {
            if let Some(answer) = resolver.answers().pop() {
                return answer;
            }
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn a_query_is_answered_over_udp_and_over_tcp() {
        in_new_namespace(|| {
            let datagrams = UdpSocket::bind((RESOLVER, DOMAIN_PORT)).unwrap();
            let listener = TcpListener::bind((RESOLVER, DOMAIN_PORT)).unwrap();
            let mut resolver = Resolver::default();

            resolver.ask(7, false, b"one").unwrap();
            let mut bytes = [0; 16];
            let (count, from) = datagrams.recv_from(&mut bytes).unwrap();
            datagrams.send_to(&bytes[..count], from).unwrap();
            assert_eq!(answer(&mut resolver), (7, Some(b"one".to_vec())));

            resolver.ask(8, true, b"two").unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            let mut query = [0; 5];
            stream.read_exact(&mut query).unwrap();
            stream.write_all(&query).unwrap();
            assert_eq!(answer(&mut resolver), (8, Some(b"two".to_vec())));
        });
    }

    #[test]
    #[ignore = "needs root"]
    fn where_no_name_server_is_nothing_is_answered() {
        in_new_namespace(|| {
            let mut resolver = Resolver::default();

            resolver.ask(1, false, b"one").unwrap();

            assert_eq!(answer(&mut resolver), (1, None));
            assert!(resolver.ask(2, true, b"two").is_err());
        });
    }
}
