//! The subcommand `with-postgres`: runs any command, mostly `cargo test`, with a PostgreSQL server.

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

/// Each private cluster is in such a directory, with the harness's pid at the end.
const DIRECTORY_PREFIX: &str = "target/postgres-";

/// Run a command with a PostgreSQL server
///
/// Creates this project's roles, sets POSTGRES_URL to the superuser's URL, and exits with the command's exit code. If
/// POSTGRES_URL is set already, that server is used. Otherwise a private server is started on a free port, and deleted
/// afterwards. POSTGRES_BIN names the directory of its programs, if not those found first are wanted. The private server does
/// not wait for the disk, so do not measure with it.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Superuser's URL of an existing server, instead of a private one
    #[arg(long, env = "POSTGRES_URL", hide_env_values = true, value_name = "URL")]
    postgres_url: Option<String>,

    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    // Listens first, so that no signal can end this process and leave a server behind.
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
    if let Some(cluster) = &cluster {
        let installation = cluster.installation();
        eprintln!(
            "a private server of PostgreSQL {} from {}",
            installation.major(),
            installation.directory().display()
        );
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
                // A terminal's Ctrl-C reached the command too. A second one would make it quit without cleaning up.
                let has_received = received == Signal::INT && std::io::stdin().is_terminal();
                let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed()));
                if let Some(pid) = pid.filter(|_| !has_received) {
                    let _ = kill_process(pid, received);
                }
            }
        }
    }
}

/// The signals that ask a program to end: from Ctrl-C, a supervisor, or a closed terminal.
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

/// Like a shell: 128 plus the signal's number for a killed command.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().or_else(|| Some(128 + status.signal()?));
    code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}

fn exit_code_of_signal(signal: Signal) -> ExitCode {
    exit_code(ExitStatus::from_raw(signal.as_raw()))
}
