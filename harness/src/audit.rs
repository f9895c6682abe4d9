//! The subcommand `audit`: compares the databases and names every row that is wrong.
//!
//! No snapshot spans two databases, and yet the audit is exact while the system runs, because of the order in which it
//! reads. Inventory commits an effect before the relay deletes the outbox row, so an order without a row in the first
//! snapshot has its effect in the later one. An effect whose order is not in the first snapshot is looked up again at the
//! end. If the two sides disagree about an order's status, an event may be on its way between them. So these orders are read
//! again, and only a disagreement that lasts is a finding.
//!
//! Each subscriber has rows of its own in the outbox. So the audit asks of each subscriber what is on its way to it, and a
//! row for one never excuses another.

mod again;
mod points;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tokio::time::sleep;
use uuid::Uuid;

pub use self::points::Points;
use crate::target::Databases;
use chassis::TlsSettings;

/// How many findings are printed; the rest is counted.
const FINDINGS_SHOWN: usize = 50;
/// How often the orders are read again on whose status the databases disagree.
const RECHECKS: u32 = 10;
const RECHECK_PAUSE: Duration = Duration::from_millis(200);
/// The subscriptions of the orders' events, and that of inventory's replies.
const INVENTORY: &str = "inventory";
const LOYALTY: &str = "loyalty";
const ORDERS: &str = "orders";

/// Check that nothing was lost and nothing applied twice
///
/// Compares the databases. Every committed order must have exactly one effect or still be in the outbox, and every effect an
/// order. Each order must have taken its items once, and returned them if it was cancelled. For every SKU, opening stock +
/// adjustments − reserved + released must equal the current stock, which must not be negative. Every order's status must
/// agree with its reservation. No order may be PENDING with no event on its way.
///
/// If loyalty has a subscription, its database is compared too. Every order placed since then must have earned its points
/// once, or still be in the outbox for loyalty. Points must belong to an order, and count unless it was cancelled.
///
/// May run while the system runs. Exits with 1 and names the rows if anything is wrong.
///
/// With --every it audits again and again until Ctrl-C, serves the metric outbox_audit_violations, and exits with 0. Each audit
/// reads all orders, so leave it time.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    #[command(flatten)]
    databases: Databases,
    /// Audit again so many seconds after the last audit began
    #[arg(long, value_name = "SECONDS", requires = "ops_listen", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    every: Option<u64>,
    /// With --every: serve /metrics on this address
    #[arg(long, value_name = "ADDRESS", requires = "every")]
    ops_listen: Option<SocketAddr>,
    #[command(flatten)]
    tls: TlsSettings,
}

/// The result of an audit.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    /// Orders committed.
    pub orders: usize,
    /// Orders whose items are all reserved.
    pub reserved: usize,
    /// Orders that were rejected.
    pub rejected: usize,
    /// Orders that were cancelled and have returned their stock, if they had any.
    pub released: usize,
    /// Orders whose event is in the outbox, perhaps dead, and has had no effect yet.
    pub on_their_way: usize,
    /// Orders whose event an operator has discarded.
    pub discarded: usize,
    /// Orders that stay PENDING because an operator has discarded an event of theirs.
    pub stranded: usize,
    /// Dead events in both outboxes, which wait for an operator.
    pub dead: usize,
    /// SKUs whose stock was checked.
    pub skus: usize,
    /// What loyalty has, if it has a subscription.
    pub points: Option<Points>,
    /// One sentence for each row that is wrong. If empty, the audit is clean.
    pub findings: Vec<String>,
}

impl Audit {
    /// The audit as text; the last line is the verdict.
    pub fn lines(&self) -> Vec<String> {
        let Self { orders, reserved, rejected, released, on_their_way, discarded, stranded, dead, skus, .. } = self;
        let mut lines = vec![format!(
            "{orders} orders = {reserved} reserved + {rejected} rejected + {released} cancelled + {on_their_way} on \
             their way + {discarded} discarded; {dead} dead events; {skus} SKUs"
        )];
        if *stranded > 0 {
            lines.push(format!("{stranded} orders stay PENDING because an event of theirs was discarded"));
        }
        lines.extend(self.points.as_ref().map(Points::line));
        lines.extend(self.findings.iter().take(FINDINGS_SHOWN).map(|finding| format!("FOUND {finding}")));
        let findings = self.findings.len();
        if findings > FINDINGS_SHOWN {
            lines.push(format!("… and {} more", findings - FINDINGS_SHOWN));
        }
        lines.push(match findings {
            0 => "clean: nothing lost, nothing applied twice, all stock balanced".into(),
            _ => format!("NOT CLEAN: {findings} findings"),
        });
        lines
    }

