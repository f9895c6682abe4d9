//! Compares what clients were told with what is in the databases at the end.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    sync::PoisonError,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use sqlx::PgConnection;
use tokio::{process::Command, time::sleep};
use uuid::Uuid;

use super::{
    apart::{Waiting, drain_apart},
    history::Known,
    poison::UNHEARD,
    site::Part,
    world::World,
};
use harness::{
    audit::{Points, audit},
    stress::wait_until_delivered,
    system::operate,
};

/// How long the system may take to deliver all events once the faults are undone.
const DELIVERED_LIMIT: Duration = Duration::from_secs(60);
const CONNECT_LIMIT: Duration = Duration::from_secs(60);

/// The findings.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// Acknowledged, but without effect.
    pub(super) lost: Vec<String>,
    /// Applied twice, or placed twice.
    pub(super) doubled: Vec<String>,
    pub(super) others: Vec<String>,
    /// How long it took from the end of the load until all events were delivered, if they were.
    pub(super) drained: Duration,
    /// Events for loyalty-service that waited while all others were delivered.
    pub(super) waited: i64,
    /// How the orders are known to loyalty-service, if that was compared.
    pub(super) points: Option<Points>,
    /// How often each process began to use renewed certificates.
    pub(super) renewed: Vec<(&'static str, usize)>,
}

impl Verdict {
    pub(super) fn violations(&self) -> usize {
        self.lost.len() + self.doubled.len() + self.others.len()
    }

    /// Sorts a finding by its first word, also those of the audit. In the audit, WRONG stock was taken twice, or too
    /// much of it.
    fn add(&mut self, finding: String) {
        match finding.split(':').next() {
            Some("LOST") => self.lost.push(finding),
            Some("DOUBLED" | "WRONG") => self.doubled.push(finding),
            _ => self.others.push(finding),
        }
    }
}

/// Checks a system without faults and load, and adds what it finds.
///
/// # Errors
/// If something cannot be read. Earlier findings stay.
pub(super) async fn check(world: &World, verdict: &mut Verdict) -> Result<()> {
    let mut orders = connect_patiently(world, Part::Orders).await?;
    let mut inventory = connect_patiently(world, Part::Inventory).await?;
    let began = Instant::now();
    check_apart(world, &mut orders, &mut inventory, verdict).await?;
    check_unheard(&mut orders, verdict).await?;
    give_up_unheard(&mut orders, verdict).await?;
    match wait_until_delivered(&world.target.databases, DELIVERED_LIMIT).await {
        Ok(_) => verdict.drained = began.elapsed(),
        Err(error) => verdict.others.push(format!("after all faults were undone: {error:#}")),
    }
    for connection in [&mut orders, &mut inventory] {
        check_breaches(connection, verdict).await?;
    }
    check_dead(world, &mut orders, &mut inventory, verdict).await?;
    check_known(world, &mut orders, verdict).await?;
    check_adjusted(world, &mut inventory, verdict).await?;
    check_sequence(&mut inventory, verdict).await?;
    restore_inbox(world, &mut inventory).await?;
    let audit = audit(&world.target.databases).await?;
    verdict.points = audit.points;
    audit.findings.into_iter().for_each(|finding| verdict.add(finding));
    check_files(world, verdict).await
}

async fn check_apart(
    world: &World,
    orders: &mut PgConnection,
    inventory: &mut PgConnection,
    verdict: &mut Verdict,
) -> Result<()> {
    let Waiting { for_it, for_others } = drain_apart(world, orders, inventory, DELIVERED_LIMIT).await?;
    verdict.waited = for_it;
    if for_others > 0 {
        let what = format!("{for_others} events for others were not delivered while loyalty-service was away");
        verdict.others.push(what);
    }
    Ok(())
}

/// Waits until a database answers, which may have crashed a moment ago.
async fn connect_patiently(world: &World, part: Part) -> Result<PgConnection> {
    let began = Instant::now();
    loop {
        match world.site.connect(part).await {
            Err(_) if began.elapsed() < CONNECT_LIMIT => sleep(Duration::from_millis(100)).await,
            connected => return connected,
        }
    }
}

async fn check_breaches(connection: &mut PgConnection, verdict: &mut Verdict) -> Result<()> {
    let rows: Vec<(String, String, i64)> = sqlx::query_as(
        "-- chaos: read breaches
        SELECT breach, session, count(*) FROM chaos_breaches GROUP BY 1, 2",
    )
    .fetch_all(connection)
    .await?;
    verdict.others.extend(rows.into_iter().map(|(breach, by, events)| format!("{events} events {breach}, by {by}")));
    Ok(())
}

