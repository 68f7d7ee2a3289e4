#!/usr/bin/env bash
# Runs every test that needs root, namespaces or KVM: builds them here, runs them in the lab.
#
# Such tests are marked `#[ignore = "needs …"]`, so that `cargo test` stays what it is everywhere,
# or are targets of their own (tests/tests/guest). For another architecture (LAB_ARCH) they are compiled
# here, and so are the unit tests of what runs there, which cannot run anywhere else.
# Usage: suite.sh [FILTER]
set -euo pipefail
cd "$(dirname "$0")/../.."
arch=${LAB_ARCH:-$(uname -m)}
# shellcheck source=/dev/null
. "tests/lab/arch/$arch.sh"

built=$(mktemp)
trap 'rm -f "$built"' EXIT
build() { "$@" --no-run 2>> "$built" || { cat "$built" >&2; exit 1; }; }
if [ "$arch" = "$(uname -m)" ]; then
  build cargo test --workspace
  build cargo test --package tests --test guest --test compare
else
  build "tests/lab/cross.sh" "$arch" cargo test --package arch --package devices --package vmm \
    --package coracle --package coracle-agent --package agent-protocol
  build "tests/lab/cross.sh" "$arch" cargo test --package tests --test guest
fi
mapfile -t executables < <(sed -n 's/.*Executable .*(\(.*\))$/\1/p' "$built" | sort -u)

script="failed=0; export CORACLE_TEST_KERNEL=/var/lib/coracle/guest/kernel"
script+=" CORACLE_TEST_INITRD=/var/lib/coracle/guest/initrd"
script+=" CORACLE_TEST_DEBIAN=\$CORACLE_CACHE/debian"
# As the unit tests find it where they run on the machine itself.
[ "$arch" = "$(uname -m)" ] || script+="; ulimit -n 65536"
# What is shared with guests lies on a file system that has everything a container's may have.
script+="; modprobe -q loop; truncate -s 3G /tmp/shared.img && mkfs.ext4 -q -N 400000 /tmp/shared.img"
script+=" && mkdir -p /tmp/shared && mount -o loop /tmp/shared.img /tmp/shared || failed=1"
left_out=("${unfit_tests[@]}")
[ "${LAB_KERNEL:-distro}" = tuned ] || left_out+=("${tuned_tests[@]}")
for name in "${left_out[@]}"; do echo "==> not run, as tests/lab/arch/$arch.sh says why: $name"; done
run() { script+="; $environment tests/lab/bounded.sh $1 || failed=1"; }
for executable in "${executables[@]}"; do
  environment=
  skip="${left_out[*]/#/--skip }"
  name=${executable##*/}
  [[ " ${foreign_tests[*]} " != *" ${name%-*} "* ]] || continue
  case "$name" in
    guest-*) run "'$executable' --test-threads=1 ${1:-}" ;;
    # Says how long each case took, as a filter is for one of the tests alone.
    compare-*) run "'$executable' --test-threads=1 --nocapture ${1:-}" ;;
    # The checklist itself runs in the guests.
    share-*) environment="TMPDIR=/tmp/shared"
       run "'$executable' --test-threads=1 --ignored --skip checklist:: $skip ${1:-}" ;;
    # These need no KVM but the network or a plain machine: `make unit` runs them on this one.
    image-*) ;;
    server-*) [ "$arch" = "$(uname -m)" ] || run "'$executable' --test-threads=1 --ignored ${1:-}" ;;
    *) if [ "$arch" != "$(uname -m)" ]; then
         environment="TMPDIR=/tmp/shared"
         run "'$executable' ${1:-}"
       fi
       run "'$executable' --test-threads=1 --ignored $skip ${1:-}" ;;
  esac
done
export LAB_TIMEOUT=${LAB_TIMEOUT:-4500}
exec tests/lab/lab.sh run "$script; exit \$failed"
