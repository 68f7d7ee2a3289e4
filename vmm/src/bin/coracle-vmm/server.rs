//! The clients of the control socket: who they are, what they sent, and that none holds up another.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use devices::listener::{Listener, SocketFile};
use nix::unistd::Pid;
use vmm::UserConfig;

use crate::asker::Asker;
use crate::http::{MAX_BODY_BYTES, MAX_HEAD_BYTES, Request, Response};

/// Most clients at one time; one that waits for nothing makes room for one more.
const MAX_CLIENTS: usize = 16;

/// How long whoever listens at a socket may take to be gone, and how often that is looked at.
const HANDOVER: Duration = Duration::from_secs(1);
const HANDOVER_STEP: Duration = Duration::from_millis(10);

/// The control socket.
pub struct Server {
    listener: Listener,
    clients: Vec<Client>,
    /// The last attempt to let a client in failed.
    is_deaf: bool,
    /// Whom it does not let in.
    kept_out: Option<Pid>,
}

struct Client {
    stream: UnixStream,
    asker: Asker,
    received: Vec<u8>,
    /// Whether it was answered in the last turn: there may be more that it has asked for.
    may_have_more: bool,
}

impl Server {
    /// Listens at `path`. Waits a moment for whoever listens there already: the process that served the
    /// clients of a machine which was killed ends after it.
    pub fn open(path: &Path) -> io::Result<Self> {
        let deadline = Instant::now() + HANDOVER;
        let is_socket = || path.metadata().is_ok_and(|found| found.file_type().is_socket());
        let listener = loop {
            match Listener::bind(path) {
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse
                        && is_socket()
                        && Instant::now() < deadline =>
                {
                    thread::sleep(HANDOVER_STEP);
                }
                outcome => break outcome?,
            }
        };
        Ok(Server { listener, clients: Vec::new(), is_deaf: false, kept_out: None })
    }

    /// Leaves the socket to `user`, and with it the right to connect.
    pub fn give_to(&self, user: UserConfig) -> io::Result<()> {
        self.listener.give_to(user.uid, user.gid)
    }

    /// Lets no thread of `process` in: it is the machine's, and a guest may have made it anything.
    pub fn keep_out(&mut self, process: Pid) {
        self.kept_out = Some(process);
    }

    /// Closes it in this process, and leaves its file to another one that has it, too.
    pub fn leave(self) {
        let (_closed, file) = self.listener.without_file(PathBuf::new());
        let _ = file.map(SocketFile::into_path);
    }

    /// Refuses a `path` at which it could not listen, as far as a look can tell.
    pub fn check(path: &Path) -> io::Result<()> {
        Listener::check(path)
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

    /// Whether there may be something to do without anything new: what else a client has asked for.
    pub fn may_have_more(&self) -> bool {
        self.clients.iter().any(|client| client.may_have_more)
    }

    /// Lets clients in and answers one request of each that is there in full. Waits for nobody but `answer`.
    pub fn serve(&mut self, mut answer: impl FnMut(&Request, &Asker) -> Response) {
        self.clients.retain_mut(|client| client.serve(&mut answer));
        // No more than there may be, so that a client which comes again and again stops nothing.
        for _ in 0..MAX_CLIENTS {
            let accepted = self.listener.accept();
            self.is_deaf = accepted.is_err();
            let Ok(Some(stream)) = accepted else { break };
            let Ok(asker) = Asker::of(&stream) else { continue };
            if self.kept_out == Some(asker.process) {
                continue;
            }
            let received = Vec::new();
            let mut client = Client { stream, asker, received, may_have_more: false };
            if client.serve(&mut answer) {
                self.make_room();
                self.clients.push(client);
            }
        }
    }

    /// Sends one client away if there are as many as may be: the first that has asked for nothing, or
    /// the first of all.
    fn make_room(&mut self) {
        if self.clients.len() < MAX_CLIENTS {
            return;
        }
        let idle = self.clients.iter().position(|client| client.received.is_empty());
        let mut client = self.clients.remove(idle.unwrap_or(0));
        if idle.is_none() {
            client.refuse(&Response::failure(
                503,
                "(request)",
                "must come in full, and others wait",
            ));
        }
    }
}

impl Client {
    /// Returns whether the client stays.
    fn serve(&mut self, answer: &mut impl FnMut(&Request, &Asker) -> Response) -> bool {
        let is_open = self.read();
        let taken = Request::take(&mut self.received);
        self.may_have_more = matches!(taken, Ok(Some(_)));
        match taken {
            Ok(Some(request)) => {
                let response = answer(&request, &self.asker);
                let text = match request.is_head {
                    true => response.head(request.is_last),
                    false => response.encode(request.is_last),
                };
                self.write(&text) && !request.is_last
            }
            Ok(None) if is_open => true,
            Ok(None) => {
                if !self.received.is_empty() {
                    self.refuse(&Response::failure(400, "(request)", "must come in full"));
                }
                false
            }
            Err(response) => {
                self.refuse(&response);
                false
            }
        }
    }

