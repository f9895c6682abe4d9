//! A private cluster: made, started, awaited, stopped.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use tokio::time::sleep;

use super::{Server, find::Installation, home::Home, install::find_or_install};
use crate::processes::{Process, free_port};

const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
const IMMEDIATE_STOP_TIMEOUT: Duration = Duration::from_secs(5);
const LOG_LINES_SHOWN: usize = 15;

/// How a private cluster is to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cluster's own directory: a new or empty one, or that of an earlier run.
    pub directory: PathBuf,
    /// The port on 127.0.0.1; any free one if none.
    pub port: Option<u16>,
    /// Whether the directory outlives the cluster.
    pub keep: bool,
    /// Whether what is committed outlives a loss of power. Without it the server still loses nothing when it is killed, and
    /// tests, which make and drop a database each, take a third of the time.
    pub durable: bool,
    /// Other settings of the server, each as `name=value`.
    pub settings: Vec<String>,
}

/// A running private cluster. Dropping it stops the server at once, as a crash would; [`Cluster::stop`] does it properly.
#[derive(Debug)]
pub struct Cluster {
    server: Server,
    process: Process,
    installation: Installation,
    port: u16,
    options: Options,
    // Last, because what is in it may be deleted only when no process uses it any more.
    home: Home,
}

impl Cluster {
    /// Makes a cluster, or takes over that of an earlier run, and returns once it accepts queries.
    pub async fn start(options: Options) -> Result<Cluster> {
        let installation = find_or_install().await?;
        let home = Home::open(&options.directory, options.keep)?;
        home.stop_abandoned_server(&installation).await?;
        initialise(&installation, &home).await?;
        let port = match options.port {
            Some(port) => claim(port)?,
            None => free_port()?,
        };
        let server = Server::parse(&format!("postgres://postgres:postgres@127.0.0.1:{port}/postgres"))?;
        let process = launch(&installation, &home, port, &options)?;
        let mut cluster = Cluster { server, process, installation, port, options, home };
        cluster.wait_until_ready().await?;
        Ok(cluster)
    }

    /// The addresses of its databases.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The programs it is made of; clients of the same version are among them.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// The file with what the server has logged.
    pub fn log(&self) -> PathBuf {
        self.home.log()
    }

    /// Ends the server as a crash would, by an immediate shutdown: nothing that sessions are at is brought to its end, and nothing is
    /// written any more. Returns when it is gone.
    pub async fn crash(&mut self) -> Result<()> {
        self.process.stop(Signal::QUIT, STOP_TIMEOUT).await?;
        Ok(())
    }

    /// Starts the server again if it is not running, in the same place, and returns once it has recovered.
    pub async fn recover(&mut self) -> Result<()> {
        if !self.process.is_running() {
            self.process = launch(&self.installation, &self.home, self.port, &self.options)?;
        }
        self.wait_until_ready().await
    }

    /// Ends all sessions, stops the server, and deletes its directory unless that is to be kept.
    pub async fn stop(mut self) -> Result<()> {
        // What `pg_ctl stop -m fast` sends; but a parent needs no pid file to know when its child is gone.
        let exit = self.process.stop(Signal::INT, STOP_TIMEOUT).await?;
        ensure!(!exit.killed, "PostgreSQL did not stop within {} s and was killed", STOP_TIMEOUT.as_secs());
        Ok(())
    }

    async fn wait_until_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let Err(error) = self.server.connect().await else {
                return Ok(());
            };
            if let Some(status) = self.process.exit_status()? {
                bail!(
                    "PostgreSQL did not start ({status}); its log ends in\n{}",
                    self.process.log_tail(LOG_LINES_SHOWN)
                );
            }
            if Instant::now() > deadline {
                let tail = self.process.log_tail(LOG_LINES_SHOWN);
                bail!(
                    "PostgreSQL was not ready within {} s ({error:#}); its log ends in\n{tail}",
                    START_TIMEOUT.as_secs()
                );
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Killing the server alone would leave its children a moment to write into a directory about to be deleted, and
        // its shared memory for ever. This is an immediate shutdown: it waits for nobody, so waiting for it is short.
        if !self.process.is_running() || self.process.signal(Signal::QUIT).is_err() {
            return;
        }
        let deadline = Instant::now() + IMMEDIATE_STOP_TIMEOUT;
        while self.process.is_running() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

async fn initialise(installation: &Installation, home: &Home) -> Result<()> {
    let data = home.data();
    if let Ok(version) = fs::read_to_string(data.join("PG_VERSION")) {
        let version = version.trim();
        ensure!(
            version == installation.major().to_string(),
            "{} is of PostgreSQL {version} and the programs found are of {}: delete it, or put initdb of {version} first in PATH",
            data.display(),
            installation.major()
        );
        return Ok(());
    }
    // Under another name until it is whole, so that a run killed here leaves nothing that looks like a cluster.
    let unfinished = data.with_extension("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).with_context(|| unfinished.display().to_string())?;
    }
    let password = home.write_secret("password", "postgres\n")?;
    let mut initdb = home.command(&installation.program("initdb"));
    initdb.arg("-D").arg(&unfinished).arg("--pwfile").arg(&password);
    initdb.args(["--username=postgres", "--auth=scram-sha-256", "--data-checksums"]);
    // The one locale that every system has. What is sorted here is sorted by its bytes anyway.
    initdb.args(["--encoding=UTF8", "--locale=C"]);
    let output = initdb.kill_on_drop(true).output().await.context("cannot run initdb")?;
    ensure!(output.status.success(), "initdb failed:\n{}", String::from_utf8_lossy(&output.stderr).trim());
    fs::remove_file(password)?;
    fs::rename(unfinished, data)?;
    Ok(())
}

/// Sees whether the port is free before PostgreSQL does, whose log would be the wrong place to say what to do.
fn claim(port: u16) -> Result<u16> {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => Ok(port),
        Err(error) => bail!(
            "cannot use port {port} for PostgreSQL ({error}): choose another with --port or POSTGRES_PORT, \
             or set POSTGRES_URL to a superuser's URL of an existing server"
        ),
    }
}

fn launch(installation: &Installation, home: &Home, port: u16, options: &Options) -> Result<Process> {
    let mut postgres = home.command(&installation.program("postgres"));
    postgres.arg("-D").arg(home.data()).args(["-p", &port.to_string()]);
    // No socket: its directory would be one more thing to own, and all our clients speak TCP.
    for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=300"] {
        postgres.args(["-c", setting]);
    }
    if !options.durable {
        postgres.args(["-c", "fsync=off", "-c", "full_page_writes=off"]);
    }
    for setting in &options.settings {
        postgres.args(["-c", setting]);
    }
    Process::spawn_command("PostgreSQL", postgres, &home.log())
}
