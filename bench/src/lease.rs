//! Part 5: how long a lease takes, with different contents of the outbox.
//!
//! The real relay executes its statement with one worker. Its receiver enqueues an event for each that it receives (see
//! [`super::stub_receiver`]). So the number of waiting events stays the same, and is always more than a lease takes.
//! The durations are those in the log of the server (see [`super::statement_log`]). Now and then a lease scans all
//! visible events, and not only from where the last lease found some. The median hides these scans, so the table also
//! has mean and p99.
//!
//! Each state has a database of its own. Autovacuum is off for the table, so that it does not repair the state.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use sqlx::PgConnection;
use tokio::time::timeout;

use super::{
    quantiles::{Latencies, P50, P99, median},
    report::{Report, Table, number},
    site::Site,
    statement_log::StatementLog,
    stub_receiver::StubReceiver,
};
use harness::system::{Layout, Service, stop};

/// The beginning of the relay's statement.
pub(super) const STATEMENT: &str = "-- relay: lease";
/// Events of a lease, as by default.
const BATCH: u32 = 500;
/// A small number of waiting events, and still enough for a full lease at any time.
const FEW: i32 = 600;
/// Leases of a state in a round, and the leases before them that do not count.
const LEASES: u64 = 200;
const WARM_UP: usize = 10;
/// Fewer leases are no measurement.
const LEASES_AT_LEAST: usize = 20;
const TIME_LIMIT: Duration = Duration::from_secs(15);

/// Enqueues events.
pub(super) const ENQUEUE: &str = "-- bench: enqueue
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload)
    SELECT bench_uuid_v7(), 1, bench_uuid_v7(), 'orders.v1.OrderCreated', convert_to(repeat('x', 150), 'UTF8')
    FROM generate_series(1, $1)";
/// Enqueues events that are visible since a time in the past, or from a time in the future, a millisecond apart.
const ENQUEUE_SINCE: &str = "-- bench: enqueue a backlog
    INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, visible_at, created_at, attempts, last_error)
    SELECT bench_uuid_v7(), 1, bench_uuid_v7(), 'orders.v1.OrderCreated', convert_to(repeat('x', 150), 'UTF8'),
        now() + make_interval(secs => $2) + number * interval '1 ms', now() - interval '1 hour', $3, NULL
    FROM generate_series(1, $1) AS number";
/// Also logs the statements of the relay, in this database only.
const PREPARE: &str = "-- bench: prepare outbox
    ALTER TABLE outbox SET (autovacuum_enabled = off);
    DO $$ BEGIN
        EXECUTE format('ALTER ROLE outbox_relay IN DATABASE %I SET log_min_duration_statement = 0', current_database());
    END $$";
/// VACUUM can remove no row that is deleted before this transaction ends.
const HOLD: &str = "-- bench: hold the horizon
    BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM outbox";

/// The contents of an outbox.
#[derive(Clone, Copy, Debug)]
enum State {
    Waiting(i32),
    /// The largest number of waiting events.
    Backlog(i32),
    BackedOff(i32),
    HeldDead(i32),
}

impl State {
    /// The others are compared with the first.
    fn all(site: &Site) -> [Self; 6] {
        let part = site.size(1, 10);
        [
            Self::Waiting(FEW),
            Self::Waiting(10_000 / part),
            Self::Waiting(100_000 / part),
            Self::Backlog(1_000_000 / part),
            Self::BackedOff(100_000 / part),
            Self::HeldDead(400_000 / part),
        ]
    }

    fn name(self) -> String {
        match self {
            Self::Waiting(events) | Self::Backlog(events) => format!("{} waiting", number(events.into())),
            Self::BackedOff(events) => format!("{FEW} waiting, {} backed off", number(events.into())),
            Self::HeldDead(rows) => format!("{FEW} waiting, {} dead tuples held", number(rows.into())),
        }
    }
}

/// A database in a state.
struct Prepared {
    state: State,
    layout: Layout,
    receiver: StubReceiver,
    /// An open transaction.
    _held: Option<PgConnection>,
    delivered: u64,
    rounds: Vec<Latencies>,
}

/// Measures and prints.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let mut states = Vec::new();
    for (number, state) in State::all(site).into_iter().enumerate() {
        println!("bench: 5  preparing an outbox with {}", state.name());
        states.push(prepare(site, state, &format!("lease{number}")).await?);
    }
    site.checkpoint().await?;
    for round in 1..=site.rounds() {
        for prepared in &mut states {
            let leases = measure(site, prepared).await?;
            let [p50, mean, p99] = [leases.at(P50), leases.mean(), leases.at(P99)].map(number);
            let state = prepared.state.name();
            println!("bench: 5  round {round}  {state:<40} p50 {p50:>6} ms  mean {mean:>6} ms  p99 {p99:>6} ms");
            prepared.rounds.push(leases);
        }
    }
    report_figures(&states, report);
    Ok(())
}

