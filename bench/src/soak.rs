//! Part 6: whether an outbox stays small and fast when it is used for a long time.
//!
//! The whole system runs at a constant rate of orders. Samples are taken at a constant interval: the size of the table
//! with its indexes, the number of waiting events, the dead tuples by the statistics of the server, and the median time
//! of the leases since the last sample. Many leases find few events, since every worker leases again once it has
//! delivered.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use sqlx::PgConnection;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    latency,
    lease::STATEMENT,
    open_loop::Schedule,
    plot,
    quantiles::median,
    report::{Report, Table, number},
    requests::Shape,
    site::{Site, finish, start},
    statement_log::StatementLog,
};

const RATE: u32 = 2000;
const INTERVAL: Duration = Duration::from_secs(10);
const LOG_LEASES: &str = "-- bench: log statements
    DO $$ BEGIN
        EXECUTE format('ALTER ROLE outbox_relay IN DATABASE %I SET log_min_duration_statement = 0', current_database());
    END $$";

/// A sample of the outbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) seconds: f64,
    pub(super) kilobytes: f64,
    waiting: i64,
    dead: i64,
    pub(super) lease_ms: f64,
}

impl Sample {
    fn as_json(&self) -> Value {
        let Self { seconds, kilobytes, waiting, dead, lease_ms } = self;
        json!({ "seconds": seconds, "kilobytes": kilobytes, "waiting": waiting, "dead": dead, "lease_ms": lease_ms })
    }
}

/// Measures, prints and plots.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let time = Duration::from_secs(site.size(600, 60));
    let layout = site.databases("soak").await?;
    let mut outbox = site.connect(&layout.orders).await?;
    sqlx::raw_sql(LOG_LEASES).execute(&mut outbox).await?;
    let processes = start(&layout, &layout.services()).await?;
    Shape::USUAL.add_stock(&layout.target()?).await?;

    println!("bench: 6  {} s at {RATE} orders/s", time.as_secs());
    let log = StatementLog::follow(&site.server_log())?;
    let sampling = tokio::spawn(sample_for(outbox, log, time));
    let measured = latency::measure(&layout, Schedule { rate: RATE, time }, "6", report).await?;
    let samples = sampling.await??;

    let mut table = Table::new("6. Soak", &["s", "outbox kB", "waiting", "dead tuples", "lease p50 ms"]);
    for sample in &samples {
        let Sample { seconds, kilobytes, waiting, dead, lease_ms } = *sample;
        table.row([
            number(seconds.round()),
            number(kilobytes),
            waiting.to_string(),
            dead.to_string(),
            number(lease_ms),
        ]);
    }
    table.print();
    plot::soak(site.directory(), &samples)?;
    let samples: Vec<Value> = samples.iter().map(Sample::as_json).collect();
    report.raw(
        "soak",
        json!({ "rate": RATE, "achieved": measured.achieved, "unsent": measured.unsent, "looks": samples }),
    );
    finish(&layout, processes, report).await
}

async fn sample_for(mut outbox: PgConnection, mut log: StatementLog, time: Duration) -> Result<Vec<Sample>> {
    let begin = Instant::now();
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let mut samples = Vec::new();
    while begin.elapsed() < time {
        ticks.tick().await;
        let (bytes, waiting, dead): (i64, i64, i64) = sqlx::query_as(
            "-- bench: sample outbox
            SELECT pg_total_relation_size('outbox'), (SELECT count(*) FROM outbox),
                pg_stat_get_dead_tuples('outbox'::regclass)",
        )
        .fetch_one(&mut outbox)
        .await?;
        let lease_ms = median(&log.durations(STATEMENT)?);
        let kilobytes = bytes as f64 / 1024.0;
        println!(
            "bench: 6  {:>4} s  {:>8} kB  lease {} ms",
            begin.elapsed().as_secs(),
            number(kilobytes),
            number(lease_ms)
        );
        samples.push(Sample { seconds: begin.elapsed().as_secs_f64(), kilobytes, waiting, dead, lease_ms });
    }
    Ok(samples)
}
