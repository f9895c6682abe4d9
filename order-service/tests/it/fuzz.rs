//! Any input of a stranger gets an answer of the contract, and does no harm to the service.
//!
//! A failure prints how to repeat it. `FUZZ_SECONDS=600` feeds each target for ten minutes; `testkit::fuzz` tells more.

use std::{cell::RefCell, collections::HashSet, slice};

use proptest::{collection::vec, option, prelude::*};
use prost::{Message, Name, bytes::Bytes};
use proto::{
    events::v1::{DeliverRequest, DeliverResponse, Event},
    inventory::v1::{Shortage, StockRejected, StockReleased, StockReserved},
    orders::v1::{CreateOrderRequest, ListOrdersRequest, ListOrdersResponse, Order},
};
use testkit::fuzz::{
    BATCH_MAX, Damage, EventChange, Host, MESSAGE_MAX, Text, call, change_event, damage, doublings, event_changes, id,
    is_refused_by_transport, is_result_of_each, number, number_i32, repeat, text,
};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue},
};

use crate::service::{Service, Written, order, order_once, refusal, reserved};

/// Headers of more than a few KiB are refused before the service sees them.
const HEADER_MAX: usize = 2048;

/// Asserts that the contract declares this refusal for what was sent: the transport's own for bytes that are too large or no
/// message, else one of `declared`, with its reason.
fn is_declared<M: Message + Default>(status: Status, sent: &Bytes, limit: usize, declared: &[(Code, &str)]) {
    if !is_refused_by_transport::<M>(&status, sent, limit) {
        let refused = refusal::<()>(Err(status));
        assert!(declared.contains(&(refused.code, refused.reason.as_str())), "{refused:?}");
    }
}

/// How an order differs from a sound one. A `u8` chooses the item.
#[derive(Clone, Debug)]
enum OrderChange {
    RequestId(Text),
    CustomerId(Text),
    CurrencyCode(Text),
    Sku(u8, Text),
    Quantity(u8, i32),
    UnitPrice(u8, i64),
    /// Doubles the items so far, this often.
    Items(u32),
    Traceparent(Text),
    Tracestate(Text),
}

fn order_change() -> impl Strategy<Value = OrderChange> {
    prop_oneof![
        id().prop_map(OrderChange::RequestId),
        text().prop_map(OrderChange::CustomerId),
        text().prop_map(OrderChange::CurrencyCode),
        (any::<u8>(), text()).prop_map(|(item, sku)| OrderChange::Sku(item, sku)),
        (any::<u8>(), number_i32()).prop_map(|(item, quantity)| OrderChange::Quantity(item, quantity)),
        (any::<u8>(), number()).prop_map(|(item, price)| OrderChange::UnitPrice(item, price)),
        doublings().prop_map(OrderChange::Items),
        text().prop_map(OrderChange::Traceparent),
        text().prop_map(OrderChange::Tracestate),
    ]
}

fn changed_order(changes: &[OrderChange]) -> Request<CreateOrderRequest> {
    let mut request = Request::new(order());
    for change in changes {
        let order = request.get_mut();
        let item = |place: u8| usize::from(place) % order.items.len();
        match change {
            OrderChange::RequestId(id) => order.request_id = id.into(),
            OrderChange::CustomerId(text) => order.customer_id = text.into(),
            OrderChange::CurrencyCode(text) => order.currency_code = text.into(),
            OrderChange::Sku(place, text) => {
                let item = item(*place);
                order.items[item].sku = text.into();
            }
            OrderChange::Quantity(place, number) => {
                let item = item(*place);
                order.items[item].quantity = *number;
            }
            OrderChange::UnitPrice(place, number) => {
                let item = item(*place);
                order.items[item].unit_price_minor = *number;
            }
            OrderChange::Items(doublings) => order.items = repeat(&order.items, *doublings),
            OrderChange::Traceparent(text) => insert_header(request.metadata_mut(), "traceparent", text),
            OrderChange::Tracestate(text) => insert_header(request.metadata_mut(), "tracestate", text),
        }
    }
    request
}

/// Only text that a header can have, which includes some that is not ASCII.
fn insert_header(metadata: &mut MetadataMap, name: &'static str, text: &Text) {
    let text = String::from(text);
    if let Ok(value) = MetadataValue::<Ascii>::try_from(text.as_bytes())
        && text.len() <= HEADER_MAX
    {
        metadata.insert(MetadataKey::from_static(name), value);
    }
}

