//! Starts logging.

use std::{
    env,
    io::{self, IsTerminal},
    process,
};

use tracing_subscriber::EnvFilter;

/// The filter if `RUST_LOG` is not set. A repeated migration is safe; PostgreSQL's notices about it ("already exists,
/// skipping") say no more than that.
const DEFAULT: &str = "info,sqlx::postgres::notice=warn";

/// Logs to stdout: as text on a terminal, otherwise as one JSON object per line.
///
/// `RUST_LOG` filters the logs. If it is invalid, the process ends with one line on stderr and exit code 2.
pub fn log_to_stdout() {
    let chosen = env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let filter = EnvFilter::try_new(chosen.as_deref().unwrap_or(DEFAULT)).unwrap_or_else(|error| {
        eprintln!("error: RUST_LOG: {error}");
        process::exit(2);
    });
    let logs = tracing_subscriber::fmt().with_env_filter(filter);
    if io::stdout().is_terminal() {
        logs.with_target(false).init();
    } else {
        logs.json().flatten_event(true).init();
    }
}
