//! What a guest does that went on from a template: its clocks stood still, and every other guest of the
//! template would draw the same random numbers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use agent_protocol::{Failed, Resumed, SEED_BYTES};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::failure::Context;

/// The host's clock, where the kernel has a driver for it (Documentation/virt/kvm/ and driver-api/ptp.rst).
const HOST_CLOCK: &str = "/dev/ptp0";

const RANDOM: &str = "/dev/random";

/// `struct rand_pool_info` of linux/random.h with its buffer.
#[repr(C)]
struct PoolInfo {
    entropy_bits: libc::c_int,
    bytes: libc::c_int,
    seed: [u8; SEED_BYTES],
}

nix::ioctl_write_ptr!(add_entropy, b'R', 0x03, [libc::c_int; 2]);
nix::ioctl_none!(reseed, b'R', 0x07);

/// Sets the clock, and makes the kernel draw random numbers of its own.
pub fn catch_up(resumed: &Resumed) -> Result<(), Failed> {
    let now = host_time(Path::new(HOST_CLOCK)).unwrap_or_else(|error| {
        log::debug!("read {HOST_CLOCK}: {error}");
        TimeSpec::from_duration(resumed.now)
    });
    clock_settime(ClockId::CLOCK_REALTIME, now).context("set the clock")?;
    mix_in(&resumed.seed).context("seed the random number generator")
}

/// What the host's clock says, without the time that a message takes.
fn host_time(device: &Path) -> io::Result<TimeSpec> {
    let clock = File::open(device)?;
    // A clock of a descriptor (clock_getres(2), "Dynamic clocks").
    let id = (!clock.as_raw_fd() << 3) | 3;
    Ok(ClockId::from_raw(id).now()?)
}

fn mix_in(seed: &[u8; SEED_BYTES]) -> io::Result<()> {
    let random = File::options().write(true).open(RANDOM)?;
    let bytes = libc::c_int::try_from(SEED_BYTES).map_err(io::Error::other)?;
    let info = PoolInfo { entropy_bits: 8 * bytes, bytes, seed: *seed };
    // SAFETY: the kernel reads the two integers, and then as many bytes behind them as the second one
    // says: those of the seed.
    unsafe { add_entropy(random.as_raw_fd(), (&raw const info).cast()) }?;
    // What it has drawn in advance goes, too.
    // SAFETY: the request has no argument.
    unsafe { reseed(random.as_raw_fd()) }?;
    Ok(())
}
