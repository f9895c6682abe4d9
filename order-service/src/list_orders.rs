//! Lists a customer's orders, page by page.

use chassis::Fields;
use prost::Message;
use proto::orders::v1::{ListOrdersRequest, ListOrdersResponse, Order};
use sqlx::PgConnection;
use tonic_types::FieldViolation;
use uuid::Uuid;

use crate::{get_order::get_orders, ids::OrderId};

/// Clients refuse messages over 4 MiB unless they are configured otherwise, so a page of large orders is shorter than
/// the caller asked.
const PAGE_BYTES_MAX: usize = 3 * 1024 * 1024;

/// A page to read.
#[derive(Debug)]
pub(crate) struct Page {
    customer_id: String,
    size: u16,
    /// The last order of the previous page; for the first page, an id after all others.
    before: OrderId,
}

pub(crate) fn validate_page(request: ListOrdersRequest) -> Result<Page, Vec<FieldViolation>> {
    let mut fields = Fields::default();
    fields.name("customer_id", &request.customer_id);
    let size = fields.page_size("page_size", request.page_size);
    let token = || chassis::decode_page_token(&request.customer_id, &request.page_token);
    let before = match request.page_token.as_str() {
        "" => Uuid::max(),
        _ => token().and_then(|id| Uuid::try_parse(&id).ok()).unwrap_or_else(|| {
            fields.refuse("page_token", "must be empty or the next_page_token of a page for the same customer");
            Uuid::max()
        }),
    };
    fields.finish(Page { customer_id: request.customer_id, size, before: before.into() })
}

/// Reads one row more than the page holds, to know whether another page follows.
pub(crate) async fn list_orders(connection: &mut PgConnection, page: Page) -> Result<ListOrdersResponse, sqlx::Error> {
    let order_ids = sqlx::query_scalar!(
        r#"-- orders: list ids
        SELECT order_id AS "order_id: OrderId" FROM orders
        WHERE customer_id = $1 AND order_id < $2 ORDER BY order_id DESC LIMIT $3"#,
        page.customer_id,
        page.before as OrderId,
        i64::from(page.size) + 1,
    )
    .fetch_all(&mut *connection)
    .await?;
    let found = order_ids.len();
    let mut orders = get_orders(connection, &order_ids[..found.min(page.size.into())]).await?;
    orders.truncate(fitting(&orders));
    let last = orders.last().filter(|_| found > orders.len());
    let next_page_token =
        last.map(|order| chassis::encode_page_token(&page.customer_id, &order.order_id)).unwrap_or_default();
    Ok(ListOrdersResponse { orders, next_page_token })
}

/// How many of the orders fit into a message: at least one, since no order is that large.
fn fitting(orders: &[Order]) -> usize {
    let mut bytes = 0;
    let fits = |order: &&Order| {
        bytes += order.encoded_len();
        bytes <= PAGE_BYTES_MAX
    };
    orders.iter().take_while(fits).count()
}
