//! Guests of a few x86-64 instructions, written as a kernel file on the fly.

use std::io::Write;

use tempfile::NamedTempFile;
use vmm::VmConfig;

/// Where the payload is loaded and entered: 1 MiB, the start of high memory.
const ADDRESS: u64 = 0x10_0000;

/// `lidt` of an empty table, then an undefined instruction.
pub const TRIPLE_FAULT: &[u8] =
    &[0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// `jmp $`
pub const HANG: &[u8] = &[0xeb, 0xfe];

/// Writes `text` to the UART.
pub fn print(text: &str) -> Vec<u8> {
    let mut code = SELECT_UART.to_vec();
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]);
    }
    code
}

/// Writes `byte` to the UART again and again.
pub fn print_for_ever(byte: u8) -> Vec<u8> {
    let mut code = SELECT_UART.to_vec();
    code.extend([0xb0, byte, 0xee, 0xeb, 0xfd]);
    code
}

/// `mov dx, 0x3f8`
const SELECT_UART: [u8; 4] = [0x66, 0xba, 0xf8, 0x03];

/// A kernel file that is deleted at the end of the test.
pub struct Payload(NamedTempFile);

impl Payload {
    /// An ELF executable that runs `code`, part after part.
    pub fn elf(code: &[Vec<u8>]) -> Self {
        const HEADERS: u64 = 64 + 56;
        let code = code.concat();
        let size = code.len() as u64;
        let mut file = NamedTempFile::new().unwrap();
        let mut halves = |values: &[u16]| {
            values.iter().for_each(|value| file.write_all(&value.to_le_bytes()).unwrap());
        };
        // e_ident: 64-bit, little endian, version 1; ET_EXEC, EM_X86_64, version 1.
        halves(&[0x457f, 0x464c, 0x0102, 1, 0, 0, 0, 0, 2, 62, 1, 0]);
        let mut words = |values: &[u64]| {
            values.iter().for_each(|value| file.write_all(&value.to_le_bytes()).unwrap());
        };
        words(&[ADDRESS, 64, 0]);
        // e_flags (two halves), e_ehsize, e_phentsize | e_phnum, e_shentsize, e_shnum, e_shstrndx
        words(&[64 << 32 | 56 << 48, 1]);
        // PT_LOAD, readable and executable; offset, virtual and physical address, sizes, alignment.
        words(&[1 | 5 << 32, HEADERS, ADDRESS, ADDRESS, size, size, 0x1000]);
        file.write_all(&code).unwrap();
        Payload(file)
    }

    /// A machine that runs the payload with a UART.
    pub fn config(&self) -> VmConfig {
        let mut config = VmConfig::new(self.0.path().to_owned());
        config.memory.size_mib = 32;
        config.console.serial = true;
        config
    }
}
