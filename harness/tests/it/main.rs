//! The harness's own parts, against a real PostgreSQL and real processes. Run them with `make test`.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod scratch;

mod site;

mod bootstrap;

mod cluster;

mod processes;

mod system;

mod test_database;

mod with_postgres;

mod interleavings;

mod third_service;

mod plans;
