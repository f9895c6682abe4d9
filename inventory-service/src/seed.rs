//! Adds demo stock.

use chassis::DatabaseUrl;
use sqlx::Connection;
use uuid::Uuid;

/// The reference of the opening movements in the ledger.
const SEED: Uuid = Uuid::from_u128(0x0192_0000_0000_7000_8000_0000_0000_5eed);

/// Enough for orders by hand and under load. The last SKU is short, so that orders for it can be seen rejected.
const DEMO_STOCK: [(&str, i64); 6] = [
    ("COFFEE-BEANS", 1_000_000),
    ("FILTER-PAPER", 1_000_000),
    ("GRINDER", 1_000_000),
    ("KETTLE", 1_000_000),
    ("MUG", 1_000_000),
    ("LAST-OF-ITS-KIND", 3),
];

/// Adds the demo SKUs that do not exist yet, each with its opening movement in the ledger, and returns their number.
///
/// # Errors
/// Those of the database.
pub async fn seed(url: &DatabaseUrl) -> Result<u64, sqlx::Error> {
    let mut connection = url.connect().await?;
    let (skus, available): (Vec<String>, Vec<i64>) =
        DEMO_STOCK.iter().map(|(sku, available)| ((*sku).to_owned(), *available)).unzip();
    let added = sqlx::query!(
        "-- inventory: seed
        WITH opened AS (
            INSERT INTO stock (sku, available)
            SELECT sku, available FROM unnest($1::text[], $2::bigint[]) AS demo (sku, available) ORDER BY sku
            ON CONFLICT DO NOTHING
            RETURNING sku, available
        )
        INSERT INTO stock_ledger (reference, kind, sku, delta)
        SELECT $3, 'OPENING', sku, available FROM opened",
        &skus,
        &available,
        SEED,
    )
    .execute(&mut connection)
    .await?;
    connection.close().await?;
    Ok(added.rows_affected())
}
