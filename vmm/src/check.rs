//! What this host must have for a configuration: its files and its memory, looked at without KVM and
//! without touching any device.

use std::fs::{self, OpenOptions};
use std::mem;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use arch::machine::BootFiles;
use arch::{Arch, Host};

use crate::builder::open_file;
use crate::config::{
    ConfigError, ConsoleOutput, DiskConfig, MemoryBacking, MemoryConfig, VmConfig,
};
use crate::confinement::Confinement;
use crate::error::chain;
use crate::memory::{GuestRam, Store};

/// Everything that keeps `config` from starting, as far as a look at configuration and host can tell:
/// values that cannot be, files that are not there, a kernel that is none, more memory than the host
/// has. Neither /dev/kvm nor a block device nor a network interface is opened.
pub fn check(config: &VmConfig) -> Vec<ConfigError> {
    if let Err(error) = config.validate() {
        return vec![error];
    }
    let mut found = Vec::new();
    found.extend(check_memory(&config.memory).err());
    found.extend(Confinement::check(config).err());
    check_boot(config, &mut found);
    for (index, disk) in config.disks.iter().enumerate() {
        found.extend(check_disk(&format!("disks[{index}].path"), disk).err());
    }
    for (index, file) in config.pmem.iter().enumerate() {
        let opened = open_file("persistent memory", &file.path).err();
        found.extend(opened.map(|error| refusal(&format!("pmem[{index}].path"), chain(&error))));
    }
    for (index, share) in config.shares.iter().enumerate() {
        found.extend(check_folder(&format!("shares[{index}].path"), &share.path).err());
    }
    if let MemoryBacking::File(path) = &config.memory.backing {
        found.extend(check_folder("memory.backing.file", parent(path)).err());
    }
    if let ConsoleOutput::File(path) = &config.console.output {
        found.extend(check_folder("console.output", parent(path)).err());
    }
    if let Some(socket) = config.vsock.as_ref().and_then(|vsock| vsock.socket.as_ref()) {
        found.extend(check_folder("vsock.socket", parent(socket)).err());
    }
    found
}

/// Refuses more RAM than the host has with its swap: a guest's RAM is a limit, which the host may
/// promise many times, but one guest alone must be able to use its own.
pub(crate) fn check_memory(config: &MemoryConfig) -> Result<(), ConfigError> {
    let most = host_memory_mib();
    if u64::from(config.size_mib) > most {
        let rule = format!(
            "must be at most {most}, the memory and swap of this host, not {}",
            config.size_mib
        );
        return Err(refusal("memory.size_mib", rule));
    }
    Ok(())
}

fn host_memory_mib() -> u64 {
    // SAFETY: the structure is plain numbers, for which zero is valid.
    let mut host: libc::sysinfo = unsafe { mem::zeroed() };
    // SAFETY: the call fills in the structure it is given, and cannot fail otherwise.
    unsafe { libc::sysinfo(&raw mut host) };
    (host.totalram + host.totalswap).saturating_mul(host.mem_unit.into()) >> 20
}

/// Loads the kernel and the initrd into memory as the builder does, where both can be opened.
fn check_boot(config: &VmConfig, found: &mut Vec<ConfigError>) {
    let boot = &config.boot;
    let kernel = open_file("kernel", &boot.kernel);
    let initrd = boot.initrd.as_deref().map(|path| open_file("initrd", path)).transpose();
    let opened = match (kernel, initrd) {
        (Ok(kernel), Ok(initrd)) => {
            Some(BootFiles { kernel, initrd, protocol: boot.protocol.into() })
        }
        (kernel, initrd) => {
            found.extend(kernel.err().map(|error| refusal("boot.kernel", chain(&error))));
            found.extend(initrd.err().map(|error| refusal("boot.initrd", chain(&error))));
            None
        }
    };
    let Some(mut files) = opened.filter(|_| found.is_empty()) else { return };
    let map = Host::memory_map(u64::from(config.memory.size_mib) << 20);
    found.extend(match GuestRam::allocate(&map, &config.memory, Store::anonymous()) {
        Ok(ram) => {
            let loaded = Host::load(ram.memory(), &mut files);
            loaded.err().map(|error| refusal("boot.kernel", chain(&error)))
        }
        Err(error) => Some(refusal("memory.size_mib", chain(&error))),
    });
}

