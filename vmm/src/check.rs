//! What this host must have for a configuration: its files and its memory, looked at without KVM and
//! without touching any device.

use std::fs;
use std::mem;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use arch::{Arch, Host};
use devices::listener::Listener;
use devices::virtio::block::Disk;

use crate::builder::{cannot_load, open_boot_files, open_file};
use crate::config::{
    ConfigError, ConsoleOutput, DiskConfig, MemoryBacking, MemoryConfig, Problems, VmConfig,
};
use crate::confinement::Confinement;
use crate::error::{Error, chain};
use crate::memory::{GuestRam, Store};
use crate::opened::check_tap;
use crate::output::check_output;

/// Everything that keeps `config` from starting, as far as a look at configuration and host can tell:
/// values that cannot be, files that are not there or in use, a kernel that is none, more memory than the
/// host has. Neither /dev/kvm nor a block device nor a network interface is opened, and nothing is
/// made. To a socket that is there already it connects, to learn whether somebody listens.
pub fn check(config: &VmConfig) -> Vec<ConfigError> {
    let mut found = config.problems();
    found.add_if(check_memory(&config.memory));
    found.add_if(Confinement::check(config));
    check_boot(config, &mut found);
    check_disks(&config.disks, &mut found);
    for (index, net) in config.nets.iter().enumerate() {
        let field = format!("nets[{index}].tap");
        found.add_if(check_tap(index, net).map_err(|error| match error {
            Error::Config(error) => error,
            error => refusal(&field, &error),
        }));
    }
    for (index, file) in config.pmem.iter().enumerate() {
        let field = format!("pmem[{index}].path");
        let opened = open_file("persistent memory", &file.path);
        found.add_if(opened.map_err(|error| refusal(&field, &error)));
    }
    for (index, share) in config.shares.iter().enumerate() {
        found.add_if(check_folder(&format!("shares[{index}].path"), &share.path));
    }
    if let MemoryBacking::File(path) = &config.memory.backing {
        let field = "memory.backing.file";
        found.add_if(Store::check_file(path).map_err(|error| refusal(field, &error)));
    }
    if let ConsoleOutput::File(path) = &config.console.output {
        let look = check_output(path);
        found.add_if(look.map_err(|error| unusable("console.output.file", path, &error)));
    }
    if let Some(socket) = config.vsock.as_ref().and_then(|vsock| vsock.socket.as_ref()) {
        let look = Listener::check(socket);
        found.add_if(look.map_err(|error| unusable("vsock.socket", socket, &error)));
    }
    found.into_all()
}

