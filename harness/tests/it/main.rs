//! The whole system, as real processes against a real PostgreSQL. Run them with `make test`.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod site;

mod command_line;
mod interleavings;
mod plans;
mod system;
mod third_service;
mod with_postgres;
