//! Runs pgbench, the load generator of PostgreSQL, on the same rows: the services are compared with it.

use std::{fs, path::Path, process::Output, time::Duration};

use anyhow::{Context, Result, ensure};
use tokio::process::Command;

use super::quantiles::Latencies;
use testkit::postgres::Installation;

/// A script in `bench/sql`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Script {
    name: &'static str,
    text: &'static str,
}

/// The rows of CreateOrder, one order per transaction.
pub(super) const CREATE_ORDER: Script = Script { name: "create_order", text: include_str!("../sql/create_order.sql") };
/// The statements of inventory-service for a batch of events.
pub(super) const APPLY_BATCH: Script = Script { name: "apply_batch", text: include_str!("../sql/apply_batch.sql") };

/// When a run ends.
#[derive(Clone, Copy, Debug)]
pub(super) enum Until {
    /// Transactions within the warm-up do not count, as with the services: clients prepare their statements then.
    Time {
        warm_up: Duration,
        time: Duration,
    },
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
    /// Transactions per second, without the time to connect.
    pub(super) rate: f64,
    /// Those of all transactions that count.
    pub(super) latencies: Latencies,
}

/// Runs pgbench from the installation of the server. Scripts and logs are in the directory.
///
/// # Errors
/// If pgbench or a transaction fails.
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
        Until::Time { warm_up, time } => format!("--time={}", (warm_up + time).as_secs_f64().ceil()),
        Until::TransactionsOfEach(transactions) => format!("--transactions={transactions}"),
    });
    for (name, value) in run.variables {
        pgbench.arg(format!("--define={name}={value}"));
    }
    let output = pgbench.arg(run.url).kill_on_drop(true).output().await;
    let output = output.context("cannot run pgbench: install the server package of PostgreSQL, which contains it")?;
    let rate = read_output(&output).with_context(|| format!("pgbench of {}", run.script.name))?;
    let transactions = read_logs(&scratch)?;
    Ok(match run.until {
        Until::Time { warm_up, time } => count(&transactions, warm_up, time),
        Until::TransactionsOfEach(_) => Outcome { rate, latencies: latencies(&transactions) },
    })
}

fn read_output(output: &Output) -> Result<f64> {
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && !complained.contains("aborted"), "it failed: {complained}");
    parse_rate(&said).with_context(|| format!("it printed no rate: {said}"))
}

/// Parses `tps = 1234.567890 (without initial connection time)`.
fn parse_rate(said: &str) -> Option<f64> {
    let line = said.lines().find_map(|line| line.strip_prefix("tps = "))?;
    line.split_whitespace().next()?.parse().ok()
}

/// A line of the log.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Transaction {
    /// In seconds since 1970.
    ended: f64,
    milliseconds: f64,
}

/// Counts transactions from the end of the first one and the warm-up, for the time that counts.
fn count(transactions: &[Transaction], warm_up: Duration, time: Duration) -> Outcome {
    let first = transactions.iter().map(|transaction| transaction.ended).fold(f64::MAX, f64::min);
    let begin = first + warm_up.as_secs_f64();
    let counts = begin..begin + time.as_secs_f64();
    let counted: Vec<_> =
        transactions.iter().filter(|transaction| counts.contains(&transaction.ended)).copied().collect();
    Outcome { rate: counted.len() as f64 / time.as_secs_f64(), latencies: latencies(&counted) }
}

fn latencies(transactions: &[Transaction]) -> Latencies {
    Latencies::of(transactions.iter().map(|transaction| transaction.milliseconds).collect())
}

fn read_logs(scratch: &Path) -> Result<Vec<Transaction>> {
    let mut transactions = Vec::new();
    for entry in fs::read_dir(scratch)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("log.") {
            transactions.extend(fs::read_to_string(entry.path())?.lines().filter_map(parse_transaction));
        }
    }
    Ok(transactions)
}

/// Parses `client transaction microseconds script second microsecond`.
fn parse_transaction(line: &str) -> Option<Transaction> {
    let fields: Vec<f64> = line.split(' ').map_while(|field| field.parse().ok()).collect();
    let [_, _, micros, _, second, microsecond, ..] = fields[..] else { return None };
    Some(Transaction { ended: second + microsecond / 1e6, milliseconds: micros / 1e3 })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Transaction, count, parse_rate, parse_transaction};

    #[test]
    fn the_output_and_the_log_of_pgbench_are_parsed() {
        let said = "transaction type: create_order.sql\nnumber of clients: 64\nlatency average = 20.1 ms\n\
                    initial connection time = 95.5 ms\ntps = 3184.072718 (without initial connection time)\n";
        assert_eq!(parse_rate(said), Some(3184.072718));
        assert_eq!(parse_rate("pgbench: error"), None);
        let transaction = Transaction { ended: 1_175_850_568.5, milliseconds: 2.241 };
        assert_eq!(parse_transaction("0 199 2241 0 1175850568 500000"), Some(transaction));
        assert_eq!(parse_transaction("0 199 failed 0 1175850568 500000"), None);
    }

    #[test]
    fn transactions_in_the_warm_up_or_too_late_do_not_count() {
        let ended = [100.0, 100.9, 101.5, 102.5, 103.1];
        let transactions = ended.map(|ended| Transaction { ended, milliseconds: ended });
        let outcome = count(&transactions, Duration::from_secs(1), Duration::from_secs(2));
        assert_eq!((outcome.rate, outcome.latencies.all()), (1.0, &[101.5, 102.5][..]));
    }
}
