//! Creates, starts and stops a private cluster.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::Signal;
use tokio::time::sleep;

use super::{Server, find::Installation, home::Home, install::find_or_install};
use crate::{
    ports::claim,
    processes::{Process, free_port},
};

const START_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
const IMMEDIATE_STOP_TIMEOUT: Duration = Duration::from_secs(5);
const LOG_LINES_SHOWN: usize = 15;

/// How to run a private cluster.
#[derive(Debug, Clone)]
pub struct Options {
    /// The cluster's own directory: new, empty, or of an earlier run.
    pub directory: PathBuf,
    /// The port on 127.0.0.1; none means any free one.
    pub port: Option<FixedPort>,
    /// Whether the directory stays after the cluster has stopped.
    pub keep: bool,
    /// Whether commits survive a loss of power. If not, they still survive a killed server, and tests, which create and drop
    /// a database each, are much faster.
    pub durable: bool,
    /// More settings of the server, each as `name=value`.
    pub settings: Vec<String>,
}

/// The port that a cluster has to have.
#[derive(Debug, Clone, Copy)]
pub struct FixedPort {
    /// Its number.
    pub number: u16,
    /// How long to wait for it while another process holds it.
    pub patience: Duration,
}

/// A running private cluster. [`Cluster::stop`] stops it properly; dropping it stops it at once, like a crash.
#[derive(Debug)]
pub struct Cluster {
    server: Server,
    process: Process,
    installation: Installation,
    port: u16,
    options: Options,
    // Last, because its files may be deleted only after the process has ended.
    home: Home,
}

impl Cluster {
    /// Creates a cluster, or takes over that of an earlier run. Returns once it accepts queries.
    pub async fn start(options: Options) -> Result<Cluster> {
        let installation = find_or_install().await?;
        let home = Home::open(&options.directory, options.keep)?;
        home.stop_abandoned_server(&installation).await?;
        initialise(&installation, &home, options.durable).await?;
        let port = match options.port {
            Some(port) => wait_for_port(port).await?,
            None => free_port()?,
        };
        let server = Server::parse(&format!("postgres://postgres:postgres@127.0.0.1:{port}/postgres"))?;
        let process = launch(&installation, &home, port, &options, &[])?;
        let mut cluster = Cluster { server, process, installation, port, options, home };
        cluster.wait_until_ready().await?;
        Ok(cluster)
    }

    /// The addresses of its databases.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The programs it runs, with clients of the same version.
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// The server's log file.
    pub fn log(&self) -> PathBuf {
        self.home.log()
    }

    /// Ends the server like a crash, by an immediate shutdown: no session finishes, and nothing more is written. Returns when
    /// the server has ended.
    pub async fn crash(&mut self) -> Result<()> {
        self.process.stop(Signal::QUIT, STOP_TIMEOUT).await?;
        Ok(())
    }

    /// Starts the server again, unless it is running. Returns once it has recovered.
    pub async fn recover(&mut self) -> Result<()> {
        self.recover_with(&[]).await
    }

    /// The same with more variables in the environment of the server, until it ends.
    pub async fn recover_with(&mut self, environment: &[(String, String)]) -> Result<()> {
        if !self.process.is_running() {
            self.process = launch(&self.installation, &self.home, self.port, &self.options, environment)?;
        }
        self.wait_until_ready().await
    }

    /// Ends all sessions, stops the server, and deletes its directory unless [`Options::keep`] is set.
    pub async fn stop(mut self) -> Result<()> {
        // `pg_ctl stop -m fast` sends the same signal. A parent needs no pid file to see its child end.
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
        // SIGKILL would leave the shared memory for ever, and the children could still write into a directory that is about
        // to be deleted. An immediate shutdown waits for no session, so waiting for it is short.
        if !self.process.is_running() || self.process.signal(Signal::QUIT).is_err() {
            return;
        }
        let deadline = Instant::now() + IMMEDIATE_STOP_TIMEOUT;
        while self.process.is_running() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

async fn initialise(installation: &Installation, home: &Home, durable: bool) -> Result<()> {
    let data = home.data();
    if let Ok(version) = fs::read_to_string(data.join("PG_VERSION")) {
        let version = version.trim();
        ensure!(
            version == installation.major().to_string(),
            "{} is of PostgreSQL {version}, and the programs found are of {}: delete it, or name the directory of {version} in POSTGRES_BIN",
            data.display(),
            installation.major()
        );
        return Ok(());
    }
    // Under another name until it is complete: a run killed here must leave nothing that looks like a cluster.
    let unfinished = data.with_extension("unfinished");
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).with_context(|| unfinished.display().to_string())?;
    }
    let password = home.write_secret("password", "postgres\n")?;
    let mut initdb = home.command(&installation.program("initdb"));
    initdb.arg("-D").arg(&unfinished).arg("--pwfile").arg(&password);
    // SCRAM costs a client thousands of rounds for each connection. Tests make thousands of connections to a server that
    // lives as long as they do, and listens on this machine only.
    let authentication = if durable { "--auth=scram-sha-256" } else { "--auth=md5" };
    initdb.args(["--username=postgres", authentication, "--data-checksums"]);
    // Every system has this locale. The system's own indexes compare bytes anyway.
    initdb.args(["--encoding=UTF8", "--locale=C"]);
    let output = initdb.kill_on_drop(true).output().await.context("cannot run initdb")?;
    ensure!(output.status.success(), "initdb failed:\n{}", String::from_utf8_lossy(&output.stderr).trim());
    fs::remove_file(password)?;
    fs::rename(unfinished, data)?;
    Ok(())
}

/// Waits until the port is free. PostgreSQL itself would say that it is not, but only in its log.
async fn wait_for_port(port: FixedPort) -> Result<u16> {
    let FixedPort { number, patience } = port;
    claim(number, "PostgreSQL", patience).await.map(|_| number).map_err(|error| {
        anyhow!(
            "{error}: stop that process, choose another port with --port, POSTGRES_PORT or --ports-from, \
             or set POSTGRES_URL to a superuser's URL of an existing server"
        )
    })
}

fn launch(
    installation: &Installation,
    home: &Home,
    port: u16,
    options: &Options,
    environment: &[(String, String)],
) -> Result<Process> {
    let mut postgres = home.command(&installation.program("postgres"));
    postgres.arg("-D").arg(home.data()).args(["-p", &port.to_string()]);
    // No Unix socket: its directory would need an owner too, and all clients here use TCP.
    for setting in ["listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=300"] {
        postgres.args(["-c", setting]);
    }
    if !options.durable {
        postgres.args(["-c", "fsync=off", "-c", "full_page_writes=off"]);
    }
    for setting in &options.settings {
        postgres.args(["-c", setting]);
    }
    postgres.envs(environment.iter().map(|(name, value)| (name, value)));
    Process::spawn_command("PostgreSQL", postgres, &home.log())
}
