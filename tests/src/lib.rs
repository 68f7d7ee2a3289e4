//! Fixtures for tests that run the built `coracle` on real KVM: throw-away bundles, commands with
//! their outcome, and a look for what should not be left behind.

mod bundle;
mod command;
mod container;
mod leftovers;

pub mod comparison;

pub use bundle::{Bundle, RESULT_TIMEOUT, rootfs};
pub use command::{Outcome, coracle, docker, run, shell};
pub use container::Container;
pub use leftovers::assert_nothing_left;
