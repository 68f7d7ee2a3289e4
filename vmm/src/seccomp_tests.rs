//! The filters allow what is listed and nothing else, and everything listed has a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::env::consts::ARCH;
use std::path::{Path, PathBuf};
use std::{fs, ptr};

use libc::{c_int, c_long};
use libseccomp::ScmpSyscall;
use seccompiler::compile_from_json;
use serde_json::Value;

use super::*;

const KINDS: [Kind; 5] = [Kind::Vcpu, Kind::Vmm, Kind::Io, Kind::Main, Kind::Growing];

/// Beyond the highest system call number of any kernel so far.
const CALLS: c_int = 512;

/// `uretprobe` and `uprobe`, which Linux lets past every filter: only probes that root set in the
/// program use them, and whoever else calls them gets an error or SIGILL.
const BEYOND_FILTERS: [c_int; 2] = [335, 336];

/// Bit that marks the system calls of the x32 ABI, which have numbers of their own.
const X32: c_long = 0x4000_0000;

/// Stands for a signal to the process itself, whose pid only the process knows.
const OWN_ABORT: c_long = -1;

/// The file with the rules.
fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seccomp").join(format!("{ARCH}.json"))
}

/// The rules of each kind of threads, as they were written down.
fn rules() -> BTreeMap<String, Vec<Value>> {
    let kinds: BTreeMap<String, Value> =
        serde_json::from_str(&fs::read_to_string(path()).unwrap()).unwrap();
    kinds.into_iter().map(|(k, v)| (k, v["filter"].as_array().unwrap().clone())).collect()
}

/// How a process ends whose only thread confines itself as `kind` and makes one system call.
fn fate(kind: Kind, number: c_long, arguments: [c_long; 3]) -> c_int {
    // SAFETY: the child has one thread, and until it ends it neither allocates nor takes a lock.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let [first, second, third] = arguments;
        // SAFETY: whatever the call does, it does it to this child, which ends right after it.
        unsafe {
            if install(kind).is_err() {
                libc::abort();
            }
            if number == OWN_ABORT {
                libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGABRT);
            }
            libc::syscall(number, first, second, third, 0, 0, 0);
            // Ends this process like `exit_group` would, which no filter allows.
            libc::syscall(libc::SYS_exit, 0);
        }
    }
    let mut status = 0;
    // SAFETY: the child is ours, and the call writes one int.
    assert_eq!(unsafe { libc::waitpid(child, ptr::from_mut(&mut status), 0) }, child);
    status
}

fn is_killed(status: c_int) -> bool {
    libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS
}

#[test]
fn every_system_call_has_a_reason() {
    for rule in rules().values().flatten() {
        let reasons = [&rule["comment"]].into_iter().chain(
            rule["args"].as_array().into_iter().flatten().map(|argument| &argument["comment"]),
        );
        for reason in reasons {
            assert!(reason.as_str().is_some_and(|reason| !reason.is_empty()), "{rule}");
        }
    }
}

#[test]
fn a_system_call_that_is_not_listed_kills() {
    for kind in KINDS {
        let listed: BTreeSet<c_int> = rules()[kind.name()]
            .iter()
            .map(|rule| ScmpSyscall::from_name(rule["syscall"].as_str().unwrap()).unwrap().into())
            .collect();

        let survived: Vec<c_int> = (0..CALLS)
            .filter(|number| !listed.contains(number) && !BEYOND_FILTERS.contains(number))
            .filter(|&number| !is_killed(fate(kind, number.into(), [0; 3])))
            .collect();

        assert!(survived.is_empty(), "{kind:?}: {survived:?}");
    }
}