fn check_disk(field: &str, disk: &DiskConfig) -> Result<(), ConfigError> {
    let path = &disk.path;
    let unusable = |error| refusal(field, format!("{path:?}: {error}"));
    let kind = fs::metadata(path).map_err(unusable)?.file_type();
    if kind.is_block_device() {
        return Ok(());
    }
    if !kind.is_file() {
        let rule = format!("must be a regular file or a block device, which {path:?} is not");
        return Err(refusal(field, rule));
    }
    OpenOptions::new().read(true).write(!disk.read_only).open(path).map_err(unusable)?;
    Ok(())
}

fn check_folder(field: &str, path: &Path) -> Result<(), ConfigError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(refusal(field, format!("{path:?} is not a directory"))),
        Err(error) => Err(refusal(field, format!("directory {path:?}: {error}"))),
    }
}

/// The folder a file would be made in.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn refusal(field: &str, rule: String) -> ConfigError {
    ConfigError { field: field.to_owned(), rule }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ShareConfig, VsockConfig};

    fn complaints(config: &VmConfig) -> Vec<String> {
        check(config).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_missing_file_is_named_with_its_field() {
        let mut config = VmConfig::new("/nowhere/kernel".into());
        config.boot.initrd = Some("/nowhere/initrd".into());
        config.disks =
            vec![DiskConfig { read_only: true, ..DiskConfig::new("a", "/nowhere/disk".into()) }];
        config.shares = vec![ShareConfig::new("t", "/nowhere/share".into())];
        config.vsock = Some(VsockConfig { cid: 3, socket: Some("/nowhere/socket".into()) });
        config.console.output = ConsoleOutput::File("/nowhere/log".into());

        let complaints = complaints(&config);

        let fields: Vec<_> =
            complaints.iter().map(|line| line.split(':').next().unwrap()).collect();
        let all = ["boot.kernel", "boot.initrd", "disks[0].path", "shares[0].path"];
        assert_eq!(fields, [&all[..], &["console.output", "vsock.socket"]].concat());
        assert!(complaints.iter().all(|line| line.contains("No such file")), "{complaints:?}");
    }

    #[test]
    fn a_text_file_is_no_kernel() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "#!/bin/sh\necho not a kernel\n").unwrap();

        let complaints = complaints(&VmConfig::new(file.path().into()));

        assert_eq!(complaints.len(), 1);
        assert!(complaints[0].starts_with("boot.kernel: "), "{complaints:?}");
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused() {
        let size_mib = u32::try_from(host_memory_mib() + 1).unwrap();

        let error = check_memory(&MemoryConfig { size_mib, ..MemoryConfig::default() });

        let message = error.unwrap_err().to_string();
        assert!(message.starts_with("memory.size_mib: must be at most "), "{message}");
        assert_eq!(check_memory(&MemoryConfig { size_mib: 16, ..MemoryConfig::default() }), Ok(()));
    }

    #[test]
    fn a_value_that_cannot_be_is_found_before_any_file() {
        let mut config = VmConfig::new("/nowhere".into());
        config.vcpus = 0;

        assert_eq!(complaints(&config), ["vcpus: must be 1 to 64, not 0"]);
    }

    #[test]
    fn a_pipe_is_no_disk() {
        let config = DiskConfig { read_only: true, ..DiskConfig::new("a", "/dev/null".into()) };

        let error = check_disk("disks[0].path", &config).unwrap_err();

        assert!(error.rule.starts_with("must be a regular file or a block device"), "{error}");
    }
}
