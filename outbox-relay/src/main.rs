//! The command line of outbox-relay.

use std::{
    env,
    fmt::Display,
    net::SocketAddr,
    process::{self, ExitCode},
};

use chassis::{RunError, TlsFiles, serve_until_signal};
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
        #[arg(long, env = "RELAY_OPS_LISTEN", default_value = "127.0.0.1:50053")]
        ops_listen: SocketAddr,
        #[command(flatten)]
        tls: TlsFiles,
    },
}

/// As for a flag that does not exist.
const WRONG_ARGUMENTS: i32 = 2;
/// As of a process that SIGINT has ended.
const INTERRUPTED: i32 = 130;

/// Environments may still have names that earlier versions read. Then operators would ask at an address where nobody
/// listens. In a roll-back both versions may be given theirs.
fn refuse_old_names() {
    let is_set = |name: &&str| env::var_os(name).is_some();
    if env::args_os().any(|argument| argument.as_encoded_bytes().starts_with(b"--ops-listen")) {
        return;
    }
    if let Some(old) =
        ["RELAY_LISTEN", "RELAY_METRICS_LISTEN"].iter().find(|name| is_set(name) && !is_set(&"RELAY_OPS_LISTEN"))
    {
        let to_do = "give RELAY_OPS_LISTEN the address for operators: RelayAdmin, health and metrics";
        end(WRONG_ARGUMENTS, &format!("{old} is no longer read; {to_do}"));
    }
}

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
                refuse_old_names();
                match serve_until_signal([settings.ops_listen], *settings, outbox_relay::run).await {
                    Err(wrong @ (RunError::Arguments(_) | RunError::Tls(_))) => end(WRONG_ARGUMENTS, &wrong),
                    ended => ended?,
                }
            }
            // No logs: stdout is for the command's output.
            Command::Operate(command) => match operate::run(*command).await {
                Err(interrupted @ operate::CommandError::Interrupted { .. }) => end(INTERRUPTED, &interrupted),
                Err(wrong @ operate::CommandError::Arguments(_)) => end(WRONG_ARGUMENTS, &wrong),
                ended => ended?,
            },
            Command::Healthcheck { ops_listen, tls } => chassis::healthcheck(ops_listen, &tls).await?,
        }
        anyhow::Ok(())
    })
}
