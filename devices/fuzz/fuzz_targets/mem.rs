//! libFuzzer's way into [`devices_fuzz::mem`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::mem::run(data));
