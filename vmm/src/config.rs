//! What a virtual machine consists of, as plain data: written by a JSON file, the sandbox or a test,
//! read once by the builder.

mod disk;
mod memory;
mod pmem;
mod problems;
mod rate_limit;
mod share;

use std::collections::BTreeSet;
use std::path::PathBuf;

use arch::machine::Protocol;
use devices::virtio::net::MAX_PAIRS;
use serde::{Deserialize, Serialize};

pub use disk::{DiskConfig, DiskEngine};
pub use memory::{MemoryBacking, MemoryConfig};
pub use pmem::PmemConfig;
pub(crate) use problems::Problems;
pub use rate_limit::RateLimitConfig;
pub use share::{CachePolicy, MAX_ALL_DAX_MIB, MAX_DAX_MIB, ShareConfig};

/// Most vCPUs of one VM: what the guest kernels we build are configured for.
pub const MAX_VCPUS: u8 = 64;

/// Most devices that can be attached to a running VM: interrupt lines are few.
pub const MAX_SPARE_SLOTS: u8 = 8;

/// Least RAM, in MiB: below it no kernel finds room for itself and its initrd.
pub const MIN_MEMORY_MIB: u32 = 16;

/// Most RAM, in MiB (1 TiB): what 46 physical address bits, usual in servers, hold many times over.
/// Processors with 39 bits, as in desktops, reach half of it.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;

/// Size of what is plugged in at once, in MiB.
const BLOCK_MIB: u32 = 2;

/// Longest name of a network interface, in bytes: IFNAMSIZ less the terminating zero.
const MAX_TAP_BYTES: usize = 15;

/// Longest kernel command line, in bytes: what no kernel exceeds (`COMMAND_LINE_SIZE`). What the machine
/// adds is checked against the kernel's own.
const MAX_CMDLINE_BYTES: usize = 2047;

/// Longest path of the guest's unix socket, in bytes: what unix(7) allows, less `_` and a port.
const MAX_VSOCK_SOCKET_BYTES: usize = 107 - 11;

/// First context identifier a guest may have; 0 to 2 name hypervisor, loopback and host
/// (virtio 1.2, section 5.10.4).
const MIN_GUEST_CID: u32 = 3;

/// A whole virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// Number of virtual processors, 1 to [`MAX_VCPUS`].
    #[serde(default = "one")]
    pub vcpus: u8,
    /// How many of them there can be in all, `vcpus` (the default) to [`MAX_VCPUS`]: the guest is told
    /// of so many, starts with `vcpus`, and can bring further ones online once they are granted.
    #[serde(default)]
    pub max_vcpus: Option<u8>,
    /// Guest RAM.
    #[serde(default)]
    pub memory: MemoryConfig,
    /// What the guest boots from.
    pub boot: BootConfig,
    /// Where the guest's console goes.
    #[serde(default)]
    pub console: ConsoleConfig,
    /// Block devices, in the order the guest names them.
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    /// Network interfaces, in the order the guest names them.
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Files mapped into the guest's memory, in the order the guest names them.
    #[serde(default)]
    pub pmem: Vec<PmemConfig>,
    /// Host directories the guest can mount.
    #[serde(default)]
    pub shares: Vec<ShareConfig>,
    /// The socket device, if there is one.
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    /// Whether the guest gets an entropy device.
    #[serde(default = "yes")]
    pub rng: bool,
    /// The memory balloon, if there is one.
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    /// How many disks and network interfaces can be attached while the guest runs, 0 to
    /// [`MAX_SPARE_SLOTS`]; each costs the guest a look at its boot.
    #[serde(default)]
    pub spare_slots: u8,
    /// Whether each thread of the machine may make only the system calls it needs, and ends the
    /// process with any other. To start with it fails where nobody has written those down.
    #[serde(default = "yes")]
    pub seccomp: bool,
    /// Who the machine's threads are once it runs, if this process is root; everything is opened
    /// before. Only the thread that serves `shares`, if there are any, stays root: it acts for every
    /// user of the guest.
    #[serde(default)]
    pub user: Option<UserConfig>,
}