/// What the kernel does by `program` with a system call: the value that it returns
/// (Documentation/networking/filter.rst).
fn verdict(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    // struct seccomp_data.
    let mut data = [number.to_le_bytes(), arch.to_le_bytes()].concat();
    data.extend([0; 8]);
    data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
    let (mut at, mut value) = (0, 0);
    loop {
        let step = &program[at];
        at += 1;
        let mut branch = |is_true| at += usize::from(if is_true { step.jt } else { step.jf });
        match step.code {
            0x20 => {
                let offset = usize::try_from(step.k).unwrap();
                value = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            0x54 => value &= step.k,
            0x05 => at += usize::try_from(step.k).unwrap(),
            0x15 => branch(value == step.k),
            0x25 => branch(value > step.k),
            0x35 => branch(value >= step.k),
            0x06 => return step.k,
            code => panic!("an instruction of code {code:#x}"),
        }
    }
}

/// Arguments of system calls: those of rules, and their neighbours.
fn all_arguments(rules: &[Value]) -> Vec<[u64; 6]> {
    let mut all = vec![[0; 6], [u64::MAX; 6]];
    for rule in rules {
        for off in [0, 1, u64::MAX, 1 << 32] {
            let mut arguments = [0; 6];
            for condition in rule["args"].as_array().into_iter().flatten() {
                let index = usize::try_from(condition["index"].as_u64().unwrap()).unwrap();
                arguments[index] = condition["val"].as_u64().unwrap().wrapping_add(off);
            }
            all.push(arguments);
        }
    }
    all
}

#[test]
fn the_search_trees_say_what_the_filters_of_seccompiler_say() {
    let arch = ARCH.try_into().unwrap();
    let plain = compile_from_json(fs::File::open(path()).unwrap(), arch).unwrap();
    let rules = rules();
    let x32 = u32::try_from(X32).unwrap();
    for kind in KINDS {
        let all_arguments = all_arguments(&rules[kind.name()]);
        let (tree, plain) = (FILTERS.as_ref().unwrap().of(kind), &plain[kind.name()]);
        let own = plain.iter().find(|step| step.code == 0x15).unwrap().k;
        let numbers = (0..CALLS.unsigned_abs()).flat_map(|number| [number, number | x32]);

        for number in numbers.chain([u32::MAX, u32::MAX - 1]) {
            for &arguments in &all_arguments {
                for arch in [own, own ^ 1] {
                    assert_eq!(
                        verdict(tree, arch, number, arguments),
                        verdict(plain, arch, number, arguments),
                        "{kind:?}: {number} {arguments:x?} of {arch:#x}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_system_call_that_is_listed_is_made() {
    for kind in KINDS {
        assert_eq!(fate(kind, libc::SYS_gettid, [0; 3]), 0, "{kind:?}");
    }
}

#[test]
fn the_arguments_of_a_listed_system_call_count() {
    let writable_and_executable = libc::PROT_WRITE | libc::PROT_EXEC;
    let refused = [
        (libc::SYS_ioctl, [0, c_long::try_from(libc::TIOCSTI).unwrap(), 0]),
        (libc::SYS_mmap, [0, 4096, writable_and_executable.into()]),
        (libc::SYS_mprotect, [0, 4096, writable_and_executable.into()]),
        (libc::SYS_madvise, [0, 4096, libc::MADV_HWPOISON.into()]),
        (libc::SYS_fcntl, [0, libc::F_SETOWN.into(), 0]),
        (libc::SYS_rt_sigaction, [libc::SIGSYS.into(), 0, 0]),
        (libc::SYS_tgkill, [0, 0, libc::SIGKILL.into()]),
        (libc::SYS_tgkill, [1, 1, libc::SIGABRT.into()]),
        (libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0]),
        (libc::SYS_clone, [(libc::CLONE_NEWUSER | libc::SIGCHLD).into(), 0, 0]),
        (libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0]),
    ];
    for kind in KINDS {
        for (number, arguments) in refused {
            assert!(is_killed(fate(kind, number, arguments)), "{kind:?} {number} {arguments:?}");
        }
    }
}

#[test]
fn only_the_thread_of_balloon_and_memory_advises_on_guest_memory() {
    for advice in [libc::MADV_REMOVE, libc::MADV_DONTDUMP, libc::MADV_MERGEABLE] {
        for kind in KINDS {
            let is_killed = is_killed(fate(kind, libc::SYS_madvise, [0, 4096, advice.into()]));
            assert_eq!(is_killed, !matches!(kind, Kind::Vmm), "{kind:?} {advice}");
        }
    }
}

#[test]
fn system_calls_of_another_abi_kill() {
    for kind in KINDS {
        assert!(is_killed(fate(kind, X32 | libc::SYS_gettid, [0; 3])), "{kind:?}");
    }
}

#[test]
fn a_thread_may_signal_its_own_process() {
    for kind in KINDS {
        let status = fate(kind, OWN_ABORT, [0; 3]);
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGABRT, "{kind:?}");
    }
}

#[test]
fn only_the_thread_that_serves_files_opens_any() {
    // By name, because newer architectures lack some; what is missing has a number nobody listed.
    let number = |name| c_int::from(ScmpSyscall::from_name(name).unwrap());
    let openers = ["open", "openat", "openat2", "creat"].map(number).map(c_long::from);
    for kind in KINDS {
        let opens = openers.iter().any(|&number| !is_killed(fate(kind, number, [0; 3])));
        assert_eq!(opens, kind == Kind::Io, "{kind:?}");
    }
}

#[test]
fn what_clone3_would_start_is_not_started() {
    // It fails, and the process ends as it would have.
    assert_eq!(fate(Kind::Growing, libc::SYS_clone3, [0; 3]), 0);
    let program = FILTERS.as_ref().unwrap().without_clone3;
    let arch = match program.iter().find(|step| step.code == 0x15) {
        Some(step) => step.k,
        None => panic!("it compares nothing"),
    };
    let number = u32::try_from(libc::SYS_clone3).unwrap();
    // SECCOMP_RET_ERRNO
    assert_eq!(verdict(program, arch, number, [0; 6]), 0x5_0000 | libc::ENOSYS.unsigned_abs());
}

#[test]
fn a_processor_neither_opens_files_nor_sockets() {
    for number in [libc::SYS_openat, libc::SYS_socket, libc::SYS_execve, libc::SYS_clone3] {
        assert!(is_killed(fate(Kind::Vcpu, number, [0; 3])), "{number}");
    }
}