    /// Says why there is no answer. One that cannot be told so is gone in any case.
    fn refuse(&mut self, response: &Response) {
        self.write(&response.encode(true));
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
    fn write(&mut self, text: &str) -> bool {
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

    fn echo(request: &Request, _: &Asker) -> Response {
        Response::text("text/plain", request.path.clone())
    }

    #[test]
    fn a_process_that_is_kept_out_gets_no_answer() {
        let (folder, mut server) = server();
        server.keep_out(Pid::this());
        let mut client = dial(&folder);
        client.write_all(b"GET /one HTTP/1.1\r\n\r\n").unwrap();

        server.serve(|_, _| panic!("it asked for something"));

        let error = client.read(&mut [0]).err().map(|error| error.kind());
        assert_eq!(error.unwrap_or(io::ErrorKind::ConnectionReset), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn two_requests_on_one_connection_get_two_answers() {
        let (folder, mut server) = server();
        let mut client = dial(&folder);

        client.write_all(b"GET /one HTTP/1.1\r\n\r\nGET /two HTTP/1.1\r\n\r\n").unwrap();
        let mut other = dial(&folder);
        other.write_all(b"GET /other HTTP/1.1\r\n\r\n").unwrap();
        let mut order = Vec::new();
        let mut turns = 0;
        while turns == 0 || server.may_have_more() {
            server.serve(|request, asker| {
                order.push(request.path.clone());
                echo(request, asker)
            });
            turns += 1;
        }

        // A turn for each request, and the one that finds nothing; others have theirs in between.
        assert_eq!((order, turns), (["/one", "/other", "/two"].map(String::from).into(), 3));
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
    fn the_seventeenth_client_takes_the_place_of_the_first_that_asks_nothing() {
        let (folder, mut server) = server();
        let mut clients: Vec<UnixStream> = (0..MAX_CLIENTS).map(|_| dial(&folder)).collect();
        clients[0].write_all(b"GET /slow").unwrap();
        server.serve(echo);

        let _last = dial(&folder);
        server.serve(echo);

        assert_eq!(server.descriptors().count(), MAX_CLIENTS + 1);
        assert_eq!(clients[1].read(&mut [0]).unwrap(), 0);
        clients[0].write_all(b" HTTP/1.1\r\n\r\n").unwrap();
        server.serve(echo);
        assert!(received(&mut clients[0]).ends_with("/slow"));
    }

    #[test]
    fn a_client_who_makes_room_in_the_middle_of_a_request_is_told() {
        let (folder, mut server) = server();
        let mut clients: Vec<UnixStream> = (0..=MAX_CLIENTS).map(|_| dial(&folder)).collect();
        for client in &mut clients {
            client.write_all(b"GET /").unwrap();
        }

        server.serve(echo);
        server.serve(echo);

        assert!(received(&mut clients[0]).starts_with("HTTP/1.1 503 "));
        assert_eq!(received(&mut clients[1]), "");
    }

    #[test]
    fn a_request_that_is_cut_short_is_refused() {
        let (folder, mut server) = server();
        let mut client = dial(&folder);
        client.write_all(b"PUT / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbo").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();

        server.serve(echo);

        assert!(received(&mut client).starts_with("HTTP/1.1 400 "));
    }

    #[test]
    fn a_head_gets_what_a_get_would_without_the_body() {
        let (folder, mut server) = server();
        let mut client = dial(&folder);

        client.write_all(b"HEAD /path HTTP/1.1\r\n\r\n").unwrap();
        server.serve(echo);

        let text = received(&mut client);
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
        assert!(text.ends_with("Content-Length: 5\r\n\r\n"), "{text}");
    }
}
