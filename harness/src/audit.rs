//! The subcommand `audit`: holds the two databases against each other and names every row that should not be.
//!
//! It is exact also while the system is at work, though no snapshot spans two databases, because of the order in which
//! it reads: an effect is committed before its outbox row goes, so an order that had no row in the first snapshot has
//! its effect in the later one; and an effect of an order that was not there yet is looked up again at the end.

use std::{
    collections::{HashMap, HashSet},
    process::ExitCode,
};

use anyhow::Result;
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use uuid::Uuid;

use crate::target::Databases;

/// Findings printed one by one before the rest is only counted.
const FINDINGS_SHOWN: usize = 50;

/// Prove that nothing was lost and nothing applied twice
///
/// Checks over both databases that every committed order has exactly one effect or is still in the outbox, that no effect
/// is without its order, that each order took exactly what it says, and that for every SKU opening stock + adjustments −
/// reservations = current stock, not below zero. Safe to run while the system is at work. Exits with 1 and names the rows
/// otherwise.
#[derive(clap::Args, Clone, Debug)]
pub struct Arguments {
    #[command(flatten)]
    databases: Databases,
}

/// What the audit saw.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    /// Orders committed.
    pub orders: usize,
    /// Orders whose items are all reserved.
    pub reserved: usize,
    /// Orders that were turned away.
    pub rejected: usize,
    /// Orders whose event is in the outbox and has had no effect yet, dead ones among them.
    pub on_their_way: usize,
    /// Events that will not be delivered until an operator acts.
    pub dead: usize,
    /// SKUs whose stock was checked.
    pub skus: usize,
    /// What is wrong, a sentence a row. Empty: the audit is clean.
    pub findings: Vec<String>,
}

