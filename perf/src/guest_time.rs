//! How long a virtual processor was in its guest, by the tracepoints of the host's KVM
//! (Documentation/trace/ftrace.rst).

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};

const TRACING: &str = "/sys/kernel/tracing";
const EVENTS: [&str; 2] = ["kvm_entry", "kvm_exit"];
/// Room for each processor's events: some hundred thousand.
const BUFFER_KIB: &str = "65536";

/// What `body` gives, and for how many milliseconds guests ran meanwhile. The host's way from one
/// tracepoint into the guest and from the guest to the other one is counted as the guest's.
pub fn during<T>(body: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    if !Path::new(TRACING).join("trace").exists() {
        mount(Some("tracefs"), TRACING, Some("tracefs"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount {TRACING}"))?;
    }
    set("buffer_size_kb", BUFFER_KIB)?;
    set("trace", "")?;
    enable(true)?;
    let result = body();
    enable(false)?;
    let path = Path::new(TRACING).join("trace");
    let trace = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    // The smallest there is.
    set("buffer_size_kb", "1")?;
    Ok((result?, guest_ms(&trace)?))
}

fn enable(is_wanted: bool) -> Result<()> {
    let value = if is_wanted { "1" } else { "0" };
    EVENTS.iter().try_for_each(|event| set(&format!("events/kvm/{event}/enable"), value))
}

fn set(file: &str, value: &str) -> Result<()> {
    let path = Path::new(TRACING).join(file);
    fs::write(&path, value).with_context(|| format!("write {}", path.display()))
}

/// Sums up the time from each entry to the exit that follows it, for each thread.
fn guest_ms(trace: &str) -> Result<f64> {
    let mut entries = HashMap::new();
    let mut sum = 0.0;
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
        if *event == EVENTS[0] {
            entries.insert(thread.trim().to_owned(), seconds);
        } else if let Some(entered) = entries.remove(thread.trim()) {
            sum += seconds - entered;
        }
    }
    if sum == 0.0 {
        bail!("the trace says of no guest that it ran");
    }
    Ok(sum * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "# entries-in-buffer/entries-written: 4/4   #P:1\n\
        #           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION\n\
        \x20         vcpu 0-123     [000] d..1.     7.000100: kvm_entry: vcpu 0, rip 0x1\n\
        \x20         vcpu 0-123     [000] d..1.     7.002100: kvm_exit: vcpu 0 reason npf\n\
        \x20         vcpu 0-123     [000] d..1.     7.003000: kvm_entry: vcpu 0, rip 0x1\n\
        \x20         vcpu 0-123     [000] d..1.     7.003500: kvm_exit: vcpu 0 reason hlt\n";

    #[test]
    fn the_time_in_the_guest_is_that_between_entries_and_exits() {
        assert_eq!((guest_ms(TRACE).unwrap() * 1e3).round(), 2500.0);
    }

    #[test]
    fn a_trace_with_holes_gives_no_figure() {
        let error = guest_ms(&TRACE.replace("4/4", "4/9")).unwrap_err().to_string();

        assert_eq!(error, "the trace lost events: 4/9");
    }

    #[test]
    fn a_trace_without_a_guest_gives_no_figure() {
        assert!(guest_ms("# entries-in-buffer/entries-written: 0/0   #P:1\n").is_err());
    }
}
