//! libFuzzer's way into [`devices_fuzz::balloon`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::balloon::run(data));