/// A user of the host, who need not have a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserConfig {
    /// User id, not 0.
    pub uid: u32,
    /// Group id, not 0; the only group.
    pub gid: u32,
}

/// What the guest boots from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The kernel: an ELF `vmlinux` or a `bzImage`.
    pub kernel: PathBuf,
    /// The initial RAM disk, which must not be empty.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel parameters, appended to those the machine needs.
    #[serde(default)]
    pub cmdline: String,
    /// How the kernel is entered.
    #[serde(default)]
    pub protocol: BootProtocol,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BootProtocol {
    /// As Linux is, unless the kernel has only a PVH entry.
    #[default]
    Auto,
    /// By the protocol of Linux, in 64-bit mode on x86_64.
    Linux,
    /// By the PVH entry that an ELF kernel names in a note; x86_64 only.
    Pvh,
}

impl From<BootProtocol> for Option<Protocol> {
    fn from(protocol: BootProtocol) -> Self {
        match protocol {
            BootProtocol::Auto => None,
            BootProtocol::Linux => Some(Protocol::Linux),
            BootProtocol::Pvh => Some(Protocol::Pvh),
        }
    }
}

/// Where the guest's console goes, beside the ring that always keeps its last lines.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Whether the console is a 16550 UART, which also shows the kernel's early messages, costs an
    /// exit per character and has no input, instead of the virtio console.
    #[serde(default)]
    pub serial: bool,
    /// Where its output goes.
    #[serde(default)]
    pub output: ConsoleOutput,
}

/// Where console output goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleOutput {
    /// Only to the ring of last lines.
    #[default]
    Discard,
    /// To this process's standard output, whose reader the guest waits for; standard input is the
    /// input of a virtio console.
    Stdout,
    /// To the end of this file, which is created if need be. A FIFO must have a reader, for whom the guest
    /// waits when it is full.
    File(PathBuf),
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Name of the host's tap interface in this process's network namespace.
    pub tap: String,
    /// Whether the tap is made if it is not there, to vanish with the VM. Else that is an error.
    #[serde(default)]
    pub create: bool,
    /// The guest's hardware address, as `02:00:00:00:00:01`, another one for each interface.
    pub mac: String,
    /// Number of queue pairs, 1 to [`MAX_PAIRS`]; a guest uses at most one a vCPU. A tap that
    /// is not made here must have been made with `multi_queue` if there are several.
    #[serde(default = "one")]
    pub queue_pairs: u16,
    /// Whether the host's kernel moves the frames.
    #[serde(default)]
    pub vhost: VhostUse,
    /// How much the guest may receive, counting frames without virtio headers; what is too much
    /// waits in the tap, which drops frames when it is full. Not with `vhost` on.
    #[serde(default)]
    pub receive_limit: RateLimitConfig,
    /// How much the guest may transmit; what is too much waits in the guest. Not with `vhost` on.
    #[serde(default)]
    pub transmit_limit: RateLimitConfig,
}

/// Whether the host's kernel (vhost-net) moves the frames between tap and guest instead of the VMM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VhostUse {
    /// If it can, and need not keep to a limit.
    #[default]
    Auto,
    /// Yes, or there is no VM.
    On,
    /// No.
    Off,
}

/// The socket device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context identifier, at least 3. It needs to be unique only within this VM: no
    /// kernel of the host takes part.
    pub cid: u32,
    /// A unix socket to be made here, through which processes of the host reach the guest: they say
    /// `CONNECT <port>\n` and read `OK <host port>\n`. Connections of the guest to port P of the
    /// host go to the unix socket `<socket>_<P>`. At most 96 bytes.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

/// The memory balloon: how memory the guest does not need comes back to the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much of its memory the guest shall hand to the host at once, in MiB, less than it has.
    #[serde(default)]
    pub target_mib: u32,
    /// Whether the guest may take memory back before it kills a process for want of it.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// Whether every large piece of memory that the guest frees comes back without anyone asking.
    #[serde(default)]
    pub free_page_reporting: bool,
    /// Whether the host can ask for all memory that is free at the moment.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest tells how it uses its memory when it is asked.
    #[serde(default)]
    pub statistics: bool,
}

