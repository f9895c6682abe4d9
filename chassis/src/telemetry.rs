//! Starts logging.

use std::{
    env,
    io::{self, IsTerminal},
    process,
};

use tracing_subscriber::EnvFilter;

/// What is logged unless `RUST_LOG` says otherwise. The notices of a repeated migration ("already exists, skipping") say
/// only that it is safe to repeat.
const DEFAULT: &str = "info,sqlx::postgres::notice=warn";

/// Logs to stdout: for people on a terminal, as JSON, a line per event, otherwise. `RUST_LOG` chooses what; where it
/// cannot be read, the process ends with one line on stderr and exit code 2.
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
