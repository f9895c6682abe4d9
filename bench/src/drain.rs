//! Part 2: how fast the relay delivers a backlog to inventory-service.
//!
//! Each round compares it with the SQL of inventory-service alone: pgbench executes the same statements, in the same
//! role, for the same number of events in batches of the same size. It does so with as many clients as
//! inventory-service applies batches at once, and with one client. Batches wait for each other's locks on stock, so one
//! client may be faster; the system is compared with the faster. Each round also runs the same relay for some seconds
//! with one event at a time (`--batch 1 --workers 1`), and drains the same backlog to two subscribers at once. See [`super::backlog`] for how a drain is timed.

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

/// The number of batches that inventory-service applies at once by default, and one.
const CLIENTS: [u32; 2] = [2, 1];
/// The number of events that the relay leases at once by default.
const EVENTS_OF_A_BATCH: u32 = 500;
const SINGLE: [(&str, &str); 2] = [("RELAY_BATCH", "1"), ("RELAY_WORKERS", "1")];

/// The batches that a client of pgbench reads, instead of receiving gRPC calls.
const MAKE_BATCHES: &str = "-- bench: make batches
    CREATE TABLE bench_batches (
        batch integer PRIMARY KEY, event_ids uuid[], times timestamptz[], order_ids uuid[], statuses text[],
        sequences integer[], answer_ids uuid[], answer_types text[], payloads bytea[],
        entry_references uuid[], entry_kinds text[], entry_skus text[], entry_deltas bigint[],
        total_skus text[], total_deltas bigint[], no_ids uuid[] DEFAULT '{}', no_texts text[] DEFAULT '{}'
    );
    GRANT SELECT ON bench_batches TO inventory_service";
const EMPTY: &str = "-- bench: empty inventory
    TRUNCATE processed_messages, reservations, outbox, stock_ledger, stock;
    INSERT INTO stock (sku, available)
    SELECT 'SKU-' || lpad(number::text, 4, '0'), 1000000000 FROM generate_series(1, 1000) AS number";

/// Measures, prints and plots.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let events = site.size(200_000, 20_000);
    let single_time = Duration::from_secs(site.size(6, 3));
    println!("bench: 2  placing {} orders", number(events as f64));
    let mut backlog = Backlog::place(site, "drain", events, Shape::USUAL).await?;
    let batches = u32::try_from(events)? / EVENTS_OF_A_BATCH;
    let (mut sql_database, sql_url) = prepare_sql(site, batches).await?;

    backlog.subscribe_loyalty().await?;
    let (mut drains, mut twice, mut singles, mut sql) = (Vec::new(), Vec::new(), Vec::new(), [const { Vec::new() }; 2]);
    for round in 1..=site.rounds() {
        let single = backlog.drain(events.min(20_000), &SINGLE, Some(single_time)).await?;
        println!("bench: 2  round {round}  one at a time         {:>8} events/s", number(single.rate));
        singles.push(single.rate);
        for (clients, rates) in CLIENTS.into_iter().zip(&mut sql) {
            let rate = measure_sql(site, &mut sql_database, &sql_url, clients, batches).await?;
            println!("bench: 2  round {round}  SQL alone, {clients} at once  {:>8} events/s", number(rate));
            rates.push(rate);
        }
        let both = backlog.drain_twice(site, events).await?;
        println!("bench: 2  round {round}  to two subscribers   {:>8} deliveries/s", number(both.rate));
        twice.push(both.rate);
        let drained = backlog.drain(events, &[], None).await?;
        println!("bench: 2  round {round}  drain                 {:>8} events/s", number(drained.rate));
        drains.push(drained);
    }
    report_figures(&drains, &twice, &singles, &sql, report);
    plot::backlog(site.directory(), &drains)?;
    println!("bench: 2  delivering the answers");
    backlog.finish(report).await
}

/// Creates a database of inventory for pgbench, with the batches that it applies.
///
/// pgbench connects as the role of the service, since that role has settings that decide on plans.
async fn prepare_sql(site: &Site, batches: u32) -> Result<(PgConnection, String)> {
    let layout = site.databases("sql").await?;
    let mut inventory = site.connect(&layout.inventory).await?;
    for statement in [include_str!("../sql/ids.sql"), MAKE_BATCHES] {
        sqlx::raw_sql(statement).execute(&mut inventory).await?;
    }
    let filled = sqlx::query(include_str!("../sql/batches.sql"))
        .bind(i32::try_from(batches)?)
        .bind(i32::try_from(EVENTS_OF_A_BATCH)?);
    filled.execute(&mut inventory).await?;
    Ok((inventory, layout.server.url_for("inventory_service", &layout.inventory)))
}

async fn measure_sql(site: &Site, inventory: &mut PgConnection, url: &str, clients: u32, batches: u32) -> Result<f64> {
    for statement in [EMPTY, "VACUUM (ANALYZE)", "CHECKPOINT"] {
        sqlx::raw_sql(statement).execute(&mut *inventory).await?;
    }
    let until = Until::TransactionsOfEach(batches / clients);
    let variables = &[("n", 0), ("clients", clients)];
    let run = pgbench::Run { script: pgbench::APPLY_BATCH, url, clients, until, variables };
    let outcome = pgbench::run(site.installation(), site.directory(), run).await?;
    Ok(outcome.rate * f64::from(EVENTS_OF_A_BATCH))
}

fn report_figures(drains: &[Drained], twice: &[f64], singles: &[f64], sql: &[Vec<f64>; 2], report: &mut Report) {
    let rates: Vec<f64> = drains.iter().map(|drained| drained.rate).collect();
    let (drain, single) = (median(&rates), median(singles));
    let [alone, lone] = [&sql[0], &sql[1]].map(|rates| median(rates));
    let mut table = Table::new("2. Drain (the relay of the answers does not run)", &["", "events/s", "rounds"]);
    for (name, rate, rounds) in [
        ("through the relay into inventory-service", drain, rates.as_slice()),
        ("through one relay into inventory-service and loyalty-service", median(twice), twice),
        ("SQL of inventory alone, 2 at once", alone, &sql[0]),
        ("SQL of inventory alone, 1 at once", lone, &sql[1]),
        ("through the relay, one at a time", single, singles),
    ] {
        let rounds: Vec<String> = rounds.iter().map(|rate| number(*rate)).collect();
        table.row([name.into(), number(rate), rounds.join(" ")]);
    }
    table.print();
    report.figure("drain_over_inventory_sql", drain / alone.max(lone));
    report.figure("drain_twice_over_once", median(twice) / drain);
    report.figure("drain_over_single", drain / single);
    let samples: Vec<_> = drains.iter().map(|drained| &drained.samples).collect();
    let raw = json!({
        "drain": rates, "drain_twice": twice, "inventory_sql_2": sql[0], "inventory_sql_1": sql[1], "single": singles, "samples": samples,
    });
    report.raw("drain", raw);
}