/// A field whose value cannot be, and the rule it breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{field}: {rule}")]
pub struct ConfigError {
    /// Path of the field in the configuration, as `disks[0].id`.
    pub field: String,
    /// What a valid value looks like, and what was found.
    pub rule: String,
}

impl VmConfig {
    /// A machine with one vCPU, the default memory and no device but entropy and console.
    pub fn new(kernel: PathBuf) -> Self {
        VmConfig {
            vcpus: one(),
            max_vcpus: None,
            memory: MemoryConfig::default(),
            boot: BootConfig::new(kernel),
            console: ConsoleConfig::default(),
            disks: Vec::new(),
            nets: Vec::new(),
            pmem: Vec::new(),
            shares: Vec::new(),
            vsock: None,
            rng: yes(),
            balloon: None,
            spare_slots: 0,
            seccomp: yes(),
            user: None,
        }
    }

    /// How many vCPUs the guest can ever have.
    pub fn most_vcpus(&self) -> u8 {
        self.max_vcpus.unwrap_or(self.vcpus)
    }

    /// Checks every rule that needs no look at the host; the error is the first that is broken.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.problems().into_result()
    }

    /// The rules that are broken, of those that need no look at the host.
    pub(crate) fn problems(&self) -> Problems {
        let mut found = Problems::default();
        found.in_range("vcpus", self.vcpus, 1, MAX_VCPUS);
        if let Some(most) = self.max_vcpus {
            found.in_range("max_vcpus", most, self.vcpus.clamp(1, MAX_VCPUS), MAX_VCPUS);
        }
        self.memory.validate(&mut found);
        self.boot.validate(&mut found);
        if let ConsoleOutput::File(path) = &self.console.output {
            found.not_empty("console.output.file", path);
        }
        disk::validate(&self.disks, &mut found);
        validate_nets(&self.nets, &mut found);
        pmem::validate(&self.pmem, &mut found);
        share::validate(&self.shares, &mut found);
        found.in_range("spare_slots", self.spare_slots, 0, MAX_SPARE_SLOTS);
        if let Some(balloon) = &self.balloon {
            let most = self.memory.size_mib.saturating_sub(1);
            found.in_range("balloon.target_mib", balloon.target_mib, 0, most);
        }
        if let Some(user) = &self.user {
            // All ones means "as it is" (setresuid(2)).
            found.in_range("user.uid", user.uid, 1, u32::MAX - 1);
            found.in_range("user.gid", user.gid, 1, u32::MAX - 1);
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate(&mut found);
        }
        found
    }
}

impl BootConfig {
    /// A kernel without anything else.
    pub fn new(kernel: PathBuf) -> Self {
        let protocol = BootProtocol::default();
        BootConfig { kernel, initrd: None, cmdline: String::new(), protocol }
    }

    fn validate(&self, found: &mut Problems) {
        found.not_empty("boot.kernel", &self.kernel);
        if let Some(initrd) = &self.initrd {
            found.not_empty("boot.initrd", initrd);
        }
        if self.cmdline.bytes().any(|byte| byte < b' ' || byte == 0x7f) {
            found.add("boot.cmdline", "must be one line without control characters");
        }
        if self.cmdline.len() > MAX_CMDLINE_BYTES {
            let bytes = self.cmdline.len();
            let rule = format!("must have at most {MAX_CMDLINE_BYTES} bytes, not {bytes}");
            found.add("boot.cmdline", rule);
        }
    }
}

impl VsockConfig {
    fn validate(&self, found: &mut Problems) {
        // All ones means "any" (VMADDR_CID_ANY).
        found.in_range("vsock.cid", self.cid, MIN_GUEST_CID, u32::MAX - 1);
        let Some(socket) = &self.socket else { return };
        found.not_empty("vsock.socket", socket);
        let bytes = socket.as_os_str().len();
        if bytes > MAX_VSOCK_SOCKET_BYTES {
            let rule = format!("must have at most {MAX_VSOCK_SOCKET_BYTES} bytes, not {bytes}");
            found.add("vsock.socket", rule);
        }
    }
}

