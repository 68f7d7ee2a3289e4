//! libFuzzer's way into [`devices_fuzz::net`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::net::run(data));
