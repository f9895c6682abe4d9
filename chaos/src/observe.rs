//! What is checked while faults strike: stock, sessions, and memory.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Result;
use sqlx::Connection;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::{site::Part, world::World};
use testkit::processes::resident_bytes;

const INTERVAL: Duration = Duration::from_millis(500);
/// A pause is so many times as long as the checks before it. The ledger grows, and its sum must not take too much of
/// the server's time.
const PAUSE_TIMES: u32 = 8;
const SAMPLE_LIMIT: Duration = Duration::from_secs(5);
/// More resident memory than this is a leak: no process needs nearly as much under load.
const MEMORY_MIB_MAX: u64 = 512;

#[derive(Debug, Default)]
pub(super) struct Observed {
    /// Checks of all stock, each in one snapshot.
    pub(super) balances: u64,
    /// Checks of the sessions of a server.
    pub(super) sessions: u64,
    /// The peak of each process, in MiB.
    pub(super) memory: BTreeMap<&'static str, u64>,
    pub(super) violations: Vec<String>,
}

/// Checks until `stop`. While a database does not answer, its checks are left out.
pub(super) async fn observe(world: Arc<World>, observed: Arc<Mutex<Observed>>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let began = Instant::now();
        measure_memory(&world, &observed);
        for part in [Part::Orders, Part::Inventory] {
            if let Ok(Ok(idle)) = timeout(SAMPLE_LIMIT, find_idle(&world, part)).await {
                let mut observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
                observed.sessions += 1;
                observed.violations.extend(idle);
            }
        }
        if let Ok(Ok(unbalanced)) = timeout(SAMPLE_LIMIT, check_stock(&world)).await {
            let mut observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
            observed.balances += 1;
            observed.violations.extend(unbalanced);
        }
        let pause = INTERVAL.max(PAUSE_TIMES * began.elapsed());
        let _ = timeout(pause, stop.cancelled()).await;
    }
}

/// In one snapshot, the stock of each SKU must be the sum of its movements, and not negative.
async fn check_stock(world: &World) -> Result<Vec<String>> {
    let mut connection = world.site.connect(Part::Inventory).await?;
    let mut tx = connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let rows: Vec<(String, i64, i64)> = sqlx::query_as(
        "-- chaos: check stock
        SELECT sku, coalesce(available, 0), coalesce(moved, 0) FROM stock
        FULL JOIN (SELECT sku, sum(delta)::bigint AS moved FROM stock_ledger GROUP BY sku) AS ledger USING (sku)
        WHERE available IS DISTINCT FROM coalesce(moved, 0) OR available < 0",
    )
    .fetch_all(&mut *tx)
    .await?;
    tx.rollback().await?;
    let unbalanced = rows.into_iter().map(|(sku, available, moved)| {
        format!("the stock of {sku} is {available}, and the sum of its movements is {moved}")
    });
    Ok(unbalanced.collect())
}

/// Finds sessions that idle in a transaction for seconds, although their process runs and is connected. A lost
/// connection is no finding: the server ends its session after a while.
async fn find_idle(world: &World, part: Part) -> Result<Vec<String>> {
    let rows: Vec<(String, f64)> = sqlx::query_as(
        "-- chaos: find idle in transaction
        SELECT application_name, extract(epoch FROM now() - state_change)::double precision FROM pg_stat_activity
        WHERE state LIKE 'idle in transaction%' AND usename <> 'postgres' AND state_change < now() - interval '5 s'",
    )
    .fetch_all(&mut world.site.connect(part).await?)
    .await?;
    Ok(rows
        .into_iter()
        .filter(|(of, _)| !world.is_disturbed(of))
        .map(|(of, seconds)| format!("a session of {of} was idle in transaction for {seconds:.1} s"))
        .collect())
}

fn measure_memory(world: &World, observed: &Mutex<Observed>) {
    for part in Part::ALL {
        let Some(pid) = world.site.unit(part).pid() else { continue };
        let Some(bytes) = resident_bytes(pid.as_raw_nonzero().get().cast_unsigned()) else { continue };
        let mib = bytes / (1 << 20);
        let mut observed = observed.lock().unwrap_or_else(PoisonError::into_inner);
        let most = observed.memory.entry(part.name()).or_default();
        if mib > MEMORY_MIB_MAX && *most <= MEMORY_MIB_MAX {
            *most = mib;
            observed.violations.push(format!("{} uses {mib} MiB of memory", part.name()));
        } else {
            *most = mib.max(*most);
        }
    }
}
