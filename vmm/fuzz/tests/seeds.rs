//! Every seed, and every input that ever found something, is played without a fuzzer.

use std::fs;
use std::path::Path;

fn play(name: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name);
    for entry in fs::read_dir(folder).unwrap() {
        let seed = entry.unwrap().path();
        // The name of one that fails is the last line.
        eprintln!("{}", seed.display());
        run(&fs::read(seed).unwrap());
    }
}

#[test]
fn every_configuration_is_survived() {
    play("config", vmm_fuzz::config);
}

#[test]
fn every_request_is_survived() {
    play("http", vmm_fuzz::http);
}
