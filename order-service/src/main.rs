//! The process: reads its settings, then serves, migrates or asks for health.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::Context;
use chassis::DatabaseUrl;
use clap::{Parser, Subcommand};
use order_service::{MIGRATORS, Settings};

/// An order takes 0.88 of order-service's time with it, of what it takes with the allocator of glibc (ARCHITECTURE.md).
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Takes orders over gRPC and commits each together with the event that tells of it.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve gRPC until SIGTERM or Ctrl-C.
    Serve(Settings),
    /// Bring the orders database to this version's schema. Safe to repeat, and to run twice at once.
    Migrate {
        /// The orders database, as the role that owns it.
        #[arg(long, env = "ORDERS_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
    },
    /// Exit with 0 if the process listening on the address serves, with 1 otherwise.
    Healthcheck {
        /// Address of the process.
        #[arg(long, env = "ORDER_SERVICE_LISTEN", default_value = "127.0.0.1:50051")]
        listen: SocketAddr,
    },
}

fn main() -> ExitCode {
    let cli = chassis::parse::<Cli>();
    chassis::log_to_stdout();
    chassis::run(run(cli.command))
}

async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(settings) => {
            let shutdown = chassis::shutdown_signal()?;
            let listener = chassis::bind(settings.listen).await?;
            order_service::run(listener, settings, shutdown).await?;
        }
        Command::Migrate { database_url } => {
            chassis::migrate(&database_url, &MIGRATORS)
                .await
                .with_context(|| format!("cannot migrate {database_url}"))?;
            tracing::info!("schema of {database_url} is current");
        }
        Command::Healthcheck { listen } => chassis::healthcheck(listen).await?,
    }
    Ok(())
}
