//! How `coracle-vmm` ends.

use vmm::Exit;

use crate::payload;

/// The exit code when the guest has run [`payload::END`].
pub fn end_code() -> Option<i32> {
    Some(if payload::end() == Exit::Reset { 3 } else { 4 })
}