    /// Prints the lines on stdout.
    pub fn print(&self) {
        for line in self.lines() {
            println!("audit: {line}");
        }
    }
}

/// Runs the subcommand.
pub async fn run(arguments: Arguments) -> Result<ExitCode> {
    if let (Some(every), Some(address)) = (arguments.every, arguments.ops_listen) {
        return again::run(&arguments.databases, Duration::from_secs(every), address, &arguments.tls).await;
    }
    let audit = audit(&arguments.databases).await?;
    audit.print();
    Ok(if audit.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Audits the databases. That of loyalty is opened only if loyalty has a subscription.
///
/// # Errors
/// If one cannot be read. Rows that are wrong are [`Audit::findings`], not errors.
pub async fn audit(databases: &Databases) -> Result<Audit> {
    let (mut orders_database, mut inventory_database) = (databases.orders().await?, databases.inventory().await?);
    let mut audit = Audit::default();
    let ordered = read_ordered(&mut orders_database, None).await?;
    check_inventory(&mut inventory_database, &mut audit).await?;
    let done = read_done(&mut inventory_database, None, &mut audit.findings).await?;

    audit.orders = ordered.orders.len();
    audit.dead = ordered.dead + done.dead;
    let disagreeing = compare(&ordered, &done, &mut audit);
    let of_no_order = ordered.waiting.iter().filter(|order_id| !ordered.orders.contains_key(order_id));
    audit
        .findings
        .extend(of_no_order.map(|order_id| format!("PHANTOM: events of order {order_id}, which does not exist")));
    let look_again = async |order_ids: &[Uuid]| {
        let ordered = read_ordered(&mut orders_database, Some(order_ids)).await?;
        let done = read_done(&mut inventory_database, Some(order_ids), &mut Vec::new()).await?;
        Ok(order_ids.iter().filter_map(|id| Some((*id, disagreement(*id, &ordered, &done)?))).collect())
    };
    audit.findings.extend(find_lasting(disagreeing, look_again).await?);
    let unmatched: Vec<Uuid> =
        done.effects.keys().filter(|order_id| !ordered.orders.contains_key(order_id)).copied().collect();
    for order_id in find_missing(&mut orders_database, &unmatched).await? {
        audit.findings.push(format!("PHANTOM: order {order_id} has an effect and was never committed"));
    }
    if ordered.has_loyalty {
        points::check(&mut orders_database, &mut databases.loyalty().await?, &ordered, &mut audit).await?;
    }
    audit.findings.sort_unstable();
    Ok(audit)
}

/// Compares every order with its effect. Returns the orders on whose status the two sides disagree.
fn compare(ordered: &Ordered, done: &Done, audit: &mut Audit) -> Vec<Uuid> {
    let mut disagreeing = Vec::new();
    for (order_id, order) in &ordered.orders {
        let queue = &ordered.for_inventory;
        let (waits, discarded) =
            (queue.waiting.creations.contains(order_id), queue.discarded.creations.contains(order_id));
        match done.effects.get(order_id) {
            // A cancellation alone does not count as the effect of an order, unless its creation was discarded.
            Some(effect) if effect.asked || waits || discarded => {
                check_effect(*order_id, &order.demand, effect, audit);
            }
            None if waits => audit.on_their_way += 1,
            None if discarded => audit.discarded += 1,
            _ => {
                audit.findings.push(format!("LOST: order {order_id} has no effect and no event on its way"));
                continue;
            }
        }
        if disagreement(*order_id, ordered, done).is_some() {
            disagreeing.push(*order_id);
        }
        audit.stranded += usize::from(order.status == "PENDING" && is_stranded(*order_id, ordered, done));
    }
    disagreeing
}

/// Items that an order asks for or has taken, as `sku=quantity`, sorted by SKU.
type Quantities = String;

/// One snapshot of the orders database.
struct Ordered {
    orders: HashMap<Uuid, Order>,
    /// Orders with an event in the outbox, for whomever it is.
    waiting: HashSet<Uuid>,
    for_inventory: Queue,
    for_loyalty: Queue,
    has_loyalty: bool,
    dead: usize,
}

/// The events of one subscription: those in the outbox, dead ones too, and those that were discarded.
struct Queue {
    waiting: Events,
    discarded: Events,
}

impl Queue {
    fn holds(&self, order_id: Uuid) -> bool {
        self.waiting.any.contains(&order_id) || self.discarded.any.contains(&order_id)
    }
}

/// The orders that some events are about.
#[derive(Default)]
struct Events {
    any: HashSet<Uuid>,
    /// Orders whose first event is among these.
    creations: HashSet<Uuid>,
    /// Orders whose second event is among these: it tells of their cancellation.
    cancellations: HashSet<Uuid>,
}

impl Events {
    /// The events that are for this subscription, or for none yet: it may still get those.
    fn of(subscription: &str, rows: &[EventRow]) -> Self {
        let is_for = |row: &&EventRow| row.subscription.as_ref().is_none_or(|name| name == subscription);
        let mut events = Self::default();
        for row in rows.iter().filter(is_for) {
            events.any.insert(row.order_id);
            match row.sequence {
                1 => events.creations.insert(row.order_id),
                2 => events.cancellations.insert(row.order_id),
                _ => false,
            };
        }
        events
    }
}

/// A row of the outbox or of the discarded events.
struct EventRow {
    order_id: Uuid,
    sequence: i32,
    dead: bool,
    subscription: Option<String>,
}

/// All events of one snapshot.
struct Outbox {
    waiting: Vec<EventRow>,
    discarded: Vec<EventRow>,
}

impl Outbox {
    fn queue(&self, subscription: &str) -> Queue {
        let [waiting, discarded] = [&self.waiting, &self.discarded].map(|rows| Events::of(subscription, rows));
        Queue { waiting, discarded }
    }

    fn count_dead(&self) -> usize {
        self.waiting.iter().filter(|row| row.dead).count()
    }
}

struct Order {
    status: String,
    customer_id: String,
    total_minor: i64,
    demand: Quantities,
    /// Whether loyalty must know of it: its subscription was there when the order was placed.
    is_for_loyalty: bool,
}

/// One snapshot of the inventory database.
struct Done {
    effects: HashMap<Uuid, Effect>,
    replies: Queue,
    dead: usize,
}

struct Effect {
    status: String,
    /// Whether the order's first event was applied. If not, only its cancellation was.
    asked: bool,
    cancelled: bool,
    taken: Quantities,
    returned: Quantities,
}

fn check_effect(order_id: Uuid, demand: &Quantities, effect: &Effect, audit: &mut Audit) {
    let Effect { status, asked, cancelled, taken, returned } = effect;
    let nothing = &Quantities::new();
    let (count, should_have_taken, should_have_returned) = match status.as_str() {
        "RESERVED" => (&mut audit.reserved, demand, nothing),
        "RELEASED" if *asked => (&mut audit.released, demand, demand),
        "RELEASED" => (&mut audit.released, nothing, nothing),
        _ => (&mut audit.rejected, nothing, nothing),
    };
    if status == "RESERVED" && *cancelled {
        audit.findings.push(format!("WRONG: order {order_id} was cancelled and still has \"{taken}\""));
    } else if (taken, returned) == (should_have_taken, should_have_returned) {
        *count += 1;
    } else {
        audit.findings.push(format!(
            "WRONG: order {order_id} asks for \"{demand}\" and is {status}; it has taken \"{taken}\" and returned \"{returned}\""
        ));
    }
}

/// Whether only events that were discarded could still change the order's status.
fn is_stranded(order_id: Uuid, ordered: &Ordered, done: &Done) -> bool {
    let queues = [&ordered.for_inventory, &done.replies];
    queues.iter().any(|queue| queue.discarded.any.contains(&order_id))
        && !queues.iter().any(|queue| queue.waiting.any.contains(&order_id))
}

/// How the two sides disagree about an order; none if they agree.
fn disagreement(order_id: Uuid, ordered: &Ordered, done: &Done) -> Option<String> {
    let order = ordered.orders.get(&order_id)?;
    let effect = done.effects.get(&order_id);
    let cancelled = effect.is_some_and(|effect| effect.cancelled);
    let effect = effect.map(|effect| effect.status.as_str());
    let (told, answered) = (ordered.for_inventory.holds(order_id), done.replies.holds(order_id));
    let agree = match (order.status.as_str(), effect) {
        ("PENDING", None) => told,
        ("PENDING", Some(_)) => answered,
        ("CONFIRMED", Some("RESERVED")) | ("REJECTED", Some("REJECTED")) => true,
        // An operator has rejected the order, and discarded its event. If inventory had applied that nevertheless, the
        // order is cancelled there as soon as its reply comes.
        ("REJECTED", None) => told,
        ("REJECTED", Some("RESERVED")) => answered || ordered.for_inventory.waiting.cancellations.contains(&order_id),
        ("REJECTED", Some("RELEASED")) => cancelled,
        ("CANCELLED", _) => cancelled || told,
        _ => false,
    };
    let status = &order.status;
    let effect = effect.unwrap_or("unknown");
    let on_its_way = if told || answered { "" } else { ", with nothing on its way" };
    (!agree).then(|| format!("DISAGREE: order {order_id} is {status}, and its reservation {effect}{on_its_way}"))
}

/// Looks at these orders again until nothing is wrong with any of them, or a last time. Returns what is still wrong.
async fn find_lasting(
    mut order_ids: Vec<Uuid>,
    mut look_again: impl AsyncFnMut(&[Uuid]) -> Result<HashMap<Uuid, String>>,
) -> Result<Vec<String>> {
    let mut wrong = HashMap::new();
    for _ in 0..RECHECKS {
        if order_ids.is_empty() {
            break;
        }
        sleep(RECHECK_PAUSE).await;
        wrong = look_again(&order_ids).await?;
        order_ids.retain(|order_id| wrong.contains_key(order_id));
    }
    Ok(wrong.into_values().collect())
}

/// Orders with their items, and their outbox: all orders, or those with these ids. If only the items of an order exist, its
/// status is MISSING, which agrees with nothing.
///
/// A transaction may have begun before loyalty's subscription was there, and not have seen it. None lasts longer than the
/// services let it. So only what was placed some seconds later must have an event for loyalty.
async fn read_ordered(connection: &mut PgConnection, only: Option<&[Uuid]>) -> Result<Ordered> {
    let mut tx = begin_snapshot(connection).await?;
    let orders = sqlx::query!(
        r#"-- audit: orders
        SELECT order_id AS "order_id!", coalesce(status, 'MISSING') AS "status!",
            coalesce(customer_id, '') AS "customer_id!", coalesce(total_minor, 0) AS "total_minor!",
            coalesce(string_agg(sku || '=' || quantity, ' ' ORDER BY sku), '') AS "demand!",
            coalesce(created_at >= (
                SELECT subscription.created_at + interval '5 seconds' FROM outbox_subscriptions AS subscription
                WHERE name = $2 AND ended_at IS NULL), false) AS "is_for_loyalty!"
        FROM orders
        FULL JOIN (
            SELECT order_id, sku, sum(quantity) AS quantity FROM order_items
            WHERE $1::uuid[] IS NULL OR order_id = ANY ($1)
            GROUP BY order_id, sku
        ) AS demand USING (order_id)
        WHERE $1::uuid[] IS NULL OR order_id = ANY ($1)
        GROUP BY order_id, status, customer_id, total_minor, created_at"#,
        only as Option<&[Uuid]>,
        LOYALTY,
    )
    .fetch_all(&mut *tx)
    .await?;
    let orders = orders.into_iter().map(|row| {
        let (status, customer_id, total_minor, demand) = (row.status, row.customer_id, row.total_minor, row.demand);
        (row.order_id, Order { status, customer_id, total_minor, demand, is_for_loyalty: row.is_for_loyalty })
    });
    let orders = orders.collect();
    let outbox = read_outbox(&mut tx).await?;
    Ok(Ordered {
        orders,
        waiting: outbox.waiting.iter().map(|row| row.order_id).collect(),
        for_inventory: outbox.queue(INVENTORY),
        for_loyalty: outbox.queue(LOYALTY),
        has_loyalty: has_loyalty(&mut tx).await?,
        dead: outbox.count_dead(),
    })
}

async fn has_loyalty(tx: &mut Transaction<'_, Postgres>) -> Result<bool> {
    let has_loyalty = sqlx::query_scalar!(
        r#"-- audit: look for loyalty's subscription
        SELECT EXISTS (SELECT FROM outbox_subscriptions WHERE name = $1 AND ended_at IS NULL) AS "has_loyalty!""#,
        LOYALTY,
    )
    .fetch_one(&mut **tx)
    .await?;
    Ok(has_loyalty)
}

/// Effects, and the replies in inventory's outbox: of all orders, or of those with these ids.
async fn read_done(connection: &mut PgConnection, only: Option<&[Uuid]>, findings: &mut Vec<String>) -> Result<Done> {
    let mut tx = begin_snapshot(connection).await?;
    let rows = sqlx::query!(
        r#"-- audit: effects
        SELECT coalesce(order_id, reference) AS "order_id!", status AS "status?", event_id IS NOT NULL AS "asked!",
            cancelled_by IS NOT NULL AS "cancelled!",
            coalesce(string_agg(sku || '=' || -delta, ' ' ORDER BY sku) FILTER (WHERE kind = 'RESERVATION'), '') AS "taken!",
            coalesce(string_agg(sku || '=' || delta, ' ' ORDER BY sku) FILTER (WHERE kind = 'RELEASE'), '') AS "returned!"
        FROM reservations
        FULL JOIN (SELECT * FROM stock_ledger WHERE kind IN ('RESERVATION', 'RELEASE')) AS movement
            ON reference = order_id
        WHERE $1::uuid[] IS NULL OR order_id = ANY ($1)
        GROUP BY 1, 2, 3, 4"#,
        only as Option<&[Uuid]>,
    )
    .fetch_all(&mut *tx)
    .await?;
    let mut effects = HashMap::with_capacity(rows.len());
    for row in rows {
        let Some(status) = row.status else {
            findings.push(format!("WRONG: order {} took \"{}\" without a reservation", row.order_id, row.taken));
            continue;
        };
        let (asked, cancelled) = (row.asked, row.cancelled);
        effects.insert(row.order_id, Effect { status, asked, cancelled, taken: row.taken, returned: row.returned });
    }
    let outbox = read_outbox(&mut tx).await?;
    Ok(Done { effects, replies: outbox.queue(ORDERS), dead: outbox.count_dead() })
}

/// The events in the outbox and the discarded ones, each with the name of its subscription, even of one that has ended.
async fn read_outbox(tx: &mut Transaction<'_, Postgres>) -> Result<Outbox> {
    let waiting = sqlx::query_as!(
        EventRow,
        r#"-- audit: outbox
        SELECT aggregate_id AS order_id, sequence, visible_at = 'infinity' AS "dead!", name AS "subscription?"
        FROM outbox LEFT JOIN outbox_subscriptions USING (subscription_id)"#
    )
    .fetch_all(&mut **tx)
    .await?;
    let discarded = sqlx::query_as!(
        EventRow,
        r#"-- audit: discarded
        SELECT aggregate_id AS order_id, sequence, false AS "dead!", name AS "subscription?"
        FROM outbox_discarded LEFT JOIN outbox_subscriptions USING (subscription_id)"#
    )
    .fetch_all(&mut **tx)
    .await?;
    Ok(Outbox { waiting, discarded })
}

/// Checks of the inventory database alone, in one snapshot.
async fn check_inventory(connection: &mut PgConnection, audit: &mut Audit) -> Result<()> {
    let mut tx = begin_snapshot(connection).await?;
    check_stock(&mut tx, audit).await?;
    check_inbox(&mut tx, audit).await
}

async fn check_stock(tx: &mut Transaction<'_, Postgres>, audit: &mut Audit) -> Result<()> {
    let rows = sqlx::query!(
        r#"-- audit: stock
        SELECT sku AS "sku!", coalesce(available, -1) AS "available!",
            coalesce(sum(delta) FILTER (WHERE kind = 'OPENING'), 0)::bigint AS "opening!",
            coalesce(sum(delta) FILTER (WHERE kind = 'ADJUSTMENT'), 0)::bigint AS "adjusted!",
            coalesce(-sum(delta) FILTER (WHERE kind = 'RESERVATION'), 0)::bigint AS "reserved!",
            coalesce(sum(delta) FILTER (WHERE kind = 'RELEASE'), 0)::bigint AS "released!"
        FROM stock FULL JOIN stock_ledger USING (sku)
        GROUP BY sku, available"#
    )
    .fetch_all(&mut **tx)
    .await?;
    audit.skus = rows.len();
    for row in rows {
        let (sku, available, opening, adjusted) = (row.sku, row.available, row.opening, row.adjusted);
        let (reserved, released) = (row.reserved, row.released);
        if available != opening + adjusted - reserved + released || available < 0 {
            audit.findings.push(format!(
                "UNBALANCED: {sku} has {available}, which is not opening {opening} + adjusted {adjusted} − reserved {reserved} + \
                 released {released}"
            ));
        }
    }
    Ok(())
}

/// An effect and its inbox row are written by one transaction, so each needs the other, until the inbox deletes its row. It
/// deletes none before two hours (the shortest retention and its margin), and the oldest first. So every effect younger than
/// the oldest row left must have a row.
async fn check_inbox(tx: &mut Transaction<'_, Postgres>, audit: &mut Audit) -> Result<()> {
    let rows = sqlx::query!(
        r#"-- audit: inbox
        WITH effect AS (
            SELECT order_id, event_id, created_at AS at FROM reservations WHERE event_id IS NOT NULL
            UNION ALL
            SELECT order_id, cancelled_by, cancelled_at FROM reservations WHERE cancelled_by IS NOT NULL
        )
        SELECT order_id AS "order_id?", coalesce(event_id, message_id) AS "event_id!"
        FROM effect FULL JOIN processed_messages ON message_id = event_id
        WHERE event_id IS NULL
            OR message_id IS NULL
                AND (at > (SELECT min(processed_at) FROM processed_messages) OR at > now() - interval '2 hours')"#
    )
    .fetch_all(&mut **tx)
    .await?;
    audit.findings.extend(rows.into_iter().map(|row| match row.order_id {
        Some(order_id) => {
            format!("WRONG: order {order_id} has an effect of event {}, which the inbox lacks", row.event_id)
        }
        None => format!("WRONG: event {} is in the inbox and has no effect", row.event_id),
    }));
    Ok(())
}

/// The ids of which there is no order now.
async fn find_missing(connection: &mut PgConnection, order_ids: &[Uuid]) -> Result<Vec<Uuid>> {
    let missing = sqlx::query_scalar!(
        r#"-- audit: find missing orders
        SELECT id AS "id!" FROM unnest($1::uuid[]) AS id WHERE NOT EXISTS (SELECT FROM orders WHERE order_id = id)"#,
        order_ids
    )
    .fetch_all(connection)
    .await?;
    Ok(missing)
}

async fn begin_snapshot(connection: &mut PgConnection) -> Result<Transaction<'_, Postgres>> {
    Ok(connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY").await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_counts_for_the_subscriber_whose_row_it_is_and_one_without_a_subscription_for_all() {
        let row = |sequence, subscription: Option<&str>| EventRow {
            order_id: Uuid::from_u128(7),
            sequence,
            dead: false,
            subscription: subscription.map(str::to_owned),
        };
        let rows = [row(1, Some(INVENTORY)), row(2, Some(LOYALTY)), row(3, None)];
        let holds = |subscription| {
            let Events { any, creations, cancellations } = Events::of(subscription, &rows);
            [any, creations, cancellations].map(|orders| orders.contains(&Uuid::from_u128(7)))
        };
        assert_eq!(holds(INVENTORY), [true, true, false]);
        assert_eq!(holds(LOYALTY), [true, false, true]);
        assert_eq!(holds("another"), [true, false, false]);
    }
}
