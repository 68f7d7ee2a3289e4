//! The unix socket of the socket device: first lines of clients, while the guest does as it likes.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;

use devices::listener::Listener;
use devices::virtio::vsock::Vsock;
use tempfile::TempDir;

use crate::Seed;
use crate::guest::Guest;
use crate::script::{START, Step, chain, input};
use crate::vsock::{CID, DATA, RECEIVE, REQUEST, RESPONSE, TRANSMIT, assert_answers, packet};

/// Most clients of one input.
const CLIENTS: usize = 8;

/// The port of the host on which somebody listens for the guest.
const PORT: u32 = 5;

/// Host port of the first client.
const FIRST_SOURCE_PORT: u32 = 1 << 30;

/// Where the sockets are.
fn folder() -> PathBuf {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| TempDir::new().expect("a place for a socket")).path().to_owned()
}

/// A guest whose socket device has a door. The script's host is its clients, chosen by `what`: one
/// comes when it first has something to say, and goes when it has nothing.
fn guest() -> Guest {
    let path = folder().join("door");
    let listener = Listener::bind(&path).expect("nobody else is there");
    let callee = folder().join(format!("door_{PORT}"));
    // That of the last input.
    let _ = std::fs::remove_file(&callee);
    let callee = UnixListener::bind(callee).expect("nobody else is there");
    let (device, _) = Vsock::with_socket(CID, listener).expect("an epoll");
    let mut clients: [Option<UnixStream>; CLIENTS] = Default::default();
    let host = move |what: u8, bytes: &[u8]| {
        let _still_listens = &callee;
        let client = &mut clients[usize::from(what) % CLIENTS];
        if bytes.is_empty() {
            *client = None;
            return;
        }
        if client.is_none() {
            // There is no room for one whom the device does not let in.
            *client = UnixStream::connect(&path).ok();
        }
        if let Some(client) = client {
            client.set_nonblocking(true).expect("a socket has this mode");
            // Who was refused cannot say any more.
            let _ = client.write(bytes);
            let _ = client.read(&mut [0; 64]);
        }
    };
    Guest::new(device, Box::new(host))
}

/// Plays `data`, and then the guest connects to nobody.
pub fn run(data: &[u8]) {
    let mut guest = guest();
    guest.play(data);
    assert_answers(&mut guest);
}

/// Lines that are right, in pieces, and wrong.
pub fn seeds() -> Vec<Seed> {
    let says = |what, bytes| Step::Host { what, bytes };
    let room = chain(RECEIVE, b"", 4096);
    let accept = packet(RESPONSE, 52, FIRST_SOURCE_PORT, 0);
    let answer = [packet(DATA, 52, FIRST_SOURCE_PORT, 2), b"hi".to_vec()].concat();
    let call = packet(REQUEST, 9, PORT, 0);
    let good = [
        START,
        room,
        room,
        room,
        says(0, b"CONNECT 52\nand more"),
        chain(TRANSMIT, &accept, 0),
        chain(TRANSMIT, &answer, 0),
        says(0, b"even more"),
        says(1, b"conn"),
        says(1, b"ect 4294967295\r\n"),
        says(0, b""),
        chain(TRANSMIT, &call, 0),
    ];
    let bad = [
        says(0, b"CONNECT\n"),
        says(1, b"CONNECT -1\n"),
        says(2, b"CONNECT 4294967296\n"),
        says(3, b"CONNECT 1 2\n"),
        says(4, b"\xff\xfe\n"),
        says(5, b"CONNECT 00000000000000000000000000000001\n"),
        says(6, b"CONNECT 1"),
        says(6, b""),
        says(7, b"\n"),
        START,
        room,
    ];
    vec![("good", input(&good)), ("bad", input(&bad))]
}
