# Two commands are the contract: `make run` sets up and runs the main job, `make test` sets up and
# passes the tests. Everything a machine needs is installed by `make setup`, which both call.

MACHINE  := $(shell uname -m)
# x86_64 or aarch64. Another one than this machine's is cross-compiled, and runs in a lab of its own.
ARCH     ?= $(MACHINE)
FOREIGN  := $(filter-out $(MACHINE),$(ARCH))
TARGET   := target/$(ARCH)-unknown-linux-gnu
CACHE    := $(or $(CORACLE_CACHE),/var/cache/coracle)$(FOREIGN:%=/%)
# Runs on this machine, whatever the images are for.
IMAGE    := CORACLE_CACHE=$(CACHE) target/$(MACHINE)-unknown-linux-gnu/release/coracle-image
LAB      := tests/lab/lab.sh
# The lab whose clock counts instructions, without engines, wherever it runs.
COUNTING := LAB_ICOUNT=1 LAB_ENGINES=0 LAB_FORCE=emulated
# distro: Debian's kernel, ready in seconds. tuned: compiled from source, once per machine; it is
# the default as soon as it is at hand.
KERNEL   ?= $(if $(wildcard $(CACHE)/guest-tuned/kernel),tuned,distro)
PREFIX   ?= /usr/local
# How long each target is fuzzed, in seconds. 3600 for a release.
FUZZ_SECONDS ?= 5

export LAB_KERNEL = $(KERNEL)
export LAB_ARCH = $(ARCH)

.PHONY: run test smoke build guest guest-images debian setup lab check unit fuzz guest-tests perf install clean

## Builds everything and runs a container through Docker on Coracle. ARCH=aarch64: on an emulated one.
run: build guest
	@echo "==> docker run --runtime coracle (in the lab unless this machine has hardware virtualization)"
	@$(LAB) run 'tests/lab/hello.sh'

## Sets up and runs every test; those that boot guests run in the lab where they have to. For another
## architecture, those of what is built for it, in its lab. On x86_64 the main job of aarch64 comes last.
ifdef FOREIGN
test: guest
	@echo "==> tests in the lab for $(ARCH)"
	@tests/lab/suite.sh
	@$(MAKE) --no-print-directory smoke
else
test: check unit fuzz guest-tests
ifeq ($(MACHINE),x86_64)
	@$(MAKE) --no-print-directory smoke ARCH=aarch64 KERNEL=distro
endif
endif

## The main job in the lab, of any architecture: a container is run by Docker and by Podman, entered,
## reached over its network, and shares files; then a few guests on the other kinds of machine that the lab
## can be. Three minutes, after the builds.
smoke: guest
	@echo "==> the main job in the lab for $(ARCH)"
	@$(LAB) run 'tests/lab/hello.sh && tests/lab/smoke.sh'
	@tests/lab/machines.sh

## Packages, once per machine.
setup:
	@tests/lab/setup.sh

build: setup
	@echo "==> building the binaries"
ifdef FOREIGN
	@cargo build --release --package coracle-image
	@tests/lab/cross.sh $(ARCH) cargo build --release --package coracle --package coracle-agent --package vmm --bins
else
	@cargo build --release --workspace --bins
endif

## The guest's kernel and its root. KERNEL=tuned compiles a kernel (about 10 minutes, once).
guest: build
	@echo "==> building the guest image ($(KERNEL) kernel)"
	@$(IMAGE) build --architecture $(ARCH) --kind $(KERNEL) --agent $(TARGET)/release/coracle-agent --output $(CACHE)/guest-$(KERNEL)

## Both kinds, which the tests and the benchmarks compare.
guest-images: build
	@$(MAKE) --no-print-directory guest KERNEL=distro
	@$(MAKE) --no-print-directory guest KERNEL=tuned

## A stock Debian on a disk, which the tests and tests/lab/login.sh boot.
debian: setup
	@tests/lab/debian.sh $(CACHE)/debian

## `make lab` opens a shell in the lab; `make lab CMD='…'` runs a command in it.
lab: setup
ifdef CMD
	@$(LAB) run '$(subst ','\'',$(CMD))'
else
	@$(LAB) shell
endif

check: setup
	@echo "==> formatting and lints"
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets --quiet -- -D warnings

unit: setup
	@echo "==> unit tests"
	@cargo test --workspace --quiet
	@echo "==> the image builder on Debian's packages, the agent as root on this machine"
	@cargo test --package coracle-image --quiet -- --ignored
	@cargo test --package coracle-agent --test server --quiet -- --ignored --test-threads=1

## Hostile guests: every parser and device against libFuzzer; TARGETS='fs vsock' chooses some.
fuzz: setup
	@FUZZ_SECONDS=$(FUZZ_SECONDS) tests/fuzz.sh $(TARGETS)

guest-tests: guest-images debian
	@echo "==> tests on real guests, tuned kernel"
	@LAB_KERNEL=tuned tests/lab/suite.sh
	@echo "==> the main job, distro kernel"
	@LAB_KERNEL=distro $(LAB) run tests/lab/hello.sh
ifneq ($(wildcard perf/baselines/$(MACHINE).json),)
	@echo "==> what a boot costs, beside what it did cost"
	@LAB_KERNEL=tuned $(COUNTING) $(LAB) run 'coracle-perf check perf/baselines/$(MACHINE).json'
endif

## What Coracle costs beside its peers; one emulated instruction counts as 1 ns. Writes
## perf/report.json and the plots beside it. The start of a machine is measured here, where its guest
## needs no lab. For another architecture only boots, to perf/ARCH.
ifdef FOREIGN
perf:
	@$(MAKE) --no-print-directory guest-images
	@tests/lab/cross.sh $(ARCH) cargo build --release --package coracle-perf --bins
	@$(COUNTING) LAB_OUTPUT=$(CURDIR)/perf/$(ARCH) $(LAB) run 'coracle-perf boot --output "$$LAB_RESULTS"'
else
perf: guest-images
	@here=; if [ -w /dev/kvm ]; then here='--add $(CACHE)/startup/report.json'; \
		$(TARGET)/release/coracle-perf startup --output $(CACHE)/startup || exit; fi; \
	$(COUNTING) LAB_OUTPUT=$(CURDIR)/perf $(LAB) run "coracle-perf all $$here --output \"\$$LAB_RESULTS\""
endif

## Binaries and guest image for this machine's own engines.
install: guest
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)/var/lib/coracle/guest
	install $(TARGET)/release/coracle $(TARGET)/release/coracle-vmm $(TARGET)/release/coracle-image $(DESTDIR)$(PREFIX)/bin/
	@# Guests map what is there: each file comes in one step, the root of another kernel goes first.
	rm -f $(DESTDIR)/var/lib/coracle/guest/rootfs.erofs
	set -e; for file in kernel initrd rootfs.erofs; do \
		new=$(DESTDIR)/var/lib/coracle/guest/$$file; \
		[ ! -e $(CACHE)/guest-$(KERNEL)/$$file ] || \
			{ install -m 644 $(CACHE)/guest-$(KERNEL)/$$file $$new.new; mv -f $$new.new $$new; }; \
	done

clean:
	cargo clean
