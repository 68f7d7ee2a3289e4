//! libFuzzer's way into [`devices_fuzz::block`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::block::run(data));