impl NetConfig {
    /// An interface of one queue pair on the existing `tap`, with the hardware address `mac`.
    pub fn new(tap: impl Into<String>, mac: impl Into<String>) -> Self {
        NetConfig {
            tap: tap.into(),
            create: false,
            mac: mac.into(),
            queue_pairs: one(),
            vhost: VhostUse::default(),
            receive_limit: RateLimitConfig::default(),
            transmit_limit: RateLimitConfig::default(),
        }
    }

    /// Checks every rule that needs no look at the host.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let mut found = Problems::default();
        validate_nets(std::slice::from_ref(self), &mut found);
        found.into_result()
    }

    /// Whether the guest may receive or transmit only so much.
    pub(crate) fn is_limited(&self) -> bool {
        let unlimited = RateLimitConfig::default();
        self.receive_limit != unlimited || self.transmit_limit != unlimited
    }

    /// The hardware address as bytes; `None` unless it is six hexadecimal bytes with colons between
    /// and names one station.
    pub fn mac_bytes(&self) -> Option<[u8; 6]> {
        let mut bytes = [0; 6];
        let mut parts = self.mac.split(':');
        for byte in &mut bytes {
            let hexadecimal = |part: &&str| part.len() == 2 && !part.starts_with('+');
            let part = parts.next().filter(hexadecimal)?;
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        let multicast = bytes[0] & 1 != 0;
        (parts.next().is_none() && !multicast && bytes != [0; 6]).then_some(bytes)
    }
}

fn one<N: From<u8>>() -> N {
    1.into()
}

fn yes() -> bool {
    true
}

