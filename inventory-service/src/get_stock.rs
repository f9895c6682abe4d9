//! Reads stock.

use chassis::Fields;
use proto::inventory::v1::{ListStockRequest, ListStockResponse, StockLevel};
use sqlx::PgConnection;
use tonic_types::FieldViolation;

/// The name of this list in page tokens.
const LIST: &str = "stock";

pub(crate) async fn get_stock(connection: &mut PgConnection, sku: &str) -> Result<Option<StockLevel>, sqlx::Error> {
    sqlx::query_as!(
        StockLevel,
        "-- inventory: get stock
        SELECT sku, available FROM stock WHERE sku = $1",
        sku,
    )
    .fetch_optional(connection)
    .await
}

/// A checked request for a page.
#[derive(Debug)]
pub(crate) struct Page {
    size: u16,
    /// The last SKU of the page before. Empty for the first page: it sorts before every SKU.
    after: String,
}

pub(crate) fn validate_page(request: &ListStockRequest) -> Result<Page, Vec<FieldViolation>> {
    let mut fields = Fields::default();
    let size = fields.page_size("page_size", request.page_size);
    let after = match request.page_token.as_str() {
        "" => String::new(),
        // No SKU has a NUL, and Postgres would refuse it as text.
        token => chassis::decode_page_token(LIST, token).filter(|sku| !sku.contains('\0')).unwrap_or_else(|| {
            fields.refuse("page_token", "must be the next_page_token of an earlier answer of this call");
            String::new()
        }),
    };
    fields.finish(Page { size, after })
}

/// Reads one row more than the page holds, to find out whether another page follows.
pub(crate) async fn list_stock(connection: &mut PgConnection, page: Page) -> Result<ListStockResponse, sqlx::Error> {
    let mut levels = sqlx::query_as!(
        StockLevel,
        "-- inventory: list stock
        SELECT sku, available FROM stock WHERE sku > $1 ORDER BY sku LIMIT $2",
        page.after,
        i64::from(page.size) + 1,
    )
    .fetch_all(connection)
    .await?;
    let more = levels.len() > usize::from(page.size);
    if more {
        levels.pop();
    }
    let last = levels.last().filter(|_| more);
    let next_page_token = last.map(|level| chassis::encode_page_token(LIST, &level.sku)).unwrap_or_default();
    Ok(ListStockResponse { levels, next_page_token })
}
