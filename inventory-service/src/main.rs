//! The command line of inventory-service.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::Context;
use chassis::{DatabaseUrl, MigrateArguments, PasswordFile, TlsFiles, serve_until_signal, shutdown_signal};
use clap::Parser;
use inventory_service::{MIGRATORS, Settings};
use outbox::ResendArguments;

/// mimalloc needs less processor time for an order than glibc's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Reserves and releases stock: applies each event of an order once, and answers it in the same transaction.
#[derive(Parser)]
#[command(version)]
enum Command {
    /// Serve gRPC until SIGTERM or Ctrl-C.
    Serve(Box<Settings>),
    /// Bring the inventory database to the schema of this version. Safe to repeat, and to run twice at once.
    Migrate {
        /// The inventory database, as the role that owns it: postgres://user:password@host:5432/database.
        #[arg(long, env = "INVENTORY_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        how: MigrateArguments,
    },
    /// Add demo stock. SKUs that exist stay unchanged.
    Seed {
        /// The inventory database, as the role inventory_service or as its owner.
        #[arg(long, env = "INVENTORY_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        password_file: PasswordFile,
    },
    /// Send answers again that a receiver has lost: after its database was restored to an earlier state
    ///
    /// The answers are made again from the reservations, under the ids and times that they had. The receiver is asked which
    /// of them it has; the others are enqueued for its subscription, 500 orders at a time. What waits in the outbox, what was
    /// discarded, and what is too old for the receiver to remember is left alone. Each event that is enqueued is recorded in
    /// the table outbox_resent. It is safe to stop the command, and to repeat it.
    ///
    /// It prints a line for each event that is lost or refused, and a summary. It exits with 1 if an event is refused.
    #[command(after_long_help = "Examples:
  inventory-service resend --subscription orders --receiver http://127.0.0.1:52051 --since 2026-11-30T08:00:00Z --dry-run
  inventory-service resend --subscription orders --receiver http://127.0.0.1:52051 --since 2026-11-30T08:00:00Z \\
    --reason 'orders was restored to its state of 08:10'")]
    Resend {
        /// The inventory database, as the role inventory_service or as its owner.
        #[arg(long, env = "INVENTORY_DATABASE_URL", hide_env_values = true)]
        database_url: DatabaseUrl,
        #[command(flatten)]
        arguments: Box<ResendArguments>,
    },
    /// Exit with 0 if the process that listens on the address serves. Otherwise print the reason, and exit with 1.
    Healthcheck {
        /// Address of the process.
        #[arg(long, env = "INVENTORY_SERVICE_LISTEN", default_value = "127.0.0.1:50052")]
        listen: SocketAddr,
        #[command(flatten)]
        tls: TlsFiles,
    },
}

fn main() -> ExitCode {
    chassis::main(async |command| {
        // Without logs: stdout is for the command's output.
        if !matches!(command, Command::Resend { .. }) {
            chassis::log_to_stdout();
        }
        match command {
            Command::Serve(settings) => {
                serve_until_signal([settings.listen, settings.events_listen], *settings, inventory_service::run)
                    .await?;
            }
            Command::Migrate { database_url, how } => {
                chassis::migrate(&database_url, &MIGRATORS, &how, &shutdown_signal()?).await?;
            }
            Command::Seed { database_url: url, password_file } => {
                let url = url.with_password_file(&password_file);
                let added = inventory_service::seed(&url).await.with_context(|| format!("cannot seed {url}"))?;
                tracing::info!("{added} SKUs added to {url}");
            }
            Command::Resend { database_url: url, arguments } => inventory_service::resend(&url, *arguments).await?,
            Command::Healthcheck { listen, tls } => chassis::healthcheck(listen, &tls).await?,
        }
        anyhow::Ok(())
    })
}
