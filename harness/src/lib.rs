//! Runs the whole system on one machine, and gives the service crates' tests a PostgreSQL database each.
//!
//! The binary of the same name is a thin shell over this library. What it works with:
//!
//! - [`postgres`]: a PostgreSQL server: an existing one, or a private cluster that is started and stopped.
//! - [`bootstrap`]: what the superuser makes once per server: the roles and the two databases.
//! - [`processes`]: child processes: spawned, awaited, signalled, and read when they fail.
//! - [`system`]: the two services and two relays as such processes; [`target`]: where a running system is.
//! - [`test_database`]: a database of its own for every test; `fuzz`: what a fuzzer sends to a service.
//!
//! What it does, a module per subcommand: [`up`], [`demo`], [`stress`], [`replay`], [`audit`], [`mod@bench`],
//! [`chaos`], [`with_postgres`].

pub mod audit;
pub mod bench;
pub mod bootstrap;
pub mod chaos;
pub mod demo;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod interrupt;
pub mod postgres;
pub mod processes;
pub mod replay;
pub mod stress;
pub mod system;
pub mod target;
pub mod test_database;
pub mod up;
pub mod with_postgres;

pub use test_database::TestDatabase;
