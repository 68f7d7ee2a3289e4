//! libFuzzer's way into [`devices_fuzz::console`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::console::run(data));
