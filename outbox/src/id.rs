//! A type for each kind of id, so that none can be passed in place of another.

/// Defines the type of an id: a UUID, and transparent for sqlx.
///
/// A statement with several parameters of type `uuid[]` compiles even if two of them are swapped. With a type for each
/// kind of id it does not.
///
/// The macro names the crates `uuid` and `sqlx`. So the calling crate needs both: `uuid` with the feature `v7`, and
/// `sqlx` with the features `derive` (or `macros`) and `uuid`.
///
/// ```
/// outbox::id! {
///     /// Names an invoice.
///     pub struct InvoiceId
/// }
/// let id = InvoiceId::new();
/// assert_eq!(id.to_string().parse::<uuid::Uuid>().map(InvoiceId::from), Ok(id));
/// ```
#[macro_export]
macro_rules! id {
    ($(#[$meta:meta])* $visibility:vis struct $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, sqlx::Type)]
        #[sqlx(transparent)]
        $visibility struct $name(uuid::Uuid);

        #[allow(dead_code, clippy::allow_attributes, reason = "not every id is used in every way")]
        impl $name {
            /// A new id, greater than all ids that this process made before (UUID v7).
            #[expect(clippy::new_without_default, reason = "each call returns another id")]
            $visibility fn new() -> Self {
                Self(uuid::Uuid::now_v7())
            }

            /// The UUID.
            $visibility fn uuid(self) -> uuid::Uuid {
                self.0
            }
        }

        impl From<uuid::Uuid> for $name {
            fn from(id: uuid::Uuid) -> Self {
                Self(id)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// Names an event. Receivers deduplicate by it.
    pub struct EventId
}

/// Any odd number whose bits are spread well.
const SPREAD: u64 = 0x9e37_79b9_7f4a_7c15;

impl EventId {
    /// The id of the event with this number among those of its aggregate. It can be made again from what a service has
    /// in its own tables, so an event can be sent again under the id that it had.
    ///
    /// It is a UUID v8: the aggregate's UUID, with the source and the number mixed into its last 62 bits. The first bits
    /// stay: in a UUID v7 they are the time, so ids of new events lie close together in an index. Numbers of one
    /// aggregate never share an id, since the factor is odd; nor do aggregates whose ids are UUIDs of one version.
    ///
    /// The source is the package of the event's type, without its version. So two services that tell of the same
    /// aggregate use different ids, and a later version of a type does not change them. (A hash of it all would do as
    /// well, but for chance collisions.)
    pub fn derive(event_type: &str, aggregate_id: AggregateId, sequence: i32) -> Self {
        let (high, low) = aggregate_id.uuid().as_u64_pair();
        let mixed = hash(source(event_type)).wrapping_add(u64::from(sequence.unsigned_abs()).wrapping_mul(SPREAD));
        let bytes = uuid::Uuid::from_u64_pair(high, low ^ mixed).into_bytes();
        Self(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

/// `orders` of `orders.v1.OrderCreated`.
fn source(event_type: &str) -> &str {
    let package = event_type.rsplit_once('.').map_or("", |(package, _)| package);
    let is_version =
        |name: &str| name.strip_prefix('v').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    match package.rsplit_once('.') {
        Some((source, version)) if is_version(version) => source,
        _ => package,
    }
}

/// FNV-1a: it must never change, and the standard library's hash may.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

id! {
    /// Names an aggregate, such as an order. Its events are delivered in sequence.
    pub struct AggregateId
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use uuid::{Uuid, Variant};

    use super::*;

    const CREATED: &str = "orders.v1.OrderCreated";

    #[test]
    fn an_id_is_the_same_for_ever() {
        let order = AggregateId::from(Uuid::from_u128(0x0192_f0c1_2345_7abc_8def_0123_4567_89ab));
        // These ids are in the inboxes of receivers.
        assert_eq!(EventId::derive(CREATED, order, 1).to_string(), "0192f0c1-2345-8abc-93a6-d668956e8eca");
        assert_eq!(
            EventId::derive("inventory.v1.StockReserved", order, 2).to_string(),
            "0192f0c1-2345-8abc-97b8-569a24a2e3a2"
        );
    }

    #[test]
    fn ids_of_one_source_aggregate_and_number_are_equal_and_all_others_differ() {
        let orders: Vec<AggregateId> = (0..200).map(|_| Uuid::now_v7().into()).collect();
        let mut seen = HashSet::new();
        for order in &orders {
            for sequence in (1..50).chain([i32::MAX]) {
                for event_type in [CREATED, "inventory.v1.StockReserved", "Happened"] {
                    assert!(
                        seen.insert(EventId::derive(event_type, *order, sequence)),
                        "{order} {sequence} {event_type}"
                    );
                }
                assert!(!seen.insert(EventId::derive("orders.v2.OrderPlaced", *order, sequence)), "another version");
            }
        }
    }

    #[test]
    fn an_id_is_a_uuid_v8_that_keeps_the_time_of_its_aggregate() {
        let order = Uuid::now_v7();
        let id = EventId::derive(CREATED, order.into(), 1).uuid();
        assert_eq!((id.get_version_num(), id.get_variant()), (8, Variant::RFC4122));
        assert_eq!(id.as_bytes()[..6], order.as_bytes()[..6]);
    }

    #[test]
    fn the_source_is_the_package_without_its_version() {
        let types = [CREATED, "shop.orders.v12beta.Placed", "billing.Paid", "vendor.Paid", "Paid"];
        assert_eq!(types.map(source), ["orders", "shop.orders", "billing", "vendor", ""]);
    }
}
