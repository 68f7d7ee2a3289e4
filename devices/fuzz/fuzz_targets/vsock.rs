//! libFuzzer's way into [`devices_fuzz::vsock`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::vsock::run(data));
