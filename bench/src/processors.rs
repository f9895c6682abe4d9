//! Gives the servers some of the processors, and the load the others.

use std::{fs, path::Path, process, thread, time::Instant};

use anyhow::{Context, Result, ensure};
use sqlx::PgConnection;
use tokio::process::Command;

use testkit::processes::Process;

/// Which processors are whose, as `taskset` lists them.
#[derive(Debug)]
pub(super) struct Processors {
    servers: String,
    all: String,
}

impl Processors {
    /// This program keeps the second half from now on.
    pub(super) async fn split() -> Result<Self> {
        let count = thread::available_parallelism()?.get();
        ensure!(count >= 2, "load and servers need a processor each, and this machine has one");
        let (half, last) = (count / 2, count - 1);
        give(process::id(), &format!("{half}-{last}")).await?;
        Ok(Self { servers: format!("0-{}", half - 1), all: format!("0-{last}") })
    }

    /// The processes and the server of the database get the first half.
    pub(super) async fn give_servers(&self, database: &mut PgConnection, processes: &[Process]) -> Result<()> {
        give_each(database, processes, &self.servers).await
    }

    /// They get all.
    pub(super) async fn give_all(&self, database: &mut PgConnection, processes: &[Process]) -> Result<()> {
        give_each(database, processes, &self.all).await
    }
}

/// Sessions that begin later inherit the processors of the postmaster.
async fn give_each(database: &mut PgConnection, processes: &[Process], list: &str) -> Result<()> {
    let of_database: Vec<i32> = sqlx::query_scalar(
        "-- bench: processes of the server
        SELECT split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int
        UNION SELECT pid FROM pg_stat_activity",
    )
    .fetch_all(database)
    .await?;
    for pid in of_database.into_iter().map(i32::cast_unsigned).chain(processes.iter().map(Process::pid)) {
        give(pid, list).await?;
    }
    Ok(())
}

/// All threads of the process. New ones inherit it.
async fn give(pid: u32, list: &str) -> Result<()> {
    let mut taskset = Command::new("taskset");
    taskset.args(["--all-tasks", "--cpu-list", "--pid", list, &pid.to_string()]);
    let given = taskset.output().await.context("cannot run taskset, which is part of util-linux")?;
    // A session may have ended meanwhile.
    let is_gone = !Path::new("/proc").join(pid.to_string()).exists();
    ensure!(given.status.success() || is_gone, "taskset: {}", String::from_utf8_lossy(&given.stderr).trim());
    Ok(())
}

/// How busy this program is. A load that has no processor time left measures itself.
pub(super) struct Busy {
    began: Instant,
    used: u64,
}

impl Busy {
    pub(super) fn begin() -> Result<Self> {
        Ok(Self { began: Instant::now(), used: used_nanos()? })
    }

    /// Since the beginning, in percent of one processor.
    pub(super) fn end(self) -> Result<f64> {
        Ok((used_nanos()? - self.used) as f64 / self.began.elapsed().as_nanos() as f64 * 100.0)
    }
}

/// The processor time of the calling thread.
fn used_nanos() -> Result<u64> {
    let schedstat = fs::read_to_string("/proc/thread-self/schedstat")?;
    schedstat.split(' ').next().context("the first figure")?.parse().context("processor time")
}
