//! Erases a customer from the orders, and from events that were discarded.
//!
//! An event that waits, or is dead, names the customer, and a relay may be sending it just now. So its order is left as it
//! is until the event is delivered or discarded. Whoever reads an order that was erased can be sure that no event in the
//! outbox names the customer. (A relay may still be sending an event of a subscription that has just been ended.)

use std::collections::HashMap;

use chassis::{ERASED, Erase, Piece};
use prost::{Message, Name};
use proto::orders::v1::OrderCreated;
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use uuid::Uuid;

use crate::{get_order::get_orders, ids::OrderId, resend::creation_of};

/// Orders of one transaction. It takes a moment, so nobody who cancels one of them waits for long.
const PIECE: i64 = 500;
/// How often a piece is tried. Each failed try means that an order or an event of it was changed by another at that moment,
/// and those are few.
const TRIES: u32 = 50;

/// Orders and their events.
#[derive(Debug)]
pub(crate) struct EraseFromOrders;

impl Erase for EraseFromOrders {
    async fn begin(&self, connection: &mut PgConnection, by: &str, reason: &str) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar!(
            "-- erase: begin
            INSERT INTO order_erasures (done_by, reason) VALUES ($1, $2) RETURNING erasure_id",
            by,
            reason,
        )
        .fetch_one(connection)
        .await
    }

    /// There are none of payloads.
    async fn renew_statistics(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let renew = "-- erase: renew statistics
            ANALYZE orders (customer_id)";
        sqlx::query(renew).execute(connection).await.map(drop)
    }

    async fn erase_piece(
        &self,
        connection: &mut PgConnection,
        erasure_id: i64,
        customer_id: &str,
    ) -> Result<Piece, sqlx::Error> {
        let mut tries = 1;
        loop {
            match try_piece(connection, erasure_id, customer_id).await {
                Err(sqlx::Error::Database(error))
                    if tries < TRIES && error.code().is_some_and(|code| ["40001", "40P01"].contains(&&*code)) =>
                {
                    tries += 1;
                }
                tried => return tried,
            }
        }
    }
}

/// All of it sees one snapshot. If another changes one of the rows after that, this transaction fails, and is tried again.
/// So an event that is discarded or restored meanwhile keeps no id: either its order is erased with it, or neither is.
async fn try_piece(connection: &mut PgConnection, erasure_id: i64, customer_id: &str) -> Result<Piece, sqlx::Error> {
    let mut tx = connection.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ").await?;
    let order_ids = lock_orders(&mut tx, customer_id).await?;
    let piece = if order_ids.is_empty() {
        end(&mut tx, erasure_id, customer_id).await?
    } else {
        let discarded = lock_discarded(&mut tx, &order_ids).await?;
        let orders = erase_orders(&mut tx, &order_ids).await?;
        let events = erase_events(&mut tx, &discarded).await?;
        count(&mut tx, erasure_id, orders, events).await?;
        Piece::Erased { orders, events }
    };
    tx.commit().await?;
    Ok(piece)
}

/// The customer's oldest orders that may be erased.
///
/// None of them is PENDING: an answer may settle such an order at this moment. The statement that does so finds the order by
/// the place of its row (`apply_reply.rs`). It would wait for this transaction, and then miss the row, which has moved. The
/// answer would be lost. All other orders never become PENDING.
async fn lock_orders(tx: &mut Transaction<'_, Postgres>, customer_id: &str) -> Result<Vec<OrderId>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- erase: lock orders
        SELECT order_id AS "order_id: OrderId" FROM orders
        WHERE customer_id = $1 AND status <> 'PENDING'
            AND (SELECT true FROM outbox WHERE aggregate_id = order_id AND event_type = $2 LIMIT 1) IS NULL
        ORDER BY order_id LIMIT $3
        FOR UPDATE"#,
        customer_id,
        OrderCreated::full_name(),
        PIECE,
    )
    .fetch_all(&mut **tx)
    .await
}

/// An event in `outbox_discarded` that names a customer.
struct Discarded {
    event_id: Uuid,
    subscription_id: i16,
    aggregate_id: OrderId,
}

/// Those of the orders. Nobody can restore one of them before this transaction ends.
async fn lock_discarded(
    tx: &mut Transaction<'_, Postgres>,
    order_ids: &[OrderId],
) -> Result<Vec<Discarded>, sqlx::Error> {
    sqlx::query_as!(
        Discarded,
        r#"-- erase: lock discarded events
        SELECT event_id, subscription_id, aggregate_id AS "aggregate_id: OrderId" FROM outbox_discarded
        WHERE aggregate_id = ANY ($1) AND event_type = $2
        ORDER BY event_id, subscription_id
        FOR UPDATE"#,
        order_ids as &[OrderId],
        OrderCreated::full_name(),
    )
    .fetch_all(&mut **tx)
    .await
}

async fn erase_orders(tx: &mut Transaction<'_, Postgres>, order_ids: &[OrderId]) -> Result<i64, sqlx::Error> {
    let erased = sqlx::query!(
        "-- erase: replace in orders
        UPDATE orders SET customer_id = $2 WHERE order_id = ANY ($1)",
        order_ids as &[OrderId],
        ERASED,
    );
    Ok(erased.execute(&mut **tx).await?.rows_affected().cast_signed())
}

