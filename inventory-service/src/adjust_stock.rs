//! Corrects stock by hand, once per request id.

use chassis::Fields;
use proto::inventory::v1::{AdjustStockRequest, StockLevel};
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tonic_types::FieldViolation;
use uuid::Uuid;

use crate::get_stock::get_stock;

const DELTA_MAX: i64 = 1_000_000_000;

/// A correction that may be tried.
#[derive(Clone, Debug)]
pub(crate) struct Adjustment {
    request_id: Uuid,
    sku: String,
    delta: i64,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum AdjustStockError {
    #[error("the request_id was used for another adjustment")]
    RequestIdReused,
    #[error("there is less of {sku} than is to be taken")]
    InsufficientStock { sku: String },
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

pub(crate) fn validate_adjustment(request: AdjustStockRequest) -> Result<Adjustment, Vec<FieldViolation>> {
    let mut fields = Fields::default();
    let request_id = fields.uuid("request_id", &request.request_id);
    fields.name("sku", &request.sku);
    fields.number("delta", request.delta, -DELTA_MAX..=DELTA_MAX);
    if request.delta == 0 {
        fields.refuse("delta", "must not be 0");
    }
    fields.finish(Adjustment { request_id, sku: request.sku, delta: request.delta })
}

/// Applies the adjustment, unless its request id has been applied; answers the stock as it is then.
pub(crate) async fn adjust_stock(
    connection: &mut PgConnection,
    adjustment: Adjustment,
) -> Result<StockLevel, AdjustStockError> {
    let mut tx = connection.begin().await?;
    introduce_sku(&mut tx, &adjustment).await?;
    if !record_movement(&mut tx, &adjustment).await? {
        tx.rollback().await?;
        return repeat_adjustment(connection, adjustment).await;
    }
    match change_stock(&mut tx, &adjustment).await {
        Ok(Some(level)) => {
            tx.commit().await?;
            Ok(level)
        }
        // Of a SKU nobody knows there is less than of any other.
        Ok(None) => Err(AdjustStockError::InsufficientStock { sku: adjustment.sku }),
        Err(error) if violates(&error, "stock_available_not_negative") => {
            Err(AdjustStockError::InsufficientStock { sku: adjustment.sku })
        }
        Err(error) => Err(error.into()),
    }
}

/// What is added may be of a SKU nobody knew.
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

/// False when the request id was used before: the unique index decides, as it does for two calls at the same moment.
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

/// `None` when nobody knows the SKU.
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

async fn repeat_adjustment(
    connection: &mut PgConnection,
    adjustment: Adjustment,
) -> Result<StockLevel, AdjustStockError> {
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
    Ok(get_stock(connection, &adjustment.sku).await?.ok_or(sqlx::Error::RowNotFound)?)
}

fn violates(error: &sqlx::Error, constraint: &str) -> bool {
    error.as_database_error().is_some_and(|error| error.constraint() == Some(constraint))
}
