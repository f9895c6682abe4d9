//! Erases a customer from the points. They stay with their orders, and count for nobody.

use chassis::{ERASED, Erase, Piece};
use sqlx::PgConnection;

/// Orders of one statement.
const PIECE: i64 = 500;

/// Points of orders.
#[derive(Debug)]
pub(crate) struct EraseFromPoints;

impl Erase for EraseFromPoints {
    async fn begin(&self, connection: &mut PgConnection, by: &str, reason: &str) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar!(
            "-- erase: begin
            INSERT INTO points_erasures (done_by, reason) VALUES ($1, $2) RETURNING erasure_id",
            by,
            reason,
        )
        .fetch_one(connection)
        .await
    }

    async fn renew_statistics(&self, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
        let renew = "-- erase: renew statistics
            ANALYZE points (customer_id)";
        sqlx::query(renew).execute(connection).await.map(drop)
    }

    /// One statement is one transaction. It finds its rows by two indexes: of orders that count, and of cancelled ones. An
    /// order that is cancelled at this moment is in the first when the statement begins, and locked wherever it is.
    ///
    /// Rows are locked in the order of their ids, as by whoever applies events. So one waits for the other, and no two for
    /// each other. That a row names a customer never changes but by an erasure.
    async fn erase_piece(
        &self,
        connection: &mut PgConnection,
        erasure_id: i64,
        customer_id: &str,
    ) -> Result<Piece, sqlx::Error> {
        let erased = sqlx::query_scalar!(
            r#"-- erase: replace in points
            WITH piece AS MATERIALIZED (
                SELECT order_id FROM points WHERE order_id = ANY (ARRAY (
                    (SELECT order_id FROM points WHERE customer_id = $1 AND cancelled_by IS NULL LIMIT $4)
                    UNION ALL
                    (SELECT order_id FROM points WHERE customer_id = $1 AND cancelled_by IS NOT NULL LIMIT $4)
                    LIMIT $4))
                ORDER BY order_id
                FOR UPDATE
            ), erased AS (
                UPDATE points SET customer_id = $2 WHERE order_id = ANY (ARRAY (SELECT order_id FROM piece))
                RETURNING order_id
            )
            UPDATE points_erasures
            SET orders = orders + (SELECT count(*) FROM erased),
                finished_at = CASE WHEN NOT EXISTS (SELECT FROM erased) THEN now() END
            WHERE erasure_id = $3
            RETURNING (SELECT count(*) FROM erased) AS "erased!""#,
            customer_id,
            ERASED,
            erasure_id,
            PIECE,
        )
        .fetch_one(connection)
        .await?;
        Ok(if erased > 0 { Piece::Erased { orders: erased, events: 0 } } else { Piece::Finished })
    }
}