/// The events are made again from their orders, which are erased already. So they can still be restored and delivered,
/// and even one whose data could not be read names nobody.
async fn erase_events(tx: &mut Transaction<'_, Postgres>, discarded: &[Discarded]) -> Result<i64, sqlx::Error> {
    let order_ids: Vec<OrderId> = discarded.iter().map(|event| event.aggregate_id).collect();
    let orders = get_orders(&mut *tx, &order_ids).await?;
    let payloads: HashMap<&str, Vec<u8>> =
        orders.iter().map(|order| (order.order_id.as_str(), creation_of(order).encode_to_vec())).collect();
    let (mut event_ids, mut subscription_ids, mut renewed) = (Vec::new(), Vec::new(), Vec::new());
    for event in discarded {
        let payload = payloads.get(event.aggregate_id.to_string().as_str());
        event_ids.push(event.event_id);
        subscription_ids.push(event.subscription_id);
        renewed.push(payload.ok_or(sqlx::Error::RowNotFound)?.clone());
    }
    let erased = sqlx::query!(
        "-- erase: replace in discarded events
        UPDATE outbox_discarded AS discarded SET payload = erased.payload
        FROM unnest($1::uuid[], $2::smallint[], $3::bytea[]) AS erased (event_id, subscription_id, payload)
        WHERE discarded.event_id = erased.event_id AND discarded.subscription_id = erased.subscription_id",
        &event_ids,
        &subscription_ids,
        &renewed,
    );
    Ok(erased.execute(&mut **tx).await?.rows_affected().cast_signed())
}

async fn count(
    tx: &mut Transaction<'_, Postgres>,
    erasure_id: i64,
    orders: i64,
    events: i64,
) -> Result<(), sqlx::Error> {
    let counted = sqlx::query!(
        "-- erase: count what is erased
        UPDATE order_erasures SET orders = orders + $2, events = events + $3 WHERE erasure_id = $1",
        erasure_id,
        orders,
        events,
    );
    counted.execute(&mut **tx).await?;
    Ok(())
}

/// Nothing could be erased in this snapshot: either nothing is left in it, or something holds up the rest.
async fn end(tx: &mut Transaction<'_, Postgres>, erasure_id: i64, customer_id: &str) -> Result<Piece, sqlx::Error> {
    if let Some(why) = count_held(tx, customer_id).await?.why() {
        return Ok(Piece::Held(why));
    }
    let finished = sqlx::query!(
        "-- erase: finish
        UPDATE order_erasures SET finished_at = now() WHERE erasure_id = $1",
        erasure_id,
    );
    finished.execute(&mut **tx).await?;
    Ok(Piece::Finished)
}

/// What holds up the erasure.
#[derive(Debug)]
struct Held {
    orders: i64,
    /// Orders, as the next two: those with an event that waits, and with one that is dead.
    pending: i64,
    waiting: i64,
    dead: i64,
    example: Option<String>,
}

async fn count_held(tx: &mut Transaction<'_, Postgres>, customer_id: &str) -> Result<Held, sqlx::Error> {
    sqlx::query_as!(
        Held,
        r#"-- erase: count what holds it up
        SELECT count(*) AS "orders!", count(*) FILTER (WHERE status = 'PENDING') AS "pending!",
            count(*) FILTER (WHERE event.waits) AS "waiting!", count(*) FILTER (WHERE event.is_dead) AS "dead!",
            min(order_id::text) AS example
        FROM orders CROSS JOIN LATERAL (
            SELECT bool_or(visible_at < 'infinity') AS waits, bool_or(visible_at = 'infinity') AS is_dead
            FROM outbox WHERE aggregate_id = order_id AND event_type = $2
        ) AS event
        WHERE customer_id = $1"#,
        customer_id,
        OrderCreated::full_name(),
    )
    .fetch_one(&mut **tx)
    .await
}

impl Held {
    /// `None` if no order names the customer any more.
    fn why(&self) -> Option<String> {
        let Self { orders, pending, waiting, dead, example } = self;
        let example = example.as_ref()?;
        let mut to_do = Vec::new();
        if *dead > 0 {
            to_do.push("discard or requeue the dead events, which `outbox-relay dead list` shows");
        }
        if *waiting > 0 {
            to_do.push("wait until relays have delivered what waits (what matches no subscription needs one)");
        }
        if *pending > 0 {
            to_do.push("wait until the orders are settled, or cancel them");
        }
        to_do.push("repeat the command");
        Some(format!(
            "orders that still name the customer: {orders}, such as {example}; PENDING: {pending}, with an event that \
             waits: {waiting}, with a dead one: {dead}; {}",
            to_do.join("; ")
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::Held;

    #[test]
    fn what_holds_up_an_erasure_says_what_to_do_about_it() {
        assert_eq!(Held { orders: 0, pending: 0, waiting: 0, dead: 0, example: None }.why(), None);
        let example = || Some("0190".into());
        let why =
            |pending, waiting, dead| Held { orders: 9, pending, waiting, dead, example: example() }.why().unwrap();
        let says = |why: &str| ["discard or requeue", "until relays", "or cancel"].map(|what| why.contains(what));
        assert_eq!(says(&why(1, 0, 0)), [false, false, true]);
        assert_eq!(says(&why(0, 2, 0)), [false, true, false]);
        assert_eq!(says(&why(0, 0, 3)), [true, false, false]);
        let all = why(1, 2, 3);
        assert!(says(&all) == [true; 3] && all.ends_with("; repeat the command"), "{all}");
        assert!(all.starts_with("orders that still name the customer: 9, such as 0190; PENDING: 1, "), "{all}");
    }
}
