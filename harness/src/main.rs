//! The command line of the harness.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use harness::{audit, bench, chaos, demo, replay, stress, up, with_postgres};
use tokio::runtime;

/// An order takes 0.88 of order-service's time with it, of what it takes with the allocator of glibc (ARCHITECTURE.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

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
    Bench(bench::Arguments),
    Chaos(chaos::Arguments),
    #[command(hide = true)]
    BenchNoop(bench::noop::Arguments),
    WithPostgres(with_postgres::Arguments),
}

fn main() -> ExitCode {
    let command = chassis::parse::<Arguments>().command;
    // A load that is measured is to take little of the processors it shares; and what answers at once runs as the services do.
    let mut runtime = match command {
        Command::Bench(_) | Command::BenchNoop(_) => runtime::Builder::new_current_thread(),
        _ => runtime::Builder::new_multi_thread(),
    };
    let outcome =
        runtime.enable_all().build().map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(run(command)));
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Up(arguments) => up::run(arguments).await,
        Command::Demo(arguments) => demo::run(arguments).await,
        Command::Stress(arguments) => stress::run(arguments).await,
        Command::Replay(arguments) => replay::run(arguments).await,
        Command::Audit(arguments) => audit::run(arguments).await,
        Command::Bench(arguments) => bench::run(arguments).await,
        Command::Chaos(arguments) => chaos::run(arguments).await,
        Command::BenchNoop(arguments) => bench::noop::run(arguments).await,
        Command::WithPostgres(arguments) => with_postgres::run(arguments).await,
    }
}
