//! Metrics in the Prometheus text format, version 0.0.4.

use std::fmt::{Display, Write};

use crate::metrics::{DeviceCounts, Metrics};

/// What an HTTP answer with this text says it is.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

const NS_PER_SECOND: u64 = 1_000_000_000;

impl Metrics {
    /// The metrics in the Prometheus text format; names begin with `coracle_`.
    pub fn to_prometheus(&self) -> String {
        let mut text = String::new();
        let exits = &self.exits;
        let reasons = [
            ("read", exits.reads),
            ("write", exits.writes),
            ("handled", exits.handled),
            ("signal", exits.signals),
        ];
        family(&mut text, "exits_total", "counter", "Exits of all vCPUs to user space.");
        samples(&mut text, "exits_total", "reason", reasons);
        family(&mut text, "accesses_total", "counter", "Accesses to device registers.");
        samples(&mut text, "accesses_total", "address", &exits.by_address);
        samples(&mut text, "accesses_total", "address", [("other", exits.other_addresses)]);

        let kicks = ("device_kicks_total", "Times a queue of the device was served.");
        self.devices(&mut text, kicks, |counts| counts.kicks);
        let interrupts = ("device_interrupts_total", "Interrupts of the device.");
        self.devices(&mut text, interrupts, |counts| counts.interrupts);
        let chains = ("device_chains_total", "Descriptor chains the device gave back.");
        self.devices(&mut text, chains, |counts| counts.chains);

        let help = "When the boot passed this stage, since its begin.";
        family(&mut text, "boot_seconds", "gauge", help);
        let stages = [
            ("loaded", self.loaded_ns),
            ("machine", self.machine_ns),
            ("devices", self.devices_ns),
            ("built", self.built_ns),
            ("first_entry", self.first_entry_ns),
        ];
        let passed = stages.into_iter().filter(|&(_, ns)| ns != 0);
        let since = |ns: u64| seconds(ns.saturating_sub(self.started_ns));
        samples(&mut text, "boot_seconds", "stage", passed.map(|(stage, ns)| (stage, since(ns))));
        text
    }

    fn devices(
        &self,
        text: &mut String,
        (name, help): (&str, &str),
        count: impl Fn(&DeviceCounts) -> u64,
    ) {
        family(text, name, "counter", help);
        let devices = self.devices.iter().map(|(device, counts)| (device, count(counts)));
        samples(text, name, "device", devices);
    }
}

fn family(text: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a String cannot fail, here and below.
    let _ = write!(text, "# HELP coracle_{name} {help}\n# TYPE coracle_{name} {kind}\n");
}

fn samples<L: AsRef<str>, V: Display>(
    text: &mut String,
    name: &str,
    label: &str,
    values: impl IntoIterator<Item = (L, V)>,
) {
    for (of, value) in values {
        let of = of.as_ref().replace('\\', r"\\").replace('"', "\\\"").replace('\n', r"\n");
        let _ = writeln!(text, "coracle_{name}{{{label}=\"{of}\"}} {value}");
    }
}

fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / NS_PER_SECOND, ns % NS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_a_type_and_a_label() {
        let mut metrics = Metrics::default();
        metrics.exits.reads = 7;
        metrics.exits.by_address.insert("port 0x3f8".to_owned(), 5);

        let text = metrics.to_prometheus();

        assert!(text.contains("# TYPE coracle_exits_total counter\n"), "{text}");
        assert!(text.contains("\ncoracle_exits_total{reason=\"read\"} 7\n"), "{text}");
        assert!(text.contains("\ncoracle_accesses_total{address=\"port 0x3f8\"} 5\n"), "{text}");
    }

    #[test]
    fn a_device_with_a_quote_in_its_name_stays_in_its_label() {
        let mut metrics = Metrics::default();
        let counts = DeviceCounts { kicks: 1, interrupts: 2, chains: 3 };
        metrics.devices.insert("disk a\"b\\".to_owned(), counts);

        let text = metrics.to_prometheus();

        let expected = "\ncoracle_device_chains_total{device=\"disk a\\\"b\\\\\"} 3\n";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn only_stages_that_were_passed_are_there() {
        let metrics = Metrics { started_ns: 5, built_ns: 2_000_000_006, ..Metrics::default() };

        let text = metrics.to_prometheus();

        assert!(text.ends_with("\ncoracle_boot_seconds{stage=\"built\"} 2.000000001\n"), "{text}");
        assert!(!text.contains("first_entry"), "{text}");
    }
}
