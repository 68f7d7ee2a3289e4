//! libFuzzer's way into [`devices_fuzz::pmem`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| devices_fuzz::pmem::run(data));
