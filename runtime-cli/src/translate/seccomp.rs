//! `linux.seccomp` to the BPF program that the agent loads, by way of libseccomp.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::str::FromStr;

use agent_protocol::Seccomp;
use libseccomp::error::SeccompError;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

/// Bits of the flags of seccomp(2) (linux/seccomp.h).
const FILTER_FLAG_TSYNC: u32 = 1 << 0;
const FILTER_FLAG_LOG: u32 = 1 << 1;
const FILTER_FLAG_SPEC_ALLOW: u32 = 1 << 2;

/// libseccomp's optimization level that sorts system calls into a binary tree.
const OPTIMIZE_BINARY_TREE: u32 = 2;

/// Bit of a system call number that says x32 on x86_64; no other architecture has such numbers.
const X32_SYSCALL_BIT: u32 = 0x4000_0000;

/// Bytes of a `struct sock_filter`.
const INSTRUCTION_BYTES: usize = 8;

/// Why a profile cannot be compiled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The supervisor of such a profile is a process on the host, which cannot see the guest's.
    #[error(
        "SCMP_ACT_NOTIFY cannot be honoured in a virtual machine: use a profile without it (no \
         listenerPath)"
    )]
    Notify,
    /// An errno that does not fit the filter's return value.
    #[error("errnoRet {0} is no error number")]
    Errno(u32),
    /// An argument that system calls do not have.
    #[error("seccomp argument index {0} is greater than 5")]
    ArgumentIndex(usize),
    /// libseccomp does not know the architecture.
    #[error("seccomp architecture {arch} is not known to libseccomp")]
    Arch {
        /// As the profile names it.
        arch: Arch,
        /// What libseccomp says.
        #[source]
        source: SeccompError,
    },
    /// A rule that libseccomp does not take.
    #[error("seccomp rule for {name}")]
    Rule {
        /// The system call.
        name: String,
        /// What libseccomp says.
        #[source]
        source: SeccompError,
    },
    /// The filter as a whole.
    #[error("build seccomp filter")]
    Filter(#[from] SeccompError),
    /// The file that libseccomp writes the program to.
    #[error("export seccomp filter")]
    Export(#[source] io::Error),
}

/// The program of a profile; `None` if the profile allows everything.
pub fn compile(profile: &LinuxSeccomp) -> Result<Option<Seccomp>, Error> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let syscalls = profile.syscalls().as_deref().unwrap_or_default();
    if default == ScmpAction::Allow && syscalls.is_empty() {
        return Ok(None);
    }
    let mut filter = ScmpFilterContext::new(default)?;
    // The agent sets no_new_privs as the configuration says, not as libseccomp would.
    filter.set_ctl_nnp(false)?;
    filter.set_ctl_optimize(OPTIMIZE_BINARY_TREE)?;
    for arch in profile.architectures().iter().flatten() {
        add_arch(&mut filter, *arch)?;
    }
    for syscall in syscalls {
        add_rules(&mut filter, syscall, default)?;
    }
    let mut program = export(&filter)?;
    if let (Some(newest), Some(arch)) = (newest_syscall(default, syscalls), native_audit_arch()) {
        program.splice(..0, unknown_syscalls_prologue(arch, newest));
    }
    let flags = profile.flags().iter().flatten();
    Ok(Some(Seccomp { program, flags: flags.fold(0, |bits, flag| bits | flag_bit(*flag)) }))
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, Error> {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    let value = u16::try_from(errno).map_err(|_| Error::Errno(errno))?;
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(value.into()),
        LinuxSeccompAction::ScmpActNotify => return Err(Error::Notify),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(value),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
    })
}

fn add_arch(filter: &mut ScmpFilterContext, arch: Arch) -> Result<(), Error> {
    let failed = |source| Error::Arch { arch, source };
    let arch = ScmpArch::from_str(&arch.to_string()).map_err(failed)?;
    if !filter.is_arch_present(arch).map_err(failed)? {
        filter.add_arch(arch).map_err(failed)?;
    }
    Ok(())
}

fn add_rules(
    filter: &mut ScmpFilterContext,
    rule: &LinuxSyscall,
    default: ScmpAction,
) -> Result<(), Error> {
    let action = action(rule.action(), rule.errno_ret())?;
    // libseccomp refuses a rule that says what the default says.
    if action == default {
        return Ok(());
    }
    let comparisons: Vec<_> =
        rule.args().iter().flatten().map(comparison).collect::<Result<_, _>>()?;
    let indexes: Vec<_> = rule.args().iter().flatten().map(LinuxSeccompArg::index).collect();
    for name in rule.names() {
        // A profile names the system calls of all architectures and of newer kernels.
        let Ok(syscall) = ScmpSyscall::from_name(name) else { continue };
        add_rule(filter, action, syscall, &comparisons, has_duplicate(&indexes))
            .map_err(|source| Error::Rule { name: name.clone(), source })?;
    }
    Ok(())
}

