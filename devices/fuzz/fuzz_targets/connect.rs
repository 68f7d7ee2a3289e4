//! libFuzzer's way into [`devices_fuzz::connect`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::connect::run(data));
