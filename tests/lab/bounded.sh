#!/usr/bin/env bash
# Runs a test executable; one that hangs says where, and is ended. One without such tests is passed over.
# Usage: bounded.sh EXECUTABLE ARGUMENT...
set -uo pipefail
limit_s=1500
executable=$1; shift

# Not piped into a grep that ends at the first match: the lost rest would count as an error.
list=$("$executable" "$@" --list) || exit
[[ $list == *': test'* ]] || exit 0
echo "== ${executable##*/}"
"$executable" "$@" & tests=$!
(
  sleep "$limit_s"
  echo "== no end within $limit_s s; the threads of the tests and of every container:"
  for pid in "$tests" $(pgrep -x coracle); do
    for thread in /proc/"$pid"/task/*; do
      echo "-- $pid $(cat "$thread/comm"): $(grep State "$thread/status"), in the kernel:"
      cat "$thread/stack"
    done
  done
  kill -KILL "$tests"
) & watch=$!
status=0
wait "$tests" || status=$?
# The watch first, or it would take the end of its sleep for the end of the time.
# shellcheck disable=SC2046
kill "$watch" $(pgrep -P "$watch") 2>/dev/null
wait "$watch" 2>/dev/null
exit "$status"
