//! Cancels an order, and commits the event that announces it in the same transaction.

use chassis::{Fields, WorkError};
use outbox::{NewEvent, TraceContext};
use proto::orders::v1::{CancelOrderRequest, Order, OrderCancelled};
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tonic_types::FieldViolation;

use crate::{
    get_order::get_orders,
    ids::{OrderId, RequestId},
};

/// `OrderCancelled` follows `OrderCreated` and is an order's last event.
pub(crate) const SEQUENCE: i32 = 2;

/// A valid request to cancel an order. Only [`validate_cancellation`] makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cancellation {
    order_id: OrderId,
    request_id: Option<RequestId>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum CancelOrderError {
    #[error("there is no order {0}")]
    NotFound(OrderId),
    #[error("order {0} was rejected, so there is nothing to cancel")]
    Rejected(OrderId),
    #[error("order {0} is already cancelled")]
    Cancelled(OrderId),
    #[error("the request_id was used to cancel another order; use a new request_id for each order")]
    RequestIdReused,
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl WorkError for CancelOrderError {
    fn of_database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

/// An order that was cancelled by this call, or by an earlier call with the same request id.
#[derive(Debug)]
pub(crate) struct Cancelled {
    pub(crate) order: Order,
    pub(crate) by_this_call: bool,
}

pub(crate) fn validate_cancellation(request: &CancelOrderRequest) -> Result<Cancellation, Vec<FieldViolation>> {
    let mut fields = Fields::default();
    let request_id =
        (!request.request_id.is_empty()).then(|| fields.chosen_uuid("request_id", &request.request_id).into());
    let order_id = fields.uuid("order_id", &request.order_id).into();
    fields.finish(Cancellation { order_id, request_id })
}

/// Cancels the order if it is PENDING or CONFIRMED.
///
/// The update locks the order's row, so a reply of inventory is applied either before it or after it. Before it, the
/// order is CONFIRMED or REJECTED here. After it, the reply finds the order CANCELLED and changes nothing. Either way
/// inventory receives the cancellation after the creation, because of their sequence, and releases the stock that it
/// reserved.
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
    if !by_this_call {
        chassis::confirm_seen(connection).await?;
    }
    Ok(Cancelled { order, by_this_call })
}

async fn set_cancelled(
    tx: &mut Transaction<'_, Postgres>,
    cancellation: Cancellation,
) -> Result<bool, CancelOrderError> {
    let updated = sqlx::query!(
        "-- orders: cancel
        UPDATE orders
        SET status = 'CANCELLED', cancel_request_id = $2, cancelled_at = now(), derived_ids = derived_ids | 2
        WHERE order_id = $1 AND status IN ('PENDING', 'CONFIRMED')",
        cancellation.order_id as OrderId,
        cancellation.request_id as Option<RequestId>,
    )
    .execute(&mut **tx)
    .await;
    match updated {
        Ok(updated) => Ok(updated.rows_affected() == 1),
        // The unique key decides, even between two simultaneous calls.
        Err(sqlx::Error::Database(error)) if error.constraint() == Some("orders_cancel_request_id_key") => {
            Err(CancelOrderError::RequestIdReused)
        }
        Err(error) => Err(error.into()),
    }
}

/// Succeeds if this request cancelled the order earlier. Fails with the reason why the order cannot be cancelled.
///
/// An order that exists, but that the update did not find, has a final status, which never changes.
async fn find_cancelled(connection: &mut PgConnection, cancellation: Cancellation) -> Result<(), CancelOrderError> {
    let Cancellation { order_id, request_id } = cancellation;
    let found = sqlx::query!(
        r#"-- orders: find cancelled
        SELECT status, cancel_request_id AS "cancel_request_id: RequestId" FROM orders WHERE order_id = $1"#,
        order_id as OrderId,
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
