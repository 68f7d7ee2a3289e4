//! Opens what clients name: with no more rights than they have, and for a while at most, as it may lie on a
//! file system that does not answer.

use std::sync::mpsc::sync_channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm::{ConfigError, Opened};

use crate::asker::Asker;
use crate::http::Request;
use crate::resources;

/// How long other clients wait.
const PATIENCE: Duration = Duration::from_secs(2);

/// Opens one thing at a time.
#[derive(Default)]
pub struct Opener {
    /// Opens what was not there in time.
    late: Option<JoinHandle<()>>,
}

impl Opener {
    /// What `request` of `asker` names.
    pub fn open_for(&mut self, request: &Request, asker: &Asker) -> Result<Opened, ConfigError> {
        let Some(field) = resources::opened_field(request) else { return Ok(Opened::default()) };
        let refusal = move |rule| ConfigError { field: field.to_owned(), rule };
        let (request, asker) = (request.clone(), asker.clone());
        let open = move || {
            let lent = asker.lend_rights();
            lent.map_err(|error| refusal(format!("cannot be opened with your rights: {error}")))?;
            resources::open_for(&request, field)
        };
        self.within(PATIENCE, open).unwrap_or_else(|rule| Err(refusal(rule)))
    }

    /// What `open` gives in a thread of its own, if it does within `patience`; if not, why. What it gives
    /// later is closed.
    fn within(
        &mut self,
        patience: Duration,
        open: impl FnOnce() -> Result<Opened, ConfigError> + Send + 'static,
    ) -> Result<Result<Opened, ConfigError>, String> {
        if self.late.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Err(
                "must wait: the host does not answer to what was to be opened before".into()
            );
        }
        let (sender, receiver) = sync_channel(0);
        let thread = thread::Builder::new().spawn(move || {
            // Nobody may wait for it any more.
            let _ = sender.send(open());
        });
        let thread = thread.map_err(|error| format!("cannot be opened: {error}"))?;
        receiver.recv_timeout(patience).map_err(|_| {
            self.late = Some(thread);
            format!(
                "must be what the host opens within {} s: it does not answer",
                patience.as_secs()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::asker::tests::of_user;

    #[test]
    fn what_does_not_open_in_time_is_refused_and_so_is_the_next_until_it_does() {
        let mut opener = Opener::default();
        let (release, mut hang) = UnixStream::pair().unwrap();
        let (mut closed, file) = UnixStream::pair().unwrap();
        let hanging = move || {
            let _ = hang.read(&mut [0]);
            Ok(Opened { files: vec![file.into()], mtu: None })
        };

        let rule = opener.within(Duration::ZERO, hanging).unwrap_err();
        assert!(rule.contains("does not answer"), "{rule}");
        let rule = opener.within(PATIENCE, || Ok(Opened::default())).unwrap_err();
        assert!(rule.starts_with("must wait"), "{rule}");
        drop(release);

        assert_eq!(closed.read(&mut [0]).unwrap(), 0);
        while opener.within(PATIENCE, || Ok(Opened::default())).is_err() {
            thread::yield_now();
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn a_disk_is_opened_for_who_may_open_it() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(512).unwrap();
        let body = format!(r#"{{"id": "a", "path": {:?}}}"#, image.path());
        let head = format!("POST /v1/vm/disks HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        let request = Request::take(&mut (head + &body).into_bytes()).unwrap().unwrap();
        let mut opener = Opener::default();

        assert_eq!(opener.open_for(&request, &of_user(0)).unwrap().files.len(), 1);
        let error = opener.open_for(&request, &of_user(65_534)).unwrap_err();

        assert_eq!(error.field, "path");
        let denied = io::Error::from_raw_os_error(libc::EACCES).to_string();
        assert!(error.rule.contains(&denied), "{error}");
    }
}
