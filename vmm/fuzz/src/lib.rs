//! Bytes from people and programs of the host that `vmm` parses: what `make fuzz` mutates.

// The program's, which is no library.
#[expect(dead_code, reason = "only what reads requests and refuses them is wanted here")]
#[path = "../../src/bin/coracle-vmm/http.rs"]
mod http;

use std::alloc::System;

use cap::Cap;
use vmm::VmConfig;

/// No input may take more memory than this; an allocation beyond it aborts.
#[global_allocator]
static HEAP: Cap<System> = Cap::new(System, 64 << 20);

/// A configuration file: read, checked, and written so that it reads the same.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let config = match vmm::from_json::<VmConfig>(text) {
        Ok(config) => config,
        Err(error) => {
            assert!(
                !error.field.is_empty() && !error.rule.is_empty(),
                "an error says what is wrong"
            );
            return;
        }
    };
    if let Err(error) = config.validate() {
        assert!(!error.field.is_empty() && !error.rule.is_empty(), "an error says what is wrong");
    }
    let written = serde_json::to_string(&config).expect("a configuration can be written");
    assert_eq!(vmm::from_json(&written), Ok(config), "what was written reads the same");
}

/// What clients of the control socket send, in two pieces: the first byte says where it is cut.
pub fn http(data: &[u8]) {
    let Some((&cut, data)) = data.split_first() else { return };
    let (mut received, later) = {
        let (now, later) = data.split_at(data.len().min(usize::from(cut) * 4));
        (now.to_vec(), later)
    };
    if !take_all(&mut received) {
        return;
    }
    received.extend_from_slice(later);
    take_all(&mut received);
    let most = http::MAX_HEAD_BYTES + http::MAX_BODY_BYTES;
    assert!(received.len() <= most.max(data.len()), "what waits for more is bounded");
}

/// Takes every request there is; `false` if one of them is wrong.
fn take_all(received: &mut Vec<u8>) -> bool {
    loop {
        let before = received.len();
        match http::Request::take(received) {
            Ok(Some(request)) => {
                assert!(received.len() < before, "a request that was taken is gone");
                assert!(request.body.len() <= http::MAX_BODY_BYTES, "a body is bounded");
                let answer = http::Response::failure(404, &request.method, &request.path);
                assert!(answer.encode(request.is_last).ends_with('}'), "any text can be answered");
            }
            Ok(None) => return true,
            Err(response) => {
                assert!((400..500).contains(&response.status), "it is the client's fault");
                return false;
            }
        }
    }
}
