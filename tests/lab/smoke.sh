#!/usr/bin/env bash
# The main job on a machine of any architecture, in a minute: a container is run, by Docker and by
# Podman, entered by exec, reached over its network, and shares files with the host.
set -euo pipefail

# Usage: expect WHAT WANTED COMMAND...
expect() {
  local what=$1 wanted=$2 found; shift 2
  found=$("$@" 2>&1) || { echo "FAILED $what: exit code $?: $found" >&2; exit 1; }
  [ "$found" = "$wanted" ] || { echo "FAILED $what: '$found' and not '$wanted'" >&2; exit 1; }
  echo "ok     $what"
}
inside() { docker exec smoke "$@"; }

coracle check
shared=$(mktemp -d)
echo from the host > "$shared/in"
docker run --detach --name smoke --runtime coracle --volume "$shared:/shared" busybox \
  sh -c 'echo served > /tmp/index.html; exec httpd -f -h /tmp' >/dev/null
trap 'docker rm --force smoke >/dev/null 2>&1; rm -rf "$shared"' EXIT

expect "a container has the processor of its host" "$(uname -m)" inside uname -m
expect "exec returns the exit code" 7 sh -c 'docker exec smoke sh -c "exit 7" || echo $?'
expect "exec passes input" piped sh -c 'echo piped | docker exec --interactive smoke cat'
expect "a container knows what year it is" "$(date +%Y)" inside date +%Y
expect "a container reads the host's files" "from the host" inside cat /shared/in
inside sh -c 'echo from the guest > /shared/out'
expect "the host reads a container's files" "from the guest" cat "$shared/out"
address=$(docker inspect --format '{{.NetworkSettings.IPAddress}}' smoke)
# Not by busybox, whose static binary loads the C library's resolver, of whatever version it finds.
# shellcheck disable=SC2016
expect "the host reaches a container's port" served timeout 20 bash -c \
  'exec 3<> "/dev/tcp/$1/80"; printf "GET / HTTP/1.0\r\n\r\n" >&3; tail -n 1 <&3' - "$address"

# What Podman wants of an administrator.
mkdir -p /etc/containers
[ -e /etc/containers/policy.json ] || echo '{ "default": [{ "type": "insecureAcceptAnything" }] }' > /etc/containers/policy.json
docker save busybox | podman load --quiet >/dev/null
expect "podman runs a container" "$(uname -m)" \
  podman --runtime /usr/local/bin/coracle run --rm --network none busybox uname -m
