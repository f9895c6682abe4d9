# Everything here sets up what it needs by itself; POSTGRES_URL (a superuser's URL) uses an existing server instead.

.DEFAULT_GOAL := help
.PHONY: help demo up bench bench-soak chaos test test-all-postgres broken-variants rolling-upgrade failover sbom prepare ci

help:
	@echo 'make demo        see the pattern at work, from nothing, in a few seconds (after a first build of some minutes)'
	@echo '                 (make demo SECURE=1 does the same with mutual TLS and a policy of who may call what)'
	@echo 'make up          run the whole system in the foreground and learn how to use it; Ctrl-C ends it'
	@echo '                 (make up SECURE=1 does the same with mutual TLS and a policy)'
	@echo '                 (make up PROFILE=release takes minutes longer to build, and is what to put load on)'
	@echo 'make bench       measure it against PostgreSQL and gRPC alone: up to 15 minutes on a machine that does nothing else'
	@echo 'make bench-soak  ten minutes at 2,000 orders/s: whether the outbox stays small and fast'
	@echo 'make chaos       break it in every way known for four minutes, and check that nothing is lost or applied twice'
	@echo '                 (make chaos SECURE=1 does the same with mutual TLS and a policy)'
	@echo 'make failover    have the databases fail over under load (needs patroni, etcd and haproxy): twenty minutes'
	@echo 'make test        every test, each with a database of its own'
	@echo '                 (make test POSTGRES=14 installs PostgreSQL 14 for it, if need be; so for 15, 16, 17 and 18)'
	@echo 'make test-all-postgres  every test on each of these five versions: half an hour'
	@echo 'make broken-variants  whether harness chaos finds ten ways to break the pattern: half an hour (more the first time)'
	@echo 'make rolling-upgrade COMMIT=…  replace the processes of an earlier commit one at a time under load, and back'
	@echo 'make sbom        list the crates of each program in CycloneDX, in target/sbom (after a first build of some minutes)'
	@echo 'make prepare     renew the data that SQL is checked against at compile time, after changing SQL'
	@echo 'make ci          all that a change has to pass'

# What runs the system on this machine. It is built without optimisation, which takes most of a first build:
# `make up PROFILE=release` is what to put load on.
system := -p order-service -p inventory-service -p loyalty-service -p outbox-relay -p harness
PROFILE ?= local

demo: system
	@target/$(PROFILE)/harness demo $(if $(SECURE),--secure)

up: system
	@target/$(PROFILE)/harness up $(if $(SECURE),--secure)

bench: release
	@target/release/harness bench

bench-soak: release
	@target/release/harness bench --only 6

chaos: release
	@target/release/harness chaos $(if $(SECURE),--secure)

failover: release
	@target/release/harness failover --patroni
	@target/release/harness failover --standby

# The tests bring all binaries with them, the harness that lends them a server among them. They wait (for leases to expire,
# for back-offs) more than they work, so more of them run at once than there are cores.
test test-all-postgres: export RUST_TEST_THREADS ?= 6
test:
ifdef POSTGRES
	.ci/test-postgres $(POSTGRES)
else
	cargo test --workspace --locked --no-run
	target/debug/harness with-postgres -- cargo test --workspace --locked
endif

test-all-postgres:
	.ci/test-postgres 14 15 16 17 18

broken-variants:
	.ci/broken-variants

rolling-upgrade:
	.ci/rolling-upgrade $(COMMIT)

sbom:
	.ci/sbom

prepare:
	.ci/prepare-sql

ci:
	.ci/run

.PHONY: system release
system:
	cargo build --locked --profile $(PROFILE) $(system)

release:
	cargo build --locked --release $(system) -p chaos -p bench
