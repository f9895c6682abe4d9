//! Checks an order before anything is written.

use chassis::Fields;
use iso_currency::Currency;
use proto::orders::v1::{CreateOrderRequest, OrderItem};
use tonic_types::FieldViolation;

use crate::ids::RequestId;

const ITEMS_MAX: usize = 100;
const QUANTITY_MAX: i64 = 1_000_000;

/// An order that may be placed. Only [`validate_order`] makes one.
#[derive(Clone, Debug)]
pub(crate) struct NewOrder {
    pub(crate) request_id: Option<RequestId>,
    pub(crate) customer_id: String,
    pub(crate) currency_code: String,
    pub(crate) items: Vec<OrderItem>,
    pub(crate) total_minor: i64,
}

/// Checks every field, so that one answer names all bad fields.
pub(crate) fn validate_order(request: CreateOrderRequest) -> Result<NewOrder, Vec<FieldViolation>> {
    let mut fields = Fields::default();
    let request_id =
        (!request.request_id.is_empty()).then(|| fields.chosen_uuid("request_id", &request.request_id).into());
    fields.name("customer_id", &request.customer_id);
    if Currency::from_code(&request.currency_code).is_none() {
        fields.refuse("currency_code", "must be an ISO 4217 code, such as EUR");
    }
    if !(1..=ITEMS_MAX).contains(&request.items.len()) {
        fields.refuse("items", format!("must have 1 to {ITEMS_MAX} items, but has {}", request.items.len()));
    }
    // A request of the largest size can hold very many items. The items past the limit are refused by their number
    // alone.
    for (line, item) in request.items.iter().take(ITEMS_MAX).enumerate() {
        fields.name(format_args!("items[{line}].sku"), &item.sku);
        fields.number(format_args!("items[{line}].quantity"), item.quantity, 1..=QUANTITY_MAX);
        fields.number(format_args!("items[{line}].unit_price_minor"), item.unit_price_minor, 0..=i64::MAX);
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
    use proptest::prelude::*;
    use uuid::Uuid;

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

    /// A value, and whether it is valid.
    fn either<T: std::fmt::Debug>(
        sound: impl Strategy<Value = T>,
        bad: impl Strategy<Value = T>,
    ) -> impl Strategy<Value = (T, bool)> {
        prop_oneof![30 => sound.prop_map(|value| (value, true)), 1 => bad.prop_map(|value| (value, false))]
    }

    fn name() -> impl Strategy<Value = (String, bool)> {
        either("[A-Za-z0-9._-]{1,64}", prop_oneof!["", "[A-Za-z0-9._-]{65,80}", "[a-z]{0,9}[^A-Za-z0-9._-][a-z]{0,9}"])
    }

    /// An item, and the names of its bad fields.
    fn item() -> impl Strategy<Value = (OrderItem, Vec<&'static str>)> {
        let quantity = either(1..=1_000_000, prop_oneof![Just(0), i32::MIN..0, Just(1_000_001), 1_000_002..=i32::MAX]);
        // Small prices, prices of which only a few fit into a total, and any price.
        let price = either(
            prop_oneof![0..=10_000_i64, 0..=i64::MAX / 1_000_000, 0..=i64::MAX],
            prop_oneof![Just(-1), i64::MIN..0],
        );
        (name(), quantity, price).prop_map(|((sku, sku_sound), (quantity, quantity_sound), (price, price_sound))| {
            let fields = [("sku", sku_sound), ("quantity", quantity_sound), ("unit_price_minor", price_sound)];
            let bad = fields.into_iter().filter(|(_, sound)| !sound).map(|(field, _)| field).collect();
            (OrderItem { sku, quantity, unit_price_minor: price }, bad)
        })
    }

    proptest! {
        #[test]
        fn an_order_gets_its_total_or_an_error_for_each_bad_field(
            (request_id, request_id_sound) in either(
                prop_oneof![Just(String::new()), any::<u128>().prop_map(|id| Uuid::from_u128(id).to_string())],
                "[g-z]{1,40}",
            ),
            (customer_id, customer_sound) in name(),
            (currency_code, currency_sound) in either("EUR|USD|JPY", "[A-Z]{0,2}|[a-z]{3}|[A-Z]{4,5}"),
            items in prop_oneof![prop::collection::vec(item(), 0..=5), prop::collection::vec(item(), 0..=104)],
        ) {
            let mut expected: Vec<String> = [
                ("request_id", request_id_sound), ("customer_id", customer_sound), ("currency_code", currency_sound),
                ("items", (1..=100).contains(&items.len())),
            ].into_iter().filter(|(_, sound)| !sound).map(|(field, _)| field.to_owned()).collect();
            for (line, (_, bad)) in items.iter().enumerate().take(100) {
                expected.extend(bad.iter().map(|field| format!("items[{line}].{field}")));
            }
            let items: Vec<OrderItem> = items.into_iter().map(|(item, _)| item).collect();
            let total: i128 = items.iter().map(|item| i128::from(item.quantity) * i128::from(item.unit_price_minor)).sum();
            let validated = validate_order(CreateOrderRequest { request_id, customer_id, currency_code, items });
            match validated {
                Ok(order) => {
                    prop_assert!(expected.is_empty(), "accepted in spite of {expected:?}");
                    prop_assert_eq!(i128::from(order.total_minor), total);
                }
                Err(refused) => {
                    let mut named: Vec<_> = refused.into_iter().map(|violation| violation.field).collect();
                    if expected.is_empty() {
                        prop_assert!(i64::try_from(total).is_err(), "refused for {named:?}");
                        expected.push("items".into());
                    } else if named.len() > expected.len() {
                        // Bad prices and quantities may or may not have a total.
                        prop_assert_eq!(named.pop(), Some("items".to_owned()));
                    }
                    prop_assert_eq!(named, expected);
                }
            }
        }
    }
}
