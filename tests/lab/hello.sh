#!/usr/bin/env bash
# The main job in one picture: a container that says hello from a kernel of its own.
set -euo pipefail
echo "host:  $(uname -srm)"
docker run --rm --runtime coracle busybox sh -c 'echo "guest: $(uname -srm): hello"'
