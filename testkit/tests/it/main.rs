//! The kit's own parts, against a real PostgreSQL and real processes. Run them with `make test`.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod bootstrap;
mod cluster;
mod processes;
mod test_database;
