//! Runs the whole system on one machine.
//!
//! The binary of the same name only reads the command line. Each subcommand has a module: [`up`], [`demo`], [`stress`],
//! [`failover`], [`replay`], [`mod@audit`], [`upgrade`] and [`with_postgres`]. They share:
//!
//! - [`system`]: PostgreSQL, the three services and the two relays as processes;
//! - [`target`]: where a running system is;
//! - [`identities`]: certificates for a system, and a policy;
//! - [`interrupt`]: work that Ctrl-C may end.

pub mod audit;
pub mod demo;
pub mod failover;
pub mod identities;
pub mod interrupt;
pub mod replay;
pub mod stress;
pub mod system;
pub mod target;
pub mod up;
pub mod upgrade;
pub mod with_postgres;
