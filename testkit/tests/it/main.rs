//! The test kit itself, with a real PostgreSQL and real processes. Run with `make test`.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod bootstrap;
mod cluster;
mod processes;
mod test_database;
