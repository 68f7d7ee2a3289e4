#!/usr/bin/env bash
# Runs a test executable; each test that fails runs once more, alone, and must pass then.
#
# An emulated processor under an emulated hypervisor loses a guest now and then. A test that passes
# only the second time is named as flaky, so that it is seen; one that fails twice fails the suite.
# Usage: once-more.sh EXECUTABLE ARGUMENT...
set -uo pipefail
executable=$1; shift
output=$(mktemp)
trap 'rm -f "$output"' EXIT

echo "== ${executable##*/}"
"$executable" "$@" 2>&1 | tee "$output" && exit 0
mapfile -t failures < <(sed -n 's/^test \(.*\) \.\.\. FAILED$/\1/p' "$output")
# More than a few are no accident, and none means that the executable itself ended.
[ "${#failures[@]}" -ge 1 ] && [ "${#failures[@]}" -le 3 ] || exit 1
flaky=()
for failure in "${failures[@]}"; do
  "$executable" "$@" --exact "$failure" || exit 1
  flaky+=("$failure")
done
echo "FLAKY, passed the second time: ${flaky[*]}"
