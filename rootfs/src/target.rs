//! What differs between the architectures that a guest kernel is built for.

use crate::bzimage;

/// One architecture, as the kernel build and Debian name things.
#[derive(Debug)]
pub struct Target {
    /// Name as in the configuration's file name.
    pub name: &'static str,
    /// What Debian calls it.
    pub debian: &'static str,
    /// `ARCH` of the kernel build, and what to build: the file that the VMM boots.
    pub kbuild: Kbuild,
    /// What the compiler's and the linker's names begin with on machines of another architecture.
    pub tool_prefix: &'static str,
    /// Debian's package that depends on the newest kernel made for virtual machines.
    pub distro_package: &'static str,
    /// Whether a kernel with our configuration can map its root: its pages must be as large as the blocks of
    /// erofs.
    pub maps_root: bool,
    /// Takes what the VMM boots out of the file that Debian's packages have in `/boot`.
    pub unwrap: fn(&[u8]) -> Result<Vec<u8>, bzimage::Error>,
    /// Our configuration beside the common one.
    config: &'static str,
}

/// The kernel build's own names.
#[derive(Debug)]
pub struct Kbuild {
    /// `ARCH`.
    pub arch: &'static str,
    /// Argument of `make`.
    pub goal: &'static str,
    /// What that leaves in the source folder.
    pub image: &'static str,
}

const COMMON: &str = include_str!("../kernel/common.config");

const TARGETS: &[Target] = &[
    Target {
        name: "x86_64",
        debian: "amd64",
        kbuild: Kbuild { arch: "x86_64", goal: "vmlinux", image: "vmlinux" },
        tool_prefix: "x86_64-linux-gnu-",
        distro_package: "linux-image-cloud-amd64",
        maps_root: true,
        unwrap: bzimage::vmlinux,
        config: include_str!("../kernel/x86_64.config"),
    },
    Target {
        name: "aarch64",
        debian: "arm64",
        kbuild: Kbuild { arch: "arm64", goal: "Image", image: "arch/arm64/boot/Image" },
        tool_prefix: "aarch64-linux-gnu-",
        distro_package: "linux-image-cloud-arm64",
        maps_root: true,
        unwrap: as_it_is,
        config: include_str!("../kernel/aarch64.config"),
    },
    Target {
        name: "ppc64le",
        debian: "ppc64el",
        kbuild: Kbuild { arch: "powerpc", goal: "vmlinux", image: "vmlinux" },
        tool_prefix: "powerpc64le-linux-gnu-",
        distro_package: "linux-image-powerpc64le",
        maps_root: false,
        unwrap: bzimage::vmlinux,
        config: include_str!("../kernel/ppc64le.config"),
    },
];

impl Target {
    /// The architecture called `name`, by the kernel's or by Rust's name.
    pub fn named(name: &str) -> Option<&'static Self> {
        let name = if name == "powerpc64" { "ppc64le" } else { name };
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Whether this machine is of another architecture.
    pub fn is_foreign(&self) -> bool {
        Self::named(std::env::consts::ARCH).is_none_or(|own| own.name != self.name)
    }

    /// The name of the build's `tool` for this architecture.
    pub fn tool(&self, tool: &str) -> String {
        let prefix = if self.is_foreign() { self.tool_prefix } else { "" };
        format!("{prefix}{tool}")
    }

    /// The whole kernel configuration with its reasons.
    pub fn config(&self) -> String {
        format!("{COMMON}\n{}", self.config)
    }
}

/// A kernel that the VMM boots in the form in which Debian packs it.
fn as_it_is(image: &[u8]) -> Result<Vec<u8>, bzimage::Error> {
    Ok(image.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fragment::Fragment;

    /// A reason speaks for at most this many options.
    const LARGEST_BLOCK: usize = 10;

    fn blocks(config: &str) -> impl Iterator<Item = Vec<&str>> {
        config
            .split("\n\n")
            .map(|block| block.lines().filter(|line| !line.is_empty()).collect::<Vec<_>>())
            .filter(|block| block.iter().any(|line| !line.starts_with('#')))
    }

    #[test]
    fn every_configuration_parses() {
        for target in TARGETS {
            Fragment::parse(&target.config()).unwrap();
        }
    }

    #[test]
    fn every_option_stands_in_a_small_block_below_its_reason() {
        for block in TARGETS.iter().flat_map(|target| [COMMON, target.config]).flat_map(blocks) {
            let reason =
                block[0].strip_prefix("# ").unwrap_or_else(|| panic!("no reason: {block:?}"));
            assert!(reason.len() > 10, "{block:?}");
            let options = block.iter().filter(|line| !line.starts_with('#'));
            assert!(options.count() <= LARGEST_BLOCK, "{block:?}");
        }
    }

    #[test]
    fn only_the_tools_of_another_architecture_have_a_prefix() {
        let own = Target::named(std::env::consts::ARCH).unwrap();
        let foreign = TARGETS.iter().find(|target| target.name != own.name).unwrap();

        assert_eq!(own.tool("gcc"), "gcc");
        assert_eq!(foreign.tool("gcc"), format!("{}gcc", foreign.tool_prefix));
    }

    #[test]
    fn rust_and_kernel_names_find_the_same_target() {
        assert_eq!(Target::named("powerpc64").unwrap().name, "ppc64le");
        assert!(Target::named("riscv64").is_none());
    }
}
