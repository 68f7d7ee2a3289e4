//! Opens what clients name, for a while at most: it may lie on a file system that does not answer.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm::{ConfigError, Opened};

use crate::http::Request;
use crate::resources;

/// How long other clients wait for a file system.
const PATIENCE: Duration = Duration::from_secs(2);

/// Opens one thing at a time.
#[derive(Default)]
pub struct Opener {
    /// Opens what did not answer in time.
    late: Option<JoinHandle<()>>,
}

impl Opener {
    /// What `request` names.
    pub fn open_for(&mut self, request: &Request) -> Result<Opened, ConfigError> {
        if !resources::names_something(request) {
            return Ok(Opened::default());
        }
        let request = request.clone();
        self.within(PATIENCE, move || resources::open_for(&request))
    }

    /// What `open` gives in a thread of its own, if it does within `patience`. What it gives later is closed.
    fn within(
        &mut self,
        patience: Duration,
        open: impl FnOnce() -> Result<Opened, ConfigError> + Send + 'static,
    ) -> Result<Opened, ConfigError> {
        if self.late.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return Err(refusal("must wait: another one's file system does not answer".to_owned()));
        }
        let (sender, receiver) = sync_channel(0);
        let thread = thread::Builder::new().spawn(move || {
            // Nobody may wait for it any more.
            let _ = sender.send(open());
        });
        let thread = thread.map_err(|error| refusal(format!("cannot be opened: {error}")))?;
        receiver.recv_timeout(patience).unwrap_or_else(|error| {
            if error == RecvTimeoutError::Timeout {
                self.late = Some(thread);
            }
            let seconds = patience.as_secs();
            Err(refusal(format!("must be on a file system that answers within {seconds} s")))
        })
    }
}

fn refusal(rule: String) -> ConfigError {
    ConfigError { field: "path".to_owned(), rule }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn what_does_not_open_in_time_is_refused_and_so_is_the_next_until_it_does() {
        let mut opener = Opener::default();
        let (release, mut hang) = UnixStream::pair().unwrap();
        let (mut closed, file) = UnixStream::pair().unwrap();
        let hanging = move || {
            let _ = hang.read(&mut [0]);
            Ok(Opened { files: vec![file.into()], mtu: None })
        };

        let error = opener.within(Duration::ZERO, hanging).unwrap_err();
        assert!(error.rule.contains("answers within"), "{error}");
        let error = opener.within(PATIENCE, || Ok(Opened::default())).unwrap_err();
        assert!(error.rule.starts_with("must wait"), "{error}");
        drop(release);

        assert_eq!(closed.read(&mut [0]).unwrap(), 0);
        while opener.within(PATIENCE, || Ok(Opened::default())).is_err() {
            thread::yield_now();
        }
    }

    #[test]
    fn what_opens_in_time_comes_as_it_is() {
        let open =
            || Ok(Opened { files: vec![File::open("/dev/null").unwrap().into()], mtu: None });
        assert_eq!(Opener::default().within(PATIENCE, open).unwrap().files.len(), 1);
        let failing = || Err(refusal("no".to_owned()));
        assert_eq!(Opener::default().within(PATIENCE, failing).unwrap_err().rule, "no");
    }
}
