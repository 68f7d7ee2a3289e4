//! The engine's name server, as the guest sees it: the host's side of the container's network has one
//! on its loopback, which the guest does not have, so the host asks it.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use agent_protocol::{DOMAIN_PORT, Event, Failed, RESOLVER};

use crate::failure::Context;
use crate::redirection;

/// Queries that wait for an answer, and TCP connections that wait for a query. The oldest gives way:
/// whoever asks so much has long asked again.
const MAX_WAITING: usize = 256;

/// Most bytes of a query: far more than a name and its type take.
const MAX_QUERY_BYTES: usize = 4096;

/// Ports are tried until one is free for UDP and TCP.
const ATTEMPTS: u32 = 16;

/// Sockets on which the container's processes ask, and who waits for an answer.
#[derive(Debug)]
pub struct Resolver {
    datagrams: UdpSocket,
    listener: TcpListener,
    connections: Vec<Connection>,
    waiting: BTreeMap<u32, Client>,
    next: u32,
}

#[derive(Debug)]
enum Client {
    Datagram(SocketAddr),
    Stream(TcpStream),
}

/// A TCP connection whose query has not arrived whole.
#[derive(Debug)]
struct Connection {
    stream: TcpStream,
    bytes: Vec<u8>,
}

impl Resolver {
    /// Listens for the processes in and below `cgroup`.
    pub fn open(cgroup: BorrowedFd<'_>) -> Result<Self, Failed> {
        let listening = listen(0).and_then(|(datagrams, listener)| {
            let port = datagrams.local_addr()?.port();
            redirection::redirect(cgroup, RESOLVER, port)?;
            Ok((datagrams, listener))
        });
        let listening = listening.or_else(|error| {
            log::warn!("the name server takes port 53 for itself: {error}");
            listen(DOMAIN_PORT)
        });
        let (datagrams, listener) = listening.context("listen as the engine's name server")?;
        let (connections, waiting) = (Vec::new(), BTreeMap::new());
        Ok(Self { datagrams, listener, connections, waiting, next: 0 })
    }

    /// What it has to be woken up for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let connections = self.connections.iter().map(|connection| connection.stream.as_fd());
        [self.datagrams.as_fd(), self.listener.as_fd()].into_iter().chain(connections)
    }

    /// The queries that have arrived; never waits.
    pub fn queries(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut bytes = [0; MAX_QUERY_BYTES];
        for _ in 0..MAX_WAITING {
            let Ok((count, from)) = self.datagrams.recv_from(&mut bytes) else { break };
            events.push(self.query(Client::Datagram(from), bytes[..count].to_vec()));
        }
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                self.connections.push(Connection { stream, bytes: Vec::new() });
            }
            if self.connections.len() > MAX_WAITING {
                self.connections.remove(0);
            }
        }
        for mut connection in std::mem::take(&mut self.connections) {
            match connection.receive() {
                Ok(Some(query)) => {
                    events.push(self.query(Client::Stream(connection.stream), query));
                }
                Ok(None) => self.connections.push(connection),
                Err(_) => {}
            }
        }
        events
    }

    fn query(&mut self, client: Client, query: Vec<u8>) -> Event {
        let number = self.next;
        self.next = self.next.wrapping_add(1);
        let stream = matches!(client, Client::Stream(_));
        self.waiting.insert(number, client);
        if self.waiting.len() > MAX_WAITING {
            self.waiting.pop_first();
        }
        Event::NameQuery { number, stream, query }
    }

    /// Passes an answer on to who waits for it. Nobody waits for the end of a datagram's query; that of
    /// a connection's closes it.
    pub fn answer(&mut self, number: u32, answer: Option<&[u8]>) {
        let (Some(client), Some(answer)) = (self.waiting.remove(&number), answer) else { return };
        // Whoever is gone, or takes no answer, asks again.
        let _ = match client {
            Client::Datagram(to) => self.datagrams.send_to(answer, to).map(drop),
            Client::Stream(mut stream) => {
                let length = u16::try_from(answer.len()).unwrap_or_default().to_be_bytes();
                stream.write_all(&[&length, answer].concat())
            }
        };
    }
}

impl Connection {
    /// The query, once it is there (RFC 1035, section 4.2.2).
    fn receive(&mut self) -> io::Result<Option<Vec<u8>>> {
        let mut chunk = [0; MAX_QUERY_BYTES];
        match self.stream.read(&mut chunk) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.bytes.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        let Some((length, rest)) = self.bytes.split_first_chunk() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes(*length));
        if length > MAX_QUERY_BYTES {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(rest.get(..length).map(<[u8]>::to_vec))
    }
}

/// Sockets of both kinds at the same port of the engine's name server.
fn listen(port: u16) -> io::Result<(UdpSocket, TcpListener)> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let datagrams = UdpSocket::bind((RESOLVER, port))?;
        match TcpListener::bind((RESOLVER, datagrams.local_addr()?.port())) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && attempt < ATTEMPTS => {}
            listener => {
                let listener = listener?;
                datagrams.set_nonblocking(true)?;
                listener.set_nonblocking(true)?;
                return Ok((datagrams, listener));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that listens without a cgroup to redirect: on a port of its own.
    fn resolver() -> Resolver {
        let (datagrams, listener) = listen(0).unwrap();
        Resolver { datagrams, listener, connections: Vec::new(), waiting: BTreeMap::new(), next: 0 }
    }

    fn one(resolver: &mut Resolver) -> (u32, bool, Vec<u8>) {
        loop {
            if let Some(Event::NameQuery { number, stream, query }) = resolver.queries().pop() {
                return (number, stream, query);
            }
        }
    }

    #[test]
    fn a_datagram_is_answered_to_its_sender() {
        let mut resolver = resolver();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(resolver.datagrams.local_addr().unwrap()).unwrap();

        client.send(b"query").unwrap();
        let (number, stream, query) = one(&mut resolver);
        resolver.answer(number, Some(b"answer"));

        assert_eq!((stream, query.as_slice()), (false, b"query".as_slice()));
        let mut bytes = [0; 16];
        let count = client.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"answer");
    }

    #[test]
    fn a_query_over_tcp_may_come_in_pieces() {
        let mut resolver = resolver();
        let mut client = TcpStream::connect(resolver.listener.local_addr().unwrap()).unwrap();

        client.write_all(&[0, 5, b'q', b'u']).unwrap();
        while resolver.connections.is_empty() {
            assert!(resolver.queries().is_empty());
        }
        client.write_all(b"ery").unwrap();
        let (number, stream, query) = one(&mut resolver);
        resolver.answer(number, Some(b"answer"));

        assert_eq!((stream, query.as_slice()), (true, b"query".as_slice()));
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, b"\0\x06answer");
    }

    #[test]
    fn an_unanswered_connection_is_closed() {
        let mut resolver = resolver();
        let mut client = TcpStream::connect(resolver.listener.local_addr().unwrap()).unwrap();

        client.write_all(b"\0\x01x").unwrap();
        let (number, ..) = one(&mut resolver);
        resolver.answer(number, None);

        assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn those_who_never_hear_an_answer_are_forgotten() {
        let mut resolver = resolver();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(resolver.datagrams.local_addr().unwrap()).unwrap();

        for _ in 0..2 * MAX_WAITING {
            client.send(b"query").unwrap();
            one(&mut resolver);
        }

        assert_eq!(resolver.waiting.len(), MAX_WAITING);
    }
}
