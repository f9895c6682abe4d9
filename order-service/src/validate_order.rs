//! Checks an order before anything is written.

use chassis::Fields;
use iso_currency::Currency;
use proto::orders::v1::{CreateOrderRequest, OrderItem};
use tonic_types::FieldViolation;
use uuid::Uuid;

const ITEMS_MAX: usize = 100;
const QUANTITY_MAX: i64 = 1_000_000;

/// An order that may be placed; only [`validate_order`] makes one.
#[derive(Clone, Debug)]
pub(crate) struct NewOrder {
    pub(crate) request_id: Option<Uuid>,
    pub(crate) customer_id: String,
    pub(crate) currency_code: String,
    pub(crate) items: Vec<OrderItem>,
    pub(crate) total_minor: i64,
}

/// Checks every field, so that one answer names all that are wrong.
pub(crate) fn validate_order(request: CreateOrderRequest) -> Result<NewOrder, Vec<FieldViolation>> {
    let mut fields = Fields::default();
    let request_id = (!request.request_id.is_empty()).then(|| fields.uuid("request_id", &request.request_id));
    fields.name("customer_id", &request.customer_id);
    if Currency::from_code(&request.currency_code).is_none() {
        fields.refuse("currency_code", "must be an ISO 4217 code, such as EUR");
    }
    if !(1..=ITEMS_MAX).contains(&request.items.len()) {
        fields.refuse("items", format!("must be 1 to {ITEMS_MAX} items, and are {}", request.items.len()));
    }
    // A request may hold half a million items in the size it is allowed; those past the limit are refused by their
    // number alone.
    for (line, item) in request.items.iter().take(ITEMS_MAX).enumerate() {
        fields.name(format!("items[{line}].sku"), &item.sku);
        fields.number(format!("items[{line}].quantity"), item.quantity, 1..=QUANTITY_MAX);
        fields.number(format!("items[{line}].unit_price_minor"), item.unit_price_minor, 0..=i64::MAX);
    }
    let total_minor = total_minor(&request.items).unwrap_or_else(|| {
        fields.refuse("items", "must have a total below 2^63 minor units");
        0
    });
    let CreateOrderRequest { customer_id, currency_code, items, .. } = request;
    fields.finish(NewOrder { request_id, customer_id, currency_code, items, total_minor })
}

fn total_minor(items: &[OrderItem]) -> Option<i64> {
    items.iter().try_fold(0_i64, |total, item| {
        item.unit_price_minor.checked_mul(item.quantity.into()).and_then(|price| total.checked_add(price))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> CreateOrderRequest {
        CreateOrderRequest {
            request_id: String::new(),
            customer_id: "ann".into(),
            currency_code: "EUR".into(),
            items: vec![OrderItem { sku: "TEA".into(), quantity: 3, unit_price_minor: 250 }],
        }
    }

    #[test]
    fn the_total_is_the_sum_over_all_items() {
        let mut request = request();
        request.items.push(OrderItem { sku: "TEA".into(), quantity: 2, unit_price_minor: 100 });
        assert_eq!(validate_order(request).unwrap().total_minor, 950);
    }

    #[test]
    fn a_total_that_overflows_is_refused_whether_by_product_or_by_sum() {
        for items in [
            vec![OrderItem { sku: "TEA".into(), quantity: 2, unit_price_minor: i64::MAX }],
            vec![OrderItem { sku: "TEA".into(), quantity: 1, unit_price_minor: i64::MAX }; 2],
        ] {
            let refused = validate_order(CreateOrderRequest { items, ..request() }).unwrap_err();
            assert_eq!(refused.len(), 1);
            assert_eq!(refused[0].field, "items");
        }
    }

    #[test]
    fn every_bad_field_is_named_with_its_path() {
        let bad = CreateOrderRequest {
            request_id: "7".into(),
            customer_id: "a b".into(),
            currency_code: "eur".into(),
            items: vec![
                OrderItem { sku: "TEA".into(), quantity: 1, unit_price_minor: 0 },
                OrderItem { sku: "x".repeat(65), quantity: 0, unit_price_minor: -1 },
                OrderItem { sku: String::new(), quantity: 1_000_001, unit_price_minor: 1 },
            ],
        };
        let refused = validate_order(bad).unwrap_err();
        let fields: Vec<_> = refused.iter().map(|violation| violation.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "request_id",
                "customer_id",
                "currency_code",
                "items[1].sku",
                "items[1].quantity",
                "items[1].unit_price_minor",
                "items[2].sku",
                "items[2].quantity",
            ]
        );
    }

    #[test]
    fn an_order_has_1_to_100_items() {
        for (items, accepted) in [(0, false), (1, true), (100, true), (101, false)] {
            let items = vec![request().items[0].clone(); items];
            assert_eq!(validate_order(CreateOrderRequest { items, ..request() }).is_ok(), accepted);
        }
    }
}
