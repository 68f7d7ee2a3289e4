# Debian packages that this machine's own apt does not offer, unpacked and never installed: the
# machine's apt settings and packages stay as they are. Sourced by the lab's scripts.
# shellcheck shell=bash

# The mirror from which this machine has its own release.
debian_mirror() {
  apt-get indextargets --format '$(RELEASE) $(REPO_URI)' | awk -v r="$1" '$1 == r {print $2; exit}'
}

debian_codename() { (. /etc/os-release && echo "$VERSION_CODENAME"); }

# Makes the settings and the package index of an apt with one suite of that mirror as its only source,
# in FOLDER; who exports APT_CONFIG=FOLDER/apt.conf uses it.
# Usage: private_apt FOLDER SUITE ARCHITECTURE...
private_apt() {
  local folder=$1 suite=$2; shift 2
  local mirror; mirror=$(debian_mirror "$(debian_codename)")
  [ -n "$mirror" ] || { echo "lab: no Debian archive with release $(debian_codename) among this machine's apt sources" >&2; return 1; }
  rm -rf "$folder"
  mkdir -p "$folder"/{lists,cache/archives}/partial
  : > "$folder/status"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$folder/sources.list"
  {
    apt-config dump Acquire | grep -v IndexTargets
    echo "APT::Architectures { $(printf '"%s"; ' "$@") };"
    echo "APT::Sandbox::User \"root\";"
    echo "Dir::Etc { main \"/dev/null\"; parts \"/dev/null\"; sourceparts \"/dev/null\"; };"
    echo "Dir::Etc::sourcelist \"$folder/sources.list\";"
    echo "Dir::State { lists \"$folder/lists\"; status \"$folder/status\"; };"
    echo "Dir::Cache \"$folder/cache\";"
  } > "$folder/apt.conf"
  APT_CONFIG=$folder/apt.conf apt-get update -qq >&2 \
    || { echo "lab: cannot read the package index of $suite" >&2; return 1; }
}

# Unpacks packages of a suite, of any architectures, into FOLDER/root.
# Usage: unpack_debian FOLDER SUITE PACKAGE:ARCHITECTURE...
unpack_debian() {
  local folder=$1 suite=$2; shift 2
  local package architectures
  mapfile -t architectures < <(printf '%s\n' "${@##*:}" | sort -u)
  rm -rf "$folder"
  private_apt "$folder/apt" "$suite" "${architectures[@]}" || return 1
  mkdir "$folder/packages"
  (cd "$folder/packages" && APT_CONFIG=$folder/apt/apt.conf apt-get download -qq "$@") >&2 \
    || { echo "lab: cannot download $* from $suite" >&2; return 1; }
  for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder/root"; done
  rm -r "$folder/packages" "$folder/apt"
}
