//! Files of the host that are written to while the machine runs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use devices::listener::check_folder_of;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Opens the file at `path`, which is made if need be, to write at its end. A FIFO must have somebody who
/// reads it already: nobody is waited for.
pub fn open_output(path: &Path) -> io::Result<File> {
    let file = options().create(true).open(path).map_err(|error| explained(path, error))?;
    // What is written later waits for its reader.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND))?;
    Ok(file)
}

/// Refuses a `path` that [`open_output`] would not open, as far as a look can tell. Nothing is made, and
/// only a file is opened: whoever reads a FIFO would take a writer that goes for its end.
pub fn check_output(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_file() || found.is_dir() => options().open(path).map(drop),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => check_folder_of(path),
        Err(error) => Err(error),
    }
}

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.append(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options
}

/// `error`, which came of opening `path`, in words that say what to do.
fn explained(path: &Path, error: io::Error) -> io::Error {
    let is_fifo = || fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    match error.raw_os_error() {
        Some(libc::ENXIO) if is_fifo() => {
            io::Error::other("no process reads this FIFO: start its reader first")
        }
        Some(libc::ENOENT) => check_folder_of(path).err().unwrap_or(error),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use tempfile::TempDir;

    use super::*;

    #[test]
    fn a_fifo_that_nobody_reads_is_refused_and_one_with_a_reader_is_waited_for() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("fifo");
        mkfifo(&path, Mode::S_IRWXU).unwrap();

        let error = open_output(&path).unwrap_err();
        assert_eq!(error.to_string(), "no process reads this FIFO: start its reader first");
        let mut options = OpenOptions::new();
        let mut reader = options.read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut writer = open_output(&path).unwrap();

        writer.write_all(b"x").unwrap();
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        let flags = fcntl(&writer, FcntlArg::F_GETFL).unwrap();
        assert_eq!((byte, flags & libc::O_NONBLOCK), (*b"x", 0));
    }

    #[test]
    fn a_look_at_a_fifo_ends_nothing_and_does_not_wait() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("fifo");
        mkfifo(&path, Mode::S_IRWXU).unwrap();

        check_output(&path).unwrap();
    }

    #[test]
    fn a_look_at_a_file_makes_and_changes_nothing() {
        let folder = TempDir::new().unwrap();
        let (there, new) = (folder.path().join("there"), folder.path().join("new"));
        fs::write(&there, "kept").unwrap();

        check_output(&there).unwrap();
        check_output(&new).unwrap();

        assert_eq!(fs::read_to_string(there).unwrap(), "kept");
        assert!(!new.exists());
    }

    #[test]
    fn what_cannot_be_written_to_is_refused_by_a_look_at_it_as_by_its_use() {
        for path in ["/", "/nowhere/log"].map(Path::new) {
            let (look, used) = (check_output(path).unwrap_err(), open_output(path).unwrap_err());
            assert_eq!(look.to_string(), used.to_string());
        }
        let error = open_output(Path::new("/nowhere/log")).unwrap_err();
        assert!(error.to_string().starts_with("directory \"/nowhere\": No such"), "{error}");
    }
}