/// Refuses more RAM than the host has with its swap: a guest's RAM is a limit, which the host may
/// promise many times, but one guest alone must be able to use its own.
pub(crate) fn check_memory(config: &MemoryConfig) -> Result<(), ConfigError> {
    let most = host_memory_mib();
    let refuse = |field: &str, most: u64, what: &str, value: u32| {
        let rule = format!("must be at most {most}, {what}, not {value}");
        Err(ConfigError { field: field.to_owned(), rule })
    };
    let Some(rest) = most.checked_sub(config.size_mib.into()) else {
        let what = "the memory and swap of this host";
        return refuse("memory.size_mib", most, what, config.size_mib);
    };
    if u64::from(config.pluggable_mib) > rest {
        let what = "what memory.size_mib leaves of the memory and swap of this host";
        return refuse("memory.pluggable_mib", rest, what, config.pluggable_mib);
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
fn check_boot(config: &VmConfig, found: &mut Problems) {
    let boot = &config.boot;
    let kernel = open_file("kernel", &boot.kernel);
    found.add_if(kernel.map_err(|error| refusal("boot.kernel", &error)));
    if let Some(initrd) = &boot.initrd {
        let initrd = open_file("initrd", initrd);
        found.add_if(initrd.map_err(|error| refusal("boot.initrd", &error)));
    }
    let needed = ["boot.kernel", "boot.initrd", "memory.size_mib"];
    if needed.iter().any(|field| found.has(field)) {
        return;
    }
    let map = Host::memory_map(u64::from(config.memory.size_mib) << 20);
    let loaded = open_boot_files(boot).and_then(|mut files| {
        let ram = GuestRam::allocate(&map, &config.memory, Store::anonymous())?;
        Host::load(ram.memory(), &mut files).map_err(|source| cannot_load(boot, source))
    });
    found.add_if(loaded.map_err(|error| match &error {
        Error::Load { what, source, .. } => refusal(&format!("boot.{what}"), source),
        Error::Memory(_) => refusal("memory.size_mib", &error),
        _ => refusal("boot", &error),
    }));
}

/// Looks at each disk, and for an image that two of them write to.
fn check_disks(disks: &[DiskConfig], found: &mut Problems) {
    let mut images: Vec<((u64, u64), &DiskConfig)> = Vec::with_capacity(disks.len());
    for (index, disk) in disks.iter().enumerate() {
        let field = format!("disks[{index}].path");
        let look = Disk::check(&disk.path, disk.access());
        found.add_if(look.map_err(|error| refusal(&field, &error)));
        // A block device may have several writers. What is not there was complained about.
        let Ok(image) = fs::metadata(&disk.path) else { continue };
        let identity = (image.dev(), image.ino());
        let is_shared = |(other, of): &&(_, &DiskConfig)| {
            image.is_file() && *other == identity && !(disk.read_only && of.read_only)
        };
        if let Some((_, other)) = images.iter().find(is_shared) {
            let id = &other.id;
            let rule = format!("must not be the image of disk {id:?}, unless both are `read_only`");
            found.add(&field, rule);
        }
        images.push((identity, disk));
    }
}

fn check_folder(field: &str, path: &Path) -> Result<(), ConfigError> {
    let rule = match fs::metadata(path) {
        Ok(found) if found.is_dir() => return Ok(()),
        Ok(_) => format!("{path:?} is not a directory"),
        Err(error) => format!("directory {path:?}: {error}"),
    };
    Err(ConfigError { field: field.to_owned(), rule })
}

/// What the builder would say, about `field`.
fn refusal(field: &str, error: &(dyn std::error::Error + 'static)) -> ConfigError {
    ConfigError { field: field.to_owned(), rule: chain(error) }
}

fn unusable(field: &str, path: &Path, error: &std::io::Error) -> ConfigError {
    ConfigError { field: field.to_owned(), rule: format!("{path:?}: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{NetConfig, PmemConfig, ShareConfig, VsockConfig};

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
        assert_eq!(fields, [&all[..], &["console.output.file", "vsock.socket"]].concat());
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
    fn what_can_be_plugged_in_is_memory_of_the_host_too() {
        let pluggable_mib = u32::try_from(host_memory_mib()).unwrap();
        let config = MemoryConfig { pluggable_mib, ..MemoryConfig::default() };

        let error = check_memory(&config).unwrap_err();

        assert_eq!(error.field, "memory.pluggable_mib");
        let pluggable_mib = pluggable_mib - config.size_mib;
        assert_eq!(check_memory(&MemoryConfig { pluggable_mib, ..config }), Ok(()));
    }

    #[test]
    fn a_value_that_cannot_be_hides_no_file_that_is_not_there() {
        let mut config = VmConfig::new("/nowhere".into());
        config.vcpus = 0;

        let complaints = complaints(&config);

        assert_eq!(complaints.len(), 2);
        assert_eq!(complaints[0], "vcpus: must be 1 to 64, not 0");
        assert!(complaints[1].starts_with("boot.kernel: "), "{complaints:?}");
    }

    #[test]
    fn a_field_that_is_empty_is_complained_about_once() {
        let mut config = VmConfig::new("".into());
        config.disks = vec![DiskConfig::new("a", "".into())];
        config.console.output = ConsoleOutput::File("".into());

        let complaints = complaints(&config);

        let wanted = ["boot.kernel", "console.output.file", "disks[0].path"];
        assert_eq!(complaints, wanted.map(|field| format!("{field}: must name a file")));
    }

    fn complaints_of_disk(disk: DiskConfig) -> Vec<ConfigError> {
        let mut found = Problems::default();
        check_disks(&[disk], &mut found);
        found.into_all()
    }

    #[test]
    fn a_pipe_is_no_disk() {
        let disk = DiskConfig { read_only: true, ..DiskConfig::new("a", "/dev/null".into()) };

        let found = complaints_of_disk(disk);

        let rule = "disk /dev/null is neither a regular file nor a block device";
        assert_eq!(found, [ConfigError { field: "disks[0].path".into(), rule: rule.into() }]);
    }

    #[test]
    fn an_image_has_one_writer_whatever_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let (image, link) = (folder.path().join("image"), folder.path().join("link"));
        fs::write(&image, [0; 512]).unwrap();
        std::os::unix::fs::symlink(&image, &link).unwrap();
        let check = |read_only| {
            let disk =
                |id, path: &Path| DiskConfig { read_only, ..DiskConfig::new(id, path.into()) };
            let mut found = Problems::default();
            check_disks(&[disk("a", &image), disk("b", &link)], &mut found);
            found.into_all()
        };

        let rule = "must not be the image of disk \"a\", unless both are `read_only`";
        assert_eq!(
            check(false),
            [ConfigError { field: "disks[1].path".into(), rule: rule.into() }]
        );
        assert_eq!(check(true), []);
    }

    #[test]
    fn what_a_start_would_refuse_of_the_host_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("empty"), "").unwrap();
        let _listener = Listener::bind(&at("socket")).unwrap();
        let mut config = VmConfig::new(at("empty"));
        config.boot.initrd = Some(at("empty"));
        config.memory.backing = MemoryBacking::File(at("empty"));
        config.console.output = ConsoleOutput::File(folder.path().into());
        config.nets = vec![NetConfig::new("coracle-none", "02:00:00:00:00:01")];
        config.pmem = vec![PmemConfig { id: "p".into(), path: at("empty"), read_only: true }];
        config.vsock = Some(VsockConfig { cid: 3, socket: Some(at("socket")) });

        let complaints = complaints(&config).join("\n");

        let name = |name: &str| format!("{:?}", at(name));
        let wanted = [
            format!("boot.kernel: kernel {} is empty", name("empty")),
            format!("boot.initrd: initrd {} is empty", name("empty")),
            "nets[0].tap: must name a tap of this network namespace, and \"coracle-none\" is none \
             (make it with `ip tuntap`, or set `create`)"
                .to_owned(),
            format!("pmem[0].path: persistent memory {} is empty", name("empty")),
            format!(
                "memory.backing.file: the file for guest RAM {} must not exist yet: it may be another \
                 machine's",
                name("empty")
            ),
            format!("console.output.file: {:?}: Is a directory (os error 21)", folder.path()),
            format!("vsock.socket: {}: another process listens there already", name("socket")),
        ];
        assert_eq!(complaints, wanted.join("\n"));
    }
}
