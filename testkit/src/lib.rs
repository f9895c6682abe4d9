//! What tests need of the world around the code: a PostgreSQL database for each, processes, ports, files, fuzzed input.
//!
//! - [`TestDatabase`]: a database of its own for every test.
//! - [`postgres`]: a PostgreSQL server: an existing one, or a private cluster that is started and stopped.
//! - [`bootstrap`]: what the superuser makes once per server: the roles and the two databases.
//! - [`processes`]: child processes: spawned, awaited, signalled, and read when they fail; free ports.
//! - [`Scratch`]: a directory for one test.
//! - `fuzz`: what a fuzzer sends to a service.
//!
//! The harness, the fault runs and the bench use the same servers and processes.

pub mod bootstrap;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod postgres;
pub mod processes;
mod scratch;
mod test_database;

pub use scratch::Scratch;
pub use test_database::TestDatabase;
