//! Audits again and again, and tells Prometheus what it finds.

use std::{
    net::SocketAddr,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result, anyhow};
use chassis::{ConnectionSettings, Ops, ServeSettings, Tls, TlsSettings};
use metrics::{counter, describe_counter, describe_gauge, gauge};
use tokio::time::{Instant, sleep_until, timeout};

use super::audit;
use crate::target::Databases;

const VIOLATIONS: &str = "outbox_audit_violations";
const ENDED: &str = "outbox_audits_total";
const READ_AT: &str = "outbox_audit_read_timestamp_seconds";
const INTERVAL: &str = "outbox_audit_interval_seconds";
/// An audit that takes longer than its interval is cut off after this time: a database may be silent.
const LIMIT: Duration = Duration::from_secs(3600);

fn describe() {
    describe_gauge!(VIOLATIONS, "Rows that the last audit found wrong: lost, applied twice, or in disagreement");
    describe_counter!(ENDED, "Audits by how they ended: clean, violated, failed (a database could not be read)");
    describe_gauge!(READ_AT, "When the last audit ended that could read all databases, by this machine's clock");
    describe_gauge!(INTERVAL, "Time from the begin of an audit to the begin of the next");
    // Whoever compares them needs all from the start.
    for outcome in ["clean", "violated", "failed"] {
        counter!(ENDED, "outcome" => outcome).increment(0);
    }
}

/// Audits until a signal. A database that is away is told and tried again: it is no violation.
pub(super) async fn run(
    databases: &Databases,
    every: Duration,
    address: SocketAddr,
    tls: &TlsSettings,
) -> Result<ExitCode> {
    let limits = ServeSettings {
        drain_seconds: 5,
        request_seconds: 10,
        concurrent_streams: 256,
        reflection: false,
        message_bytes: 65_536,
        connections: ConnectionSettings::default(),
    };
    let tls = Tls::start(tls, &[address])?;
    let _ops = Ops::start(Some(address), &limits, &tls).await.with_context(|| format!("cannot listen on {address}"))?;
    describe();
    gauge!(INTERVAL).set(every.as_secs_f64());
    // As long as none has ended, the time counts from here.
    gauge!(READ_AT).set(unix_seconds());
    println!("audit: every {} s; metrics are at http://{address}/metrics", every.as_secs());
    let shutdown = chassis::shutdown_signal()?;
    loop {
        let next = Instant::now() + every;
        let auditing = timeout(LIMIT.max(every), audit(databases));
        let Some(audited) = shutdown.run_until_cancelled(auditing).await else { break };
        let audited = audited.unwrap_or_else(|_| Err(anyhow!("no end within {:?}", LIMIT.max(every))));
        let outcome = match &audited {
            Ok(audit) if audit.findings.is_empty() => "clean",
            Ok(_) => "violated",
            Err(_) => "failed",
        };
        match &audited {
            Ok(audit) => {
                gauge!(VIOLATIONS).set(audit.findings.len() as f64);
                gauge!(READ_AT).set(unix_seconds());
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

fn unix_seconds() -> f64 {
    #[expect(clippy::disallowed_methods, reason = "for Prometheus, which compares it with its own clock")]
    let now = SystemTime::now();
    now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
