//! The subcommand `with-postgres`: lends a PostgreSQL server to any command, above all to `cargo test`.

use std::{
    ffi::OsString,
    io::IsTerminal,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{self, ExitCode, ExitStatus},
};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::Command,
    select,
    signal::unix::{Signal as Listener, SignalKind, signal},
};

use testkit::{
    bootstrap::bootstrap,
    postgres::{self, Cluster, Options, Server},
};

/// Private clusters that last for one command are here, each with the harness's pid at the end.
const DIRECTORY_PREFIX: &str = "target/postgres-";

/// Run a command with a PostgreSQL server at hand.
///
/// Sets POSTGRES_URL for the command to a superuser's URL, with this project's roles in place, and exits with the
/// command's exit code. If POSTGRES_URL is set already that server is used; else a private one is started on a free port
/// under ./target, and is gone afterwards; it does not wait for the disk, so measure nothing on it.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A superuser's URL of an existing server, to be used instead of a private one
    #[arg(long, env = "POSTGRES_URL", hide_env_values = true, value_name = "URL")]
    postgres_url: Option<String>,

    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    // From here on a signal is ours to handle, so that none can leave a server behind.
    let mut signals = Signals::listen()?;
    let (server, cluster) = select! {
        prepared = prepare(arguments.postgres_url.as_deref()) => prepared?,
        received = signals.next() => return Ok(exit_code_of_signal(received)),
    };
    let status = run_command(&arguments.command, &server, &mut signals).await;
    if let Some(cluster) = cluster {
        cluster.stop().await?;
    }
    Ok(exit_code(status?))
}

async fn prepare(url: Option<&str>) -> Result<(Server, Option<Cluster>)> {
    let directory = format!("{DIRECTORY_PREFIX}{}", process::id()).into();
    let (server, cluster) =
        postgres::provide(url, Options { directory, port: None, keep: false, durable: false, settings: Vec::new() })
            .await?;
    if cluster.is_some() {
        postgres::remove_abandoned(Path::new(DIRECTORY_PREFIX)).await?;
    }
    bootstrap(&server).await?;
    Ok((server, cluster))
}

async fn run_command(command: &[OsString], server: &Server, signals: &mut Signals) -> Result<ExitStatus> {
    let [program, arguments @ ..] = command else { unreachable!("clap requires a command") };
    let mut child = Command::new(program);
    child.args(arguments).env("POSTGRES_URL", server.url()).kill_on_drop(true);
    let mut child = child.spawn().with_context(|| format!("cannot run {}", program.display()))?;
    loop {
        select! {
            status = child.wait() => return Ok(status?),
            received = signals.next() => {
                // A terminal's Ctrl-C went to the command as well; a second one would mean "now, without cleaning up".
                let had_it = received == Signal::INT && std::io::stdin().is_terminal();
                let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
                if let Some(pid) = pid.filter(|_| !had_it) {
                    let _ = kill_process(pid, received);
                }
            }
        }
    }
}

/// What asks a program to end: a terminal's Ctrl-C, a supervisor, a terminal that closes.
struct Signals {
    interrupt: Listener,
    terminate: Listener,
    hang_up: Listener,
}

impl Signals {
    fn listen() -> Result<Signals> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Signal {
        select! {
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.hang_up.recv() => Signal::HUP,
        }
    }
}

/// As shells do it: 128 and the signal's number for a command that was killed.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn exit_code_of_signal(signal: Signal) -> ExitCode {
    exit_code(ExitStatus::from_raw(signal.as_raw()))
}
