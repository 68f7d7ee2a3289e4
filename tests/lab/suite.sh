#!/usr/bin/env bash
# Runs every test that needs root, namespaces or KVM: builds them here, runs them in the lab.
#
# Such tests are marked `#[ignore = "needs …"]`, so that `cargo test` stays what it is everywhere,
# or are targets of their own (tests/tests/guest). Usage: suite.sh [FILTER]
set -euo pipefail
cd "$(dirname "$0")/../.."

built=$(mktemp)
trap 'rm -f "$built"' EXIT
cargo test --workspace --no-run 2> "$built" || { cat "$built" >&2; exit 1; }
cargo test --package tests --test guest --test compare --no-run 2>> "$built" || { cat "$built" >&2; exit 1; }
mapfile -t executables < <(sed -n 's/.*Executable .*(\(.*\))$/\1/p' "$built" | sort -u)

script="failed=0; export CORACLE_TEST_KERNEL=/var/lib/coracle/guest/kernel"
script+=" CORACLE_TEST_INITRD=/var/lib/coracle/guest/initrd"
script+=" CORACLE_TEST_DEBIAN=\$CORACLE_CACHE/debian"
# What is shared with guests lies on a file system that has everything a container's may have.
script+="; modprobe -q loop; truncate -s 3G /tmp/shared.img && mkfs.ext4 -q -N 400000 /tmp/shared.img"
script+=" && mkdir -p /tmp/shared && mount -o loop /tmp/shared.img /tmp/shared || failed=1"
for executable in "${executables[@]}"; do
  environment=
  case "$executable" in
    */guest-*) arguments="--test-threads=1" ;;
    # Says how long each case took, as a filter is for one of the tests alone.
    */compare-*) arguments="--test-threads=1 --nocapture" ;;
    # The checklist itself runs in the guests.
    */share-*) environment="TMPDIR=/tmp/shared" arguments="--test-threads=1 --ignored --skip checklist::" ;;
    # These need no KVM but the network or a plain machine: `make unit` runs them.
    */image-*|*/server-*) continue ;;
    *) arguments="--test-threads=1 --ignored"
       # Not piped into a grep that ends at the first match: the lost rest would count as an error,
       # and leave the tests out.
       list=$("$executable" --list --ignored)
       [[ $list == *': test'* ]] || continue ;;
  esac
  script+="; $environment tests/lab/bounded.sh '$executable' $arguments ${1:-} || failed=1"
done
export LAB_TIMEOUT=${LAB_TIMEOUT:-3000}
exec tests/lab/lab.sh run "$script; exit \$failed"
