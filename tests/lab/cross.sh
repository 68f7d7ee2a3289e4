#!/usr/bin/env bash
# Runs a command, as `cargo build`, with a compiler for another architecture in its environment.
#
# Debian has Rust's standard library for others than this machine, and a compiler of the same version
# to go with it; both are unpacked into the cache, and so is the library that is linked in.
# Usage: cross.sh ARCHITECTURE COMMAND ARGUMENT...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
. "$here/arch/$1.sh"
# shellcheck source=apt.sh
. "$here/apt.sh"
triple=$1-unknown-linux-gnu
folder=${CORACLE_CACHE:-/var/cache/coracle}/cross-$1
shift

# Usage: dependency PACKAGE START_OF_NAME
dependency() {
  APT_CONFIG=$folder.apt/apt.conf apt-cache depends "$1" | awk -v start="$2" '$1 == "Depends:" && index($2, start) == 1 {print $2; exit}'
}

fetch() {
  local own library llvm; own=$(dpkg --print-architecture)
  # Named after their versions, which are others where the release's updates come from as well.
  private_apt "$folder.apt" "$(debian_codename)" "$own" || exit 2
  library=$(dependency libstd-rust-web-dev libstd-rust-web-)
  llvm=$(dependency "$library" libllvm)
  rm -r "$folder.apt"
  echo "==> fetching Rust for $debian_architecture" >&2
  unpack_debian "$folder" "$(debian_codename)" rustc-web:"$own" "$library:$own" \
    "$llvm:$own" libz3-4:"$own" libstd-rust-web-dev:"$own" \
    "libstd-rust-web-dev:$debian_architecture" "libseccomp-dev:$debian_architecture" || exit 2
  touch "$folder/.complete"
}

mkdir -p "${folder%/*}"
exec 9>"$folder.lock"; flock 9
[ -e "$folder/.complete" ] || fetch
# The libraries are not in the environment of all that cargo runs, because only this one program is
# unpacked. bash, because sh drops variables with a hyphen in their names, of which cargo has some.
cat > "$folder/rustc.new" <<RUSTC
#!/bin/bash
libraries=("$folder"/root/usr/lib/{$(uname -m)-linux-gnu,llvm-*/lib})
export LD_LIBRARY_PATH=\$(IFS=:; echo "\${libraries[*]}")
exec "$folder/root/usr/bin/rustc" --sysroot "$folder/root/usr" "\$@"
RUSTC
chmod 755 "$folder/rustc.new"
# A newer file would be another compiler to cargo.
cmp -s "$folder/rustc.new" "$folder/rustc" || mv "$folder/rustc.new" "$folder/rustc"
"$folder/rustc" --version >/dev/null || { echo "cross: the fetched compiler does not start" >&2; exit 2; }
exec 9>&-

upper=${triple//-/_}
export RUSTC=$folder/rustc CARGO_BUILD_TARGET=$triple
export "CARGO_TARGET_${upper^^}_LINKER=$cross_prefix-gcc" "CC_$upper=$cross_prefix-gcc"
export LIBSECCOMP_LIB_PATH=$folder/root/usr/lib/$cross_prefix
exec "$@"
