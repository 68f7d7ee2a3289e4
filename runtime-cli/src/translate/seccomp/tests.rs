//! Compiled profiles, judged by what an interpreter of classic BPF makes of them.

use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

/// The engines' default profile in short: what Docker writes into `config.json`.
const DOCKER_LIKE: &str = r#"{
    "defaultAction": "SCMP_ACT_ERRNO",
    "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
    "syscalls": [
        {"names": ["read", "write", "exit_group", "nosuchcall"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
         "args": [{"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}]},
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
         "args": [{"index": 0, "value": 2114060288, "op": "SCMP_CMP_MASKED_EQ"}]}
    ]
}"#;

fn compiled(json: &str) -> Result<Option<Seccomp>, Error> {
    compile(&serde_json::from_str(json).unwrap())
}

fn filter(json: &str) -> Vec<u8> {
    compiled(json).unwrap().unwrap().program
}

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number.unsigned_abs()
}

/// What the filter answers to a native system call.
fn verdict(program: &[u8], syscall: libc::c_long, first_argument: u64) -> u32 {
    let mut data = Vec::new();
    data.extend_from_slice(&u32::try_from(syscall).unwrap().to_ne_bytes());
    data.extend_from_slice(&native_audit_arch().unwrap().to_ne_bytes());
    data.extend_from_slice(&0u64.to_ne_bytes());
    data.extend_from_slice(&first_argument.to_ne_bytes());
    data.resize(64, 0);
    run(program, &data)
}

/// Runs classic BPF as far as seccomp filters use it.
fn run(program: &[u8], data: &[u8]) -> u32 {
    let mut position = 0;
    let mut accumulator = 0;
    loop {
        let instruction = &program[position * INSTRUCTION_BYTES..][..INSTRUCTION_BYTES];
        let code = u32::from(u16::from_ne_bytes(instruction[..2].try_into().unwrap()));
        let operand = u32::from_ne_bytes(instruction[4..].try_into().unwrap());
        position += 1;
        let mut jump = |condition: bool| {
            position += usize::from(instruction[if condition { 2 } else { 3 }]);
        };
        match (code & 0x07, code & 0xf0) {
            (libc::BPF_LD, _) => {
                let offset = operand as usize;
                accumulator = u32::from_ne_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            (libc::BPF_ALU, libc::BPF_AND) => accumulator &= operand,
            (libc::BPF_JMP, libc::BPF_JA) => position += operand as usize,
            (libc::BPF_JMP, libc::BPF_JEQ) => jump(accumulator == operand),
            (libc::BPF_JMP, libc::BPF_JGT) => jump(accumulator > operand),
            (libc::BPF_JMP, libc::BPF_JGE) => jump(accumulator >= operand),
            (libc::BPF_JMP, libc::BPF_JSET) => jump(accumulator & operand != 0),
            (libc::BPF_RET, _) => return operand,
            other => panic!("instruction {other:?} is not interpreted"),
        }
    }
}

#[test]
fn listed_calls_are_allowed_and_others_get_the_default() {
    let program = filter(DOCKER_LIKE);

    assert_eq!(verdict(&program, libc::SYS_read, 0), ALLOW);
    assert_eq!(verdict(&program, libc::SYS_ptrace, 0), errno(libc::EPERM));
}

#[test]
fn a_rule_has_an_error_number_of_its_own() {
    assert_eq!(verdict(&filter(DOCKER_LIKE), libc::SYS_clone3, 0), errno(libc::ENOSYS));
}

#[test]
fn an_argument_decides() {
    let program = filter(DOCKER_LIKE);

    assert_eq!(verdict(&program, libc::SYS_personality, 0), ALLOW);
    assert_eq!(verdict(&program, libc::SYS_personality, 1), errno(libc::EPERM));
}

#[test]
fn a_masked_comparison_looks_at_the_masked_bits_only() {
    let program = filter(DOCKER_LIKE);
    let newuser = u64::try_from(libc::CLONE_NEWUSER).unwrap();

    assert_eq!(verdict(&program, libc::SYS_clone, 0x11), ALLOW);
    assert_eq!(verdict(&program, libc::SYS_clone, newuser | 0x11), errno(libc::EPERM));
}

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    assert_eq!(verdict(&filter(DOCKER_LIKE), 4000, 0), errno(libc::ENOSYS));
}

#[test]
fn a_profile_that_denies_by_list_leaves_new_calls_alone() {
    let program = filter(
        r#"{"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}"#,
    );

    assert_eq!(verdict(&program, 4000, 0), ALLOW);
    assert_eq!(verdict(&program, libc::SYS_mkdirat, 0), errno(libc::EACCES));
}

#[test]
fn several_conditions_on_one_argument_are_alternatives() {
    let program = filter(
        r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"},
                      {"index": 0, "value": 9, "op": "SCMP_CMP_EQ"}]}]}"#,
    );

    assert_eq!(verdict(&program, libc::SYS_personality, 8), ALLOW);
    assert_eq!(verdict(&program, libc::SYS_personality, 9), ALLOW);
    assert_eq!(verdict(&program, libc::SYS_personality, 10), errno(libc::EPERM));
}

#[test]
fn the_default_action_has_an_error_number_of_its_own() {
    let program = filter(
        r#"{"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38,
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}"#,
    );

    assert_eq!(verdict(&program, libc::SYS_write, 0), errno(libc::ENOSYS));
}

#[test]
fn a_profile_that_allows_everything_is_no_filter() {
    assert_eq!(compiled(r#"{"defaultAction": "SCMP_ACT_ALLOW"}"#).unwrap(), None);
}

#[test]
fn flags_become_bits() {
    let json = r#"{"defaultAction": "SCMP_ACT_LOG",
                   "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
                   "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}"#;

    assert_eq!(compiled(json).unwrap().unwrap().flags, 0b110);
}

#[test]
fn notifications_are_refused_with_a_remedy() {
    let json = r#"{"defaultAction": "SCMP_ACT_ALLOW",
                   "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]}"#;

    assert!(matches!(compiled(json), Err(Error::Notify)));
}

#[test]
fn an_argument_that_no_call_has_is_refused() {
    let json = r#"{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW",
         "args": [{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]}]}"#;

    assert!(matches!(compiled(json), Err(Error::ArgumentIndex(6))));
}