fn validate_nets(nets: &[NetConfig], found: &mut Problems) {
    let (mut seen, mut seen_macs) = (BTreeSet::new(), BTreeSet::new());
    for (index, net) in nets.iter().enumerate() {
        let field = |name: &str| format!("nets[{index}].{name}");
        found.name_of(&field("tap"), &net.tap, MAX_TAP_BYTES, &mut seen);
        found.in_range(&field("queue_pairs"), net.queue_pairs, 1, MAX_PAIRS);
        net.receive_limit.validate(&field("receive_limit"), found);
        net.transmit_limit.validate(&field("transmit_limit"), found);
        if net.vhost == VhostUse::On && net.is_limited() {
            let rule =
                "must not be on for an interface with a limit, which the kernel does not keep";
            found.add(&field("vhost"), rule);
        }
        let mac = &net.mac;
        match net.mac_bytes() {
            None => {
                let rule = format!(
                    "must be the address of one station, as 02:00:00:00:00:01, not {mac:?}"
                );
                found.add(&field("mac"), rule);
            }
            Some(bytes) if !seen_macs.insert(bytes) => {
                found.add(&field("mac"), format!("must be used once, but {mac:?} is there twice"));
            }
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use devices::virtio::rate_limit::Rate;

    use super::*;

    fn parse(json: &str) -> VmConfig {
        serde_json::from_str(json).unwrap()
    }

    fn refused(json: &str) -> String {
        parse(json).validate().unwrap_err().to_string()
    }

    #[test]
    fn a_kernel_is_all_that_must_be_given() {
        let config = parse(r#"{"boot": {"kernel": "/k"}}"#);

        assert_eq!(config, VmConfig::new("/k".into()));
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn an_unknown_field_is_refused_by_name() {
        let error =
            serde_json::from_str::<VmConfig>(r#"{"boot": {"kernel": "/k", "intrd": "/i"}}"#)
                .unwrap_err()
                .to_string();

        assert!(error.contains("unknown field `intrd`"), "{error}");
    }

    #[test]
    fn a_configuration_survives_being_written_and_read() {
        let mut config = VmConfig::new("/k".into());
        config.console.output = ConsoleOutput::File("/log".into());
        config.vsock = Some(VsockConfig { cid: 3, socket: Some("/vsock".into()) });

        let json = serde_json::to_string(&config).unwrap();

        assert_eq!(parse(&json), config);
    }

    #[test]
    fn no_vcpu_is_refused() {
        let error = refused(r#"{"vcpus": 0, "boot": {"kernel": "/k"}}"#);
        assert_eq!(error, "vcpus: must be 1 to 64, not 0");
    }

    #[test]
    fn there_can_be_no_fewer_vcpus_than_there_are() {
        let error = refused(r#"{"vcpus": 4, "max_vcpus": 2, "boot": {"kernel": "/k"}}"#);
        assert_eq!(error, "max_vcpus: must be 4 to 64, not 2");
    }

    #[test]
    fn a_machine_has_no_more_spare_slots_than_lines() {
        let error = refused(r#"{"spare_slots": 9, "boot": {"kernel": "/k"}}"#);
        assert_eq!(error, "spare_slots: must be 0 to 8, not 9");
    }

    #[test]
    fn memory_may_be_kept_in_a_file() {
        let backing = |json: &str| {
            let json =
                format!(r#"{{"memory": {{"size_mib": 64{json}}}, "boot": {{"kernel": "/k"}}}}"#);
            let config = parse(&json);
            config.validate().map(|()| config.memory.backing)
        };

        assert_eq!(backing(""), Ok(MemoryBacking::Anonymous));
        assert_eq!(backing(r#", "backing": "memfd""#), Ok(MemoryBacking::Memfd));
        let file = backing(r#", "backing": {"file": "/m"}"#);
        assert_eq!(file, Ok(MemoryBacking::File("/m".into())));
        let error = backing(r#", "backing": "memfd", "mergeable": true"#).unwrap_err();
        assert_eq!(error.field, "memory.mergeable");
    }

    #[test]
    fn too_little_memory_is_refused() {
        let error = refused(r#"{"memory": {"size_mib": 1}, "boot": {"kernel": "/k"}}"#);
        assert_eq!(error, "memory.size_mib: must be 16 to 1048576, not 1");
    }

    #[test]
    fn half_a_block_of_memory_is_refused() {
        let error = refused(
            r#"{"memory": {"size_mib": 64, "pluggable_mib": 3}, "boot": {"kernel": "/k"}}"#,
        );
        assert_eq!(error, "memory.pluggable_mib: must be a multiple of 2");
    }

    #[test]
    fn a_command_line_of_two_lines_is_refused() {
        let error = refused(r#"{"boot": {"kernel": "/k", "cmdline": "a\nb"}}"#);
        assert_eq!(error, "boot.cmdline: must be one line without control characters");
    }

    #[test]
    fn a_command_line_longer_than_any_kernel_takes_is_refused() {
        let cmdline = "x".repeat(2048);
        let error = refused(&format!(r#"{{"boot": {{"kernel": "/k", "cmdline": "{cmdline}"}}}}"#));
        assert_eq!(error, "boot.cmdline: must have at most 2047 bytes, not 2048");
    }

    #[test]
    fn an_id_used_twice_is_refused() {
        let error = refused(
            r#"{"boot": {"kernel": "/k"},
                "disks": [{"id": "a", "path": "/1"}, {"id": "a", "path": "/2"}]}"#,
        );
        assert_eq!(error, r#"disks[1].id: must be used once, but "a" is there twice"#);
    }

    fn refused_disk(fields: &str) -> String {
        refused(&format!(
            r#"{{"boot": {{"kernel": "/k"}}, "disks": [{{"id": "a", "path": "/1", {fields}}}]}}"#
        ))
    }

    #[test]
    fn too_many_queues_of_a_disk_are_refused() {
        assert_eq!(refused_disk(r#""queues": 17"#), "disks[0].queues: must be 1 to 16, not 17");
    }

    #[test]
    fn a_disk_is_written_through_one_queue_unless_it_says_otherwise() {
        let config = parse(
            r#"{"boot": {"kernel": "/k"}, "disks": [
                {"id": "a", "path": "/1"},
                {"id": "b", "path": "/2", "queues": 4, "direct": true, "engine": "io_uring"}]}"#,
        );

        let chosen = DiskConfig {
            queues: 4,
            direct: true,
            engine: DiskEngine::IoUring,
            ..DiskConfig::new("b", "/2".into())
        };
        assert_eq!(config.disks, [DiskConfig::new("a", "/1".into()), chosen]);
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn a_rate_of_nothing_is_refused() {
        let error = refused_disk(r#""rate_limit": {"operations_per_second": 0}"#);
        let rule = "must be 1 to 18446744073709551615, not 0";
        assert_eq!(error, format!("disks[0].rate_limit.operations_per_second: {rule}"));
    }

    #[test]
    fn a_burst_without_a_rate_is_refused() {
        let error = refused_disk(r#""rate_limit": {"bytes_burst": 4096}"#);
        let rule = "must come with disks[0].rate_limit.bytes_per_second";
        assert_eq!(error, format!("disks[0].rate_limit.bytes_burst: {rule}"));
    }

    #[test]
    fn a_burst_is_a_seconds_worth_unless_given() {
        let limits = RateLimitConfig {
            bytes_per_second: Some(1000),
            operations_per_second: Some(10),
            operations_burst: Some(3),
            ..RateLimitConfig::default()
        }
        .limits();

        let burst = |rate: Option<Rate>| rate.unwrap().burst.get();
        assert_eq!((burst(limits.bytes), burst(limits.operations)), (1000, 3));
    }

    #[test]
    fn a_multicast_hardware_address_is_refused() {
        let error = refused(
            r#"{"boot": {"kernel": "/k"}, "nets": [{"tap": "t", "mac": "01:00:00:00:00:01"}]}"#,
        );
        assert!(error.starts_with("nets[0].mac: must be the address of one station"), "{error}");
    }

    #[test]
    fn two_interfaces_with_one_hardware_address_are_refused() {
        let error = refused(
            r#"{"boot": {"kernel": "/k"}, "nets": [
                {"tap": "a", "mac": "02:00:00:00:00:0a"}, {"tap": "b", "mac": "02:00:00:00:00:0A"}]}"#,
        );
        assert_eq!(
            error,
            r#"nets[1].mac: must be used once, but "02:00:00:00:00:0A" is there twice"#
        );
    }

    #[test]
    fn every_rule_that_is_broken_is_told_of() {
        let config = parse(
            r#"{"vcpus": 0, "memory": {"size_mib": 0}, "boot": {"kernel": ""}, "spare_slots": 9,
                "console": {"output": {"file": ""}},
                "disks": [{"id": "", "path": "", "queues": 0}], "balloon": {"target_mib": 1},
                "nets": [{"tap": "", "mac": "", "queue_pairs": 0}], "vsock": {"cid": 2, "socket": ""},
                "user": {"uid": 0, "gid": 0}}"#,
        );

        let problems = config.problems().into_all();

        let fields: Vec<&str> = problems.iter().map(|problem| problem.field.as_str()).collect();
        let wanted = "vcpus memory.size_mib boot.kernel console.output.file disks[0].id disks[0].path \
                      disks[0].queues nets[0].tap nets[0].queue_pairs nets[0].mac spare_slots \
                      balloon.target_mib user.uid user.gid vsock.cid vsock.socket";
        assert_eq!(fields.join(" "), wanted);
    }

    #[test]
    fn a_network_interface_without_a_queue_is_refused() {
        let error = refused(
            r#"{"boot": {"kernel": "/k"},
                "nets": [{"tap": "t", "mac": "02:00:00:00:00:01", "queue_pairs": 0}]}"#,
        );
        assert_eq!(error, "nets[0].queue_pairs: must be 1 to 16, not 0");
    }

    #[test]
    fn a_limit_the_hosts_kernel_would_not_keep_is_refused() {
        let mut net = NetConfig::new("t", "02:00:00:00:00:01");
        net.vhost = VhostUse::On;
        net.transmit_limit.bytes_per_second = Some(1);

        let error = net.validate().unwrap_err();

        assert!(error.to_string().starts_with("nets[0].vhost: must not be on"), "{error}");
    }

    #[test]
    fn a_tap_is_one_that_exists_unless_said_otherwise() {
        let config = parse(
            r#"{"boot": {"kernel": "/k"}, "nets": [{"tap": "t", "mac": "02:00:00:00:00:01"}]}"#,
        );
        assert_eq!(config.nets, [NetConfig::new("t", "02:00:00:00:00:01")]);
        assert!(!config.nets[0].create);
    }

    #[test]
    fn a_hardware_address_is_six_bytes() {
        let mac = |text: &str| NetConfig::new("t", text).mac_bytes();

        assert_eq!(mac("02:00:00:ab:CD:ef"), Some([2, 0, 0, 0xab, 0xcd, 0xef]));
        assert_eq!(mac("02:00:00:ab:cd"), None);
        assert_eq!(mac("02:00:00:ab:cd:ef:00"), None);
        assert_eq!(mac("2:00:00:ab:cd:ef"), None);
        assert_eq!(mac("+2:00:00:ab:cd:ef"), None);
    }

    fn refused_share(fields: &str) -> String {
        let share = format!(r#"{{"tag": "t", "path": "/", {fields}}}"#);
        refused(&format!(r#"{{"boot": {{"kernel": "/k"}}, "shares": [{share}]}}"#))
    }

    #[test]
    fn a_window_of_half_a_slot_or_more_than_there_can_be_is_refused() {
        let odd = refused_share(r#""dax_mib": 3"#);
        let large = refused_share(r#""dax_mib": 16386"#);

        assert_eq!(odd, "shares[0].dax_mib: must be even, not 3");
        assert_eq!(large, "shares[0].dax_mib: must be 0 to 16384, not 16386");
    }

    #[test]
    fn windows_that_could_use_up_the_mappings_of_the_process_are_refused() {
        let mut config = VmConfig::new("/k".into());
        let share = |tag| ShareConfig { dax_mib: MAX_DAX_MIB, ..ShareConfig::new(tag, "/".into()) };
        config.shares = vec![share("a"), share("b")];
        assert!(config.validate().is_ok());

        config.shares.push(ShareConfig { dax_mib: 2, ..share("c") });
        let error = config.validate().unwrap_err();

        let expected = "shares[2].dax_mib: must be at most 32768 of all shares together";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn a_guest_that_believes_nothing_keeps_no_writes() {
        let error = refused_share(r#""cache": "never", "writeback": true"#);

        assert_eq!(error, "shares[0].writeback: must not be on with cache never");
    }

    #[test]
    fn a_tag_of_37_bytes_is_refused() {
        let mut config = VmConfig::new("/k".into());
        let tag = "t".repeat(37);
        config.shares = vec![ShareConfig::new(&tag, "/".into())];

        let error = config.validate().unwrap_err();

        assert_eq!(error.to_string(), "shares[0].tag: must have 1 to 36 bytes, not 37");
    }

    #[test]
    fn a_balloon_as_large_as_the_memory_is_refused() {
        let error = refused(
            r#"{"boot": {"kernel": "/k"}, "memory": {"size_mib": 64},
                "balloon": {"target_mib": 64}}"#,
        );
        assert_eq!(error, "balloon.target_mib: must be 0 to 63, not 64");
    }

    #[test]
    fn a_socket_path_without_room_for_a_port_is_refused() {
        let mut config = VmConfig::new("/k".into());
        let socket = Some(format!("/{}", "s".repeat(96)).into());
        config.vsock = Some(VsockConfig { cid: 3, socket });

        let error = config.validate().unwrap_err();

        assert_eq!(error.to_string(), "vsock.socket: must have at most 96 bytes, not 97");
    }

    #[test]
    fn the_hosts_own_cid_is_refused() {
        let error = refused(r#"{"boot": {"kernel": "/k"}, "vsock": {"cid": 2}}"#);
        assert_eq!(error, "vsock.cid: must be 3 to 4294967294, not 2");
    }
}
