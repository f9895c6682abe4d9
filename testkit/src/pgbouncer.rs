//! PgBouncer in front of a server, for tests.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use sqlx::{ConnectOptions, Row, postgres::PgConnectOptions};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    Scratch,
    postgres::Server,
    processes::{Process, free_port},
};

/// Sessions of a role and a database.
const POOL: usize = 20;
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Its clients. Their passwords are their names (see the bootstrap).
const ROLES: [&str; 7] = [
    "orders_owner",
    "order_service",
    "inventory_owner",
    "inventory_service",
    "loyalty_owner",
    "loyalty_service",
    "outbox_relay",
];

/// A running PgBouncer. Killed when dropped.
#[derive(Debug)]
pub struct PgBouncer {
    port: u16,
    _process: Process,
    // Last, because its files may be deleted only after the process has ended.
    _scratch: Scratch,
}

impl PgBouncer {
    /// Starts `program` before a server. `mode` is `session` or `transaction`. Returns once it listens.
    pub async fn start(program: &Path, server: &Server, mode: &str) -> Result<PgBouncer> {
        let scratch = Scratch::new();
        let (port, address) = (free_port()?, server.address());
        let (host, server_port) = address.rsplit_once(':').context("the server's address has no port")?;
        let users: String = ROLES.iter().map(|role| format!("\"{role}\" \"{role}\"\n")).collect();
        fs::write(scratch.join("users"), users)?;
        let user = if rustix::process::getuid().is_root() { "user = postgres\n" } else { "" };
        let settings = format!(
            "[databases]\n* = host={host} port={server_port}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
             unix_socket_dir =\nauth_type = md5\nauth_file = {}\npool_mode = {mode}\ndefault_pool_size = {POOL}\n\
             max_client_conn = 500\n{user}",
            scratch.join("users").display()
        );
        let file = scratch.join("pgbouncer.ini");
        fs::write(&file, settings)?;
        let nothing: [(&str, &str); 0] = [];
        let mut process = Process::spawn("PgBouncer", program, [&file], nothing, &scratch.join("log"))?;
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
            if process.exit_status()?.is_some() || Instant::now() > deadline {
                bail!("PgBouncer does not listen; its log ends in\n{}", process.log_tail(10));
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(PgBouncer { port, _process: process, _scratch: scratch })
    }

    /// How many channels its sessions of a role listen to. A session that was given to another client meanwhile shows no
    /// trace of a LISTEN but this.
    ///
    /// # Panics
    /// If it does not answer.
    pub async fn listened_channels(&self, role: &str, database: &str) -> i64 {
        let options: PgConnectOptions = self.url_for(role, database).parse().expect("a URL");
        let options = options.extra_float_digits(None);
        // As many at once as there can be sessions, so each session is asked.
        let mut asking = JoinSet::new();
        for _ in 0..POOL {
            let options = options.clone();
            asking.spawn(async move {
                let mut client = options.connect().await.expect("a session");
                let ask = "SELECT (SELECT count(*) FROM pg_listening_channels()) FROM pg_sleep(0.3)";
                let row = sqlx::raw_sql(ask).fetch_one(&mut client).await.expect("an answer");
                row.try_get::<i64, _>(0).expect("a number")
            });
        }
        asking.join_all().await.into_iter().sum()
    }

    /// The URL of a database for a role.
    pub fn url_for(&self, role: &str, database: &str) -> String {
        format!("postgres://{role}:{role}@127.0.0.1:{}/{database}", self.port)
    }
}

/// A program of a version that is wanted, if there is one: the one that the environment's `PGBOUNCER` names, or the
/// system's. `.ci/install-pgbouncer` builds a current one.
pub fn find(is_wanted: impl Fn((u32, u32)) -> bool) -> Option<PathBuf> {
    let given = env::var_os("PGBOUNCER").map(PathBuf::from);
    let mut candidates = given.into_iter().chain(["/usr/sbin/pgbouncer".into(), "/usr/bin/pgbouncer".into()]);
    candidates.find(|program| version(program).is_ok_and(&is_wanted))
}

fn version(program: &Path) -> Result<(u32, u32)> {
    let output = process::Command::new(program).arg("--version").output()?;
    ensure!(output.status.success(), "{} --version failed", program.display());
    let text = String::from_utf8(output.stdout)?;
    let number = text.split_whitespace().nth(1).context("no version")?;
    let mut parts = number.split('.').map(str::parse);
    let mut next = || parts.next().context("no version")?.context("no number");
    Ok((next()?, next()?))
}
