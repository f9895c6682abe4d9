//! The command line of the harness.

use std::{ffi::OsString, os::unix::process::CommandExt, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};
use harness::{audit, demo, replay, stress, up, with_postgres};
use testkit::processes::binary;

/// Run the whole system on one machine.
///
/// Needs PostgreSQL 14 or newer: the server of POSTGRES_URL if that is set, else a private one, started from the
/// binaries found on this machine and stopped at the end. No server that runs already is touched.
#[derive(Debug, Parser)]
#[command(version, after_help = "Exit codes: 0 it worked, 1 it failed, 2 it was asked for wrongly.")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Up(up::Arguments),
    Demo(demo::Arguments),
    Stress(stress::Arguments),
    Replay(replay::Arguments),
    Audit(audit::Arguments),
    /// Measure the system against PostgreSQL and gRPC alone
    ///
    /// Runs the program `bench` beside this one, a crate of its own, with the same arguments.
    #[command(disable_help_flag = true)]
    Bench(Handed),
    /// Break the system in every way known, under load, and check that nothing was lost or applied twice
    ///
    /// Runs the program `chaos` beside this one, a crate of its own, with the same arguments.
    #[command(disable_help_flag = true)]
    Chaos(Handed),
    WithPostgres(with_postgres::Arguments),
}

/// What is handed on to a program of its own.
#[derive(clap::Args, Debug)]
struct Handed {
    /// Its arguments; `--help` explains them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

fn main() -> ExitCode {
    let outcome = match chassis::parse::<Arguments>().command {
        Command::Bench(handed) => become_program("bench", &handed),
        Command::Chaos(handed) => become_program("chaos", &handed),
        command => run(command),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Replaces this process, so that signals and the exit code are the program's.
fn become_program(name: &str, handed: &Handed) -> anyhow::Result<ExitCode> {
    let path = binary(name)?;
    let failed = std::process::Command::new(&path).args(&handed.arguments).exec();
    Err(failed).with_context(|| format!("cannot run {}", path.display()))
}

#[tokio::main]
async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(arguments) => up::run(arguments).await,
        Command::Demo(arguments) => demo::run(arguments).await,
        Command::Stress(arguments) => stress::run(arguments).await,
        Command::Replay(arguments) => replay::run(arguments).await,
        Command::Audit(arguments) => audit::run(arguments).await,
        Command::WithPostgres(arguments) => with_postgres::run(arguments).await,
        Command::Bench(_) | Command::Chaos(_) => unreachable!("these are programs of their own"),
    }
}
