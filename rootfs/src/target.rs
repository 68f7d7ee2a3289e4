//! What differs between the architectures that a guest kernel is built for.

/// One architecture, as the kernel build and Debian name things.
#[derive(Debug)]
pub struct Target {
    /// Name as in the configuration's file name.
    pub name: &'static str,
    /// `ARCH` of the kernel build, and what to build: the file that the VMM boots.
    pub kbuild: Kbuild,
    /// Debian's package that depends on the newest kernel made for virtual machines.
    pub distro_package: &'static str,
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
        kbuild: Kbuild { arch: "x86_64", goal: "vmlinux", image: "vmlinux" },
        distro_package: "linux-image-cloud-amd64",
        config: include_str!("../kernel/x86_64.config"),
    },
    Target {
        name: "aarch64",
        kbuild: Kbuild { arch: "arm64", goal: "Image", image: "arch/arm64/boot/Image" },
        distro_package: "linux-image-cloud-arm64",
        config: include_str!("../kernel/aarch64.config"),
    },
    Target {
        name: "ppc64le",
        kbuild: Kbuild { arch: "powerpc", goal: "vmlinux", image: "vmlinux" },
        distro_package: "linux-image-powerpc64le",
        config: include_str!("../kernel/ppc64le.config"),
    },
];

impl Target {
    /// The architecture called `name`, by the kernel's or by Rust's name.
    pub fn named(name: &str) -> Option<&'static Self> {
        let name = if name == "powerpc64" { "ppc64le" } else { name };
        TARGETS.iter().find(|target| target.name == name)
    }

    /// The whole kernel configuration with its reasons.
    pub fn config(&self) -> String {
        format!("{COMMON}\n{}", self.config)
    }
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
    fn rust_and_kernel_names_find_the_same_target() {
        assert_eq!(Target::named("powerpc64").unwrap().name, "ppc64le");
        assert!(Target::named("riscv64").is_none());
    }
}
