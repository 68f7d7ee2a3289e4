//! The clients of the control socket: who they are, what they sent, and that none holds up another.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use devices::listener::{Listener, SocketFile};

use crate::http::{MAX_BODY_BYTES, MAX_HEAD_BYTES, Request, Response};

/// Most clients at one time; the one that came first makes room for one more.
const MAX_CLIENTS: usize = 16;

/// The control socket.
pub struct Server {
    listener: Listener,
    clients: Vec<Client>,
    /// The last attempt to let a client in failed.
    is_deaf: bool,
}

struct Client {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Server {
    /// Listens at `path`, which must not exist yet.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Server { listener: Listener::bind(path)?, clients: Vec::new(), is_deaf: false })
    }

    /// Closes it in this process, and leaves its file to another one that has it, too.
    pub fn leave(self) {
        let (_closed, file) = self.listener.without_file(PathBuf::new());
        let _ = file.map(SocketFile::into_path);
    }

    /// What to wait for before the next [`Server::serve`].
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let clients = self.clients.iter().map(|client| client.stream.as_fd());
        (!self.is_deaf).then(|| self.listener.as_fd()).into_iter().chain(clients)
    }

    /// Whether clients may wait without being among [`Server::descriptors`]: this process is out of
    /// descriptors, and waiting for them would only turn in circles.
    pub fn is_deaf(&self) -> bool {
        self.is_deaf
    }

    /// Lets clients in and answers every request that is there in full. Never waits.
    pub fn serve(&mut self, mut answer: impl FnMut(&Request) -> Response) {
        // No more than there may be, so that a client which comes again and again stops nothing.
        for _ in 0..MAX_CLIENTS {
            let accepted = self.listener.accept();
            self.is_deaf = accepted.is_err();
            let Ok(Some(stream)) = accepted else { break };
            if self.clients.len() == MAX_CLIENTS {
                self.clients.remove(0);
            }
            self.clients.push(Client { stream, received: Vec::new() });
        }
        self.clients.retain_mut(|client| client.serve(&mut answer));
    }
}

impl Client {
    /// Returns whether the client stays.
    fn serve(&mut self, answer: &mut impl FnMut(&Request) -> Response) -> bool {
        let is_open = self.read();
        loop {
            match Request::take(&mut self.received) {
                Ok(Some(request)) => {
                    let response = answer(&request);
                    if !self.write(&response, request.is_last) || request.is_last {
                        return false;
                    }
                }
                Ok(None) => return is_open,
                Err(response) => {
                    self.write(&response, true);
                    return false;
                }
            }
        }
    }

    /// Takes what is there, up to the largest request; what is left comes with the next turn.
    fn read(&mut self) -> bool {
        let mut chunk = [0; 4096];
        while self.received.len() < MAX_HEAD_BYTES + MAX_BODY_BYTES {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(bytes) => self.received.extend(&chunk[..bytes]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// Answers at once or not at all: an answer fits the socket's buffer many times, so that only
    /// who never reads answers loses one, and the connection with it.
    fn write(&mut self, response: &Response, is_last: bool) -> bool {
        let text = response.encode(is_last);
        matches!(self.stream.write(text.as_bytes()), Ok(bytes) if bytes == text.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> (tempfile::TempDir, Server) {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::open(&folder.path().join("api")).unwrap();
        (folder, server)
    }

    fn dial(folder: &tempfile::TempDir) -> UnixStream {
        let client = UnixStream::connect(folder.path().join("api")).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    fn received(client: &mut UnixStream) -> String {
        let mut text = Vec::new();
        // It ends with EAGAIN while the connection lives.
        let _ = client.read_to_end(&mut text);
        String::from_utf8(text).unwrap()
    }

    fn echo(request: &Request) -> Response {
        Response::text("text/plain", request.path.clone())
    }

    #[test]
    fn two_requests_on_one_connection_get_two_answers() {
        let (folder, mut server) = server();
        let mut client = dial(&folder);

        client.write_all(b"GET /one HTTP/1.1\r\n\r\nGET /two HTTP/1.1\r\n\r\n").unwrap();
        server.serve(echo);

        let text = received(&mut client);
        assert_eq!(text.matches("200 OK").count(), 2, "{text}");
        assert!(text.contains("/one") && text.ends_with("/two"), "{text}");
    }

    #[test]
    fn a_client_that_is_slow_to_ask_holds_nobody_up() {
        let (folder, mut server) = server();
        let mut slow = dial(&folder);
        slow.write_all(b"GET /slow").unwrap();
        server.serve(echo);
        let mut quick = dial(&folder);
        quick.write_all(b"GET /quick HTTP/1.1\r\n\r\n").unwrap();

        server.serve(echo);
        assert!(received(&mut quick).ends_with("/quick"));
        slow.write_all(b" HTTP/1.1\r\n\r\n").unwrap();
        server.serve(echo);

        assert!(received(&mut slow).ends_with("/slow"));
    }

    #[test]
    fn the_seventeenth_client_takes_the_place_of_the_first() {
        let (folder, mut server) = server();
        let mut clients: Vec<UnixStream> = (0..=MAX_CLIENTS).map(|_| dial(&folder)).collect();

        server.serve(echo);
        server.serve(echo);

        assert_eq!(server.descriptors().count(), MAX_CLIENTS + 1);
        assert_eq!(clients[0].read(&mut [0]).unwrap(), 0);
    }
}
