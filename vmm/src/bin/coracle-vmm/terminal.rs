//! The terminal that is the guest's console.

use std::io;

use vmm_sys_util::terminal::Terminal;

/// The terminal passes every key to the guest for as long as this lives.
pub struct RawTerminal;

impl RawTerminal {
    /// Takes the terminal that is standard input.
    pub fn open() -> io::Result<Self> {
        io::stdin().lock().set_raw_mode().map_err(io::Error::from)?;
        Ok(RawTerminal)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing is left to do about a terminal that is gone.
        let _ = io::stdin().lock().set_canon_mode();
    }
}
