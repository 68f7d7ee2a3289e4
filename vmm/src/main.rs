//! `coracle-vmm`: starts one virtual machine from a configuration file, and ends as it ends.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::ptr;

use anyhow::{Context, bail};
use clap::Parser;
use log::{LevelFilter, Log, Metadata, Record};
use vmm::{ConsoleConfig, ConsoleOutput, Exit, Metrics, VmConfig, VmHandle, Vmm};
use vmm_sys_util::terminal::Terminal;

const EXIT_CODES: &str = "\
Exit codes:
  0    the guest powered off
  1    the machine could not be built, or could not go on
  2    wrong arguments
  3    the guest asked for a reset
  4    the guest's processor gave up (triple fault)
  130  stopped by SIGINT
  143  stopped by SIGTERM";

/// Runs one virtual machine.
#[derive(Parser)]
#[command(name = "coracle-vmm", version, after_help = EXIT_CODES)]
struct Arguments {
    /// Machine configuration (JSON)
    #[arg(long, value_name = "FILE", required_unless_present = "kernel")]
    config: Option<PathBuf>,
    /// Kernel, ELF or bzImage; overrides boot.kernel
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; overrides boot.initrd
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel parameters; overrides boot.cmdline
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Number of virtual processors; overrides vcpus
    #[arg(long, value_name = "N")]
    vcpus: Option<u8>,
    /// Guest memory in MiB; overrides memory.size_mib
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// Show the guest's console here; overrides console.output
    #[arg(long)]
    console: bool,
    /// Use a serial port as the console, which shows early messages, too, but has no input; sets
    /// console.serial
    #[arg(long)]
    serial: bool,
    /// Let the machine's threads make any system call; sets seccomp to false
    #[arg(long)]
    no_seccomp: bool,
    /// Write what the machine cost to this file when it ends (JSON)
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Build the machine, then end without running it
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    vmm::use_one_heap();
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
    match run(&Arguments::parse()) {
        Ok(code) => code.into(),
        Err(error) => {
            eprintln!("coracle-vmm: {error:#}");
            1.into()
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<u8> {
    let config = configuration(arguments)?;
    let interactive = takes_keys(&config.console) && io::stdin().is_terminal();
    // Before the first thread starts, so that every thread leaves these signals to this one.
    let signals = Signals::open().context("receive signals")?;
    vmm::forbid_core_dumps().context("forbid core dumps")?;
    let machine = Vmm::new(config)?;
    if arguments.check {
        return Ok(0);
    }
    let terminal = interactive.then(RawTerminal::open).transpose().context("use the terminal")?;
    let metrics = arguments.metrics.as_deref().map(Report::create).transpose()?;
    let machine = machine.start()?;
    // Nothing is opened from here on.
    vmm::give_up_privileges().context("give up privileges")?;
    let signal = wait_for_end(&machine, &signals).context("wait for the machine")?;
    drop(terminal);
    machine.stop();
    if let Some(metrics) = metrics {
        metrics.write(&machine.metrics())?;
    }
    exit_code(finish(machine, signals, signal), signal)
}

/// A file for what the machine cost.
struct Report<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> Report<'a> {
    fn create(path: &'a Path) -> anyhow::Result<Self> {
        let file = File::create(path).with_context(|| format!("create {path:?}"))?;
        Ok(Report { path, file })
    }

    fn write(mut self, metrics: &Metrics) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(metrics)?;
        self.file.write_all(text.as_bytes()).with_context(|| format!("write {:?}", self.path))
    }
}

/// Says how `machine` ended, and lets its devices finish, unless a signal says not to: one of them
/// may wait for whoever reads our output, or for a slow disk.
fn finish(machine: VmHandle, signals: Signals, signal: Option<i32>) -> Exit {
    if signal.is_none() {
        drop(signals);
        return machine.wait();
    }
    let exit = machine.outcome();
    // Its threads end with the process, which is about to.
    mem::forget(machine);
    exit
}

/// The configuration file with the arguments' changes.
fn configuration(arguments: &Arguments) -> anyhow::Result<VmConfig> {
    let mut config = match &arguments.config {
        Some(path) => {
            let text = fs::read_to_string(path).with_context(|| format!("read {path:?}"))?;
            serde_json::from_str(&text).with_context(|| format!("parse {path:?}"))?
        }
        None => VmConfig::new(PathBuf::new()),
    };
    if let Some(kernel) = &arguments.kernel {
        config.boot.kernel.clone_from(kernel);
    }
    if arguments.initrd.is_some() {
        config.boot.initrd.clone_from(&arguments.initrd);
    }
    if let Some(cmdline) = &arguments.cmdline {
        config.boot.cmdline.clone_from(cmdline);
    }
    if let Some(vcpus) = arguments.vcpus {
        config.vcpus = vcpus;
    }
    if let Some(memory) = arguments.memory {
        config.memory.size_mib = memory;
    }
    if arguments.console {
        config.console.output = ConsoleOutput::Stdout;
    }
    config.console.serial |= arguments.serial;
    config.seccomp &= !arguments.no_seccomp;
    Ok(config)
}

/// Whether the guest gets what is typed here. A serial port has no input, and then the keys that
/// send signals must go on doing so.
fn takes_keys(console: &ConsoleConfig) -> bool {
    console.output == ConsoleOutput::Stdout && !console.serial
}

/// Waits for the machine's end or for a signal, which it returns.
fn wait_for_end(machine: &VmHandle, signals: &Signals) -> io::Result<Option<i32>> {
    let mut descriptors = [machine.ended(), signals.as_fd()].map(|descriptor| libc::pollfd {
        fd: descriptor.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    loop {
        // SAFETY: the array holds two descriptors that stay open during the call.
        if unsafe { libc::poll(descriptors.as_mut_ptr(), 2, -1) } >= 0 {
            break;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    if descriptors[0].revents != 0 { Ok(None) } else { signals.read().map(Some) }
}

fn exit_code(exit: Exit, signal: Option<i32>) -> anyhow::Result<u8> {
    Ok(match exit {
        Exit::PowerOff => 0,
        Exit::Reset => 3,
        Exit::TripleFault => 4,
        Exit::Stopped => {
            let signal = signal.expect("only a signal stops the machine");
            128 + u8::try_from(signal).expect("signal numbers are small")
        }
        Exit::Failed(reason) => bail!(reason),
    })
}

/// Shows what the machine complains about on standard error.
struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The file server's library writes what a guest sends it, as often as the guest likes.
        !metadata.target().starts_with("fuse_backend_rs")
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // Not `eprintln`, which panics where nobody listens.
            let _ = writeln!(io::stderr(), "coracle-vmm: {}", record.args());
        }
    }

    fn flush(&self) {}
}

/// SIGINT and SIGTERM as a descriptor; once it is dropped they end the process as usual.
struct Signals {
    descriptor: OwnedFd,
    set: libc::sigset_t,
}

impl Signals {
    fn open() -> io::Result<Self> {
        // SAFETY: an all-zero sigset_t is valid for sigemptyset to initialize; the other calls get
        // that initialized set.
        let (fd, set) = unsafe {
            let mut set: libc::sigset_t = mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
            (libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC), set)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd just opened it, and nobody else owns it.
        Ok(Signals { descriptor: unsafe { OwnedFd::from_raw_fd(fd) }, set })
    }

    /// The number of the signal that arrived.
    fn read(&self) -> io::Result<i32> {
        // SAFETY: the structure is plain numbers, for which zero is valid.
        let mut info: libc::signalfd_siginfo = unsafe { mem::zeroed() };
        let bytes = size_of_val(&info);
        // SAFETY: the kernel writes at most `bytes` bytes into `info`.
        let read =
            unsafe { libc::read(self.descriptor.as_raw_fd(), (&raw mut info).cast(), bytes) };
        if read < 0 {
            return Err(io::Error::last_os_error());
        }
        i32::try_from(info.ssi_signo).map_err(io::Error::other)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        // SAFETY: `open` initialized the set.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const self.set, ptr::null_mut()) };
    }
}

/// The terminal passes every key to the guest for as long as this lives.
struct RawTerminal;

impl RawTerminal {
    fn open() -> anyhow::Result<Self> {
        io::stdin().lock().set_raw_mode()?;
        Ok(RawTerminal)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // Nothing is left to do about a terminal that is gone.
        let _ = io::stdin().lock().set_canon_mode();
    }
}
