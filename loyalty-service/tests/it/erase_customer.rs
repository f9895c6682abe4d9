//! The command `erase-customer`.

use tokio::process::Command;
use uuid::Uuid;

use crate::loyalty::{Loyalty, cancellation_of, created, id_of, order_id_of};

/// No word of any other text in the database.
const CUSTOMER: &str = "kowalczyk-4711";
const ERASED: &str = "(erased)";

/// Runs the command, which erases all. Returns what it prints.
async fn erase(loyalty: &Loyalty) -> String {
    let url = loyalty.database.url_as("loyalty_owner");
    let arguments = ["erase-customer", CUSTOMER, "--by", "bob", "--reason", "request 12", "--database-url", &url];
    let mut command = Command::new(env!("CARGO_BIN_EXE_loyalty-service"));
    let output = command.args(arguments).env_clear().output().await.unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The orders of each run of the command, and whether nothing was left.
async fn record(loyalty: &Loyalty) -> Vec<(String, String, i64, bool)> {
    let record = "SELECT done_by, reason, orders, finished_at IS NOT NULL FROM points_erasures ORDER BY erasure_id";
    sqlx::query_as(record).fetch_all(&loyalty.database.pool().await).await.unwrap()
}

fn run_of(orders: i64) -> (String, String, i64, bool) {
    ("bob".into(), "request 12".into(), orders, true)
}

#[tokio::test]
async fn no_table_names_an_erased_customer_and_the_points_stay_with_their_orders() {
    let loyalty = Loyalty::serve(&[]).await;
    let (kept, cancelled, other) = (created(CUSTOMER, 500), created(CUSTOMER, 700), created("bob", 900));
    let cancellation = cancellation_of(&cancelled);
    assert_eq!(loyalty.deliver([&kept, &cancelled, &other, &cancellation]).await.unwrap(), ["APPLIED"; 4]);
    let rows = loyalty.rows().await;
    assert_eq!(loyalty.database.tables_that_hold(CUSTOMER).await, ["points"]);
    sqlx::query("ANALYZE points").execute(&loyalty.database.pool().await).await.unwrap();
    assert!(loyalty.database.statistics_hold(CUSTOMER).await);

    let output = erase(&loyalty).await;
    assert!(output.contains("erased from 2 orders"), "{output}");
    assert_eq!(loyalty.database.tables_that_hold(CUSTOMER).await, [""; 0]);
    assert!(!loyalty.database.statistics_hold(CUSTOMER).await);
    assert_eq!((loyalty.balance(CUSTOMER).await.unwrap(), loyalty.balance("bob").await.unwrap()), ((0, 0), (9, 1)));
    assert_eq!(loyalty.rows().await, rows);
    // What was delivered is known still, and an order can still be cancelled.
    assert_eq!(loyalty.deliver([&kept, &cancellation_of(&kept)]).await.unwrap(), ["DUPLICATE", "APPLIED"]);
    erase(&loyalty).await;
    assert_eq!(record(&loyalty).await, [run_of(2), run_of(0)]);
    loyalty.stop().await;
}

/// It was discarded here, or is sent again, and its order was erased before.
#[tokio::test]
async fn an_event_whose_customer_was_erased_is_applied_and_counts_for_nobody() {
    let loyalty = Loyalty::serve(&[]).await;
    let event = created(ERASED, 500);
    assert_eq!(loyalty.deliver([&event]).await.unwrap(), ["APPLIED"]);
    assert_eq!(loyalty.rows().await, [(order_id_of(&event), 5, Some(id_of(&event)), None::<Uuid>)]);
    assert!(loyalty.balance(ERASED).await.is_err(), "no customer is called so");
    assert!(loyalty.deliver([&created("(erase)", 500)]).await.unwrap()[0].starts_with("REJECTED INVALID_ORDER"));
    loyalty.stop().await;
}

#[tokio::test]
async fn more_orders_than_one_statement_erases_are_all_erased_and_no_table_is_read_whole() {
    let loyalty = Loyalty::serve(&[]).await;
    let pool = loyalty.database.pool().await;
    let many = "INSERT INTO points (order_id, customer_id, points, event_id, awarded_at, cancelled_by, cancelled_at)
        SELECT gen_random_uuid(), CASE WHEN n <= 1203 THEN 'kowalczyk-4711' ELSE 'other' END, 1, gen_random_uuid(), now(),
            CASE WHEN n % 2 = 0 THEN gen_random_uuid() END, CASE WHEN n % 2 = 0 THEN now() END
        FROM generate_series(1, 21203) AS n";
    sqlx::query(many).execute(&pool).await.unwrap();
    sqlx::query("ANALYZE points").execute(&pool).await.unwrap();
    erase(&loyalty).await;
    assert_eq!(record(&loyalty).await, [run_of(1203)]);
    let scans = "SELECT seq_scan, idx_scan FROM pg_stat_user_tables WHERE relname = 'points'";
    // Sessions report what they have done when they end, and not all versions of PostgreSQL at once.
    let counted = async {
        loop {
            let (whole, by_index): (i64, i64) = sqlx::query_as(scans).fetch_one(&pool).await.unwrap();
            if by_index > 3 {
                return whole;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let counted = tokio::time::timeout(std::time::Duration::from_secs(60), counted).await;
    assert_eq!(counted.expect("the command's scans are counted"), 0);
    assert_eq!(loyalty.database.tables_that_hold(CUSTOMER).await, [""; 0]);
    loyalty.stop().await;
}
