//! The process: reads its settings, then relays or asks for health.

use std::{net::SocketAddr, process::ExitCode};

use clap::{Parser, Subcommand};
use outbox_relay::{Settings, operate};

/// An order takes 0.88 of order-service's time with it, of what it takes with the allocator of glibc (ARCHITECTURE.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Delivers the events of an outbox to the service that receives them, each at least once and in order per aggregate;
/// shows what is in the outbox, and lets an operator decide about what could not be delivered.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Relay until SIGTERM or Ctrl-C.
    Serve(Box<Settings>),
    #[command(flatten)]
    Operate(Box<operate::Command>),
    /// Exit with 0 if the process listening on the address works, with 1 otherwise.
    Healthcheck {
        /// Address of the process.
        #[arg(long, env = "RELAY_LISTEN", default_value = "127.0.0.1:50053")]
        listen: SocketAddr,
    },
}

fn main() -> ExitCode {
    let cli = chassis::parse::<Cli>();
    chassis::run(run(cli.command))
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(settings) => {
            chassis::log_to_stdout();
            let shutdown = chassis::shutdown_signal()?;
            let listener = chassis::bind(settings.listen).await?;
            outbox_relay::run(listener, *settings, shutdown).await?;
        }
        // No logs: stdout is for the answer.
        Command::Operate(command) => operate::run(*command).await?,
        Command::Healthcheck { listen } => chassis::healthcheck(listen).await?,
    }
    Ok(())
}
