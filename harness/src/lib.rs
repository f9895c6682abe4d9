//! Runs the whole system on one machine.
//!
//! The binary of the same name is a thin shell over this library. What it works with:
//!
//! - [`system`]: the two services and two relays as processes; [`target`]: where a running system is.
//! - [`interrupt`]: work that Ctrl-C may end.
//!
//! What it does, a module per subcommand: [`up`], [`demo`], [`stress`], [`replay`], [`mod@audit`], [`with_postgres`].

pub mod audit;
pub mod demo;
pub mod interrupt;
pub mod replay;
pub mod stress;
pub mod system;
pub mod target;
pub mod up;
pub mod with_postgres;
