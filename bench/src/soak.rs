//! Part 6: whether an outbox that is used for long stays as small and as fast as it was.
//!
//! The whole system under a constant rate of orders. Every 10 seconds: the size of the table with its indexes, the events
//! that wait, dead tuples by the server's statistics, and the median time of a lease since the last look, from the
//! server's log. Every worker that has delivered looks again, so many leases find little.

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
use harness::system::Service;

const RATE: u32 = 2000;
const LOG_LEASES: &str = "-- bench: log statements
    DO $$ BEGIN
        EXECUTE format('ALTER ROLE outbox_relay IN DATABASE %I SET log_min_duration_statement = 0', current_database());
    END $$";

/// A look at the outbox.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub(super) seconds: f64,
    pub(super) kilobytes: f64,
    waiting: i64,
    dead: i64,
    pub(super) lease_ms: f64,
}

impl Look {
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
    let processes = start(&layout, &Service::ALL).await?;
    Shape::USUAL.put_stock_in(&layout.target()?).await?;

    println!("bench: 6  {} s at {RATE} orders/s", time.as_secs());
    let log = StatementLog::follow(&site.server_log())?;
    let looks = tokio::spawn(look_for(outbox, log, time));
    let measured = latency::measure(&layout, Schedule { rate: RATE, time }, "6", report).await?;
    let looks = looks.await??;

    let mut table = Table::new("6. Soak", &["s", "outbox kB", "waiting", "dead tuples", "lease p50 ms"]);
    for look in &looks {
        let Look { seconds, kilobytes, waiting, dead, lease_ms } = *look;
        table.row([
            number(seconds.round()),
            number(kilobytes),
            waiting.to_string(),
            dead.to_string(),
            number(lease_ms),
        ]);
    }
    table.print();
    plot::soak(site.directory(), &looks)?;
    let looks: Vec<Value> = looks.iter().map(Look::as_json).collect();
    report
        .raw("soak", json!({ "rate": RATE, "achieved": measured.achieved, "unsent": measured.unsent, "looks": looks }));
    finish(&layout, processes, report).await
}

async fn look_for(mut outbox: PgConnection, mut log: StatementLog, time: Duration) -> Result<Vec<Look>> {
    let begin = Instant::now();
    let mut ticks = interval(Duration::from_secs(10));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let mut looks = Vec::new();
    while begin.elapsed() < time {
        ticks.tick().await;
        let (bytes, waiting, dead): (i64, i64, i64) = sqlx::query_as(
            "-- bench: look at outbox
            SELECT pg_total_relation_size('outbox'), (SELECT count(*) FROM outbox), pg_stat_get_dead_tuples('outbox'::regclass)",
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
        looks.push(Look { seconds: begin.elapsed().as_secs_f64(), kilobytes, waiting, dead, lease_ms });
    }
    Ok(looks)
}
