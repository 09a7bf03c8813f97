# A thin front door to cargo. `cargo build`, `test`, `bench` and `doc` work on their own.

CARGO ?= cargo
# One row of the benchmarks, as `make bench ID=add-latency`; all without it.
ID ?=
# Seconds for each fuzz target.
FUZZ_SECONDS ?= 60
# A plugin lives for milliseconds: without a dynamic linker it starts half a millisecond sooner.
STATIC ?= -C target-feature=+crt-static

.DEFAULT_GOAL := help
.PHONY: help build demo test vm-test vm-shell bench soak fuzz lint docs clean

help: ## Show this text.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

build: ## Build the CNI binary and the demo into target/release.
	$(CARGO) rustc --release -p dcenet-cni --bin dcenet -- $(STATIC)
	$(CARGO) build --release -p dcenet-demo

demo: build ## The main job before your eyes (root; DEMO="--keep" and the like for options).
	target/release/dcenet-demo --plugin target/release/dcenet $(DEMO)

test: ## Install what tests need and run every rung; missing rungs are skipped and counted.
	.ci/setup
	.ci/test

vm-test: ## Run the tests of the kernel rungs in QEMU, on Debian's 6.12 and 6.1 (KERNELS, DEVICES, ONLY to choose).
	.ci/vm/test

vm-shell: ## A shell in such a guest, with the host's root below it (KERNEL=6.12 DEVICES=igb).
	.ci/vm/setup
	.ci/vm/boot -i -d $(or $(DEVICES),default) $$(.ci/vm/kernel $(or $(KERNEL),6.12)) -- bash

bench: ## Compare with peers and floors; writes target/bench/summary.json.
	.ci/setup
	.ci/bench $(ID)

soak: ## The long proofs, with what they counted: thousands of kills, many packets.
	.ci/setup
	DCENET_SOAK=1 .ci/test

fuzz: ## Run each fuzz target for FUZZ_SECONDS.
	.ci/fuzz $(FUZZ_SECONDS)

lint: ## Formatting, clippy and rustdoc, warnings as errors.
	.ci/lint

docs: ## Build the API documentation into target/doc.
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps

clean: ## Remove everything built.
	$(CARGO) clean
