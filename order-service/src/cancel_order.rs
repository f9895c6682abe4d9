//! Cancels an order, and commits the event that tells of it in the same transaction.

use chassis::Fields;
use outbox::{NewEvent, TraceContext};
use proto::orders::v1::{CancelOrderRequest, Order, OrderCancelled};
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tonic_types::FieldViolation;
use uuid::Uuid;

use crate::get_order::get_orders;

/// `OrderCancelled` follows `OrderCreated`, and nothing follows it.
const SEQUENCE: i32 = 2;

/// A cancellation that may be tried.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cancellation {
    order_id: Uuid,
    request_id: Option<Uuid>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CancelOrderError {
    #[error("there is no order {0}")]
    NotFound(Uuid),
    #[error("order {0} was rejected: nothing is reserved for it")]
    Rejected(Uuid),
    #[error("order {0} is cancelled already")]
    Cancelled(Uuid),
    #[error("the request_id was used for the cancellation of another order")]
    RequestIdReused,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// An order that is cancelled, by this call or by an earlier one with the same request id.
#[derive(Debug)]
pub(crate) struct Cancelled {
    pub(crate) order: Order,
    pub(crate) by_this_call: bool,
}

pub(crate) fn validate_cancellation(request: &CancelOrderRequest) -> Result<Cancellation, Vec<FieldViolation>> {
    let mut fields = Fields::default();
    let request_id = (!request.request_id.is_empty()).then(|| fields.uuid("request_id", &request.request_id));
    let order_id = fields.uuid("order_id", &request.order_id);
    fields.finish(Cancellation { order_id, request_id })
}

/// Cancels the order if it is PENDING or CONFIRMED.
///
/// The update locks the order's row, so that a reply of inventory's is applied either before, and then the order is
/// CONFIRMED or REJECTED here, or after, and then it finds the order CANCELLED and changes nothing. Either way inventory
/// gets the cancellation after the creation, because of their sequence, and gives back what it reserved.
pub(crate) async fn cancel_order(
    connection: &mut PgConnection,
    cancellation: Cancellation,
    trace: TraceContext,
) -> Result<Cancelled, CancelOrderError> {
    let Cancellation { order_id, .. } = cancellation;
    let mut tx = connection.begin().await?;
    let by_this_call = set_cancelled(&mut tx, cancellation).await?;
    if by_this_call {
        let cancelled = OrderCancelled { order_id: order_id.to_string() };
        outbox::enqueue(&mut tx, &[NewEvent::of(order_id, SEQUENCE, &cancelled, &trace)]).await?;
        tx.commit().await?;
    } else {
        tx.rollback().await?;
        find_cancelled(connection, cancellation).await?;
    }
    let order = get_orders(connection, &[order_id]).await?.pop().ok_or(CancelOrderError::NotFound(order_id))?;
    Ok(Cancelled { order, by_this_call })
}

async fn set_cancelled(
    tx: &mut Transaction<'_, Postgres>,
    cancellation: Cancellation,
) -> Result<bool, CancelOrderError> {
    let updated = sqlx::query!(
        "-- orders: cancel
        UPDATE orders SET status = 'CANCELLED', cancel_request_id = $2
        WHERE order_id = $1 AND status IN ('PENDING', 'CONFIRMED')",
        cancellation.order_id,
        cancellation.request_id,
    )
    .execute(&mut **tx)
    .await;
    match updated {
        Ok(updated) => Ok(updated.rows_affected() == 1),
        // The unique key decides, also between two calls at the same moment.
        Err(sqlx::Error::Database(error)) if error.constraint() == Some("orders_cancel_request_id_key") => {
            Err(CancelOrderError::RequestIdReused)
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether it was this request that cancelled the order earlier; if not, why it cannot be cancelled. Statuses that end
/// here never change again, so this read, after the update that found nothing, sees what the update saw.
async fn find_cancelled(connection: &mut PgConnection, cancellation: Cancellation) -> Result<(), CancelOrderError> {
    let Cancellation { order_id, request_id } = cancellation;
    let found = sqlx::query!(
        "-- orders: find cancelled
        SELECT status, cancel_request_id FROM orders WHERE order_id = $1",
        order_id,
    )
    .fetch_optional(connection)
    .await?;
    match found {
        None => Err(CancelOrderError::NotFound(order_id)),
        Some(order) if order.status == "REJECTED" => Err(CancelOrderError::Rejected(order_id)),
        Some(order) if request_id.is_some() && order.cancel_request_id == request_id => Ok(()),
        Some(_) => Err(CancelOrderError::Cancelled(order_id)),
    }
}
