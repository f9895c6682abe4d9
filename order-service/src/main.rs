//! The command line of order-service.

use std::{net::SocketAddr, process::ExitCode};

use chassis::{DatabaseUrl, EraseArguments, MigrateArguments, TlsFiles, serve_until_signal, shutdown_signal};
use clap::Parser;
use order_service::{MIGRATORS, Settings};
use outbox::ResendArguments;

/// mimalloc needs less processor time for an order than glibc's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Takes orders over gRPC, and commits each order and its event in one transaction.
#[derive(Parser)]
#[command(version)]
enum Command {
    /// Serve gRPC until SIGTERM or Ctrl-C.
    Serve(Box<Settings>),
    /// Bring the orders database to the schema of this version. Safe to repeat, and to run twice at once.
    Migrate {
        /// The orders database, as the role that owns it: postgres://user:password@host:5432/database.
        #[arg(long, env = "ORDERS_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        how: MigrateArguments,
    },
    /// Send events of orders again that a receiver has lost: after its database was restored to an earlier state
    ///
    /// The events are made again from the orders, under the ids and times that they had. The receiver is asked which of them
    /// it has; the others are enqueued for its subscription, 500 orders at a time. What waits in the outbox, what was
    /// discarded, and what is too old for the receiver to remember is left alone. Each event that is enqueued is recorded in
    /// the table outbox_resent. It is safe to stop the command, and to repeat it.
    ///
    /// It prints a line for each event that is lost or refused, and a summary. It exits with 1 if an event is refused.
    #[command(after_long_help = "Examples:
  order-service resend --subscription inventory --receiver http://127.0.0.1:52052 --since 2026-11-30T08:00:00Z --dry-run
  order-service resend --subscription inventory --receiver http://127.0.0.1:52052 --since 2026-11-30T08:00:00Z \\
    --reason 'inventory was restored to its state of 08:10'")]
    Resend {
        /// The orders database, as the role order_service or as its owner.
        #[arg(long, env = "ORDERS_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        arguments: Box<ResendArguments>,
    },
    /// Replace the id of a customer in orders and in discarded events
    ///
    /// Orders stay. Where the customer was, they have "(erased)", which no caller can use as an id. It erases 500 orders in a
    /// transaction. Each run is recorded in the table order_erasures, without the customer. It is safe to stop the command, and to
    /// repeat it.
    ///
    /// An order is left as it is while it is PENDING, or while an event of it that names the customer waits or is dead. The
    /// command then erases the others, says what to do, and exits with 1. Repeat it when that is done.
    ///
    /// Erase the customer here first, and then by `loyalty-service erase-customer`.
    #[command(after_long_help = "Example:
  order-service erase-customer ann --reason 'request 4711' --by bob")]
    EraseCustomer {
        /// The orders database, as the role that owns it.
        #[arg(long, env = "ORDERS_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        arguments: EraseArguments,
    },
    /// Exit with 0 if the process that listens on the address serves. Otherwise print the reason, and exit with 1.
    Healthcheck {
        /// Address of the process.
        #[arg(long, env = "ORDER_SERVICE_LISTEN", default_value = "127.0.0.1:50051")]
        listen: SocketAddr,
        #[command(flatten)]
        tls: TlsFiles,
    },
}

fn main() -> ExitCode {
    chassis::main(async |command| {
        // Without logs: stdout is for the command's output.
        if !matches!(command, Command::Resend { .. } | Command::EraseCustomer { .. }) {
            chassis::log_to_stdout();
        }
        match command {
            Command::Serve(settings) => {
                serve_until_signal([settings.listen, settings.events_listen], *settings, order_service::run).await?;
            }
            Command::Migrate { database_url, how } => {
                chassis::migrate(&database_url, &MIGRATORS, &how, &shutdown_signal()?).await?;
            }
            Command::Resend { database_url, arguments } => order_service::resend(&database_url, *arguments).await?,
            Command::EraseCustomer { database_url, arguments } => {
                order_service::erase_customer(&database_url, &arguments).await?;
            }
            Command::Healthcheck { listen, tls } => chassis::healthcheck(listen, &tls).await?,
        }
        anyhow::Ok(())
    })
}
