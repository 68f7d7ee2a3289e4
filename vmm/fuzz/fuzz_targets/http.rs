//! libFuzzer's way into [`vmm_fuzz::http`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm_fuzz::http(data));
