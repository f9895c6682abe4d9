//! The subcommand `audit`: compares the two databases and names every row that is wrong.
//!
//! No snapshot spans two databases, and yet the audit is exact while the system runs, because of the order in which it
//! reads. Inventory commits an effect before the relay deletes the outbox row, so an order without a row in the first
//! snapshot has its effect in the later one. An effect whose order is not in the first snapshot is looked up again at the
//! end. If the two sides disagree about an order's status, an event may be on its way between them. So these orders are read
//! again, and only a disagreement that lasts is a finding.

use std::{
    collections::{HashMap, HashSet},
    process::ExitCode,
    time::Duration,
};

use anyhow::Result;
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tokio::time::sleep;
use uuid::Uuid;

use crate::target::Databases;

/// How many findings are printed; the rest is counted.
const FINDINGS_SHOWN: usize = 50;
/// How often the orders are read again on whose status the databases disagree.
const RECHECKS: u32 = 10;
const RECHECK_PAUSE: Duration = Duration::from_millis(200);

/// Check that nothing was lost and nothing applied twice
///
/// Compares both databases. Every committed order must have exactly one effect or still be in the outbox, and every effect an
/// order. Each order must have taken its items once, and returned them if it was cancelled. For every SKU, opening stock +
/// adjustments − reserved + released must equal the current stock, which must not be negative. Every order's status must
/// agree with its reservation. No order may be PENDING with no event on its way.
///
/// May run while the system runs. Exits with 1 and names the rows if anything is wrong.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    #[command(flatten)]
    databases: Databases,
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
    let audit = audit(&arguments.databases).await?;
    audit.print();
    Ok(if audit.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Audits the two databases.
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
    let mut disagreeing = Vec::new();
    for (order_id, order) in &ordered.orders {
        let (waits, discarded) =
            (ordered.outbox.creations.contains(order_id), ordered.discarded.creations.contains(order_id));
        match done.effects.get(order_id) {
            // A cancellation alone does not count as the effect of an order, unless its creation was discarded.
            Some(effect) if effect.asked || waits || discarded => {
                check_effect(*order_id, &order.demand, effect, &mut audit);
            }
            None if waits => audit.on_their_way += 1,
            None if discarded => audit.discarded += 1,
            _ => {
                audit.findings.push(format!("LOST: order {order_id} has no effect and no event on its way"));
                continue;
            }
        }
        if disagreement(*order_id, &ordered, &done).is_some() {
            disagreeing.push(*order_id);
        }
        audit.stranded += usize::from(order.status == "PENDING" && is_stranded(*order_id, &ordered, &done));
    }
    let of_no_order = ordered.outbox.any.iter().filter(|order_id| !ordered.orders.contains_key(order_id));
    audit
        .findings
        .extend(of_no_order.map(|order_id| format!("PHANTOM: events of order {order_id}, which does not exist")));
    let recheck = read_disagreements(&mut orders_database, &mut inventory_database, disagreeing).await?;
    audit.findings.extend(recheck);
    let unmatched: Vec<Uuid> =
        done.effects.keys().filter(|order_id| !ordered.orders.contains_key(order_id)).copied().collect();
    for order_id in find_missing(&mut orders_database, &unmatched).await? {
        audit.findings.push(format!("PHANTOM: order {order_id} has an effect and was never committed"));
    }
    audit.findings.sort_unstable();
    Ok(audit)
}

/// Items that an order asks for or has taken, as `sku=quantity`, sorted by SKU.
type Quantities = String;

/// One snapshot of the orders database.
struct Ordered {
    orders: HashMap<Uuid, Order>,
    outbox: Events,
    discarded: Events,
    dead: usize,
}

/// The orders that some events are about.
#[derive(Default)]
struct Events {
    any: HashSet<Uuid>,
    /// Orders whose first event is among these.
    creations: HashSet<Uuid>,
}

impl Events {
    fn of(rows: impl Iterator<Item = (Uuid, i32)>) -> Self {
        let mut events = Self::default();
        for (order_id, sequence) in rows {
            events.any.insert(order_id);
            if sequence == 1 {
                events.creations.insert(order_id);
            }
        }
        events
    }
}

struct Order {
    status: String,
    demand: Quantities,
}

/// One snapshot of the inventory database.
struct Done {
    effects: HashMap<Uuid, Effect>,
    /// The replies.
    outbox: Events,
    discarded: Events,
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
    let in_any = |sides: [&Events; 2]| sides.iter().any(|events| events.any.contains(&order_id));
    in_any([&ordered.discarded, &done.discarded]) && !in_any([&ordered.outbox, &done.outbox])
}