#[test]
fn create_order_answers_an_order_that_is_kept_or_a_declared_refusal() {
    let host = Host::start();
    let service = host.block_on(Service::start());
    let sound = order_once();
    let placed = host.block_on(service.place(sound.clone()));
    let acknowledged = RefCell::new(HashSet::from([placed.order_id.clone()]));
    let create = async |(changes, damage): &(Vec<OrderChange>, Option<Damage>)| {
        let request = changed_order(changes).map(|order| Damage::of(damage.as_ref(), order.encode_to_vec()));
        let sent = request.get_ref().clone();
        match call(&service.channel, "/orders.v1.OrderService/CreateOrder", request).await {
            Ok(answer) => {
                CreateOrderRequest::decode(sent).unwrap();
                let order = Order::decode(answer.into_inner()).unwrap();
                assert_eq!(service.get(&order.order_id).await, order);
                acknowledged.borrow_mut().insert(order.order_id);
            }
            Err(refused) => {
                let declared = ["INVALID_ORDER", "REQUEST_ID_REUSED"].map(|reason| (Code::InvalidArgument, reason));
                is_declared::<CreateOrderRequest>(refused, &sent, MESSAGE_MAX, &declared);
            }
        }
        assert_eq!(service.place(sound.clone()).await, placed);
    };
    host.test_each(&(vec(order_change(), 0..=3), damage()), &create);
    host.block_on(async {
        let Written { orders, events, .. } = service.written().await;
        let acknowledged = i64::try_from(acknowledged.borrow().len()).unwrap();
        assert_eq!((orders, events), (acknowledged, acknowledged), "all that is written was acknowledged");
        service.end().await;
    });
}

/// How a call for a page differs from a sound one.
#[derive(Clone, Debug)]
enum PageChange {
    CustomerId(Text),
    PageSize(i32),
    Token(Text),
    /// A token of the list of this name, for what follows this id.
    EncodedToken(Text, Text),
    /// A token of the sound call's list, for what follows this id.
    After(Text),
}

fn page_change() -> impl Strategy<Value = PageChange> {
    prop_oneof![
        text().prop_map(PageChange::CustomerId),
        number_i32().prop_map(PageChange::PageSize),
        text().prop_map(PageChange::Token),
        (text(), id()).prop_map(|(list, last)| PageChange::EncodedToken(list, last)),
        id().prop_map(PageChange::After),
    ]
}

fn changed_page(sound: &ListOrdersRequest, changes: &[PageChange]) -> ListOrdersRequest {
    let mut page = sound.clone();
    for change in changes {
        match change {
            PageChange::CustomerId(text) => page.customer_id = text.into(),
            PageChange::PageSize(number) => page.page_size = *number,
            PageChange::Token(text) => page.page_token = text.into(),
            PageChange::EncodedToken(list, last) => {
                page.page_token = chassis::encode_page_token(&String::from(list), &String::from(last));
            }
            PageChange::After(last) => {
                page.page_token = chassis::encode_page_token(&sound.customer_id, &String::from(last));
            }
        }
    }
    page
}

#[test]
fn list_orders_answers_a_page_of_the_customer_or_a_declared_refusal() {
    let host = Host::start();
    let service = host.block_on(Service::start());
    let list =
        async |page: Bytes| call(&service.channel, "/orders.v1.OrderService/ListOrders", Request::new(page)).await;
    let (sound, listed) = host.block_on(async {
        for _ in 0..3 {
            service.place(order()).await;
        }
        let first = ListOrdersRequest { customer_id: order().customer_id, page_size: 2, page_token: String::new() };
        let page = list(first.encode_to_vec().into()).await.unwrap().into_inner();
        let page_token = ListOrdersResponse::decode(page).unwrap().next_page_token;
        let second = ListOrdersRequest { page_token, ..first };
        let listed = list(second.encode_to_vec().into()).await.unwrap().into_inner();
        assert_eq!(ListOrdersResponse::decode(listed.clone()).unwrap().orders.len(), 1);
        (second, listed)
    });
    let ask = async |(changes, damage): &(Vec<PageChange>, Option<Damage>)| {
        let sent = Damage::of(damage.as_ref(), changed_page(&sound, changes).encode_to_vec());
        match list(sent.clone()).await {
            Ok(answer) => {
                let (asked, page) = (ListOrdersRequest::decode(sent), ListOrdersResponse::decode(answer.into_inner()));
                let customer_id = asked.unwrap().customer_id;
                assert!(page.unwrap().orders.iter().all(|order| order.customer_id == customer_id));
            }
            Err(refused) => {
                let declared = [(Code::InvalidArgument, "INVALID_PAGE")];
                is_declared::<ListOrdersRequest>(refused, &sent, MESSAGE_MAX, &declared);
            }
        }
        assert_eq!(list(sound.encode_to_vec().into()).await.unwrap().into_inner(), listed);
    };
    host.test_each(&(vec(page_change(), 0..=3), damage()), &ask);
    host.block_on(service.end());
}

