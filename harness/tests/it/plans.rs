//! The plans of the services' statements. A session keeps a plan it made while tables were nearly empty, and still uses it
//! when they are full.

use std::{fs, path::Path};

use serde_json::Value;
use sqlx::{Connection, PgConnection, Postgres, QueryBuilder, Row};

use crate::site::Site;

/// Tables that grow with the load. (Stock does not: there are few SKUs.)
const GROWING: [&str; 8] = [
    "orders",
    "order_items",
    "outbox",
    "outbox_discarded",
    "processed_messages",
    "reservations",
    "stock_ledger",
    "points",
];
/// Rows in each while the plan is made. An UPDATE that can be planned as a join gets one plan for few rows, another for many.
const FEW: [i32; 2] = [3, 500];
const FILL_ORDERS: &str = "INSERT INTO orders (order_id, customer_id, currency_code, total_minor)
    SELECT gen_random_uuid(), 'ann', 'EUR', 1 FROM generate_series(1, $1);
    INSERT INTO order_items SELECT order_id, 1, 'MUG', 1, 1 FROM orders ON CONFLICT DO NOTHING";
const FILL_INVENTORY: &str = "INSERT INTO reservations (order_id, event_id, status)
    SELECT gen_random_uuid(), gen_random_uuid(), 'RESERVED' FROM generate_series(1, $1);
    INSERT INTO stock_ledger SELECT order_id, 'RESERVATION', 'MUG', -1 FROM reservations ON CONFLICT DO NOTHING";
const FILL_LOYALTY: &str = "INSERT INTO points (order_id, customer_id, points, event_id, awarded_at)
    SELECT gen_random_uuid(), 'ann', 1, gen_random_uuid(), now() FROM generate_series(1, $1)";
const FILL_EACH: &str = "INSERT INTO outbox (subscription_id, aggregate_id, sequence, event_id, event_type, payload)
    SELECT 1, gen_random_uuid(), 1 + n % 2, gen_random_uuid(), 'test.v1.Happened', '' FROM generate_series(1, $1) AS n;
    INSERT INTO outbox_discarded (event_id, subscription_id, aggregate_id, sequence, created_at, attempts, event_type, payload,
            last_error, discarded_by, reason)
        SELECT gen_random_uuid(), 1, gen_random_uuid(), 1, now(), 1, 'test.v1.Happened', '', 'bad', 'ann', 'bad'
        FROM generate_series(1, $1);
    INSERT INTO processed_messages SELECT gen_random_uuid() FROM generate_series(1, $1);
    ANALYZE";

/// A statement as sqlx has recorded it for a crate.
struct Statement {
    name: String,
    text: String,
    parameters: usize,
}

fn read_statements(of_crate: &str) -> Vec<Statement> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(of_crate).join(".sqlx");
    let files = fs::read_dir(directory).unwrap().map(|file| fs::read(file.unwrap().path()).unwrap());
    let statement = |file: Vec<u8>| {
        let recorded: Value = serde_json::from_slice(&file).unwrap();
        let text = recorded["query"].as_str().unwrap().to_owned();
        let name = text.lines().next().unwrap().trim_start_matches("-- ").to_owned();
        let parameters = recorded["describe"]["parameters"]["Left"].as_array().unwrap().len();
        Statement { name, text, parameters }
    };
    files.map(statement).collect()
}

/// The generic plan, which a session uses after several executions, whatever the parameters are.
async fn explain(session: &mut PgConnection, statement: &Statement) -> Value {
    let execute = async |session: &mut PgConnection, sql: String| {
        sqlx::raw_sql(QueryBuilder::<Postgres>::new(sql).into_sql()).execute(session).await
    };
    execute(session, format!("PREPARE explained AS {}", statement.text)).await.unwrap();
    let nulls = vec!["NULL"; statement.parameters].join(", ");
    let arguments = if nulls.is_empty() { nulls } else { format!("({nulls})") };
    let explain = format!("EXPLAIN (FORMAT JSON) EXECUTE explained{arguments}");
    let row = sqlx::query(QueryBuilder::<Postgres>::new(explain).into_sql()).fetch_one(&mut *session).await.unwrap();
    // JSON is sent as text.
    let plan: String = row.get_unchecked(0);
    execute(session, "DEALLOCATE explained".into()).await.unwrap();
    serde_json::from_str(&plan).unwrap()
}

/// Scans of growing tables that no index narrows.
fn find_whole_scans(node: &Value, found: &mut Vec<String>) {
    let (kind, table) = (node["Node Type"].as_str().unwrap_or(""), node["Relation Name"].as_str().unwrap_or(""));
    // A sample is of a number of pages, however large the table is.
    let narrowed =
        kind == "Tid Scan" || kind == "Sample Scan" || kind == "Bitmap Heap Scan" || node.get("Index Cond").is_some();
    if kind.ends_with("Scan") && GROWING.contains(&table) && !narrowed {
        found.push(format!("{kind} on {table}"));
    }
    match node {
        Value::Array(nodes) => nodes.iter().for_each(|node| find_whole_scans(node, found)),
        Value::Object(fields) => fields.values().for_each(|node| find_whole_scans(node, found)),
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_statement_of_a_service_reads_a_whole_table_though_its_plan_was_made_over_few_rows() {
    let site = Site::prepare_with_loyalty(&[]).await;
    let (orders, inventory, loyalty) = (&site.orders, &site.inventory, site.loyalty());
    let mut whole = Vec::new();
    for few in FEW {
        for (database, fill) in [(orders, FILL_ORDERS), (inventory, FILL_INVENTORY), (loyalty, FILL_LOYALTY)] {
            for statements in [fill, FILL_EACH] {
                for statement in statements.replace("$1", &few.to_string()).split(';') {
                    let statement = QueryBuilder::<Postgres>::new(statement).into_sql();
                    sqlx::raw_sql(statement).execute(&database.pool().await).await.unwrap();
                }
            }
        }
        for (database, role, of_crate, names) in [
            (orders, "order_service", "order-service", ""),
            (inventory, "inventory_service", "inventory-service", ""),
            (loyalty, "loyalty_service", "loyalty-service", "loyalty: "),
            (loyalty, "loyalty_service", "loyalty-service", "inbox: "),
            (orders, "orders_owner", "order-service", "erase: "),
            (loyalty, "loyalty_owner", "loyalty-service", "erase: "),
            (orders, "outbox_relay", "outbox-relay", "relay: "),
        ] {
            if role.ends_with("_owner") && few == FEW[0] {
                // A command's session ends long before its tables have grown.
                continue;
            }
            let mut session = PgConnection::connect(&database.url_as(role)).await.unwrap();
            sqlx::query("SET plan_cache_mode = force_generic_plan").execute(&mut session).await.unwrap();
            if role.ends_with("_owner") {
                // As the command does.
                sqlx::query("SET enable_seqscan = off").execute(&mut session).await.unwrap();
            }
            let statements = read_statements(of_crate);
            assert!(statements.iter().any(|statement| statement.name.starts_with(names)), "{of_crate}");
            let is_role =
                |name: &str| name.starts_with(names) && name.starts_with("erase: ") == role.ends_with("_owner");
            let looked_at = statements.iter().filter(|statement| is_role(&statement.name));
            for statement in looked_at {
                let mut found = Vec::new();
                find_whole_scans(&explain(&mut session, statement).await, &mut found);
                whole.extend(found.iter().map(|scan| format!("{}: {scan}, planned over {few}", statement.name)));
            }
        }
    }
    assert_eq!(whole, [""; 0]);
}
