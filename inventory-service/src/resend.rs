//! What this service has answered, made again from the reservations.

use outbox::{Found, NewEvent, Sent, SentEvent, TraceContext};
use proto::inventory::v1::{StockRejected, StockReleased, StockReserved};
use sqlx::{PgConnection, types::time::OffsetDateTime};
use uuid::Uuid;

use crate::{
    order_event::OrderId,
    release_stock,
    reservations::Status,
    reserve_stock::{self, read_shortages},
};

/// Reservations that one query looks at.
const PIECE: i64 = 10_000;
/// Bits of `reservations.derived_ids`.
const FIRST: i16 = 1;
const RELEASE: i16 = 2;

/// Inventory's answers.
#[derive(Debug)]
pub(crate) struct SentByInventory;

struct Answered {
    order_id: OrderId,
    /// Whether the order asked for stock. If not, its cancellation came alone, and was not answered.
    has_asked: bool,
    status: String,
    rejection: Option<String>,
    created_at: OffsetDateTime,
    cancelled_at: Option<OffsetDateTime>,
    derived_ids: i16,
}

impl Sent for SentByInventory {
    /// By the primary key, through all reservations: an order of any age may have been answered just now. An index over
    /// the times would cost every order, and this is asked after a disaster.
    async fn find(
        &self,
        connection: &mut PgConnection,
        since: OffsetDateTime,
        after: Uuid,
    ) -> Result<Found, sqlx::Error> {
        let found = sqlx::query!(
            r#"-- inventory: find answers to resend
            WITH piece AS (
                SELECT order_id, created_at, cancelled_at FROM reservations
                WHERE order_id > $1 ORDER BY order_id LIMIT $3
            )
            SELECT ARRAY (
                    SELECT order_id FROM piece WHERE created_at >= $2 OR cancelled_at >= $2 ORDER BY order_id) AS "ids!",
                (SELECT order_id FROM piece ORDER BY order_id DESC LIMIT 1) AS last"#,
            after,
            since,
            PIECE,
        )
        .fetch_one(connection)
        .await?;
        Ok(Found { ids: found.ids, last: found.last })
    }

    async fn read(&self, connection: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<SentEvent>, sqlx::Error> {
        let answered = sqlx::query_as!(
            Answered,
            r#"-- inventory: read what was answered
            SELECT order_id AS "order_id: OrderId", event_id IS NOT NULL AS "has_asked!", status, rejection, created_at,
                cancelled_at, derived_ids
            FROM reservations WHERE order_id = ANY ($1) ORDER BY order_id"#,
            ids,
        )
        .fetch_all(connection)
        .await?;
        Ok(answered.iter().flat_map(make_again).collect())
    }
}

/// The answers to the order, in their sequence.
fn make_again(answered: &Answered) -> Vec<SentEvent> {
    let Answered { order_id, has_asked, status, rejection, created_at, cancelled_at, derived_ids } = answered;
    if !has_asked {
        return Vec::new();
    }
    let (id, trace) = (order_id.to_string(), TraceContext::default());
    let status = Status::of(status);
    let first = match (status, rejection) {
        (Status::Rejected, Some(rejection)) => {
            let rejected = StockRejected { order_id: id.clone(), shortages: read_shortages(rejection) };
            NewEvent::of(*order_id, reserve_stock::SEQUENCE, &rejected, &trace)
        }
        _ => NewEvent::of(*order_id, reserve_stock::SEQUENCE, &StockReserved { order_id: id.clone() }, &trace),
    };
    let mut answers = vec![SentEvent { event: first, at: *created_at, has_derived_id: derived_ids & FIRST != 0 }];
    if let (Status::Released, Some(cancelled_at)) = (status, cancelled_at) {
        let released = NewEvent::of(*order_id, release_stock::SEQUENCE, &StockReleased { order_id: id }, &trace);
        let has_derived_id = derived_ids & RELEASE != 0;
        answers.push(SentEvent { event: released, at: *cancelled_at, has_derived_id });
    }
    answers
}