/// A reply of inventory, or of somebody in its place.
#[derive(Clone, Debug)]
enum Reply {
    Reserved,
    Released,
    /// The items that are short, doubled this often.
    Rejected(Vec<Short>, u32),
}

/// A SKU, why it is short, how many are wanted and how many available.
type Short = (Text, i32, i64, i64);

fn reply() -> impl Strategy<Value = Reply> {
    let shortages = vec((text(), number_i32(), number(), number()), 0..=2);
    prop_oneof![
        Just(Reply::Reserved),
        Just(Reply::Released),
        (shortages, doublings()).prop_map(|(shortages, doublings)| Reply::Rejected(shortages, doublings)),
    ]
}

/// An event, and how it differs from a sound one.
#[derive(Clone, Debug)]
struct Told {
    reply: Reply,
    /// Another order that both the envelope and the message in it are about.
    other_order: Option<Text>,
    changes: Vec<EventChange>,
}

fn told() -> impl Strategy<Value = Told> {
    (reply(), option::weighted(0.1, id()), event_changes()).prop_map(|(reply, other_order, changes)| Told {
        reply,
        other_order,
        changes,
    })
}

/// Events, and how often all of them are doubled.
type Batch = (Vec<Told>, u32);

fn event(order_id: &str, told: &Told) -> Event {
    let order_id = told.other_order.as_ref().map_or_else(|| order_id.to_owned(), String::from);
    let (r#type, data) = encoded(order_id.clone(), &told.reply);
    change_event(Event { subject: order_id.clone(), r#type, data, ..reserved(&order_id) }, &told.changes)
}

fn encoded(order_id: String, reply: &Reply) -> (String, Bytes) {
    fn of<M: Message + Name>(message: &M) -> (String, Bytes) {
        (M::full_name(), message.encode_to_vec().into())
    }
    match reply {
        Reply::Reserved => of(&StockReserved { order_id }),
        Reply::Released => of(&StockReleased { order_id }),
        Reply::Rejected(shortages, doublings) => {
            let shortage =
                |&(ref sku, reason, wanted, available): &Short| Shortage { sku: sku.into(), reason, wanted, available };
            let shortages: Vec<_> = shortages.iter().map(shortage).collect();
            of(&StockRejected { order_id, shortages: repeat(&shortages, *doublings) })
        }
    }
}

#[test]
fn deliver_answers_a_result_for_each_event_or_a_declared_refusal() {
    let host = Host::start();
    let service = host.block_on(Service::start());
    let known = reserved(&host.block_on(service.place(order())).order_id);
    assert_eq!(host.block_on(service.deliver(slice::from_ref(&known))), ["APPLIED"]);
    let deliver = async |((events, copies), damage): &(Batch, Option<Damage>)| {
        let order_id = service.place(order()).await.order_id;
        let events: Vec<_> = events.iter().map(|told| event(&order_id, told)).collect();
        let batch = DeliverRequest { events: repeat(&events, *copies) };
        let sent = Damage::of(damage.as_ref(), batch.encode_to_vec());
        let decoded = DeliverRequest::decode(sent.clone());
        match call(&service.events, "/events.v1.EventReceiver/Deliver", Request::new(sent.clone())).await {
            Ok(answer) => {
                is_result_of_each(&decoded.unwrap().events, &DeliverResponse::decode(answer.into_inner()).unwrap());
            }
            Err(refused) => {
                let too_many = decoded.is_ok_and(|batch| batch.events.len() > 1000);
                let declared = [(Code::InvalidArgument, "INVALID_BATCH")];
                is_declared::<DeliverRequest>(refused, &sent, BATCH_MAX, if too_many { &declared } else { &[] });
            }
        }
        let order = service.get(&order_id).await;
        assert_eq!(service.newest_of(&order.customer_id).await, Some(order));
        assert_eq!(service.deliver(slice::from_ref(&known)).await, ["DUPLICATE"]);
    };
    host.test_each(&((vec(told(), 0..=3), doublings()), damage()), &deliver);
    host.block_on(service.end());
}
