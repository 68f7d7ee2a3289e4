//! Guests of a few instructions, assembled by hand, which the tests of the VMM run where no Linux boots.
//! Every piece of code may be put behind every other; none but [`print_alphabet_for_ever`],
//! [`print_for_ever`], [`for_ever`], [`HANG`], [`HALT`] and [`END`] goes anywhere else than to its end.

use crate::machine::Exit;
use crate::short;
use crate::x86_64::layout::{COM1_PORT, GAP_START, HIGH_RAM, PAGE_TABLES};

/// Registers of the first device; one page for each.
pub const DEVICES: u32 = short(GAP_START);
/// Start of memory that neither the code nor the machine uses: some MiB.
pub const DATA: u32 = 0x20_0000;
/// An address that is no memory.
pub const NOWHERE: u32 = 0xf000_0000;
/// What the metrics call the register of the UART that takes characters.
pub const UART: &str = "port 0x3f8";

/// Ends the machine: `lidt` of an empty table, then an undefined instruction.
pub const END: &[u8] = &[0x0f, 0x01, 0x1d, 2, 0, 0, 0, 0x0f, 0x0b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// What [`END`] is for the machine.
pub const ENDS_BY: Exit<'static> = Exit::TripleFault;

/// Computes for ever: `jmp $`
pub const HANG: &[u8] = &[0xeb, 0xfe];

/// Sleeps for ever, as no interrupt is enabled: `hlt`, `jmp` back
pub const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];

/// A kernel file, an ELF executable, that runs `code`.
pub fn kernel(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let size = code.len() as u64;
    let mut file = Vec::new();
    // e_ident: 64-bit, little endian, version 1; ET_EXEC, EM_X86_64, version 1.
    for half in [0x457fu16, 0x464c, 0x0102, 1, 0, 0, 0, 0, 2, 62, 1, 0] {
        file.extend(half.to_le_bytes());
    }
    let start = HIGH_RAM.0;
    let words: [u64; 12] = [
        start,
        64,
        0,
        // e_flags (two halves), e_ehsize, e_phentsize | e_phnum, e_shentsize, e_shnum, e_shstrndx
        64 << 32 | 56 << 48,
        1,
        // PT_LOAD, readable and executable; offset, virtual and physical address, sizes, alignment.
        1 | 5 << 32,
        HEADERS,
        start,
        start,
        size,
        size,
        0x1000,
    ];
    for word in words {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// Makes the registers of devices reachable: the third GiB of addresses, in the page tables that the
/// guest starts with. Its directory is a page that nobody else uses, with one large page.
pub fn reach_devices() -> Vec<u8> {
    const DIRECTORY: u32 = 0xc000;
    let entry = short(PAGE_TABLES.0) + 0x1000 + 3 * 8;
    [
        store(entry, DIRECTORY | 3),
        store(entry + 4, 0),
        store(DIRECTORY, DEVICES | 0x83),
        store(DIRECTORY + 4, 0),
    ]
    .concat()
}

/// Writes the word `value` at `address`: `mov ebx, address`, `mov dword [rbx], value`
pub fn store(address: u32, value: u32) -> Vec<u8> {
    [point_to(address), vec![0xc7, 0x03], value.to_le_bytes().to_vec()].concat()
}

/// Waits until one of the bits of `mask` is set in the word at `address`: `mov eax, [rbx]`, `test eax,
/// mask`, `jz` back
pub fn wait_for_bits(address: u32, mask: u32) -> Vec<u8> {
    let test = [vec![0x8b, 0x03, 0xa9], mask.to_le_bytes().to_vec()].concat();
    [point_to(address), test, vec![0x74, 0xf7]].concat()
}

/// Runs `body`, in which this is not, `count` times: `mov ecx, count`, the body, `dec ecx`, `jnz` back
pub fn times(count: u32, body: &[u8]) -> Vec<u8> {
    let jump = [0xff, 0xc9, 0x0f, 0x85];
    let back = backwards(body.len() + jump.len() + 4);
    [[0xb9].as_slice(), &count.to_le_bytes(), body, &jump, &back].concat()
}

/// Runs `body` again and again: `jmp` back
pub fn for_ever(body: &[u8]) -> Vec<u8> {
    let back = backwards(body.len() + 5);
    [body, &[0xe9], &back].concat()
}

/// Writes `text` to the UART.
pub fn print(text: &str) -> Vec<u8> {
    let mut code = select_uart();
    for byte in text.bytes() {
        code.extend([0xb0, byte, 0xee]);
    }
    code
}

/// Writes `byte` to the UART again and again.
pub fn print_for_ever(byte: u8) -> Vec<u8> {
    [select_uart(), vec![0xb0, byte, 0xee, 0xeb, 0xfd]].concat()
}

/// Writes the lower-case alphabet to the UART again and again. Every letter is made from the one before
/// it, in a register.
pub fn print_alphabet_for_ever() -> Vec<u8> {
    let letters = [
        [0xb0, b'a', 0xee],     // start: mov al, 'a'; next: out dx, al
        [0xfe, 0xc0, 0x3c],     // inc al; cmp al, 'z' + 1
        [b'z' + 1, 0x75, 0xf9], // jne next
    ];
    [select_uart(), letters.concat(), vec![0xeb, 0xf5]].concat()
}

/// Prints `1` if the word at `address` is 0 just as `zero` says, else `0`: `mov eax, [rbx]`, `test eax,
/// eax`, `setz al` or `setnz al`, `add al, '0'`, `out dx, al`
pub fn print_whether(address: u32, zero: bool) -> Vec<u8> {
    let set = if zero { 0x94 } else { 0x95 };
    let compare = vec![0x8b, 0x03, 0x85, 0xc0, 0x0f, set, 0xc0, 0x04, b'0'];
    [point_to(address), compare, select_uart(), vec![0xee]].concat()
}

/// `mov ebx, address`
fn point_to(address: u32) -> Vec<u8> {
    [vec![0xbb], address.to_le_bytes().to_vec()].concat()
}

/// `mov dx, port`
fn select_uart() -> Vec<u8> {
    [vec![0x66, 0xba], COM1_PORT.to_le_bytes().to_vec()].concat()
}

/// The distance of a jump over `bytes` bytes backwards.
fn backwards(bytes: usize) -> [u8; 4] {
    0u32.wrapping_sub(u32::try_from(bytes).expect("code is short")).to_le_bytes()
}
