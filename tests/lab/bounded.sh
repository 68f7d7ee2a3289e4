#!/usr/bin/env bash
# Runs a test executable and says which of its tests took longest; one that hangs says where, and is
# ended. One without such tests is passed over.
# Usage: bounded.sh EXECUTABLE ARGUMENT...
set -uo pipefail
limit_s=1500
executable=$1; shift

# Passes on what the tests say, and adds what each took: a test is a line, which is whole at its end.
timed() {
  local line last=$EPOCHSECONDS slow=
  while IFS= read -r line; do
    printf '%s\n' "$line"
    case $line in
      "test "*" ... "*) slow+="$((EPOCHSECONDS - last)) s: ${line#test }"$'\n' ;;
      "test result: "*) echo "== slowest:"; sort -rn <<< "${slow%$'\n'}" | head -n 5 ;;
    esac
    last=$EPOCHSECONDS
  done
}

# Not piped into a grep that ends at the first match: the lost rest would count as an error.
list=$("$executable" "$@" --list) || exit
[[ $list == *': test'* ]] || exit 0
echo "== ${executable##*/}"
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
mkfifo "$folder/output"
timed < "$folder/output" & timer=$!
"$executable" "$@" > "$folder/output" & tests=$!
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
# Something that the tests left behind may hold their output open for ever.
(sleep 5; kill "$timer") 2>/dev/null & reaper=$!
wait "$timer" 2>/dev/null
# shellcheck disable=SC2046
kill "$reaper" $(pgrep -P "$reaper") 2>/dev/null
exit "$status"
