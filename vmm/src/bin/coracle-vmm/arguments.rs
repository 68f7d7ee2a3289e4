//! The command line, and the configuration it makes together with the file it names.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;
use vmm::{
    BalloonConfig, BootProtocol, ConsoleOutput, DiskConfig, MemoryBacking, NetConfig, PmemConfig,
    ShareConfig, UserConfig, VmConfig, VsockConfig,
};

use crate::fields;
use crate::limits::ResourceLimit;

const EXIT_CODES: &str = "\
Exit codes:
  0    the guest powered off
  1    the machine could not be built, or could not go on
  2    wrong arguments
  3    the guest asked for a reset
  4    the guest's processor gave up (triple fault)
  5    stopped through the control socket
  129  stopped by SIGHUP, unless that was ignored when it started (nohup)
  130  stopped by SIGINT
  143  stopped by SIGTERM

A Linux kernel for x86_64 without ACPI cannot power off: it halts, and the machine goes on. There
`reboot` ends it, with 3.";

/// Runs one virtual machine.
#[derive(Parser)]
#[command(name = "coracle-vmm", version, after_help = EXIT_CODES)]
pub struct Arguments {
    /// Machine configuration (JSON)
    #[arg(long, value_name = "FILE", required_unless_present = "kernel")]
    config: Option<PathBuf>,
    /// Kernel: ELF or bzImage, Image on aarch64; overrides boot.kernel
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk; overrides boot.initrd
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel parameters; overrides boot.cmdline
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// How the kernel is entered: auto, linux or pvh; overrides boot.protocol
    #[arg(long, value_name = "PROTOCOL", value_parser = fields::parse_word::<BootProtocol>)]
    boot_protocol: Option<BootProtocol>,
    /// Number of virtual processors; overrides vcpus
    #[arg(long, value_name = "N")]
    vcpus: Option<u8>,
    /// How many of them there can be once more are granted; overrides max_vcpus
    #[arg(long, value_name = "N")]
    max_vcpus: Option<u8>,
    /// Guest memory in MiB; overrides memory.size_mib
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// How much more can be plugged in, in MiB; overrides memory.pluggable_mib
    #[arg(long, value_name = "MIB")]
    pluggable_memory: Option<u32>,
    /// Where guest memory is kept: anonymous, memfd or file=PATH; overrides memory.backing
    #[arg(long, value_name = "STORE", value_parser = backing)]
    memory_backing: Option<MemoryBacking>,
    /// Let the host merge equal pages of different guests; sets memory.mergeable
    #[arg(long)]
    mergeable: bool,
    /// Show the guest's console here; overrides console.output
    #[arg(long)]
    console: bool,
    /// Write the guest's console to the end of this file; overrides console.output
    #[arg(long, value_name = "FILE", conflicts_with = "console")]
    console_file: Option<PathBuf>,
    /// Use a serial port as the console, which shows early messages, too, but has no input; sets
    /// console.serial
    #[arg(long)]
    serial: bool,
    /// Add a block device, as id=root,path=disk.img,read_only; fields of a field follow it, as
    /// rate_limit.bytes_per_second=1000000
    #[arg(long = "disk", value_name = "FIELDS", value_parser = fields::parse::<DiskConfig>)]
    disks: Vec<DiskConfig>,
    /// Add a network interface, as tap=tap0,mac=02:00:00:00:00:01
    #[arg(long = "net", value_name = "FIELDS", value_parser = fields::parse::<NetConfig>)]
    nets: Vec<NetConfig>,
    /// Add a shared directory, as tag=data,path=/srv,read_only
    #[arg(long = "share", value_name = "FIELDS", value_parser = fields::parse::<ShareConfig>)]
    shares: Vec<ShareConfig>,
    /// Give the guest a socket device, as cid=3,socket=vm.sock; overrides vsock
    #[arg(long, value_name = "FIELDS", value_parser = fields::parse::<VsockConfig>)]
    vsock: Option<VsockConfig>,
    /// Map a file into guest memory, as id=image,path=image.erofs,read_only
    #[arg(long = "pmem", value_name = "FIELDS", value_parser = fields::parse::<PmemConfig>)]
    pmem: Vec<PmemConfig>,
    /// Give the guest a memory balloon, as target_mib=64,deflate_on_oom,statistics; overrides balloon
    #[arg(long, value_name = "FIELDS", value_parser = fields::parse::<BalloonConfig>)]
    balloon: Option<BalloonConfig>,
    /// How many disks and network interfaces can be attached while it runs; overrides spare_slots
    #[arg(long, value_name = "N")]
    spare_slots: Option<u8>,
    /// Leave the entropy device out; clears rng
    #[arg(long)]
    no_rng: bool,
    /// Let the machine's threads make any system call; sets seccomp to false
    #[arg(long)]
    no_seccomp: bool,
    /// Who the machine's threads are once it runs, by number; overrides user. Needs root
    #[arg(long, value_name = "UID:GID", value_parser = user)]
    user: Option<UserConfig>,
    /// Move to this folder of the cgroup v2 hierarchy first, which must exist
    #[arg(long, value_name = "PATH")]
    pub cgroup: Option<PathBuf>,
    /// Bound what the process may use: no-file=N open files, fsize=BYTES of each file it writes
    #[arg(long = "resource-limit", value_name = "NAME=VALUE")]
    pub resource_limits: Vec<ResourceLimit>,
    /// Listen for requests on this unix socket (HTTP and JSON, see API.md)
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Build the machine, and start it when the control socket says so
    #[arg(long, requires = "api_socket")]
    pub paused: bool,
    /// Write what the machine cost to this file when it ends (JSON)
    #[arg(long, value_name = "FILE")]
    pub metrics: Option<PathBuf>,
    /// Say what is wrong with the configuration and the files it names, and end; needs no /dev/kvm
    #[arg(long)]
    pub check: bool,
}

