//! Audits again and again, and tells Prometheus what it finds.

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use anyhow::{Context, Result};
use chassis::{Ops, ServeSettings};
use metrics::{counter, describe_counter, describe_gauge, gauge};
use tokio::time::{Instant, sleep_until};

use super::audit;
use crate::target::Databases;

const VIOLATIONS: &str = "outbox_audit_violations";
const ENDED: &str = "outbox_audits_total";

fn describe() {
    describe_gauge!(VIOLATIONS, "Rows that the last audit found wrong: lost, applied twice, or in disagreement");
    describe_counter!(ENDED, "Audits by how they ended: clean, violated, failed (a database could not be read)");
    // Whoever compares them needs all from the start.
    for outcome in ["clean", "violated", "failed"] {
        counter!(ENDED, "outcome" => outcome).increment(0);
    }
}

/// Audits until a signal. A database that is away is told and tried again: it is no violation.
pub(super) async fn run(databases: &Databases, every: Duration, address: SocketAddr) -> Result<ExitCode> {
    let limits = ServeSettings { drain_seconds: 5, request_seconds: 10, concurrent_streams: 256 };
    let _ops = Ops::start(Some(address), &limits).await.with_context(|| format!("cannot listen on {address}"))?;
    describe();
    println!("audit: every {} s; metrics are at http://{address}/metrics", every.as_secs());
    let shutdown = chassis::shutdown_signal()?;
    loop {
        let next = Instant::now() + every;
        let Some(audited) = shutdown.run_until_cancelled(audit(databases)).await else { break };
        let outcome = match &audited {
            Ok(audit) if audit.findings.is_empty() => "clean",
            Ok(_) => "violated",
            Err(_) => "failed",
        };
        match &audited {
            Ok(audit) => {
                gauge!(VIOLATIONS).set(audit.findings.len() as f64);
                audit.print();
            }
            Err(error) => eprintln!("audit: failed, and is tried again: {error:#}"),
        }
        counter!(ENDED, "outcome" => outcome).increment(1);
        if shutdown.run_until_cancelled(sleep_until(next)).await.is_none() {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}
