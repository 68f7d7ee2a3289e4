//! `coracle`: the OCI command line.
#![cfg_attr(not(test), no_main)]

mod commands;

use std::ffi::c_int;
use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};
use coracle::logging::{LogFormat, LogOptions};
use coracle::rootless;
use coracle::state::StateRoot;
use coracle::{OCI_VERSION, VERSION, sandbox};

/// Exit code of a failure that is the runtime's own.
const FAILURE: u8 = 1;

/// Runs containers, each in a virtual machine of its own, by the OCI runtime specification.
#[derive(Parser)]
#[command(name = "coracle", disable_version_flag = true, arg_required_else_help = true)]
// As with runc, the last of an option given twice counts: engines put a user's after their own.
#[command(args_override_self = true)]
struct Cli {
    /// Enable debug logging
    #[arg(long)]
    debug: bool,
    /// Log file (default: stderr)
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Log format: text or json
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: String,
    /// Folder for the state of containers; should be on a tmpfs [default: /run/coracle, or
    /// $XDG_RUNTIME_DIR/coracle for a user who is not root]
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Let systemd manage cgroups; cgroupsPath is then "slice:prefix:name"
    #[arg(long)]
    systemd_cgroup: bool,
    /// Accepted as runc has it
    #[arg(long, value_name = "WHETHER", hide = true)]
    rootless: Option<String>,
    /// Accepted as runc has it
    #[arg(long, value_name = "PATH", hide = true)]
    criu: Option<PathBuf>,
    /// Print the version
    #[arg(long, short = 'v')]
    version: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Check whether this host can run virtual machines
    Check(commands::check::Args),
    /// Print what a container's guest kernel printed last
    Console(commands::IdArgs),
    /// Create a container
    Create(commands::create::Args),
    /// Delete what a container holds
    Delete(commands::delete::Args),
    /// Display events and statistics of a container
    Events(commands::events::Args),
    /// Execute a new process inside a container
    Exec(Box<commands::exec::Args>),
    /// Show what this runtime implements
    Features,
    /// Make an engine know this runtime
    Install(commands::install::Args),
    /// Send a signal to a container's first process
    Kill(commands::kill::Args),
    /// List the containers of a root
    List(commands::list::Args),
    /// Show what the start of a container spent its time on
    Logs(commands::logs::Args),
    /// Print what a container's machine costs, in the Prometheus text format
    Metrics(commands::IdArgs),
    /// Suspend all processes inside a container
    Pause(commands::IdArgs),
    /// Display the processes inside a container
    Ps(commands::ps::Args),
    /// Resume all processes that have been paused
    Resume(commands::IdArgs),
    /// Create and run a container
    Run(commands::run::Args),
    /// Write a configuration to start from
    Spec(commands::spec::Args),
    /// Execute the user's program in a created container
    Start(commands::IdArgs),
    /// Print the state of a container
    State(commands::IdArgs),
    /// Make an engine forget this runtime, and put its configuration back
    Uninstall(commands::install::Args),
    /// Change the limits of a container
    Update(Box<commands::update::Args>),
    /// The process that holds a container's virtual machine
    #[command(hide = true)]
    SandboxProcess(commands::HiddenArgs),
    /// The process that the kernel kills when a container is out of memory
    #[command(hide = true)]
    OomVictim,
    /// The process that stands for one that `exec` started
    #[command(hide = true)]
    ExecProcess(commands::HiddenArgs),
}

#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main() -> c_int {
    vmm::run_program(parse_and_run)
}

fn parse_and_run() -> u8 {
    let words = commands::arguments::with_two_dashes(Cli::command, std::env::args_os().collect());
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        Err(error) => {
            // Neither way of failing to print help or a usage error leaves anything to do.
            let _ = error.print();
            return if error.use_stderr() { report_usage(&error) } else { 0 };
        }
    };
    if cli.version {
        let version = format!("coracle version {VERSION}\nspec: {OCI_VERSION}\n");
        let printed = commands::print(&version);
        return if printed.is_ok() { 0 } else { FAILURE };
    }
    let mut log = LogOptions { path: cli.log, debug: cli.debug, ..LogOptions::default() };
    match cli.log_format.parse() {
        Ok(format) => log.format = format,
        Err(error) => {
            log.report(&error);
            return FAILURE;
        }
    }
    let Some(verb) = cli.verb else {
        log.report(&commands::NoVerb);
        return FAILURE;
    };
    let globals = commands::Globals {
        root: StateRoot::new(cli.root.unwrap_or_else(rootless::state_root)),
        log,
        systemd_cgroup: cli.systemd_cgroup,
    };
    run(&globals, verb)
}

