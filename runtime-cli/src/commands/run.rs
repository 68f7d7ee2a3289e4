//! `run`: create and start a container, and be its stand-in until it ends.

use std::os::fd::AsFd;

use agent_protocol::{INIT_PROCESS, WindowSize};
use anyhow::Context;
use coracle::sandbox::{self, Client};
use coracle::state::ContainerDir;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::termios::{SetArg, Termios, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpgrp, tcgetpgrp};

use super::Globals;
use super::create::{self, BundleArgs};

nix::ioctl_read_bad!(window_size_of, libc::TIOCGWINSZ, libc::winsize);

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    bundle: BundleArgs,
    /// Do not wait for the container to end
    #[arg(long, short = 'd')]
    detach: bool,
    /// Keep the container's state after it has ended
    #[arg(long)]
    keep: bool,
    /// Accepted as runc has it; the machine border contains what the container leaves behind
    #[arg(long)]
    no_subreaper: bool,
}

/// Returns the exit code of the container's program, or 0 if it goes on without us.
pub fn run(globals: &Globals, args: &Args) -> anyhow::Result<u8> {
    // Blocked before there is a child, so that its end cannot be missed.
    let signals = (!args.detach).then(block_signals).transpose()?;
    let _terminal = (!args.detach).then(|| Kept::of(std::io::stdin()));
    let failed = "coracle run failed";
    let (dir, pid) = create::create(globals, &args.bundle, args.detach).context(failed)?;
    let client = Client::connect(&dir)
        .and_then(|client| sandbox::start(&dir, &client).map(|()| client))
        .inspect_err(|_| destroy(&dir));
    let client = match client {
        Ok(client) => client,
        Err(error) => {
            remove(dir);
            return Err(error).context(failed);
        }
    };
    let Some(signals) = signals else { return Ok(0) };
    resize(&client);
    let code = wait(&client, &signals, Pid::from_raw(pid)).context(failed)?;
    if !args.keep {
        destroy(&dir);
        remove(dir);
    }
    Ok(code)
}

/// A terminal that gets its settings back: the sandbox process makes it raw, and may be killed.
struct Kept<T: AsFd> {
    terminal: T,
    settings: Option<Termios>,
}

impl<T: AsFd> Kept<T> {
    /// Without effect on what is no terminal.
    fn of(terminal: T) -> Self {
        let settings = tcgetattr(&terminal).ok();
        Self { terminal, settings }
    }
}

impl<T: AsFd> Drop for Kept<T> {
    fn drop(&mut self) {
        // In the background it is another program's to set.
        let others = tcgetpgrp(&self.terminal).is_ok_and(|group| group != getpgrp());
        if let Some(settings) = self.settings.as_ref().filter(|_| !others) {
            // A terminal that hung up has no use for them.
            let _ = tcsetattr(&self.terminal, SetArg::TCSANOW, settings);
        }
    }
}

fn destroy(dir: &ContainerDir) {
    let destroyed = dir
        .load()
        .map_err(anyhow::Error::from)
        .and_then(|state| Ok(sandbox::destroy(dir, &state)?));
    if let Err(error) = destroyed {
        log::warn!("{error:#}");
    }
}

fn remove(dir: ContainerDir) {
    if let Err(error) = dir.remove() {
        log::warn!("{error:#}", error = anyhow::Error::from(error));
    }
}

/// Blocks every signal that can be taken with sigwait(3) and is not a fault of this program.
fn block_signals() -> nix::Result<SigSet> {
    let mut signals = SigSet::all();
    for fault in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP]
    {
        signals.remove(fault);
    }
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), None)?;
    Ok(signals)
}

/// Passes signals on until the sandbox process has ended.
fn wait(client: &Client, signals: &SigSet, pid: Pid) -> anyhow::Result<u8> {
    loop {
        if let Some(code) = exit_code(pid)? {
            return Ok(code);
        }
        match next_signal(signals)? {
            libc::SIGCHLD => {}
            libc::SIGWINCH => resize(client),
            libc::SIGPIPE | libc::SIGURG => {}
            signal => {
                // The container may end at any time; then there is nobody to signal.
                if let Err(error) = client.signal(INIT_PROCESS, signal, false) {
                    log::debug!("pass on signal {signal}: {error}");
                }
            }
        }
    }
}

/// The number of the next signal: the real-time ones have no name in nix's `Signal`.
fn next_signal(signals: &SigSet) -> nix::Result<i32> {
    let mut number = 0;
    // SAFETY: the set is valid for the call, which writes one int to `number`.
    let error = unsafe { libc::sigwait(signals.as_ref(), &raw mut number) };
    if error == 0 { Ok(number) } else { Err(Errno::from_raw(error)) }
}

fn exit_code(pid: Pid) -> nix::Result<Option<u8>> {
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => Ok(Some(u8::try_from(code).unwrap_or(u8::MAX))),
        Ok(WaitStatus::Signaled(_, signal, _)) => {
            Ok(Some(u8::try_from(128 + signal as i32).unwrap_or(u8::MAX)))
        }
        Ok(_) | Err(Errno::EINTR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Tells the guest the size of our terminal, if we have one.
fn resize(client: &Client) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` is a winsize that outlives the call, which writes nothing else.
    if unsafe { window_size_of(libc::STDIN_FILENO, &raw mut size) }.is_err() {
        return;
    }
    let size = WindowSize { rows: size.ws_row, columns: size.ws_col };
    if let Err(error) = client.resize(INIT_PROCESS, size) {
        log::debug!("resize terminal: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_that_was_left_raw_gets_its_settings_back() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let before = tcgetattr(&pair.slave).unwrap();

        let kept = Kept::of(&pair.slave);
        let mut raw = before.clone();
        nix::sys::termios::cfmakeraw(&mut raw);
        tcsetattr(&pair.slave, SetArg::TCSANOW, &raw).unwrap();
        drop(kept);

        assert_eq!(tcgetattr(&pair.slave).unwrap().local_flags, before.local_flags);
    }

    #[test]
    fn a_real_time_signal_is_waited_for_like_any_other() {
        let signals = block_signals().unwrap();
        let number = libc::SIGRTMIN() + 3;

        // SAFETY: the signal is blocked in this thread, the only one it is sent to.
        assert_eq!(unsafe { libc::raise(number) }, 0);

        assert_eq!(next_signal(&signals), Ok(number));
    }
}
