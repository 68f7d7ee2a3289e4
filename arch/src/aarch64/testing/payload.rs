//! Guests of a few instructions, assembled by hand, which the tests of the VMM run where no Linux boots.
//! Every piece of code may be put behind every other; none but [`print_alphabet_for_ever`],
//! [`print_for_ever`], [`for_ever`], [`HANG`], [`HALT`] and [`END`] goes anywhere else than to its end.
//!
//! They run with the MMU off, so what they and the devices write to memory needs a host that keeps it
//! coherent (FEAT_S2FWB), as an emulated one does.

use super::layout;
use crate::machine::Exit;
use crate::short;

/// Registers of the first device; one page for each.
pub const DEVICES: u32 = short(layout::DEVICES.start);
/// Start of memory that neither the code nor the machine uses: some MiB.
pub const DATA: u32 = short(layout::KERNEL.0) + (4 << 20);
/// An address that is no memory.
pub const NOWHERE: u32 = 0x3f00_0000;
/// What the metrics call the register of the UART that takes characters.
pub const UART: &str = "memory 0xb000000";

/// Ends the machine, by the call SYSTEM_RESET of PSCI: `mov w0, #0x84000000`, `movk w0, #9`, `hvc #0`
pub const END: &[u8] = &[0, 0x80, 0xb0, 0x52, 0x20, 0x01, 0x80, 0x72, 0x02, 0, 0, 0xd4];
/// What [`END`] is for the machine.
pub const ENDS_BY: Exit<'static> = Exit::Reset;

/// Computes for ever: `b .`
pub const HANG: &[u8] = &[0, 0, 0, 0x14];

/// Sleeps for ever, as no interrupt is enabled: `wfi`, `b` back
pub const HALT: &[u8] = &[0x7f, 0x20, 0x03, 0xd5, 0xff, 0xff, 0xff, 0x17];

/// Conditions of a branch.
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;

/// Registers: what is pointed to, what is written or read there, a mask, and a count.
const POINTER: u32 = 2;
const VALUE: u32 = 3;
const MASK: u32 = 4;
const COUNT: u32 = 9;

/// A kernel file, an Image, that runs `code` (Documentation/arch/arm64/booting.rst).
pub fn kernel(code: &[u8]) -> Vec<u8> {
    const HEADER_WORDS: u32 = 16;
    const SIZE: usize = 4;
    const MAGIC: usize = 14;
    let mut header = [0; HEADER_WORDS as usize];
    header[0] = 0x1400_0000 | HEADER_WORDS; // b
    header[SIZE] = u32::try_from(code.len()).expect("code is short") + 4 * HEADER_WORDS;
    header[MAGIC] = 0x644d_5241;
    [words(&header), code.to_vec()].concat()
}

/// Makes the registers of devices reachable, as they are from the start.
pub fn reach_devices() -> Vec<u8> {
    Vec::new()
}

/// Writes the word `value` at `address`.
pub fn store(address: u32, value: u32) -> Vec<u8> {
    let store = 0xb900_0000 | POINTER << 5 | VALUE;
    [set(POINTER, address), set(VALUE, value), words(&[store])].concat()
}

/// Waits until one of the bits of `mask` is set in the word at `address`.
pub fn wait_for_bits(address: u32, mask: u32) -> Vec<u8> {
    let test = 0x6a00_001f | MASK << 16 | VALUE << 5;
    let wait = words(&[LOAD, test, back_if(EQUAL, 2)]);
    [set(POINTER, address), set(MASK, mask), wait].concat()
}

/// Runs `body`, in which this is not, `count` times.
pub fn times(count: u32, body: &[u8]) -> Vec<u8> {
    let decrement = 0x7100_0400 | COUNT << 5 | COUNT;
    let back = words(&[decrement, back_if(NOT_EQUAL, body.len() / 4 + 1)]);
    [&set(COUNT, count), body, &back].concat()
}

/// Runs `body` again and again.
pub fn for_ever(body: &[u8]) -> Vec<u8> {
    [body, &words(&[back(body.len() / 4)])].concat()
}

/// Writes `text` to the UART.
pub fn print(text: &str) -> Vec<u8> {
    let mut code = select_uart();
    for byte in text.bytes() {
        code.extend([set(VALUE, byte.into()), words(&[STORE_BYTE])].concat());
    }
    code
}

/// Writes `byte` to the UART again and again.
pub fn print_for_ever(byte: u8) -> Vec<u8> {
    [select_uart(), set(VALUE, byte.into()), words(&[STORE_BYTE, back(1)])].concat()
}

/// Writes the lower-case alphabet to the UART again and again. Every letter is made from the one before
/// it, in a register.
pub fn print_alphabet_for_ever() -> Vec<u8> {
    let next =
        words(&[STORE_BYTE, ADD_TO_VALUE | 1 << 10, compare(b'z' + 1), back_if(NOT_EQUAL, 3)]);
    let start = set(VALUE, b'a'.into());
    [select_uart(), for_ever(&[start, next].concat())].concat()
}

/// Prints `1` if the word at `address` is 0 just as `zero` says, else `0`.
pub fn print_whether(address: u32, zero: bool) -> Vec<u8> {
    // `cset` is an increment on the opposite condition.
    let set_if = 0x1a9f_07e0 | if zero { NOT_EQUAL } else { EQUAL } << 12 | VALUE;
    let digit = words(&[LOAD, compare(0), set_if, ADD_TO_VALUE | u32::from(b'0') << 10]);
    [set(POINTER, address), digit, select_uart(), words(&[STORE_BYTE])].concat()
}

/// `ldr value, [pointer]`
const LOAD: u32 = 0xb940_0000 | POINTER << 5 | VALUE;
/// `strb value, [pointer]`
const STORE_BYTE: u32 = 0x3900_0000 | POINTER << 5 | VALUE;
/// `add value, value, #0`
const ADD_TO_VALUE: u32 = 0x1100_0000 | VALUE << 5 | VALUE;

/// `cmp value, #number`
fn compare(number: u8) -> u32 {
    0x7100_001f | u32::from(number) << 10 | VALUE << 5
}

/// `movz register, value`, `movk register, value, lsl #16`
fn set(register: u32, value: u32) -> Vec<u8> {
    let (low, high) = (value & 0xffff, value >> 16);
    words(&[0x5280_0000 | low << 5 | register, 0x72a0_0000 | high << 5 | register])
}

fn select_uart() -> Vec<u8> {
    set(POINTER, short(layout::UART))
}

/// `b` over `instructions` instructions backwards.
fn back(instructions: usize) -> u32 {
    0x1400_0000 | backwards(instructions) & 0x03ff_ffff
}

/// `b.condition` over `instructions` instructions backwards.
fn back_if(condition: u32, instructions: usize) -> u32 {
    0x5400_0000 | (backwards(instructions) & 0x7_ffff) << 5 | condition
}

fn backwards(instructions: usize) -> u32 {
    0u32.wrapping_sub(u32::try_from(instructions).expect("code is short"))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