impl Arguments {
    /// The configuration file with the arguments' changes.
    pub fn configuration(&self) -> anyhow::Result<VmConfig> {
        let mut config = match &self.config {
            Some(path) => {
                let text = fs::read_to_string(path).with_context(|| format!("read {path:?}"))?;
                vmm::from_json(&text).with_context(|| format!("parse {path:?}"))?
            }
            None => VmConfig::new(PathBuf::new()),
        };
        self.change_machine(&mut config);
        config.disks.extend_from_slice(&self.disks);
        config.nets.extend_from_slice(&self.nets);
        config.shares.extend_from_slice(&self.shares);
        if self.vsock.is_some() {
            config.vsock.clone_from(&self.vsock);
        }
        config.pmem.extend_from_slice(&self.pmem);
        if self.balloon.is_some() {
            config.balloon.clone_from(&self.balloon);
        }
        if let Some(slots) = self.spare_slots {
            config.spare_slots = slots;
        }
        config.rng &= !self.no_rng;
        config.seccomp &= !self.no_seccomp;
        config.user = self.user.or(config.user);
        Ok(config)
    }

    fn change_machine(&self, config: &mut VmConfig) {
        if let Some(kernel) = &self.kernel {
            config.boot.kernel.clone_from(kernel);
        }
        if self.initrd.is_some() {
            config.boot.initrd.clone_from(&self.initrd);
        }
        if let Some(cmdline) = &self.cmdline {
            config.boot.cmdline.clone_from(cmdline);
        }
        config.boot.protocol = self.boot_protocol.unwrap_or(config.boot.protocol);
        if let Some(vcpus) = self.vcpus {
            config.vcpus = vcpus;
        }
        if let Some(memory) = self.memory {
            config.memory.size_mib = memory;
        }
        config.max_vcpus = self.max_vcpus.or(config.max_vcpus);
        if let Some(pluggable) = self.pluggable_memory {
            config.memory.pluggable_mib = pluggable;
        }
        if let Some(backing) = &self.memory_backing {
            config.memory.backing.clone_from(backing);
        }
        config.memory.mergeable |= self.mergeable;
        if self.console {
            config.console.output = ConsoleOutput::Stdout;
        }
        if let Some(path) = &self.console_file {
            config.console.output = ConsoleOutput::File(path.clone());
        }
        config.console.serial |= self.serial;
    }
}