/// Several conditions on one argument are alternatives, as libseccomp can only join conditions on
/// different ones; so it is in runc.
fn add_rule(
    filter: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    comparisons: &[ScmpArgCompare],
    alternatives: bool,
) -> Result<(), SeccompError> {
    if comparisons.is_empty() {
        filter.add_rule(action, syscall)?;
    } else if alternatives {
        for comparison in comparisons {
            filter.add_rule_conditional(action, syscall, &[*comparison])?;
        }
    } else {
        filter.add_rule_conditional(action, syscall, comparisons)?;
    }
    Ok(())
}

fn has_duplicate(indexes: &[usize]) -> bool {
    indexes.iter().enumerate().any(|(position, index)| indexes[..position].contains(index))
}

fn comparison(arg: &LinuxSeccompArg) -> Result<ScmpArgCompare, Error> {
    use LinuxSeccompOperator as Operator;
    let index = u32::try_from(arg.index()).ok().filter(|index| *index < 6);
    let index = index.ok_or(Error::ArgumentIndex(arg.index()))?;
    let (operator, value) = match arg.op() {
        Operator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        Operator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        Operator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        Operator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        Operator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        Operator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // Here the value is the mask and the second one is what to compare with.
        Operator::ScmpCmpMaskedEq => {
            (ScmpCompareOp::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
        }
    };
    Ok(ScmpArgCompare::new(index, operator, value))
}

fn flag_bit(flag: LinuxSeccompFilterFlag) -> u32 {
    match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => FILTER_FLAG_TSYNC,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => FILTER_FLAG_SPEC_ALLOW,
        // About notifications, which are refused.
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    }
}

fn export(filter: &ScmpFilterContext) -> Result<Vec<u8>, Error> {
    let memory = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| Error::Export(errno.into()))?;
    filter.export_bpf(memory.as_fd())?;
    let mut file = File::from(memory);
    let mut program = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut program)).map_err(Error::Export)?;
    Ok(program)
}

/// The highest native number among the system calls that a profile names, if calls that the
/// profile's author could not know would get an error that programs take for a denial.
fn newest_syscall(default: ScmpAction, syscalls: &[LinuxSyscall]) -> Option<u32> {
    match default {
        ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_) => return None,
        ScmpAction::Errno(libc::ENOSYS) => return None,
        _ => {}
    }
    let number = |name: &String| ScmpSyscall::from_name(name).ok().map(i32::from);
    let numbers = syscalls.iter().flat_map(LinuxSyscall::names).filter_map(number);
    // Calls of other architectures have negative numbers.
    numbers.filter_map(|number| u32::try_from(number).ok()).max()
}

/// Instructions before a filter that answer ENOSYS to native system calls newer than `newest`.
///
/// The C library tries new system calls and falls back on ENOSYS only; a profile that was written
/// before a call existed would say EPERM. runc puts the same in front of every filter.
fn unknown_syscalls_prologue(arch: u32, newest: u32) -> Vec<u8> {
    /// Offsets in `struct seccomp_data`.
    const NUMBER: u32 = 0;
    const ARCH: u32 = 4;
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const GREATER: u32 = libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K;
    const GREATER_OR_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let answer = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();
    let instructions = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 0, 4, arch),
        (LOAD, 0, 0, NUMBER),
        (GREATER_OR_EQUAL, 2, 0, X32_SYSCALL_BIT),
        (GREATER, 0, 1, newest),
        (RETURN, 0, 0, answer),
    ];
    let mut bytes = Vec::with_capacity(instructions.len() * INSTRUCTION_BYTES);
    for (code, jump_true, jump_false, operand) in instructions {
        let code = u16::try_from(code).expect("instruction codes have 16 bits");
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes.extend_from_slice(&[jump_true, jump_false]);
        bytes.extend_from_slice(&operand.to_ne_bytes());
    }
    bytes
}

/// `AUDIT_ARCH_*` of this build; libseccomp's tokens, which oci-spec repeats, have the same values.
fn native_audit_arch() -> Option<u32> {
    match ScmpArch::native() {
        ScmpArch::X8664 => Some(Arch::ScmpArchX86_64 as u32),
        ScmpArch::Aarch64 => Some(Arch::ScmpArchAarch64 as u32),
        ScmpArch::Ppc64Le => Some(Arch::ScmpArchPpc64le as u32),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