impl Audit {
    /// The audit for people, line by line, ending in its verdict.
    pub fn lines(&self) -> Vec<String> {
        let Self { orders, reserved, rejected, on_their_way, dead, skus, .. } = self;
        let mut lines = vec![format!(
            "{orders} orders = {reserved} reserved + {rejected} rejected + {on_their_way} on their way ({dead} dead); {skus} SKUs"
        )];
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
/// When one cannot be read; what is wrong in them is in [`Audit::findings`].
pub async fn audit(databases: &Databases) -> Result<Audit> {
    let (mut orders_database, mut inventory_database) = (databases.orders().await?, databases.inventory().await?);
    let mut audit = Audit::default();
    let (orders, on_their_way) = read_orders(&mut orders_database, &mut audit).await?;
    let effects = read_inventory(&mut inventory_database, &mut audit).await?;

    for (order_id, demand) in &orders {
        match effects.get(order_id) {
            Some(effect) => check_effect(*order_id, demand, effect, &mut audit),
            None if on_their_way.contains(order_id) => audit.on_their_way += 1,
            None => audit.findings.push(format!("LOST: order {order_id} has no effect and no event on its way")),
        }
    }
    let unmatched: Vec<Uuid> = effects.keys().filter(|order_id| !orders.contains_key(order_id)).copied().collect();
    for order_id in find_missing(&mut orders_database, &unmatched).await? {
        audit.findings.push(format!("PHANTOM: order {order_id} has an effect and was never committed"));
    }
    audit.findings.sort_unstable();
    Ok(audit)
}

/// What an order asks for, or has taken, as `sku=quantity` by SKU.
type Quantities = String;

struct Effect {
    reserved: bool,
    taken: Quantities,
}

fn check_effect(order_id: Uuid, demand: &Quantities, effect: &Effect, audit: &mut Audit) {
    let Effect { reserved, taken } = effect;
    match reserved {
        true if taken != demand => {
            audit.findings.push(format!("WRONG: order {order_id} asks for {demand} and has taken {taken}"));
        }
        false if !taken.is_empty() => {
            audit.findings.push(format!("WRONG: order {order_id} was turned away and has taken {taken}"));
        }
        true => audit.reserved += 1,
        false => audit.rejected += 1,
    }
}

/// All orders with what they ask for, and those that have an event in the outbox, from one snapshot.
async fn read_orders(
    connection: &mut PgConnection,
    audit: &mut Audit,
) -> Result<(HashMap<Uuid, Quantities>, HashSet<Uuid>)> {
    let mut tx = begin_snapshot(connection).await?;
    let orders = sqlx::query!(
        r#"-- audit: orders
        SELECT order_id, coalesce(string_agg(sku || '=' || quantity, ' ' ORDER BY sku), '') AS "demand!"
        FROM orders
        LEFT JOIN (
            SELECT order_id, sku, sum(quantity) AS quantity FROM order_items GROUP BY order_id, sku
        ) AS demand USING (order_id)
        GROUP BY order_id"#
    )
    .fetch_all(&mut *tx)
    .await?;
    let outbox = sqlx::query!(
        r#"-- audit: outbox
        SELECT aggregate_id, visible_at = 'infinity' AS "dead!" FROM outbox"#
    )
    .fetch_all(&mut *tx)
    .await?;
    audit.orders = orders.len();
    audit.dead = outbox.iter().filter(|row| row.dead).count();
    let orders = orders.into_iter().map(|row| (row.order_id, row.demand)).collect();
    Ok((orders, outbox.into_iter().map(|row| row.aggregate_id).collect()))
}

/// All effects with what they took, from one snapshot in which the stock is checked too.
async fn read_inventory(connection: &mut PgConnection, audit: &mut Audit) -> Result<HashMap<Uuid, Effect>> {
    let mut tx = begin_snapshot(connection).await?;
    check_stock(&mut tx, audit).await?;
    check_inbox(&mut tx, audit).await?;
    let rows = sqlx::query!(
        r#"-- audit: effects
        SELECT coalesce(order_id, reference) AS "order_id!", status AS "status?",
            coalesce(string_agg(sku || '=' || -delta, ' ' ORDER BY sku), '') AS "taken!"
        FROM reservations
        FULL JOIN (SELECT reference, sku, delta FROM stock_ledger WHERE kind = 'RESERVATION') AS movement
            ON reference = order_id
        GROUP BY 1, 2"#
    )
    .fetch_all(&mut *tx)
    .await?;
    let mut effects = HashMap::with_capacity(rows.len());
    for row in rows {
        let Some(status) = row.status else {
            audit.findings.push(format!("WRONG: order {} took {} without a reservation", row.order_id, row.taken));
            continue;
        };
        effects.insert(row.order_id, Effect { reserved: status == "RESERVED", taken: row.taken });
    }
    Ok(effects)
}

async fn check_stock(tx: &mut Transaction<'_, Postgres>, audit: &mut Audit) -> Result<()> {
    let rows = sqlx::query!(
        r#"-- audit: stock
        SELECT sku, available,
            coalesce(sum(delta) FILTER (WHERE kind = 'OPENING'), 0)::bigint AS "opening!",
            coalesce(sum(delta) FILTER (WHERE kind = 'ADJUSTMENT'), 0)::bigint AS "adjusted!",
            coalesce(-sum(delta) FILTER (WHERE kind = 'RESERVATION'), 0)::bigint AS "reserved!"
        FROM stock LEFT JOIN stock_ledger USING (sku)
        GROUP BY sku"#
    )
    .fetch_all(&mut **tx)
    .await?;
    audit.skus = rows.len();
    for row in rows {
        let (sku, opening, adjusted, reserved) = (row.sku, row.opening, row.adjusted, row.reserved);
        if row.available != opening + adjusted - reserved || row.available < 0 {
            let available = row.available;
            audit.findings.push(format!(
                "UNBALANCED: {sku} has {available}, and opening {opening} + adjusted {adjusted} − reserved {reserved}"
            ));
        }
    }
    Ok(())
}

/// An effect and its inbox row are one transaction: neither is there without the other.
async fn check_inbox(tx: &mut Transaction<'_, Postgres>, audit: &mut Audit) -> Result<()> {
    let rows = sqlx::query!(
        r#"-- audit: inbox
        SELECT order_id AS "order_id?", coalesce(event_id, message_id) AS "event_id!"
        FROM reservations FULL JOIN processed_messages ON message_id = event_id
        WHERE event_id IS NULL OR message_id IS NULL"#
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

/// Those of the ids that are no orders, as of now.
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
