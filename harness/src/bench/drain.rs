//! Part 2: how fast a backlog goes through the relay into inventory-service.
//!
//! Compared in the same rounds: inventory's SQL alone, by pgbench, which writes the same rows for batches of 100 events, set
//! by set. It has as many clients as the relay has workers, or one: batches wait for each other's stock, so more clients may
//! be slower, and the system is compared with the faster. And the same relay delivering one event at a time
//! (`--batch 1 --workers 1`), for some seconds. See [`super::backlog`] for how a drain is timed.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use sqlx::PgConnection;

use super::{
    backlog::{Backlog, Drained},
    pgbench::{self, Until},
    plot,
    quantiles::median,
    report::{Report, Table, number},
    requests::Shape,
    site::Site,
};

/// As many as the relay has workers, and one.
const CLIENTS: [u32; 2] = [5, 1];
const EVENTS_OF_A_BATCH: u64 = 100;
const SINGLE: [(&str, &str); 2] = [("RELAY_BATCH", "1"), ("RELAY_WORKERS", "1")];

/// What a client of pgbench takes from instead of a gRPC call: batches of events, numbered by client.
const MAKE_EVENTS: &str = "-- bench: make events
    INSERT INTO stock (sku, available)
    SELECT 'SKU-' || lpad(number::text, 4, '0'), 1000000000 FROM generate_series(1, 1000) AS number;
    CREATE TABLE bench_events (
        batch integer, event_id uuid, order_id uuid, answer_id uuid, first_sku text COLLATE \"C\", second_sku text COLLATE \"C\"
    )";
const FILL_EVENTS: &str = "-- bench: fill events
    INSERT INTO bench_events
    SELECT client * 100000 + batch, bench_uuid_v7(), bench_uuid_v7(), bench_uuid_v7(),
        'SKU-' || lpad((1 + number)::text, 4, '0'), 'SKU-' || lpad((1 + (number + 500) % 1000)::text, 4, '0')
    FROM (
        SELECT client, batch, floor(random() * 1000)::integer AS number
        FROM generate_series(1, $2) AS batch, generate_series(0, $1 - 1) AS client, generate_series(1, 100)
        ORDER BY batch, client
    ) AS drawn";
const EMPTY: &str = "TRUNCATE processed_messages, reservations, outbox, stock_ledger";

/// Measures, prints and plots.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let events = site.size(200_000, 20_000);
    let single_time = Duration::from_secs(site.size(6, 3));
    println!("bench: 2  placing {} orders", number(events as f64));
    let mut backlog = Backlog::place(site, "drain", events, Shape::USUAL).await?;
    let batches = u32::try_from(events / EVENTS_OF_A_BATCH)? / CLIENTS[0];
    let (mut sql_database, sql_url) = prepare_sql(site, batches).await?;

    let (mut drains, mut singles, mut sql) = (Vec::new(), Vec::new(), [const { Vec::new() }; 2]);
    for round in 1..=site.rounds() {
        let single = backlog.drain(events.min(20_000), &SINGLE, Some(single_time)).await?;
        println!("bench: 2  round {round}  one at a time         {:>8} events/s", number(single.rate));
        singles.push(single.rate);
        for (clients, rates) in CLIENTS.into_iter().zip(&mut sql) {
            let rate = measure_sql(site, &mut sql_database, &sql_url, clients, batches).await?;
            println!("bench: 2  round {round}  SQL alone, {clients} at once  {:>8} events/s", number(rate));
            rates.push(rate);
        }
        let drained = backlog.drain(events, &[], None).await?;
        println!("bench: 2  round {round}  drain                 {:>8} events/s", number(drained.rate));
        drains.push(drained);
    }
    report_figures(&drains, &singles, &sql, report);
    plot::backlog(site.directory(), &drains)?;
    println!("bench: 2  bringing the answers back");
    backlog.finish(report).await
}

/// A database of inventory's own for pgbench, with all that it applies.
async fn prepare_sql(site: &Site, batches: u32) -> Result<(PgConnection, String)> {
    let layout = site.databases("sql").await?;
    let mut inventory = site.connect(&layout.inventory).await?;
    for statement in [include_str!("../../bench/uuid_v7.sql"), MAKE_EVENTS] {
        sqlx::raw_sql(statement).execute(&mut inventory).await?;
    }
    let filled = sqlx::query(FILL_EVENTS).bind(i32::try_from(CLIENTS[0])?).bind(i32::try_from(batches)?);
    filled.execute(&mut inventory).await?;
    sqlx::raw_sql("CREATE INDEX ON bench_events (batch)").execute(&mut inventory).await?;
    Ok((inventory, site.superuser_url(&layout.inventory)))
}

async fn measure_sql(site: &Site, inventory: &mut PgConnection, url: &str, clients: u32, batches: u32) -> Result<f64> {
    for statement in [EMPTY, "VACUUM (ANALYZE)", "CHECKPOINT"] {
        sqlx::raw_sql(statement).execute(&mut *inventory).await?;
    }
    let until = Until::TransactionsOfEach(batches);
    let run = pgbench::Run { script: pgbench::APPLY_BATCH, url, clients, until, variables: &[("n", 0)] };
    let outcome = pgbench::run(site.installation(), site.directory(), run).await?;
    Ok(outcome.rate * EVENTS_OF_A_BATCH as f64)
}

fn report_figures(drains: &[Drained], singles: &[f64], sql: &[Vec<f64>; 2], report: &mut Report) {
    let rates: Vec<f64> = drains.iter().map(|drained| drained.rate).collect();
    let (drain, single) = (median(&rates), median(singles));
    let [alone, lone] = [&sql[0], &sql[1]].map(|rates| median(rates));
    let mut table = Table::new("2. Drain (the relay of the answers is not running)", &["", "events/s", "rounds"]);
    for (name, rate, rounds) in [
        ("through the relay into inventory-service", drain, rates.as_slice()),
        ("inventory's SQL alone, 5 at once", alone, &sql[0]),
        ("inventory's SQL alone, 1 at once", lone, &sql[1]),
        ("through the relay, one at a time", single, singles),
    ] {
        let rounds: Vec<String> = rounds.iter().map(|rate| number(*rate)).collect();
        table.row([name.into(), number(rate), rounds.join(" ")]);
    }
    table.print();
    report.figure("drain_over_inventory_sql", drain / alone.max(lone));
    report.figure("drain_over_single", drain / single);
    let samples: Vec<_> = drains.iter().map(|drained| &drained.samples).collect();
    report.raw("drain", json!({ "drain": rates, "inventory_sql_5": sql[0], "inventory_sql_1": sql[1], "single": singles, "samples": samples }));
}
