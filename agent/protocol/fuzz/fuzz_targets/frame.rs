//! libFuzzer's way into [`agent_protocol_fuzz::frame`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| agent_protocol_fuzz::frame(data));
