//! The command line of outbox-relay.

use std::{
    fmt::Display,
    net::SocketAddr,
    process::{self, ExitCode},
};

use chassis::{RunError, serve_until_signal};
use clap::Parser;
use outbox_relay::{Settings, operate};

/// mimalloc needs less processor time for an order than glibc's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Delivers the events of an outbox to the services that receive them: at least once, and in sequence per aggregate.
///
/// Also shows the state of the outbox, and lets an operator requeue or discard dead events.
#[derive(Parser)]
#[command(version)]
enum Command {
    /// Relay events until SIGTERM or Ctrl-C.
    Serve(Box<Settings>),
    #[command(flatten)]
    Operate(Box<operate::Command>),
    /// Exit with 0 if the process that listens on the address serves. Otherwise print the reason, and exit with 1.
    Healthcheck {
        /// Address of the process.
        #[arg(long, env = "RELAY_LISTEN", default_value = "127.0.0.1:50053")]
        listen: SocketAddr,
    },
}

/// As for a flag that does not exist.
const WRONG_ARGUMENTS: i32 = 2;
/// As of a process that SIGINT has ended.
const INTERRUPTED: i32 = 130;

/// Ends with a code that says more than 1.
fn end(code: i32, error: &impl Display) -> ! {
    eprintln!("error: {error}");
    process::exit(code)
}

fn main() -> ExitCode {
    chassis::main(async |command| {
        match command {
            Command::Serve(settings) => {
                chassis::log_to_stdout();
                match serve_until_signal(settings.listen, *settings, outbox_relay::run).await {
                    Err(wrong @ RunError::Arguments(_)) => end(WRONG_ARGUMENTS, &wrong),
                    ended => ended?,
                }
            }
            // No logs: stdout is for the command's output.
            Command::Operate(command) => match operate::run(*command).await {
                Err(interrupted @ operate::CommandError::Interrupted { .. }) => end(INTERRUPTED, &interrupted),
                Err(wrong @ operate::CommandError::Arguments(_)) => end(WRONG_ARGUMENTS, &wrong),
                ended => ended?,
            },
            Command::Healthcheck { listen } => chassis::healthcheck(listen).await?,
        }
        anyhow::Ok(())
    })
}
