# Two commands for a newcomer: `make demo` and `make test`. Each installs what it needs first (scripts/prepare.sh).

.PHONY: help prepare build demo test proof bench lint
.DEFAULT_GOAL := help

help:
	@echo 'make demo [KEEP=1]        the main job end to end on this machine; KEEP=1 leaves it running'
	@echo 'make test                 every test, those with real PostgreSQL 13 to 18 and S3 included'
	@echo 'make proof                what takes too long for every run: 100,000 plans, memory at full size, fifty lost hosts'
	@echo 'make bench [AREA=…] [ROWS=…] [PEERS=…] [QUICK=1]   benchmarks, peers beside us; writes target/bench/report.json'
	@echo 'make lint                 formatting and clippy, warnings refused'

prepare:
	@scripts/prepare.sh

# One profile for demo and tests. The whole-system tests run the binaries, so they are built before any test starts.
build: prepare
	@cargo build --workspace --bins

demo: build
	@KEEP=$(KEEP) scripts/demo.sh

# Whole-system tests mostly wait for processes: twice the cores keeps two busy without starving a server's start.
test: export RUST_TEST_THREADS ?= 4
test: build
	@cargo test --workspace --no-fail-fast

# Memory is measured in the process that runs the test, so one at a time, and on a file system in memory.
proof: build
	@cargo test -p walfleet-repository --lib -- --ignored --nocapture
	@TMPDIR=/dev/shm cargo test -p walfleet-agent --lib -- --ignored --nocapture --test-threads=1
	@cargo test -p walfleet-integration-tests --test it -- --ignored --nocapture fifty_hosts_are_destroyed

bench: prepare
	@AREA=$(AREA) QUICK=$(QUICK) ROWS=$(ROWS) PEERS=$(PEERS) scripts/bench.sh

lint:
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets -- -D warnings