/// Tells the log of a command line that cannot be parsed, if it names one: an engine shows its user
/// no other words.
fn report_usage(error: &clap::Error) -> u8 {
    let known = Cli::command().ignore_errors(true).try_get_matches();
    let path = known.as_ref().ok().and_then(|known| known.get_one::<PathBuf>("log"));
    if let Some(path) = path {
        let format = known.as_ref().ok().and_then(|known| known.get_one::<String>("log_format"));
        let format = format.and_then(|format| format.parse::<LogFormat>().ok());
        let log = LogOptions {
            path: Some(path.clone()),
            format: format.unwrap_or_default(),
            debug: false,
        };
        log.report(&commands::Usage(usage_message(&error.to_string())));
    }
    FAILURE
}

/// What is wrong, in one line and without the explanation of the right usage.
fn usage_message(text: &str) -> String {
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let lines: Vec<_> = paragraph.lines().map(str::trim).collect();
    let line = lines.join(" ");
    format!("{}: see `coracle --help`", line.strip_prefix("error: ").unwrap_or(&line))
}

fn run(globals: &commands::Globals, verb: Verb) -> u8 {
    let log = &globals.log;
    let result = match verb {
        // These set up logging themselves: their options arrive over a descriptor.
        Verb::SandboxProcess(args) => sandbox::main(args.fd),
        Verb::ExecProcess(args) => sandbox::exec_main(args.fd),
        Verb::OomVictim => sandbox::victim().map(|()| 0).map_err(Into::into),
        verb => log.install().map_err(Into::into).and_then(|()| dispatch(globals, verb)),
    };
    match result {
        Ok(code) => code,
        Err(failure) => {
            log.report(failure.error.as_ref());
            failure.code
        }
    }
}

fn dispatch(globals: &commands::Globals, verb: Verb) -> Result<u8, commands::Failure> {
    let done = |result: anyhow::Result<()>| result.map(|()| 0).map_err(Into::into);
    match verb {
        Verb::Check(args) => commands::check::run(&args).map_err(Into::into),
        Verb::Console(args) => done(commands::console::run(globals, &args)),
        Verb::Create(args) => done(commands::create::run(globals, &args)),
        Verb::Delete(args) => done(commands::delete::run(globals, &args)),
        Verb::Events(args) => done(commands::events::run(globals, &args)),
        Verb::Exec(args) => commands::exec::run(globals, &args),
        Verb::Features => done(commands::features::run()),
        Verb::Install(args) => done(commands::install::install(&args)),
        Verb::Kill(args) => done(commands::kill::run(globals, &args)),
        Verb::List(args) => done(commands::list::run(globals, &args)),
        Verb::Logs(args) => done(commands::logs::run(globals, &args)),
        Verb::Metrics(args) => done(commands::metrics::run(globals, &args)),
        Verb::Pause(args) => done(commands::pause::run(globals, &args)),
        Verb::Ps(args) => done(commands::ps::run(globals, &args)),
        Verb::Resume(args) => done(commands::resume::run(globals, &args)),
        Verb::Run(args) => commands::run::run(globals, &args).map_err(Into::into),
        Verb::Spec(args) => done(commands::spec::run(&args)),
        Verb::Start(args) => done(commands::start::run(globals, &args)),
        Verb::State(args) => done(commands::state::run(globals, &args)),
        Verb::Uninstall(args) => done(commands::install::uninstall(&args)),
        Verb::Update(args) => done(commands::update::run(globals, &args)),
        Verb::SandboxProcess(_) | Verb::ExecProcess(_) | Verb::OomVictim => {
            unreachable!("run() gives these to the sandbox")
        }
    }
}
