//! What goes through the standard input and output of a container: `cat`, byte by byte and in bulk.

use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::{Bundle, Runtime, fresh_id};
use crate::Options;
use crate::report::Report;
use crate::samples::Samples;

/// Round trips of one byte that are timed.
const ROUND_TRIPS: u32 = 200;
/// Bytes of the bulk, there and back.
const BULK_BYTES: usize = 16 << 20;

/// Measures and adds the rows.
pub fn measure(report: &mut Report, options: &Options) -> Result<()> {
    let bundle = Bundle::new(&options.tuned, &["cat"])?;
    let coracle = Runtime::coracle(&bundle);
    for peer in options.peers().iter().filter(|peer| peer.is_runtime()) {
        let peer = Runtime::of_peer(peer);
        let mut samples: [[Samples; 2]; 2] = Default::default();
        for run in 0..=options.runs {
            let pair = [cat(&coracle, &bundle)?, cat(&peer, &bundle)?];
            eprintln!("stdio: run {run} of {}: {pair:.1?}", options.runs);
            if run > 0 {
                for (figure, samples) in samples.iter_mut().enumerate() {
                    samples
                        .iter_mut()
                        .zip(pair)
                        .for_each(|(side, values)| side.add(values[figure]));
                }
            }
        }
        let [[our_trip, their_trip], [our_bulk, their_bulk]] = &samples;
        let name = &peer.name;
        report.pairs("stdio round trip", ("us", our_trip), (name, their_trip), None);
        report.pairs("stdio in and out", ("us/MiB", our_bulk), (name, their_bulk), None);
    }
    Ok(())
}

/// Microseconds of a round trip, and of a MiB there and back.
fn cat(runtime: &Runtime, bundle: &Bundle) -> Result<[f64; 2]> {
    let mut command = bundle.run(runtime, &[], &fresh_id());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let figures = talk(&mut child);
    let status = child.wait()?;
    if !status.success() {
        bail!("{} run: {status}", runtime.name);
    }
    figures
}

fn talk(child: &mut Child) -> Result<[f64; 2]> {
    let mut input = child.stdin.take().context("stdin is piped")?;
    let mut output = child.stdout.take().context("stdout is piped")?;
    let mut byte = [0];
    // The first one waits for the container to start.
    input.write_all(b"x")?;
    output.read_exact(&mut byte)?;
    let started = Instant::now();
    for _ in 0..ROUND_TRIPS {
        input.write_all(b"x")?;
        output.read_exact(&mut byte)?;
    }
    let trip_us = started.elapsed().as_secs_f64() * 1e6 / f64::from(ROUND_TRIPS);

    let started = Instant::now();
    let writer = thread::spawn(move || input.write_all(&vec![0x5a; BULK_BYTES]));
    let mut read = 0;
    let mut chunk = vec![0; 64 << 10];
    while read < BULK_BYTES {
        match output.read(&mut chunk)? {
            0 => bail!("the output ended after {read} bytes"),
            bytes => read += bytes,
        }
    }
    let bulk_us = started.elapsed().as_secs_f64() * 1e6 / (BULK_BYTES >> 20) as f64;
    writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    Ok([trip_us, bulk_us])
}
