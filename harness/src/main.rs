//! The command line of the harness.

use std::{ffi::OsString, os::unix::process::CommandExt, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};
use harness::{audit, demo, failover, replay, stress, up, upgrade, with_postgres};
use testkit::processes::binary;

/// Run the whole system on one machine.
///
/// Needs PostgreSQL 14 or newer. If POSTGRES_URL is set, that server is used. Otherwise a private server is started from the
/// binaries found on this machine, and stopped at the end.
#[derive(Debug, Parser)]
#[command(version, after_help = "Exit codes: 0 success, 1 failure, 2 wrong usage.")]
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
    Failover(failover::Arguments),
    Audit(audit::Arguments),
    Upgrade(upgrade::Arguments),
    /// Measure the system against PostgreSQL and gRPC alone
    ///
    /// Runs the program `bench` beside this one with the same arguments.
    #[command(disable_help_flag = true)]
    Bench(Forwarded),
    /// Inject faults under load, and check that no event is lost or applied twice
    ///
    /// Runs the program `chaos` beside this one with the same arguments.
    #[command(disable_help_flag = true)]
    Chaos(Forwarded),
    WithPostgres(with_postgres::Arguments),
}

/// The arguments of another program.
#[derive(clap::Args, Debug)]
struct Forwarded {
    /// Its arguments; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
    arguments: Vec<OsString>,
}

fn main() -> ExitCode {
    let outcome = match chassis::parse::<Arguments>().command {
        Command::Bench(forwarded) => become_program("bench", &forwarded),
        Command::Chaos(forwarded) => become_program("chaos", &forwarded),
        command => run(command),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Replaces this process, so signals reach the program and its exit code is returned.
fn become_program(name: &str, forwarded: &Forwarded) -> anyhow::Result<ExitCode> {
    let path = binary(name)?;
    let failed = std::process::Command::new(&path).args(&forwarded.arguments).exec();
    Err(failed).with_context(|| format!("cannot run {}", path.display()))
}

#[tokio::main]
async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(arguments) => up::run(arguments).await,
        Command::Demo(arguments) => demo::run(arguments).await,
        Command::Stress(arguments) => stress::run(arguments).await,
        Command::Replay(arguments) => replay::run(arguments).await,
        Command::Failover(arguments) => failover::run(arguments).await,
        Command::Audit(arguments) => audit::run(arguments).await,
        Command::Upgrade(arguments) => upgrade::run(arguments).await,
        Command::WithPostgres(arguments) => with_postgres::run(arguments).await,
        Command::Bench(_) | Command::Chaos(_) => unreachable!("these are programs of their own"),
    }
}
