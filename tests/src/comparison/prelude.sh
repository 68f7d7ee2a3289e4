# What the scripts of cases on the host begin with: $runtime, $name and $port are set.
set -u

# docker run with the runtime that is looked at.
run() { docker run --runtime "$runtime" "$@"; }

# Waits until a command succeeds.
eventually() {
  local tries=0
  until "$@" >/dev/null 2>&1; do
    tries=$((tries + 1)); [ "$tries" -lt 400 ] || { echo "never: $*"; return 1; }
    sleep 0.2
  done
}

# Waits until the log of a container has a line.
logged() { eventually sh -c 'docker logs "$1" 2>&1 | grep -q "$2"' - "$1" "$2"; }

# A field of docker inspect.
field() { docker inspect --format "$2" "$1"; }

# Runs a command with a terminal, as a user at one would. The end of the input may be echoed as ^@, or
# come too late.
terminal() { (set -o pipefail; script -qec "$1" /dev/null | sed 's/\^@//g'); }

# The runtime's program, and Podman with it.
program=$(command -v "$runtime")
pod() { podman --runtime "$program" "$@"; }

# Docker's image in Podman's storage, as $image.
podman_image() {
  (
    flock 9
    podman images -q | grep -q . || docker save busybox | podman load -q >/dev/null
  ) 9> /tmp/compare/podman.lock
  image=$(podman images -q | head -n 1)
}
