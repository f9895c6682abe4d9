//! Adjusts stock by hand, once per request id.

use chassis::{Fields, WorkError};
use proto::inventory::v1::{AdjustStockRequest, StockLevel};
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tonic_types::FieldViolation;
use uuid::Uuid;

use crate::get_stock::get_stock;

const DELTA_MAX: i64 = 1_000_000_000;

/// A checked request to adjust stock.
#[derive(Clone, Debug)]
pub(crate) struct Adjustment {
    request_id: Uuid,
    sku: String,
    delta: i64,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum AdjustStockError {
    #[error("the request_id was used for another adjustment; use a new one")]
    RequestIdReused,
    #[error("not enough stock of {sku}")]
    InsufficientStock { sku: String },
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

impl WorkError for AdjustStockError {
    fn of_database(&self) -> Option<&sqlx::Error> {
        match self {
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

pub(crate) fn validate_adjustment(request: AdjustStockRequest) -> Result<Adjustment, Vec<FieldViolation>> {
    let mut fields = Fields::default();
    let request_id = fields.chosen_uuid("request_id", &request.request_id);
    fields.name("sku", &request.sku);
    fields.number("delta", request.delta, -DELTA_MAX..=DELTA_MAX);
    if request.delta == 0 {
        fields.refuse("delta", "must not be 0");
    }
    fields.finish(Adjustment { request_id, sku: request.sku, delta: request.delta })
}

/// Applies the adjustment, unless an earlier call with its request id has, and returns the stock after it.
pub(crate) async fn adjust_stock(
    connection: &mut PgConnection,
    adjustment: Adjustment,
) -> Result<StockLevel, AdjustStockError> {
    let mut tx = connection.begin().await?;
    introduce_sku(&mut tx, &adjustment).await?;
    if !record_movement(&mut tx, &adjustment).await? {
        tx.rollback().await?;
        return answer_again(connection, adjustment).await;
    }
    match change_stock(&mut tx, &adjustment).await {
        Ok(Some(level)) => {
            tx.commit().await?;
            Ok(level)
        }
        // An unknown SKU has no stock to take from.
        Ok(None) => Err(AdjustStockError::InsufficientStock { sku: adjustment.sku }),
        Err(error) if violates(&error, "stock_available_not_negative") => {
            Err(AdjustStockError::InsufficientStock { sku: adjustment.sku })
        }
        Err(error) => Err(error.into()),
    }
}

/// An adjustment that adds stock creates the SKU if it is unknown.
async fn introduce_sku(tx: &mut Transaction<'_, Postgres>, adjustment: &Adjustment) -> Result<(), sqlx::Error> {
    if adjustment.delta > 0 {
        sqlx::query!(
            "-- inventory: introduce sku
            INSERT INTO stock (sku, available) VALUES ($1, 0) ON CONFLICT DO NOTHING",
            adjustment.sku,
        )
        .execute(&mut **tx)
        .await?;
    }
    Ok(())
}

/// Returns whether the request id is new. The unique index decides, also between two calls at the same time.
async fn record_movement(tx: &mut Transaction<'_, Postgres>, adjustment: &Adjustment) -> Result<bool, sqlx::Error> {
    let inserted = sqlx::query!(
        "-- inventory: record adjustment
        INSERT INTO stock_ledger (reference, kind, sku, delta) VALUES ($1, 'ADJUSTMENT', $2, $3)
        ON CONFLICT DO NOTHING",
        adjustment.request_id,
        adjustment.sku,
        adjustment.delta,
    )
    .execute(&mut **tx)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

/// Returns the new level; `None` if the SKU is unknown.
async fn change_stock(
    tx: &mut Transaction<'_, Postgres>,
    adjustment: &Adjustment,
) -> Result<Option<StockLevel>, sqlx::Error> {
    sqlx::query_as!(
        StockLevel,
        "-- inventory: change stock
        UPDATE stock SET available = available + $2 WHERE sku = $1 RETURNING sku, available",
        adjustment.sku,
        adjustment.delta,
    )
    .fetch_optional(&mut **tx)
    .await
}

/// Answers a call that repeats an earlier one with the level as it is now.
async fn answer_again(connection: &mut PgConnection, adjustment: Adjustment) -> Result<StockLevel, AdjustStockError> {
    let earlier = sqlx::query!(
        "-- inventory: find adjustment
        SELECT sku, delta FROM stock_ledger WHERE reference = $1 AND kind = 'ADJUSTMENT'",
        adjustment.request_id,
    )
    .fetch_one(&mut *connection)
    .await?;
    if (earlier.sku, earlier.delta) != (adjustment.sku.clone(), adjustment.delta) {
        return Err(AdjustStockError::RequestIdReused);
    }
    let level = get_stock(connection, &adjustment.sku).await?.ok_or(sqlx::Error::RowNotFound)?;
    chassis::confirm_seen(connection).await?;
    Ok(level)
}

fn violates(error: &sqlx::Error, constraint: &str) -> bool {
    error.as_database_error().is_some_and(|error| error.constraint() == Some(constraint))
}