/// How the two sides disagree about an order; none if they agree.
fn disagreement(order_id: Uuid, ordered: &Ordered, done: &Done) -> Option<String> {
    let order = ordered.orders.get(&order_id)?;
    let effect = done.effects.get(&order_id);
    let cancelled = effect.is_some_and(|effect| effect.cancelled);
    let effect = effect.map(|effect| effect.status.as_str());
    let told = ordered.outbox.any.contains(&order_id) || ordered.discarded.any.contains(&order_id);
    let answered = done.outbox.any.contains(&order_id) || done.discarded.any.contains(&order_id);
    let agree = match (order.status.as_str(), effect) {
        ("PENDING", None) => told,
        ("PENDING", Some(_)) => answered,
        ("CONFIRMED", Some("RESERVED")) | ("REJECTED", Some("REJECTED")) => true,
        ("CANCELLED", _) => cancelled || told,
        _ => false,
    };
    let status = &order.status;
    let effect = effect.unwrap_or("unknown");
    let on_its_way = if told || answered { "" } else { ", with nothing on its way" };
    (!agree).then(|| format!("DISAGREE: order {order_id} is {status}, and its reservation {effect}{on_its_way}"))
}

/// Reads these orders again until the databases agree on each, or a last time.
async fn read_disagreements(
    orders_database: &mut PgConnection,
    inventory_database: &mut PgConnection,
    mut order_ids: Vec<Uuid>,
) -> Result<Vec<String>> {
    let mut disagreements = Vec::new();
    for _ in 0..RECHECKS {
        if order_ids.is_empty() {
            return Ok(Vec::new());
        }
        sleep(RECHECK_PAUSE).await;
        let ordered = read_ordered(orders_database, Some(&order_ids)).await?;
        let done = read_done(inventory_database, Some(&order_ids), &mut Vec::new()).await?;
        disagreements.clear();
        order_ids.retain(|order_id| {
            let disagreement = disagreement(*order_id, &ordered, &done);
            disagreements.extend(disagreement.clone());
            disagreement.is_some()
        });
    }
    Ok(disagreements)
}

/// Orders with their items, and their outbox: all orders, or those with these ids. If only the items of an order exist, its
/// status is MISSING, which agrees with nothing.
async fn read_ordered(connection: &mut PgConnection, only: Option<&[Uuid]>) -> Result<Ordered> {
    let mut tx = begin_snapshot(connection).await?;
    let orders = sqlx::query!(
        r#"-- audit: orders
        SELECT order_id AS "order_id!", coalesce(status, 'MISSING') AS "status!", coalesce(string_agg(sku || '=' || quantity, ' ' ORDER BY sku), '') AS "demand!"
        FROM orders
        FULL JOIN (
            SELECT order_id, sku, sum(quantity) AS quantity FROM order_items
            WHERE $1::uuid[] IS NULL OR order_id = ANY ($1)
            GROUP BY order_id, sku
        ) AS demand USING (order_id)
        WHERE $1::uuid[] IS NULL OR order_id = ANY ($1)
        GROUP BY order_id, status"#,
        only as Option<&[Uuid]>,
    )
    .fetch_all(&mut *tx)
    .await?;
    let orders = orders.into_iter().map(|row| (row.order_id, Order { status: row.status, demand: row.demand }));
    let orders = orders.collect();
    let (outbox, dead) = read_outbox(&mut tx).await?;
    Ok(Ordered { orders, outbox, discarded: read_discarded(&mut tx).await?, dead })
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
    let (outbox, dead) = read_outbox(&mut tx).await?;
    Ok(Done { effects, outbox, discarded: read_discarded(&mut tx).await?, dead })
}

/// The events in the outbox, and how many of them are dead.
async fn read_outbox(tx: &mut Transaction<'_, Postgres>) -> Result<(Events, usize)> {
    let rows = sqlx::query!(
        r#"-- audit: outbox
        SELECT aggregate_id, sequence, visible_at = 'infinity' AS "dead!" FROM outbox"#
    )
    .fetch_all(&mut **tx)
    .await?;
    let dead = rows.iter().filter(|row| row.dead).count();
    Ok((Events::of(rows.into_iter().map(|row| (row.aggregate_id, row.sequence))), dead))
}

async fn read_discarded(tx: &mut Transaction<'_, Postgres>) -> Result<Events> {
    let rows = sqlx::query!(
        "-- audit: discarded
        SELECT aggregate_id, sequence FROM outbox_discarded"
    )
    .fetch_all(&mut **tx)
    .await?;
    Ok(Events::of(rows.into_iter().map(|row| (row.aggregate_id, row.sequence))))
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
