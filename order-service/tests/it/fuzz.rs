//! Whatever a stranger sends is answered as the contract says, and neither harms the service nor stays with it.

use std::{
    collections::HashSet,
    slice,
    sync::{Mutex, PoisonError},
};

use bolero::{TypeGenerator, check, produce};
use prost::{Message, Name, bytes::Bytes};
use proto::{
    events::v1::{DeliverRequest, DeliverResponse, Event},
    inventory::v1::{Shortage, StockRejected, StockReleased, StockReserved},
    orders::v1::{CreateOrderRequest, ListOrdersRequest, ListOrdersResponse, Order},
};
use testkit::fuzz::{
    BATCH_MAX, Damage, Host, Id, MESSAGE_MAX, Number, TEST_TIME, Text, Times, call, is_refused_by_transport,
    is_result_of_each, repeat,
};
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataKey, MetadataMap, MetadataValue},
};

use crate::service::{Service, Written, order, order_once, refusal, reserved};

/// Beyond a few KiB, headers are refused before they come to the service.
const HEADER_MAX: usize = 2048;

/// Asserts that the refusal is one the contract has for what was sent: the transport's own for what is too large or no
/// message at all, and one of `declared`, with its reason, for anything else.
fn is_declared<M: Message + Default>(status: Status, sent: &Bytes, limit: usize, declared: &[(Code, &str)]) {
    if !is_refused_by_transport::<M>(&status, sent, limit) {
        let refused = refusal::<()>(Err(status));
        assert!(declared.contains(&(refused.code, refused.reason.as_str())), "{refused:?}");
    }
}

/// What an order differs in from a sound one.
#[derive(Debug, TypeGenerator)]
enum OrderChange {
    RequestId(Id),
    CustomerId(Text),
    CurrencyCode(Text),
    Sku(u8, Text),
    Quantity(u8, Number),
    UnitPrice(u8, Number),
    /// Those there are, so many times over.
    Items(Times),
    Traceparent(Text),
    Tracestate(Text),
}

fn changed_order(changes: &[OrderChange]) -> Request<CreateOrderRequest> {
    let mut request = Request::new(order());
    for change in changes {
        let order = request.get_mut();
        let line = |place: u8| usize::from(place) % order.items.len();
        match change {
            OrderChange::RequestId(id) => order.request_id = id.into(),
            OrderChange::CustomerId(text) => order.customer_id = text.into(),
            OrderChange::CurrencyCode(text) => order.currency_code = text.into(),
            OrderChange::Sku(place, text) => {
                let line = line(*place);
                order.items[line].sku = text.into();
            }
            OrderChange::Quantity(place, number) => {
                let line = line(*place);
                order.items[line].quantity = number.into();
            }
            OrderChange::UnitPrice(place, number) => {
                let line = line(*place);
                order.items[line].unit_price_minor = number.into();
            }
            OrderChange::Items(times) => order.items = repeat(&order.items, times),
            OrderChange::Traceparent(text) => insert_header(request.metadata_mut(), "traceparent", text),
            OrderChange::Tracestate(text) => insert_header(request.metadata_mut(), "tracestate", text),
        }
    }
    request
}

/// Of what text a header can hold, which is not only ASCII.
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
    let target = check!().with_test_time(TEST_TIME);
    let target =
        target.with_generator((produce::<Vec<OrderChange>>().with().len(0..4_usize), produce::<Option<Damage>>()));
    let host = Host::start();
    let service = host.block_on(Service::start());
    let sound = order_once();
    let placed = host.block_on(service.place(sound.clone()));
    let acknowledged = Mutex::new(HashSet::from([placed.order_id.clone()]));
    let create = async |(changes, damage): &(Vec<OrderChange>, Option<Damage>)| {
        let request = changed_order(changes).map(|order| Damage::of(damage.as_ref(), order.encode_to_vec()));
        let sent = request.get_ref().clone();
        match call(&service.channel, "/orders.v1.OrderService/CreateOrder", request).await {
            Ok(answer) => {
                CreateOrderRequest::decode(sent).unwrap();
                let order = Order::decode(answer.into_inner()).unwrap();
                assert_eq!(service.get(&order.order_id).await, order);
                acknowledged.lock().unwrap_or_else(PoisonError::into_inner).insert(order.order_id);
            }
            Err(refused) => {
                let declared = ["INVALID_ORDER", "REQUEST_ID_REUSED"].map(|reason| (Code::InvalidArgument, reason));
                is_declared::<CreateOrderRequest>(refused, &sent, MESSAGE_MAX, &declared);
            }
        }
        assert_eq!(service.place(sound.clone()).await, placed);
    };
    target.for_each(host.test_each(create));
    host.block_on(async {
        let Written { orders, events, .. } = service.written().await;
        let acknowledged = i64::try_from(acknowledged.lock().unwrap().len()).unwrap();
        assert_eq!((orders, events), (acknowledged, acknowledged), "all that is written was acknowledged");
        service.end().await;
    });
}

/// What a call for a page differs in from a sound one.
#[derive(Debug, TypeGenerator)]
enum PageChange {
    CustomerId(Text),
    PageSize(Number),
    Token(Text),
    /// Of the name of a list, and where it is to go on.
    EncodedToken(Text, Id),
    /// Where the list of the sound call is to go on.
    After(Id),
}

