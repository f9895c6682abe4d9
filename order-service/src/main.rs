//! The command line of order-service.

use std::{net::SocketAddr, process::ExitCode};

use chassis::{DatabaseUrl, MigrateArguments, serve_until_signal, shutdown_signal};
use clap::Parser;
use order_service::{MIGRATORS, Settings};

/// mimalloc needs less processor time for an order than glibc's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Takes orders over gRPC, and commits each order and its event in one transaction.
#[derive(Parser)]
#[command(version)]
enum Command {
    /// Serve gRPC until SIGTERM or Ctrl-C.
    Serve(Settings),
    /// Bring the orders database to the schema of this version. Safe to repeat, and to run twice at once.
    Migrate {
        /// The orders database, as the role that owns it: postgres://user:password@host:5432/database.
        #[arg(long, env = "ORDERS_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        how: MigrateArguments,
    },
    /// Exit with 0 if the process that listens on the address serves. Otherwise print the reason, and exit with 1.
    Healthcheck {
        /// Address of the process.
        #[arg(long, env = "ORDER_SERVICE_LISTEN", default_value = "127.0.0.1:50051")]
        listen: SocketAddr,
    },
}

fn main() -> ExitCode {
    chassis::main(async |command| {
        chassis::log_to_stdout();
        match command {
            Command::Serve(settings) => serve_until_signal(settings.listen, settings, order_service::run).await?,
            Command::Migrate { database_url, how } => {
                chassis::migrate(&database_url, &MIGRATORS, &how, &shutdown_signal()?).await?;
            }
            Command::Healthcheck { listen } => chassis::healthcheck(listen).await?,
        }
        anyhow::Ok(())
    })
}