fn user(text: &str) -> Result<UserConfig, String> {
    let numbers = text.split_once(':').and_then(|(uid, gid)| Some((uid, gid.parse().ok()?)));
    let user = numbers.and_then(|(uid, gid)| Some(UserConfig { uid: uid.parse().ok()?, gid }));
    user.ok_or_else(|| "must be two numbers, as 1000:1000".to_owned())
}

fn backing(text: &str) -> Result<MemoryBacking, String> {
    match text.split_once('=') {
        Some(("file", path)) => Ok(MemoryBacking::File(path.into())),
        None if text == "anonymous" => Ok(MemoryBacking::Anonymous),
        None if text == "memfd" => Ok(MemoryBacking::Memfd),
        _ => Err("must be anonymous, memfd or file=PATH".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> VmConfig {
        let program = ["coracle-vmm", "--kernel=/k"];
        Arguments::parse_from(program.iter().chain(arguments)).configuration().unwrap()
    }

    #[test]
    fn a_device_has_the_fields_of_the_file() {
        let config = parse(&["--disk=id=a,path=/d=1,read_only", "--vsock=cid=3,socket=/s"]);

        let disk = DiskConfig { read_only: true, ..DiskConfig::new("a", "/d=1".into()) };
        assert_eq!(config.disks, [disk]);
        assert_eq!(config.vsock, Some(VsockConfig { cid: 3, socket: Some("/s".into()) }));
    }

    #[test]
    fn what_can_change_later_is_asked_for_by_flags() {
        let config = parse(&[
            "--max-vcpus=4",
            "--pluggable-memory=512",
            "--spare-slots=2",
            "--balloon=target_mib=64,statistics",
            "--pmem=id=image,path=/image,read_only",
        ]);

        assert_eq!((config.most_vcpus(), config.spare_slots), (4, 2));
        assert_eq!(config.memory.pluggable_mib, 512);
        let balloon =
            BalloonConfig { target_mib: 64, statistics: true, ..BalloonConfig::default() };
        assert_eq!(config.balloon, Some(balloon));
        assert_eq!((config.pmem[0].id.as_str(), config.pmem[0].read_only), ("image", true));
    }

    #[test]
    fn a_share_has_a_window_of_a_size() {
        let config = parse(&["--share=tag=t,path=/s,dax_mib=64"]);
        assert_eq!(config.shares[0].dax_mib, 64);
    }

    #[test]
    fn numbers_of_a_device_are_numbers() {
        let config = parse(&[
            "--disk=id=7,path=/d,queues=2",
            "--net=tap=t,mac=02:00:00:00:00:01,queue_pairs=3",
        ]);

        assert_eq!((config.disks[0].id.as_str(), config.disks[0].queues), ("7", 2));
        assert_eq!(config.nets[0].queue_pairs, 3);
    }

    #[test]
    fn a_user_is_two_numbers() {
        assert_eq!(parse(&["--user=7:8"]).user, Some(UserConfig { uid: 7, gid: 8 }));
        assert!(user("nobody").is_err());
        assert!(user("7:").is_err());
    }

    #[test]
    fn what_a_machine_boots_from_and_is_kept_in_has_flags() {
        let config = parse(&[
            "--boot-protocol=pvh",
            "--memory-backing=file=/m",
            "--console-file=/log",
            "--disk=id=a,path=/d,rate_limit.bytes_per_second=4096",
        ]);

        assert_eq!(config.boot.protocol, BootProtocol::Pvh);
        assert_eq!(config.memory.backing, MemoryBacking::File("/m".into()));
        assert_eq!(config.console.output, ConsoleOutput::File("/log".into()));
        assert_eq!(config.disks[0].rate_limit.bytes_per_second, Some(4096));
        assert_eq!(backing("memfd"), Ok(MemoryBacking::Memfd));
        assert!(backing("/m").is_err());
    }

    #[test]
    fn arguments_win_over_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), r#"{"vcpus": 2, "boot": {"kernel": "/other"}}"#).unwrap();
        let config = format!("--config={}", file.path().display());

        let config = parse(&[&config, "--memory=64", "--no-rng"]);

        assert_eq!((config.vcpus, config.memory.size_mib, config.rng), (2, 64, false));
        assert_eq!(config.boot.kernel, PathBuf::from("/k"));
    }
}
