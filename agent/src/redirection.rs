//! Sends what the processes of a cgroup address to the engine's name server to a socket of the agent's,
//! whatever port that has: port 53 is left to the container's own name server, if it is one.
//!
//! The kernel runs three tiny BPF programs for it (bpf(2), BPF_PROG_TYPE_CGROUP_SOCK_ADDR): two change
//! the port of what is sent, the third says 53 again of what is received.

use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use agent_protocol::DOMAIN_PORT;
use nix::errno::Errno;

// linux/bpf.h: commands, the type of the programs, where they are attached and how.
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
const BPF_CGROUP_INET4_CONNECT: u32 = 10;
const BPF_CGROUP_UDP4_SENDMSG: u32 = 14;
const BPF_CGROUP_UDP4_RECVMSG: u32 = 19;
/// Beside the programs that the container's own manager attaches.
const BPF_F_ALLOW_MULTI: u32 = 2;

// `struct bpf_sock_addr`: the offsets of address and port, both in network byte order.
const USER_IP4: i16 = 4;
const USER_PORT: i16 = 24;

/// One instruction (Documentation/bpf/standardization/instruction-set.rst): operation, registers (the
/// source's number in the upper half), offset, immediate value.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction(u8, u8, i16, i32);

/// `union bpf_attr` of BPF_PROG_LOAD, up to what is set here.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// `union bpf_attr` of BPF_PROG_ATTACH, up to what is set here.
#[repr(C)]
struct Attach {
    target_fd: RawFd,
    attach_bpf_fd: RawFd,
    attach_type: u32,
    attach_flags: u32,
}

/// Has the processes in and below `cgroup` reach `port` of `address` where they ask for its port 53.
pub fn redirect(cgroup: BorrowedFd<'_>, address: Ipv4Addr, port: u16) -> io::Result<()> {
    let there = program(address, DOMAIN_PORT, port);
    let back = program(address, port, DOMAIN_PORT);
    attach(cgroup, &there, BPF_CGROUP_INET4_CONNECT)?;
    attach(cgroup, &there, BPF_CGROUP_UDP4_SENDMSG)?;
    attach(cgroup, &back, BPF_CGROUP_UDP4_RECVMSG)
}

/// Replaces port `from` of `address` by port `to`, and lets everything happen.
fn program(address: Ipv4Addr, from: u16, to: u16) -> [Instruction; 8] {
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD: u8 = 0x63;
    const JUMP_UNLESS_EQUAL: u8 = 0x56;
    const MOVE: u8 = 0xb7;
    const EXIT: u8 = 0x95;
    let address = i32::from_ne_bytes(address.octets());
    let port = |port: u16| i32::from(port.to_be());
    // The context is in register 1, the result in register 0.
    [
        Instruction(LOAD_WORD, 0x12, USER_IP4, 0),
        Instruction(JUMP_UNLESS_EQUAL, 0x02, 4, address),
        Instruction(LOAD_WORD, 0x12, USER_PORT, 0),
        Instruction(JUMP_UNLESS_EQUAL, 0x02, 2, port(from)),
        Instruction(MOVE, 0x03, 0, port(to)),
        Instruction(STORE_WORD, 0x31, USER_PORT, 0),
        Instruction(MOVE, 0x00, 0, 1),
        Instruction(EXIT, 0x00, 0, 0),
    ]
}

fn attach(cgroup: BorrowedFd<'_>, program: &[Instruction], kind: u32) -> io::Result<()> {
    let load = Load {
        prog_type: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        insn_cnt: u32::try_from(program.len()).expect("a program has a few instructions"),
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        expected_attach_type: kind,
        ..Load::default()
    };
    // SAFETY: `load` is what BPF_PROG_LOAD takes; program and licence, to which it points, outlive
    // the call, and the kernel copies them.
    let loaded = unsafe { bpf(BPF_PROG_LOAD, &load) }?;
    // SAFETY: the kernel returned a new descriptor that nobody else owns.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded) };
    let attach = Attach {
        target_fd: cgroup.as_raw_fd(),
        attach_bpf_fd: loaded.as_raw_fd(),
        attach_type: kind,
        attach_flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: `attach` is what BPF_PROG_ATTACH takes, and holds descriptors that are open. The
    // cgroup keeps the program.
    unsafe { bpf(BPF_PROG_ATTACH, &attach) }.map(drop)
}

/// bpf(2).
///
/// # Safety
///
/// `attributes` must be what `command` takes, and what it points to valid.
unsafe fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<RawFd> {
    let pointer: *const T = attributes;
    // SAFETY: the caller vouches for the content; the size is that of the type, and the kernel takes
    // what is beyond it as zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, size_of::<T>()) };
    let result = Errno::result(result)?;
    Ok(RawFd::try_from(result).expect("descriptors are small numbers"))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn only_the_port_of_one_address_is_replaced() {
        let program = program(Ipv4Addr::new(127, 0, 0, 11), 53, 4000);

        assert_eq!(program[1].3.to_ne_bytes(), [127, 0, 0, 11]);
        assert_eq!(program[3].3, i32::from(53_u16.to_be()));
        assert_eq!(program[4].3, i32::from(4000_u16.to_be()));
    }

    #[test]
    #[ignore = "needs root"]
    fn a_process_in_the_cgroup_reaches_another_port_and_is_answered_from_its_own() {
        let path = format!("/sys/fs/cgroup/redirection-test-{}", std::process::id());
        std::fs::create_dir(&path).unwrap();
        let address = Ipv4Addr::new(127, 0, 0, 11);
        let server = UdpSocket::bind((address, 0)).unwrap();
        let port = server.local_addr().unwrap().port();

        redirect(std::fs::File::open(&path).unwrap().as_fd(), address, port).unwrap();

        std::fs::write(format!("{path}/cgroup.procs"), std::process::id().to_string()).unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"who", (address, 53)).unwrap();
        let mut bytes = [0; 8];
        let (count, from) = server.recv_from(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"who");
        server.send_to(b"you", from).unwrap();
        let (_, from) = client.recv_from(&mut bytes).unwrap();
        std::fs::write("/sys/fs/cgroup/cgroup.procs", std::process::id().to_string()).unwrap();
        std::fs::remove_dir(&path).unwrap();
        assert_eq!(from, (address, 53).into());
    }
}
