//! The whole system: real processes and a real PostgreSQL. Run with `make test`.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod site;

mod command_line;
mod erase;
mod failover;
mod interleavings;
mod plans;
mod policy;
mod resend;
mod secrets;
mod system;
mod third_service;
mod tls;
mod traces;
mod up;
mod with_postgres;
