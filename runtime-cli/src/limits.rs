//! The resource limits that a process has from who started it, as with any runtime: those of the engine.

use agent_protocol::Process;

/// How many kinds of limits there are (asm-generic/resource.h, RLIM_NLIMITS).
const KINDS: u32 = 16;

/// Most files that a process of a guest may have open: what its kernel starts with (fs.nr_open), and
/// hosts may have raised.
const MOST_FILES: u64 = 1 << 20;

/// Adds the limits of this process for all that `process` names none of.
pub fn inherit(process: &mut Process) {
    for kind in 0..KINDS {
        if process.rlimits.iter().any(|(named, ..)| *named == kind) {
            continue;
        }
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the call writes one rlimit to `limit`, which outlives it.
        if unsafe { libc::getrlimit(kind, &raw mut limit) } != 0 {
            continue;
        }
        let most = if kind == libc::RLIMIT_NOFILE { MOST_FILES } else { libc::RLIM_INFINITY };
        process.rlimits.push((kind, limit.rlim_cur.min(most), limit.rlim_max.min(most)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate;

    #[test]
    fn what_is_named_stays_and_the_rest_is_this_process_s() {
        let json = r#"{"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": ["sh"],
                       "rlimits": [{"type": "RLIMIT_CORE", "soft": 7, "hard": 8}]}"#;
        let mut process = translate::process(&serde_json::from_str(json).unwrap(), None).unwrap();

        inherit(&mut process);

        let of = |kind| process.rlimits.iter().find(|(other, ..)| *other == kind).copied();
        let own = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_STACK);
        let (soft, hard) = own.unwrap();
        assert_eq!(of(libc::RLIMIT_CORE), Some((libc::RLIMIT_CORE, 7, 8)));
        assert_eq!(of(libc::RLIMIT_STACK), Some((libc::RLIMIT_STACK, soft, hard)));
        assert!(of(libc::RLIMIT_NOFILE).is_some_and(|(_, _, hard)| hard <= MOST_FILES));
        assert_eq!(process.rlimits.len(), 16);
    }
}
