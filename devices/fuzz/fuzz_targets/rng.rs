//! libFuzzer's way into [`devices_fuzz::rng`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::rng::run(data));
