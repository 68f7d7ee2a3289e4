#!/usr/bin/env bash
# Builds every fuzz target with libFuzzer and runs each for $FUZZ_SECONDS (10): `make fuzz`.
# With names as arguments only those: `FUZZ_SECONDS=3600 tests/fuzz.sh fs vsock`.
#
# These are the flags of cargo-fuzz without a sanitizer, which a stable compiler has: coverage, and all
# checks of Rust itself. Memory is bounded by the targets' own allocator. What was found before is kept
# in target/fuzz-corpus and built upon; what fails is left in target/fuzz-findings.
set -euo pipefail
cd "$(dirname "$0")/.."

crates=(devices/fuzz vmm/fuzz agent/protocol/fuzz)
seconds=${FUZZ_SECONDS:-10}

# RUSTFLAGS take the place of those in .cargo/config.toml: no static C library here.
export RUSTFLAGS="--cfg fuzzing -C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=4 \
-C llvm-args=-sanitizer-coverage-trace-compares -C llvm-args=-sanitizer-coverage-inline-8bit-counters \
-C llvm-args=-sanitizer-coverage-pc-table"
packages=()
for crate in "${crates[@]}"; do
  packages+=(--package "$(sed -n 's/^name = "\(.*-fuzz\)"$/\1/p' "$crate/Cargo.toml")")
done
echo "==> building the fuzz targets"
cargo build --quiet --profile fuzz --target-dir target/fuzz "${packages[@]}" --features \
  devices-fuzz/libfuzzer,vmm-fuzz/libfuzzer,agent-protocol-fuzz/libfuzzer --bins

mkdir -p target/fuzz-findings
binaries=$(echo target/fuzz/*/fuzz)
for crate in "${crates[@]}"; do
  for seeds in "$crate"/seeds/*; do
    target=$(basename "$seeds")
    [ $# = 0 ] || [[ " $* " == *" $target "* ]] || continue
    mkdir -p "target/fuzz-corpus/$target"
    echo "==> fuzzing $target for $seconds s"
    log=target/fuzz-findings/$target.log
    if ! "$binaries/fuzz-$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 \
      -max_len=4096 -print_final_stats=1 -artifact_prefix="target/fuzz-findings/$target-" \
      "target/fuzz-corpus/$target" "$seeds" 2>"$log"; then
      tail -n 40 "$log" >&2
      echo "fuzz: $target found something: see $log and the file it names" >&2
      exit 1
    fi
    grep -E 'number_of_executed_units|average_exec_per_sec' "$log" | tr '\n' ' '
    echo
  done
done