/// Events of a type that the receiver does not list wait with that reason, and none is dead.
async fn check_unheard(orders: &mut PgConnection, verdict: &mut Verdict) -> Result<()> {
    let began = Instant::now();
    loop {
        let (waiting, dead): (i64, i64) = sqlx::query_as(
            "-- chaos: count unheard
            SELECT count(*) FILTER (WHERE coalesce(last_error, '') NOT LIKE 'UNKNOWN_TYPE:%'),
                count(*) FILTER (WHERE visible_at = 'infinity')
            FROM outbox WHERE event_type = $1",
        )
        .bind(UNHEARD)
        .fetch_one(&mut *orders)
        .await?;
        if dead > 0 {
            verdict.others.push(format!("{dead} events are dead whose type the receiver did not know"));
        }
        if waiting == 0 {
            return Ok(());
        }
        if began.elapsed() > DELIVERED_LIMIT {
            verdict.others.push(format!("{waiting} events of an unknown type do not say that they wait for it"));
            return Ok(());
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Then they are given up, so that they are among the dead poison events below. A relay may have leased one again, and
/// its lease is not taken away: the trigger that watches the leases would take that for a breach.
async fn give_up_unheard(orders: &mut PgConnection, verdict: &mut Verdict) -> Result<()> {
    let began = Instant::now();
    loop {
        sqlx::query(
            "-- chaos: give up unheard
            UPDATE outbox SET visible_at = 'infinity', last_error = coalesce(last_error, 'never leased')
            WHERE event_type = $1 AND lease_token IS NULL",
        )
        .bind(UNHEARD)
        .execute(&mut *orders)
        .await?;
        let leased: i64 = sqlx::query_scalar(
            "-- chaos: count unheard that are leased
            SELECT count(*) FROM outbox WHERE event_type = $1 AND visible_at < 'infinity'",
        )
        .bind(UNHEARD)
        .fetch_one(&mut *orders)
        .await?;
        if leased == 0 {
            return Ok(());
        }
        if began.elapsed() > DELIVERED_LIMIT {
            verdict.others.push(format!("{leased} events of an unknown type stay leased"));
            return Ok(());
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// Exactly the poison events are dead, each for the receivers that cannot apply it. They are then discarded, as an operator
/// would, so that the audit does not report them.
async fn check_dead(
    world: &World,
    orders: &mut PgConnection,
    inventory: &mut PgConnection,
    verdict: &mut Verdict,
) -> Result<()> {
    let poisoned = world.poisoned.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut dead = BTreeSet::new();
    for (part, connection) in [(Part::Orders, orders), (Part::Inventory, inventory)] {
        let rows: Vec<(Uuid, Uuid, String, String)> = sqlx::query_as(
            "-- chaos: read dead
            SELECT aggregate_id, event_id, name, last_error FROM outbox JOIN outbox_subscriptions USING (subscription_id)
            WHERE visible_at = 'infinity'",
        )
        .fetch_all(connection)
        .await?;
        for (aggregate, event_id, subscription, reason) in rows {
            let poison = poisoned.iter().find(|(of, receiver)| *of == aggregate && receiver.database() == subscription);
            if poison.is_some() {
                discard(world, part, event_id, &subscription).await?;
            } else {
                verdict.others.push(format!(
                    "event {event_id} of {aggregate} for {subscription} is dead, and was no poison: {reason}"
                ));
            }
            dead.extend(poison);
        }
    }
    let alive = poisoned.difference(&dead);
    verdict.others.extend(
        alive.map(|(aggregate, receiver)| {
            format!("the poison event of {aggregate} for {} is not dead", receiver.name())
        }),
    );
    Ok(())
}

async fn discard(world: &World, part: Part, event_id: Uuid, subscription: &str) -> Result<()> {
    let event_id = event_id.to_string();
    let arguments = ["dead", "discard", &event_id, "--subscription", subscription];
    let reason = ["--by", "chaos", "--reason", "poison of this run"];
    operate(&world.site.relay_url(part), &[&arguments[..], &reason].concat()).await.map(drop)
}

/// The orders as they are in the database: by id, the request that has placed it, and its status.
type Placed = HashMap<Uuid, (Option<Uuid>, String)>;

/// The database holds everything that was acknowledged to a client.
async fn check_known(world: &World, orders: &mut PgConnection, verdict: &mut Verdict) -> Result<()> {
    let rows: Vec<(Uuid, Option<Uuid>, String)> = sqlx::query_as(
        "-- chaos: read orders
        SELECT order_id, request_id, status FROM orders",
    )
    .fetch_all(&mut *orders)
    .await?;
    let placed = rows.into_iter().map(|(order_id, request_id, status)| (order_id, (request_id, status))).collect();
    let known = world.history.known();
    check_requests(&placed, verdict);
    check_acknowledged(&placed, &known, verdict);
    check_statuses(&placed, &known, verdict);
    Ok(())
}

fn check_requests(placed: &Placed, verdict: &mut Verdict) {
    let mut orders_of: HashMap<Uuid, u32> = HashMap::new();
    for request in placed.values().filter_map(|(request, _)| *request) {
        *orders_of.entry(request).or_default() += 1;
    }
    let twice = orders_of.into_iter().filter(|(_, orders)| *orders > 1);
    verdict
        .doubled
        .extend(twice.map(|(request, orders)| format!("DOUBLED: request {request} has placed {orders} orders")));
}

fn check_acknowledged(placed: &Placed, known: &Known, verdict: &mut Verdict) {
    for (request, order_ids) in &known.acknowledged {
        if order_ids.len() > 1 {
            verdict.doubled.push(format!("DOUBLED: request {request} was answered with the orders {order_ids:?}"));
        }
        for order_id in order_ids {
            match placed.get(order_id) {
                None => verdict.lost.push(format!("LOST: order {order_id} was acknowledged, and does not exist")),
                Some((of, _)) if *of != Some(*request) => {
                    verdict
                        .others
                        .push(format!("order {order_id} was acknowledged to request {request}, and belongs to {of:?}"));
                }
                Some(_) => {}
            }
        }
    }
}

fn check_statuses(placed: &Placed, known: &Known, verdict: &mut Verdict) {
    let status_of = |order_id: &Uuid| placed.get(order_id).map_or("MISSING", |(_, status)| status.as_str());
    for order_id in known.cancelled.iter().filter(|order_id| status_of(order_id) != "CANCELLED") {
        let status = status_of(order_id);
        verdict.lost.push(format!("LOST: the cancellation of order {order_id} was acknowledged, and it is {status}"));
    }
    for order_id in known.refused.iter().filter(|order_id| status_of(order_id) != "REJECTED") {
        let status = status_of(order_id);
        verdict.others.push(format!("the cancellation of order {order_id} was refused, and it is {status}"));
    }
    for (order_id, seen) in &known.settled {
        let (seen, is) = (seen.as_str_name().trim_start_matches("ORDER_STATUS_"), status_of(order_id));
        if is != seen && (seen, is) != ("CONFIRMED", "CANCELLED") {
            verdict.others.push(format!("order {order_id} was shown to be {seen}, and is {is}"));
        }
    }
}

/// Puts the events back into the inbox that a fault made it prune. The audit expects all applied events there.
async fn restore_inbox(world: &World, inventory: &mut PgConnection) -> Result<()> {
    let forgotten = world.forgotten.lock().unwrap_or_else(PoisonError::into_inner).clone();
    sqlx::query(
        "-- chaos: restore inbox
        INSERT INTO processed_messages (message_id) SELECT DISTINCT id FROM unnest($1::uuid[]) AS id
        ON CONFLICT (message_id) DO UPDATE SET processed_at = now()",
    )
    .bind(forgotten)
    .execute(inventory)
    .await?;
    Ok(())
}

async fn check_adjusted(world: &World, inventory: &mut PgConnection, verdict: &mut Verdict) -> Result<()> {
    let adjusted = world.history.known().adjusted.clone();
    let missing: Vec<Uuid> = sqlx::query_scalar(
        "-- chaos: find lost adjustments
        SELECT request FROM unnest($1::uuid[]) AS request
        WHERE (SELECT sum(delta) FROM stock_ledger WHERE reference = request AND kind = 'ADJUSTMENT')
            IS DISTINCT FROM 1",
    )
    .bind(adjusted)
    .fetch_all(inventory)
    .await?;
    verdict
        .lost
        .extend(missing.into_iter().map(|id| format!("LOST: adjustment {id} was acknowledged, and has not added 1")));
    Ok(())
}

/// No event was discarded before this, so a cancellation that was applied before its order was delivered out of
/// sequence.
async fn check_sequence(inventory: &mut PgConnection, verdict: &mut Verdict) -> Result<()> {
    let rows: Vec<Uuid> = sqlx::query_scalar(
        "-- chaos: find out of sequence
        SELECT order_id FROM reservations WHERE event_id IS NULL",
    )
    .fetch_all(inventory)
    .await?;
    verdict
        .others
        .extend(rows.into_iter().map(|id| format!("order {id} was cancelled at inventory before it was placed")));
    Ok(())
}

/// Has PostgreSQL verify its tables and indexes.
async fn check_files(world: &World, verdict: &mut Verdict) -> Result<()> {
    for part in Part::SERVICES {
        let mut command = Command::new(world.site.installation.client("pg_amcheck"));
        command.args(["--install-missing", &world.site.superuser_url(part)]);
        let output = command.kill_on_drop(true).output().await.context("cannot run pg_amcheck")?;
        if !output.status.success() {
            let said = [output.stdout, output.stderr].concat();
            verdict.others.push(format!("pg_amcheck of {}: {}", part.name(), String::from_utf8_lossy(&said).trim()));
        }
    }
    Ok(())
}

/// Adds answers that were wrong in themselves, panics, and processes that ended unexpectedly.
pub(super) fn check_processes(world: &World, verdict: &mut Verdict) -> Result<()> {
    std::mem::take(&mut world.history.known().violations).into_iter().for_each(|violation| verdict.add(violation));
    for part in Part::ALL {
        let unit = world.site.unit(part);
        let log = fs::read_to_string(&unit.plan().log)?;
        verdict
            .renewed
            .push((part.name(), log.matches("the files of the certificates have changed, and count").count()));
        let panics = log.lines().filter(|line| line.contains("panicked"));
        verdict.others.extend(panics.map(|line| format!("a panic of {}: {line}", part.name())));
        verdict.others.extend(unit.unexpected().into_iter().map(|end| format!("{} {end}", part.name())));
    }
    Ok(())
}
