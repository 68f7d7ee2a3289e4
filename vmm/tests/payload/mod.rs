//! Guests of a few instructions, written as a kernel file on the fly.

use std::io::Write;

pub use arch::payload::*;
use tempfile::NamedTempFile;
use vmm::{Exit, VmConfig};

/// How a machine ends whose guest runs [`END`].
pub fn end() -> Exit {
    match ENDS_BY {
        arch::machine::Exit::TripleFault => Exit::TripleFault,
        arch::machine::Exit::Reset => Exit::Reset,
        exit => unreachable!("{exit:?} ends no machine"),
    }
}

/// A kernel file that is deleted at the end of the test.
pub struct Payload(NamedTempFile);

impl Payload {
    /// One that runs `code`, part after part.
    pub fn of(code: &[Vec<u8>]) -> Self {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&kernel(&code.concat())).unwrap();
        Payload(file)
    }

    /// A machine that runs the payload with a UART.
    pub fn config(&self) -> VmConfig {
        let mut config = VmConfig::new(self.0.path().to_owned());
        config.memory.size_mib = 32;
        config.console.serial = true;
        config
    }
}
