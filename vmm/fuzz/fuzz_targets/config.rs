//! libFuzzer's way into [`vmm_fuzz::config`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vmm_fuzz::config(data));
