//! Installs the system call filter the host compiled (config-linux.md, Seccomp).

use std::io;

use agent_protocol::Seccomp;
use nix::errno::Errno;

/// `sizeof(struct sock_filter)`.
const INSTRUCTION_BYTES: usize = 8;

/// Puts `filter` in force for this process and what it executes.
pub fn install(filter: &Seccomp) -> io::Result<()> {
    let mut program = instructions(&filter.program)?;
    let len = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let prog = libc::sock_fprog { len, filter: program.as_mut_ptr() };
    let flags = filter.flags;
    // SAFETY: `prog` points to `len` instructions, which the kernel copies during the call.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &prog)
    })?;
    Ok(())
}

fn instructions(bytes: &[u8]) -> io::Result<Vec<libc::sock_filter>> {
    if bytes.len() % INSTRUCTION_BYTES != 0 {
        return Err(Errno::EINVAL.into());
    }
    let instruction = |chunk: &[u8]| {
        let (code, k) = ([chunk[0], chunk[1]], [chunk[4], chunk[5], chunk[6], chunk[7]]);
        let (code, k) = (u16::from_ne_bytes(code), u32::from_ne_bytes(k));
        libc::sock_filter { code, jt: chunk[2], jf: chunk[3], k }
    };
    Ok(bytes.chunks_exact(INSTRUCTION_BYTES).map(instruction).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_cut_into_instructions() {
        let mut bytes = 6_u16.to_ne_bytes().to_vec();
        bytes.extend([1, 2]);
        bytes.extend(0x7fff_0000_u32.to_ne_bytes());

        let program = instructions(&bytes).unwrap();

        assert_eq!(program.len(), 1);
        assert_eq!((program[0].code, program[0].jt, program[0].jf), (6, 1, 2));
        assert_eq!(program[0].k, 0x7fff_0000);
    }

    #[test]
    fn half_an_instruction_is_refused() {
        assert!(instructions(&[0; 12]).is_err());
    }
}
