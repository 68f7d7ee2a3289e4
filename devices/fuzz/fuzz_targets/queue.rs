//! libFuzzer's way into [`devices_fuzz::queue`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::queue::run(data));
