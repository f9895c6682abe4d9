//! Reads the durations of statements from the log of the server.
//!
//! With `log_min_duration_statement = 0` PostgreSQL logs each step of a prepared statement: `parse`, `bind`, which
//! plans it, and `execute`. The duration of a statement is that of its last `bind` plus that of its `execute`, in the
//! same backend. It does not include the network and the commit.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// A log that the server writes.
#[derive(Debug)]
pub(super) struct StatementLog {
    path: PathBuf,
    read: u64,
}

impl StatementLog {
    /// Follows the log from its current end.
    pub(super) fn follow(path: &Path) -> Result<Self> {
        let read = path.metadata().with_context(|| path.display().to_string())?.len();
        Ok(Self { path: path.to_owned(), read })
    }

    /// The durations in milliseconds of statements with this beginning, since the last call.
    pub(super) fn durations(&mut self, statement: &str) -> Result<Vec<f64>> {
        let mut file = File::open(&self.path)?;
        file.seek(SeekFrom::Start(self.read))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        // The last line may be incomplete.
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        self.read += u64::try_from(whole)?;
        Ok(parse(&String::from_utf8_lossy(&bytes[..whole]), statement))
    }
}

fn parse(log: &str, statement: &str) -> Vec<f64> {
    let mut bound = HashMap::new();
    let mut durations = Vec::new();
    for step in log.lines().filter_map(parse_step).filter(|step| step.statement.starts_with(statement)) {
        match step.kind {
            "bind" => drop(bound.insert(step.backend, step.milliseconds)),
            "execute" => durations.push(step.milliseconds + bound.remove(step.backend).unwrap_or(0.0)),
            _ => {}
        }
    }
    durations
}

struct Step<'l> {
    backend: &'l str,
    milliseconds: f64,
    kind: &'l str,
    statement: &'l str,
}

/// Parses `2026-01-02 03:04:05.678 UTC [4711] LOG:  duration: 0.123 ms  bind sqlx_s_1: -- relay: lease`, with the
/// default `log_line_prefix`. The rest of the statement is on the following lines.
fn parse_step(line: &str) -> Option<Step<'_>> {
    let (prefix, logged) = line.split_once(" LOG:  duration: ")?;
    let backend = prefix.rsplit_once('[')?.1.strip_suffix(']')?;
    let (milliseconds, step) = logged.split_once(" ms  ")?;
    let (step, statement) = step.split_once(": ")?;
    let kind = step.split(' ').next()?;
    Some(Step { backend, milliseconds: milliseconds.parse().ok()?, kind, statement })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn planning_counts_and_other_backends_and_statements_do_not() {
        let log = "2026-01-02 03:04:05.678 UTC [11] LOG:  duration: 9.000 ms  parse sqlx_s_1: -- relay: lease\n\
            \tUPDATE outbox\n\
            2026-01-02 03:04:05.679 UTC [11] LOG:  duration: 0.250 ms  bind sqlx_s_1: -- relay: lease\n\
            \tUPDATE outbox\n\
            2026-01-02 03:04:05.679 UTC [12] LOG:  duration: 4.000 ms  execute sqlx_s_1: -- relay: lease\n\
            \tUPDATE outbox\n\
            2026-01-02 03:04:05.680 UTC [11] LOG:  duration: 7.000 ms  execute sqlx_s_2: -- relay: settle\n\
            2026-01-02 03:04:05.680 UTC [11] LOG:  duration: 1.500 ms  execute sqlx_s_1: -- relay: lease\n\
            2026-01-02 03:04:05.690 UTC [11] ERROR:  canceling statement\n";
        assert_eq!(parse(log, "-- relay: lease"), [4.0, 1.75]);
    }
}
