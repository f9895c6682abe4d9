//! The ids of orders and of the requests for them, each with a type of its own.

use outbox::AggregateId;

outbox::id! {
    /// Names an order.
    pub(crate) struct OrderId
}

outbox::id! {
    /// Chosen by a caller, so that a repeated call is recognised.
    pub(crate) struct RequestId
}

/// An order is the aggregate of its events, and of the replies to them.
impl From<OrderId> for AggregateId {
    fn from(order_id: OrderId) -> Self {
        order_id.uuid().into()
    }
}

impl From<AggregateId> for OrderId {
    fn from(subject: AggregateId) -> Self {
        subject.uuid().into()
    }
}
