//! The command line of loyalty-service.

use std::{net::SocketAddr, process::ExitCode};

use chassis::{DatabaseUrl, EraseArguments, MigrateArguments, TlsFiles, serve_until_signal, shutdown_signal};
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
    /// Replace the id of a customer in all points, so that nothing names the customer any more
    ///
    /// Points stay with their orders. Where the customer was, they have "(erased)", which no caller can use as an id, so they
    /// count for nobody. It erases 500 orders in a transaction. Each run is recorded in the table points_erasures, without the
    /// customer. It is safe to stop the command, and to repeat it.
    ///
    /// Erase the customer by `order-service erase-customer` first. Otherwise an event that waits there brings the id back, and
    /// this command has to be repeated.
    #[command(after_long_help = "Example:
  loyalty-service erase-customer ann --reason 'request 4711' --by bob")]
    EraseCustomer {
        /// The loyalty database, as the role that owns it.
        #[arg(long, env = "LOYALTY_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        arguments: EraseArguments,
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
        // Without logs: stdout is for the command's output.
        if !matches!(command, Command::EraseCustomer { .. }) {
            chassis::log_to_stdout();
        }
        match command {
            Command::Serve(settings) => {
                serve_until_signal([settings.listen, settings.events_listen], *settings, loyalty_service::run).await?;
            }
            Command::Migrate { database_url, how } => {
                chassis::migrate(&database_url, &MIGRATORS, &how, &shutdown_signal()?).await?;
            }
            Command::EraseCustomer { database_url, arguments } => {
                loyalty_service::erase_customer(&database_url, &arguments).await?;
            }
            Command::Healthcheck { listen, tls } => chassis::healthcheck(listen, &tls).await?,
        }
        anyhow::Ok(())
    })
}
