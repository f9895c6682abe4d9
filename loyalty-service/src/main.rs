//! The command line of loyalty-service.

use std::{net::SocketAddr, process::ExitCode};

use chassis::{DatabaseUrl, MigrateArguments, TlsFiles, serve_until_signal, shutdown_signal};
use clap::Parser;
use loyalty_service::{MIGRATORS, Settings};

/// Gives customers points for their orders: applies each event of an order once.
#[derive(Parser)]
#[command(version)]
enum Command {
    /// Serve gRPC until SIGTERM or Ctrl-C.
    Serve(Box<Settings>),
    /// Bring the loyalty database to the schema of this version. Safe to repeat, and to run twice at once.
    Migrate {
        /// The loyalty database, as the role that owns it: postgres://user:password@host:5432/database.
        #[arg(long, env = "LOYALTY_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        how: MigrateArguments,
    },
    /// Exit with 0 if the process that listens on the address serves. Otherwise print the reason, and exit with 1.
    Healthcheck {
        /// Address of the process.
        #[arg(long, env = "LOYALTY_SERVICE_LISTEN", default_value = "127.0.0.1:50055")]
        listen: SocketAddr,
        #[command(flatten)]
        tls: TlsFiles,
    },
}

fn main() -> ExitCode {
    chassis::main(async |command| {
        chassis::log_to_stdout();
        match command {
            Command::Serve(settings) => {
                serve_until_signal([settings.listen, settings.events_listen], *settings, loyalty_service::run).await?;
            }
            Command::Migrate { database_url, how } => {
                chassis::migrate(&database_url, &MIGRATORS, &how, &shutdown_signal()?).await?;
            }
            Command::Healthcheck { listen, tls } => chassis::healthcheck(listen, &tls).await?,
        }
        anyhow::Ok(())
    })
}
