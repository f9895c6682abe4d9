//! Reads a customer's points.

use proto::loyalty::v1::Balance;
use sqlx::PgConnection;

/// A sum of points may be larger than any of them: it is cut to what the answer can hold.
pub(crate) async fn get_balance(connection: &mut PgConnection, customer_id: &str) -> Result<Balance, sqlx::Error> {
    sqlx::query_as!(
        Balance,
        r#"-- loyalty: get balance
        SELECT least(coalesce(sum(points), 0), 9223372036854775807)::bigint AS "points!", count(*) AS "orders!"
        FROM points WHERE customer_id = $1 AND cancelled_by IS NULL"#,
        customer_id,
    )
    .fetch_one(connection)
    .await
}
