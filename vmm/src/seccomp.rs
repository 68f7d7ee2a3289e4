//! The system calls each kind of thread may make. Any other ends the process with SIGSYS.
//!
//! They are listed, each with its reason, in `seccomp/ARCHITECTURE.json`, and compiled by the build
//! script. The kernel's log says which thread made which call: `audit: type=1326 … comm="vcpu 0" …
//! sig=31 … syscall=41`.

use std::process;

use seccompiler::{BpfProgramRef, sock_filter};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// What the filters have in place of this process's pid, which is known only when they are installed.
/// No pid gets as large (`PID_MAX_LIMIT`).
const OWN_PID: u32 = 0x7fff_fffe;

/// One filter per [`Kind`]: nothing is compiled or read when it is installed.
struct Filters {
    vcpu: &'static [sock_filter],
    vmm: &'static [sock_filter],
    io: &'static [sock_filter],
    main: &'static [sock_filter],
    growing: &'static [sock_filter],
    without_clone3: &'static [sock_filter],
}

/// What a thread does for the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Runs a virtual processor.
    Vcpu,
    /// Serves devices that answer at once.
    Vmm,
    /// Serves devices that block on files.
    Io,
    /// Controls the machine, and does nothing else.
    Main,
    /// The same for a machine that can get vCPUs and devices. Their threads have its filter, too.
    Growing,
}

impl Kind {
    /// What such threads are called, and their filters.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Vcpu => "vcpu",
            Kind::Vmm => "vmm",
            Kind::Io => "io",
            Kind::Main => "main",
            Kind::Growing => "growing",
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
    let Some(filters) = &FILTERS else { return Ok(()) };
    if kind == Kind::Growing {
        // No filter sees what clone3 is asked for. The C library does without where it is not there.
        seccompiler::apply_filter(filters.without_clone3)?;
    }
    let mut program = filters.of(kind).to_vec();
    let own_pid = process::id();
    for step in program.iter_mut().filter(|step| step.k == OWN_PID) {
        step.k = own_pid;
    }
    seccompiler::apply_filter(&program)
}

impl Filters {
    fn of(&self, kind: Kind) -> BpfProgramRef<'static> {
        match kind {
            Kind::Vcpu => self.vcpu,
            Kind::Vmm => self.vmm,
            Kind::Io => self.io,
            Kind::Main => self.main,
            Kind::Growing => self.growing,
        }
    }
}

#[cfg(test)]
#[path = "seccomp_tests.rs"]
mod tests;
