//! The small engine in place of the large one, for `oci-spec`: it matches one value of a bundle, by a
//! pattern of ASCII characters.
//!
//! The large one's tables of Unicode are full of addresses. The loader has to correct them at each start
//! of a position-independent program, whether they are used or not, and so each of its processes would
//! have 209 KiB of them for itself.

pub use regex_lite::*;