async fn prepare(site: &Site, state: State, name: &str) -> Result<Prepared> {
    let layout = site.databases(name).await?;
    let mut outbox = site.connect(&layout.orders).await?;
    for statement in [include_str!("../sql/ids.sql"), PREPARE] {
        sqlx::raw_sql(statement).execute(&mut outbox).await?;
    }
    let mut held = None;
    match state {
        State::Waiting(FEW) => {}
        State::Waiting(events) | State::Backlog(events) => enqueue_since(&mut outbox, events, -1800.0, 0).await?,
        State::BackedOff(events) => enqueue_since(&mut outbox, events, 3600.0, 1).await?,
        State::HeldDead(rows) => {
            let mut holder = site.connect(&layout.orders).await?;
            sqlx::raw_sql(HOLD).execute(&mut holder).await?;
            enqueue_since(&mut outbox, rows, -1800.0, 0).await?;
            sqlx::raw_sql("DELETE FROM outbox").execute(&mut outbox).await?;
            held = Some(holder);
        }
    }
    if matches!(state, State::Waiting(FEW) | State::BackedOff(_) | State::HeldDead(_)) {
        sqlx::query(ENQUEUE).bind(FEW).execute(&mut outbox).await?;
    }
    sqlx::raw_sql("ANALYZE outbox").execute(&mut outbox).await?;
    let receiver = StubReceiver::start(layout.inventory_events, outbox).await?;
    Ok(Prepared { state, layout, receiver, _held: held, delivered: 0, rounds: Vec::new() })
}

async fn enqueue_since(outbox: &mut PgConnection, events: i32, seconds: f64, attempts: i32) -> Result<()> {
    sqlx::query(ENQUEUE_SINCE).bind(events).bind(seconds).bind(attempts).execute(outbox).await?;
    Ok(())
}

async fn measure(site: &Site, prepared: &mut Prepared) -> Result<Latencies> {
    let mut log = StatementLog::follow(&site.server_log())?;
    let mut layout = prepared.layout.clone();
    layout.settings.push(("RELAY_WORKERS".into(), "1".into()));
    layout.settings.push(("RELAY_BATCH".into(), BATCH.to_string()));
    // Otherwise the relay would free the backed-off events: no back-off could have hidden them for so long.
    layout.settings.push(("RELAY_BACK_OFF_MAX_MS".into(), "7200000".into()));
    let relay = layout.start(Service::OrdersRelay).await?;
    // If the leases are too slow for the target, fewer of them are measured.
    let target = prepared.delivered + LEASES + u64::try_from(WARM_UP)?;
    let _ = timeout(TIME_LIMIT, prepared.receiver.wait_for(target)).await;
    prepared.delivered = prepared.receiver.delivered();
    stop([relay]).await?;
    let leases = log.durations(STATEMENT)?;
    let state = prepared.state.name();
    ensure!(
        leases.len() >= WARM_UP + LEASES_AT_LEAST,
        "only {} leases were logged with {state}: check that a statement of the relay still begins with `{STATEMENT}`",
        leases.len()
    );
    Ok(Latencies::of(leases[WARM_UP..].to_vec()))
}

fn report_figures(states: &[Prepared], report: &mut Report) {
    const OF_ROUNDS: [fn(&Latencies) -> f64; 3] = [|leases| leases.at(P50), Latencies::mean, |leases| leases.at(P99)];
    let medians = |prepared: &Prepared| OF_ROUNDS.map(|of| median(&prepared.rounds.iter().map(of).collect::<Vec<_>>()));
    let [few_p50, few_mean, _] = states.first().map_or([f64::NAN; 3], medians);
    let header = ["", "leases", "p50 ms", "mean ms", "p99 ms", "p50 / first row", "mean / first row"];
    let mut table = Table::new(&format!("5. Lease of {BATCH} events"), &header);
    let mut raw = serde_json::Map::new();
    for prepared in states {
        let [p50, mean, p99] = medians(prepared);
        let leases: usize = prepared.rounds.iter().map(|leases| leases.all().len()).sum();
        let times = [p50, mean, p99, p50 / few_p50, mean / few_mean].map(number);
        table.row([prepared.state.name(), leases.to_string()].into_iter().chain(times));
        match prepared.state {
            State::Backlog(_) => report.figure("lease_1m_over_empty", p50 / few_p50),
            State::BackedOff(_) => report.figure("lease_backoff_over_empty", p50 / few_p50),
            State::HeldDead(_) => report.figure("lease_held_over_empty", p50 / few_p50),
            State::Waiting(_) => {}
        }
        let [p50s, means, p99s] = OF_ROUNDS.map(|of| prepared.rounds.iter().map(of).collect::<Vec<_>>());
        let rounds: Vec<_> = prepared.rounds.iter().map(Latencies::all).collect();
        raw.insert(
            prepared.state.name(),
            json!({ "p50_ms": p50s, "mean_ms": means, "p99_ms": p99s, "leases_ms": rounds }),
        );
    }
    table.print();
    report.raw("lease", raw.into());
}
