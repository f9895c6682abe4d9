//! PostgreSQL's own load generator, on the same rows: what the services are compared with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use super::quantiles::Latencies;
use crate::postgres::Installation;

/// A script of `harness/bench`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Script {
    name: &'static str,
    text: &'static str,
}

/// The rows of a CreateOrder, a transaction an order.
pub(super) const CREATE_ORDER: Script =
    Script { name: "create_order", text: include_str!("../../bench/create_order.sql") };
/// The same rows, 256 orders a transaction.
pub(super) const GROUPED_ORDERS: Script =
    Script { name: "grouped_orders", text: include_str!("../../bench/grouped_orders.sql") };
/// What inventory-service writes for a batch of 100 events.
pub(super) const APPLY_BATCH: Script =
    Script { name: "apply_batch", text: include_str!("../../bench/apply_batch.sql") };

/// When a run ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    Seconds(u64),
    TransactionsOfEach(u32),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Run<'r> {
    pub(super) script: Script,
    pub(super) url: &'r str,
    pub(super) clients: u32,
    pub(super) until: Until,
    /// Variables of the script.
    pub(super) variables: &'r [(&'r str, u32)],
}

#[derive(Debug)]
pub(super) struct Outcome {
    /// Transactions a second, without the time it took to connect.
    pub(super) rate: f64,
    /// Of every transaction.
    pub(super) latencies: Latencies,
}

/// Runs pgbench of the server's own installation; scripts and logs are in the directory.
///
/// # Errors
/// When pgbench fails, or a transaction did.
pub(super) async fn run(installation: &Installation, directory: &Path, run: Run<'_>) -> Result<Outcome> {
    let scratch = directory.join("pgbench");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
    let script = scratch.join(run.script.name).with_extension("sql");
    fs::write(&script, run.script.text)?;
    let mut pgbench = Command::new(installation.client("pgbench"));
    pgbench.args(["--no-vacuum", "--protocol=prepared", "--log", "--log-prefix"]).arg(scratch.join("log"));
    pgbench.arg("--file").arg(&script).arg(format!("--client={}", run.clients));
    // A thread for each core, as the services have.
    let threads = std::thread::available_parallelism()?.get().min(usize::try_from(run.clients)?);
    pgbench.arg(format!("--jobs={threads}"));
    pgbench.arg(match run.until {
        Until::Seconds(seconds) => format!("--time={seconds}"),
        Until::TransactionsOfEach(transactions) => format!("--transactions={transactions}"),
    });
    for (name, value) in run.variables {
        pgbench.arg(format!("--define={name}={value}"));
    }
    let output = pgbench.arg(run.url).kill_on_drop(true).output().await;
    let output = output.context("cannot run pgbench, which is part of the package of PostgreSQL's server")?;
    let rate = read_output(&output).with_context(|| format!("pgbench of {}", run.script.name))?;
    Ok(Outcome { rate, latencies: read_logs(&scratch)? })
}

fn read_output(output: &Output) -> Result<f64> {
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && !complained.contains("aborted"), "it failed: {complained}");
    parse_rate(&said).with_context(|| format!("it printed no rate: {said}"))
}

/// Of `tps = 1234.567890 (without initial connection time)`.
fn parse_rate(said: &str) -> Option<f64> {
    let line = said.lines().find_map(|line| line.strip_prefix("tps = "))?;
    line.split_whitespace().next()?.parse().ok()
}

fn read_logs(scratch: &Path) -> Result<Latencies> {
    let logs = fs::read_dir(scratch)?.collect::<Result<Vec<_>, _>>()?;
    let logs = logs.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with("log."));
    let paths: Vec<PathBuf> = logs.map(fs::DirEntry::path).collect();
    let mut latencies = Vec::new();
    for path in paths {
        latencies.extend(fs::read_to_string(path)?.lines().filter_map(parse_latency));
    }
    Ok(Latencies::of(latencies))
}

/// Of `client transaction microseconds script second microsecond`, in milliseconds.
fn parse_latency(line: &str) -> Option<f64> {
    let micros: f64 = line.split(' ').nth(2)?.parse().ok()?;
    Some(micros / 1e3)
}

#[cfg(test)]
mod tests {
    use super::{parse_latency, parse_rate};

    #[test]
    fn what_pgbench_prints() {
        let said = "transaction type: create_order.sql\nnumber of clients: 64\nlatency average = 20.1 ms\n\
                    initial connection time = 95.5 ms\ntps = 3184.072718 (without initial connection time)\n";
        assert_eq!(parse_rate(said), Some(3184.072718));
        assert_eq!(parse_rate("pgbench: error"), None);
        assert_eq!(parse_latency("0 199 2241 0 1175850568 995598"), Some(2.241));
    }
}
