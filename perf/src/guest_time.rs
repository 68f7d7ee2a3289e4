//! How long virtual processors were in their guests, and how often they left them, by the tracepoints
//! of the host's KVM (Documentation/trace/ftrace.rst).

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};

const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: [&str; 3] = [ENTRY, EXIT, EXIT_TO_USER];
const ENTRY: &str = "kvm_entry";
const EXIT: &str = "kvm_exit";
const EXIT_TO_USER: &str = "kvm_userspace_exit";
/// What the last one says, unless a signal or an error ended the guest's run.
const EXIT_REASON: &str = "reason KVM_EXIT_";
/// Room for each processor's events: some hundred thousand.
const BUFFER_KIB: &str = "65536";

/// What guests did for a while.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Guests {
    /// For how many milliseconds they ran. The host's way from one tracepoint into the guest and from the
    /// guest to the other one is counted as theirs.
    pub ms: f64,
    /// How often they were left, by what the host's KVM calls the reason.
    pub exits: BTreeMap<String, u32>,
    /// How often for the process that they belong to.
    pub exits_to_user: u32,
}

impl Guests {
    /// How often they were left.
    pub fn all_exits(&self) -> u32 {
        self.exits.values().sum()
    }
}

/// What the host's KVM notes of guests, for as long as this is there.
pub struct Watch(());

impl Watch {
    /// Begins to note.
    pub fn start() -> Result<Self> {
        if !Path::new(TRACING).join("trace").exists() {
            mount(Some("tracefs"), TRACING, Some("tracefs"), MsFlags::empty(), None::<&str>)
                .with_context(|| format!("mount {TRACING}"))?;
        }
        set("buffer_size_kb", BUFFER_KIB)?;
        set("trace", "")?;
        let watch = Watch(());
        enable(true)?;
        Ok(watch)
    }

    /// What guests did since then.
    pub fn stop(self) -> Result<Guests> {
        enable(false)?;
        let path = Path::new(TRACING).join("trace");
        let trace =
            fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        guests(&trace)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The smallest there is. What fails here was reported where it was begun.
        let _ = enable(false).and_then(|()| set("buffer_size_kb", "1"));
    }
}

fn enable(is_wanted: bool) -> Result<()> {
    let value = if is_wanted { "1" } else { "0" };
    EVENTS.iter().try_for_each(|event| set(&format!("events/kvm/{event}/enable"), value))
}

fn set(file: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACING).join(file);
    fs::write(&path, value).with_context(|| format!("write {}", path.display()))
}

/// Counts, and sums up the time from each entry to the exit that follows it, for each thread.
fn guests(trace: &str) -> Result<Guests> {
    let mut entries = HashMap::new();
    let mut guests = Guests::default();
    for line in trace.lines() {
        if let Some((_, counts)) = line.split_once("entries-in-buffer/entries-written: ") {
            let counts = counts.split_whitespace().next().unwrap_or_default();
            if counts.split_once('/').is_none_or(|(kept, written)| kept != written) {
                bail!("the trace lost events: {counts}");
            }
        }
        let Some(event) = EVENTS.iter().find(|event| line.contains(&format!(": {event}: "))) else {
            continue;
        };
        // Thread, processor in brackets, flags, seconds, event.
        let (thread, rest) = line.split_once(" [").context("a line of the trace")?;
        let seconds = rest.split(": ").next().and_then(|head| head.split_whitespace().last());
        let seconds: f64 = seconds.context("the time of an event")?.parse()?;
        match *event {
            ENTRY => drop(entries.insert(thread.trim().to_owned(), seconds)),
            EXIT_TO_USER if rest.contains(EXIT_REASON) => guests.exits_to_user += 1,
            EXIT => {
                let reason = rest.split_once(EXIT).map_or(rest, |(_, event)| reason(event));
                *guests.exits.entry(reason.to_owned()).or_default() += 1;
                guests.ms +=
                    entries.remove(thread.trim()).map_or(0.0, |entered| seconds - entered) * 1e3;
            }
            _ => {}
        }
    }
    if guests.exits.is_empty() {
        bail!("the trace says of no guest that it ran");
    }
    Ok(guests)
}

/// Why a guest was left, out of `: vcpu 0 reason npf rip 0x…` of an x86 host, `: IRQ: HSR_EC: …` or
/// `: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: …` of an Arm one.
fn reason(event: &str) -> &str {
    let event = event.trim_start_matches(": ");
    if let Some((_, rest)) = event.split_once("reason ") {
        return rest.split(' ').next().unwrap_or(rest);
    }
    match event.split_once(": ") {
        Some(("TRAP", rest)) => rest.split(['(', ')']).nth(1).unwrap_or("TRAP"),
        Some((kind, _)) => kind,
        None => event,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "# entries-in-buffer/entries-written: 6/6   #P:1\n\
        #           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n\
        \x20         vcpu 0-123     [000] d..1.     7.000100: kvm_entry: vcpu 0, rip 0x1\n\
        \x20         vcpu 0-123     [000] d..1.     7.002100: kvm_exit: vcpu 0 reason npf\n\
        \x20         vcpu 0-123     [000] d..1.     7.003000: kvm_entry: vcpu 0, rip 0x1\n\
        \x20         vcpu 0-123     [000] d..1.     7.003500: kvm_exit: vcpu 0 reason io\n\
        \x20         vcpu 0-123     [000] ...1.     7.003600: kvm_userspace_exit: reason KVM_EXIT_IO (2)\n\
        \x20         vcpu 0-123     [000] ...1.     7.003700: kvm_userspace_exit: reason restart (4)\n";

    #[test]
    fn the_time_in_the_guest_is_that_between_entries_and_exits() {
        let guests = guests(TRACE).unwrap();

        assert_eq!((guests.ms * 1e3).round(), 2500.0);
        assert_eq!((guests.all_exits(), guests.exits_to_user), (2, 1));
        assert_eq!(guests.exits, [("io".to_owned(), 1), ("npf".to_owned(), 1)].into());
    }

    #[test]
    fn a_trace_with_holes_gives_no_figure() {
        let error = guests(&TRACE.replace("6/6", "6/9")).unwrap_err().to_string();

        assert_eq!(error, "the trace lost events: 6/9");
    }

    #[test]
    fn a_trace_without_a_guest_gives_no_figure() {
        assert!(guests("# entries-in-buffer/entries-written: 0/0   #P:1\n").is_err());
    }

    #[test]
    fn the_reason_is_found_on_every_host() {
        assert_eq!(reason(": vcpu 0 reason npf rip 0x1 info1 0x7"), "npf");
        assert_eq!(reason(": IRQ: HSR_EC: 0x0000 (UNKNOWN), PC: 0x1"), "IRQ");
        assert_eq!(reason(": TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x1"), "DABT_LOW");
    }
}