fn changed_page(sound: &ListOrdersRequest, changes: &[PageChange]) -> ListOrdersRequest {
    let mut page = sound.clone();
    for change in changes {
        match change {
            PageChange::CustomerId(text) => page.customer_id = text.into(),
            PageChange::PageSize(number) => page.page_size = number.into(),
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
    let target = check!().with_test_time(TEST_TIME);
    let target =
        target.with_generator((produce::<Vec<PageChange>>().with().len(0..4_usize), produce::<Option<Damage>>()));
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
    target.for_each(host.test_each(ask));
    host.block_on(service.end());
}

/// A SKU, why it is short, how many are wanted and how many available.
type Short = (Text, Number, Number, Number);

/// What inventory answers, or somebody in its place.
#[derive(Debug, TypeGenerator)]
enum Answer {
    Reserved,
    Released,
    /// With what is short, so many times over.
    Rejected(#[generator(produce::<Vec<(Text, Number, Number, Number)>>().with().len(0..3_usize))] Vec<Short>, Times),
}

/// What an event differs in from a sound one.
#[derive(Debug, TypeGenerator)]
enum EventChange {
    Id(Id),
    Source(Text),
    Type(Text),
    /// Both of the envelope and of the message in it.
    Order(Id),
    Subject(Id),
    Sequence(Number),
    Time(Number, Number),
    NoTime,
    Data(Damage),
    Traceparent(Text),
    Tracestate(Text),
}

/// An event.
#[derive(Debug, TypeGenerator)]
struct Told {
    answer: Answer,
    #[generator(produce::<Vec<EventChange>>().with().len(0..3_usize))]
    changes: Vec<EventChange>,
}

/// A batch of events.
#[derive(Debug, TypeGenerator)]
struct Batch {
    #[generator(produce::<Vec<Told>>().with().len(0..4_usize))]
    events: Vec<Told>,
    /// All of them come so many times over.
    copies: Times,
}

fn changed_event(order_id: &str, told: &Told) -> Event {
    let about = told.changes.iter().rev().find_map(|change| match change {
        EventChange::Order(id) => Some(String::from(id)),
        _ => None,
    });
    let order_id = about.unwrap_or_else(|| order_id.to_owned());
    let (r#type, data) = encoded(order_id.clone(), &told.answer);
    let mut event = Event { subject: order_id.clone(), r#type, data, ..reserved(&order_id) };
    for change in &told.changes {
        match change {
            EventChange::Id(id) => event.id = id.into(),
            EventChange::Source(text) => event.source = text.into(),
            EventChange::Type(text) => event.r#type = text.into(),
            EventChange::Order(_) => {}
            EventChange::Subject(id) => event.subject = id.into(),
            EventChange::Sequence(number) => event.sequence = number.into(),
            EventChange::Time(seconds, nanos) => {
                event.time = Some(prost_types::Timestamp { seconds: seconds.into(), nanos: nanos.into() });
            }
            EventChange::NoTime => event.time = None,
            EventChange::Data(damage) => event.data = Damage::of(Some(damage), event.data.to_vec()),
            EventChange::Traceparent(text) => event.traceparent = text.into(),
            EventChange::Tracestate(text) => event.tracestate = text.into(),
        }
    }
    event
}

fn encoded(order_id: String, answer: &Answer) -> (String, Bytes) {
    fn of<M: Message + Name>(message: &M) -> (String, Bytes) {
        (M::full_name(), message.encode_to_vec().into())
    }
    match answer {
        Answer::Reserved => of(&StockReserved { order_id }),
        Answer::Released => of(&StockReleased { order_id }),
        Answer::Rejected(shortages, times) => {
            let shortage = |(sku, reason, wanted, available): &Short| Shortage {
                sku: sku.into(),
                reason: reason.into(),
                wanted: wanted.into(),
                available: available.into(),
            };
            let shortages: Vec<_> = shortages.iter().map(shortage).collect();
            of(&StockRejected { order_id, shortages: repeat(&shortages, times) })
        }
    }
}

#[test]
fn deliver_answers_a_result_for_each_event_or_a_declared_refusal() {
    let target = check!().with_test_time(TEST_TIME);
    let target = target.with_generator((produce::<Batch>(), produce::<Option<Damage>>()));
    let host = Host::start();
    let service = host.block_on(Service::start());
    let known = reserved(&host.block_on(service.place(order())).order_id);
    assert_eq!(host.block_on(service.deliver(slice::from_ref(&known))), ["APPLIED"]);
    let deliver = async |(batch, damage): &(Batch, Option<Damage>)| {
        let order_id = service.place(order()).await.order_id;
        let events: Vec<_> = batch.events.iter().map(|told| changed_event(&order_id, told)).collect();
        let batch = DeliverRequest { events: repeat(&events, &batch.copies) };
        let sent = Damage::of(damage.as_ref(), batch.encode_to_vec());
        let decoded = DeliverRequest::decode(sent.clone());
        match call(&service.channel, "/events.v1.EventReceiver/Deliver", Request::new(sent.clone())).await {
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
    target.for_each(host.test_each(deliver));
    host.block_on(service.end());
}
