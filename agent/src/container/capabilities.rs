//! The capability sets of a process (capabilities(7)).

use std::io;

use agent_protocol::Capabilities;
use nix::errno::Errno;

/// `_LINUX_CAPABILITY_VERSION_3`: 64 bits in two words.
const VERSION_3: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct` of capset(2).
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct` of capset(2): 32 capabilities of each set.
#[repr(C)]
struct Word {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Takes everything out of the bounding set that is not in `bounding`, while that is still allowed.
pub fn limit(bounding: u64) -> io::Result<()> {
    for capability in 0..64_u32 {
        // SAFETY: these prctl operations read their integer arguments only.
        let present = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) };
        if present < 0 {
            // The kernel has no capability with this number, nor a higher one.
            break;
        }
        if present == 0 || bounding & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: as above.
        Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) })?;
    }
    Ok(())
}

/// Whether the permitted set survives a change of user id.
pub fn keep(keep: bool) -> io::Result<()> {
    // SAFETY: this prctl operation reads its integer arguments only.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, u32::from(keep), 0, 0, 0) })?;
    Ok(())
}

/// Sets the four other sets, after the user id.
pub fn apply(sets: &Capabilities) -> io::Result<()> {
    let known = known();
    let header = Header { version: VERSION_3, pid: 0 };
    let words = words(sets, known);
    // SAFETY: the header says version 3, for which the kernel reads two words; both outlive the call.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, &header, &words) })?;

    // SAFETY: this prctl operation reads its integer arguments only.
    Errno::result(unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    })?;
    // The kernel refuses an ambient capability that is not permitted and inheritable, too.
    let ambient = sets.ambient & sets.permitted & sets.inheritable & known;
    for capability in (0..64_u32).filter(|capability| ambient & (1 << capability) != 0) {
        // SAFETY: as above.
        Errno::result(unsafe {
            libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0)
        })?;
    }
    Ok(())
}

/// The capabilities this kernel has: an older one must not fail on a newer name.
fn known() -> u64 {
    // SAFETY: this prctl operation reads its integer arguments only.
    let exists =
        |capability: &u32| unsafe { libc::prctl(libc::PR_CAPBSET_READ, *capability, 0, 0, 0) } >= 0;
    (0..64_u32).take_while(exists).fold(0, |mask, capability| mask | 1 << capability)
}

#[expect(clippy::cast_possible_truncation, reason = "each word takes its half of the mask")]
fn words(sets: &Capabilities, known: u64) -> [Word; 2] {
    [0, 32].map(|shift| Word {
        effective: ((sets.effective & sets.permitted & known) >> shift) as u32,
        permitted: ((sets.permitted & known) >> shift) as u32,
        inheritable: ((sets.inheritable & known) >> shift) as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_split_into_words_and_unknown_bits_are_left_out() {
        let sets = Capabilities {
            permitted: 1 << 40 | 1 << 63 | 0b101,
            effective: 0b111,
            ..Capabilities::default()
        };

        let [low, high] = words(&sets, (1 << 41) - 1);

        assert_eq!((low.permitted, low.effective), (0b101, 0b101));
        assert_eq!((high.permitted, high.effective), (1 << 8, 0));
    }
}
