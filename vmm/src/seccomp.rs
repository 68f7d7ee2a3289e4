//! The system calls each kind of thread may make. Any other ends the process with SIGSYS.
//!
//! They are listed, each with its reason, in `seccomp/ARCHITECTURE.json`, and compiled by the build
//! script. The kernel's log says which thread made which call: `audit: type=1326 … comm="vcpu 0" …
//! sig=31 … syscall=41`.

use seccompiler::{BpfProgramRef, sock_filter};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// One filter per [`Kind`]: nothing is compiled, allocated or read when it is installed.
struct Filters {
    vcpu: &'static [sock_filter],
    vmm: &'static [sock_filter],
    io: &'static [sock_filter],
}

/// What a thread of the machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Runs a virtual processor.
    Vcpu,
    /// Serves devices that answer at once.
    Vmm,
    /// Serves devices that block on files.
    Io,
}

impl Kind {
    /// What such threads are called, and their filters.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Vcpu => "vcpu",
            Kind::Vmm => "vmm",
            Kind::Io => "io",
        }
    }
}

/// Whether this build has filters.
pub fn is_available() -> bool {
    FILTERS.is_some()
}

/// Installs the filter of `kind` for the calling thread and those it starts, and with it
/// `no_new_privs`. Neither can be undone. Without a filter it does nothing: see [`is_available`].
pub fn install(kind: Kind) -> Result<(), seccompiler::Error> {
    FILTERS.as_ref().map_or(Ok(()), |filters| seccompiler::apply_filter(filters.of(kind)))
}

impl Filters {
    fn of(&self, kind: Kind) -> BpfProgramRef<'static> {
        match kind {
            Kind::Vcpu => self.vcpu,
            Kind::Vmm => self.vmm,
            Kind::Io => self.io,
        }
    }
}

#[cfg(test)]
#[path = "seccomp_tests.rs"]
mod tests;
