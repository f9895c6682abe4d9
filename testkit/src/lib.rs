//! Tools for tests: PostgreSQL, processes, ports, files and generated input.
//!
//! - [`TestDatabase`]: a database of its own for every test.
//! - [`postgres`]: a PostgreSQL server: an existing one, or a private cluster.
//! - [`certificates`]: an authority, and certificates that it signs.
//! - [`bootstrap`]: what the superuser creates once per server: roles and databases.
//! - [`http`]: asks a process over HTTP.
//! - [`processes`]: child processes, their signals and logs; free ports.
//! - [`pgbouncer`]: PgBouncer before a server.
//! - [`ports`]: waits for a port that another process holds; which process has a connection.
//! - [`OwnServer`]: a server whose settings a test may change.
//! - [`Scratch`]: a directory for one test.
//! - `fuzz`: property tests of a running service.
//!
//! The harness, the fault run and the bench use the same servers and processes.

pub mod bootstrap;
pub mod certificates;
#[cfg(feature = "fuzz")]
pub mod fuzz;
pub mod http;
mod own_server;
pub mod pgbouncer;
pub mod ports;
pub mod postgres;
pub mod processes;
mod rights;
mod scratch;
mod test_database;

pub use own_server::OwnServer;
pub use scratch::Scratch;
pub use test_database::TestDatabase;
