#!/usr/bin/env bash
# A few tests, of what depends on the kind of machine, on each kind that the lab can be beside its usual
# one: `machines` of arch/. What runs elsewhere is not run again.
# Usage: machines.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
arch=${LAB_ARCH:-$(uname -m)}
# shellcheck source=/dev/null
. "tests/lab/arch/$arch.sh"
[ "${#machines[@]}" -gt 0 ] || exit 0

# Devices of each sort, processors, and a machine that goes on in another one: whatever has interrupts.
linux_tests=(
  linux_runs_init_and_powers_off
  both_processors_of_two_come_up
  vcpus_come_online_once_they_are_granted
  the_guest_reads_and_writes_its_disk
  the_guest_shares_a_directory_with_the_host
  the_guest_reaches_the_host_over_its_network_interface
  a_guest_of_two_processors_goes_on_from_a_file
)
cross=()
[ "$arch" = "$(uname -m)" ] || cross=(tests/lab/cross.sh "$arch")
built=$(mktemp)
trap 'rm -f "$built"' EXIT
"${cross[@]}" cargo test --package arch --package vmm --test "$arch" --test linux --no-run 2> "$built" \
  || { cat "$built" >&2; exit 1; }
# Usage: tests NAME FILTER...
tests() {
  local executable; executable=$(sed -n "s/.*Executable .*(\(.*\/$1-[^/]*\))$/\1/p" "$built"); shift
  echo "tests/lab/bounded.sh '$executable' --test-threads=1 --ignored $*"
}
for name in "${linux_tests[@]}"; do
  grep -rq "fn [a-z_]*$name" vmm/tests || { echo "machines: there is no test $name any more" >&2; exit 1; }
done
script="export CORACLE_TEST_KERNEL=/var/lib/coracle/guest/kernel"
script+=" CORACLE_TEST_INITRD=/var/lib/coracle/guest/initrd"
script+="; $(tests "$arch") && $(tests linux "${linux_tests[@]}")"
for machine in "${machines[@]}"; do
  echo "==> what depends on the machine, in the lab for $arch with $machine"
  env "$machine" LAB_ENGINES=0 tests/lab/lab.sh run "$script"
done
