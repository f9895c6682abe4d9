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

id! {
    /// Names an aggregate, such as an order. Its events are delivered in sequence.
    pub struct AggregateId
}
