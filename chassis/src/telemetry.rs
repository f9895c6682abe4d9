//! Starts logging.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// What is logged unless `RUST_LOG` says otherwise. The notices of a repeated migration ("already exists, skipping") say
/// only that it is safe to repeat.
const DEFAULT: &str = "info,sqlx::postgres::notice=warn";

/// Logs to stdout: for people on a terminal, as JSON, a line per event, otherwise. `RUST_LOG` chooses what.
pub fn log_to_stdout() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    let logs = tracing_subscriber::fmt().with_env_filter(filter);
    if io::stdout().is_terminal() {
        logs.with_target(false).init();
    } else {
        logs.json().flatten_event(true).init();
    }
}
