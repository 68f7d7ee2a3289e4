//! Every seed, and every input that ever found something, is played without a fuzzer.

use std::fs;
use std::path::{Path, PathBuf};

use devices_fuzz::{TARGETS, Target};

fn folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target.name)
}

#[test]
fn every_seed_is_survived() {
    for target in TARGETS {
        let seeds = fs::read_dir(folder(target)).unwrap().map(|entry| entry.unwrap().path());
        for seed in seeds {
            // The name of one that fails is the last line.
            eprintln!("{}", seed.display());
            (target.run)(&fs::read(seed).unwrap());
        }
    }
}

#[test]
fn the_files_are_the_seeds() {
    for target in TARGETS {
        for (name, bytes) in (target.seeds)() {
            let file = folder(target).join(name);
            assert!(fs::read(&file).ok() == Some(bytes), "{} is not what it was", file.display());
        }
    }
}

#[test]
#[ignore = "writes the files that the_files_are_the_seeds reads"]
fn write_the_seeds() {
    for target in TARGETS {
        fs::create_dir_all(folder(target)).unwrap();
        for (name, bytes) in (target.seeds)() {
            fs::write(folder(target).join(name), bytes).unwrap();
        }
    }
}
