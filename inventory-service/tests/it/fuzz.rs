//! Whatever a stranger sends is answered as the contract says, and neither harms the service nor stays with it.

use bolero::{TypeGenerator, check, produce};
use prost::{Message, bytes::Bytes};
use proto::{
    events::v1::{DeliverRequest, DeliverResponse, Event},
    inventory::v1::{AdjustStockRequest, ListStockRequest, ListStockResponse, StockLevel},
    orders::v1::{OrderCreated, OrderItem},
};
use testkit::fuzz::{
    BATCH_MAX, Damage, Host, Id, MESSAGE_MAX, Number, TEST_TIME, Text, Times, call, is_refused_by_transport,
    is_result_of_each, repeat,
};
use tonic::{Request, Status};
use uuid::Uuid;

use crate::{
    client::refusal,
    inventory::Inventory,
    orders::{cancellation_of, event_of, order},
};

/// Asserts that the refusal is one the contract has for what was sent: the transport's own for what is too large or no
/// message at all, and one of `declared`, with its reason, for anything else.
fn is_declared<M: Message + Default>(status: &Status, sent: &Bytes, limit: usize, declared: &[&str]) {
    if !is_refused_by_transport::<M>(status, sent, limit) {
        let refused = refusal(status);
        assert!(declared.iter().any(|declared| refused.starts_with(declared)), "{refused}");
    }
}

/// What an adjustment differs in from a sound one.
#[derive(Debug, TypeGenerator)]
enum AdjustmentChange {
    RequestId(Id),
    Sku(Text),
    Delta(Number),
}

fn changed_adjustment(changes: &[AdjustmentChange]) -> AdjustStockRequest {
    let mut request = AdjustStockRequest { request_id: Uuid::new_v4().into(), sku: "MUG".into(), delta: -1 };
    for change in changes {
        match change {
            AdjustmentChange::RequestId(id) => request.request_id = id.into(),
            AdjustmentChange::Sku(text) => request.sku = text.into(),
            AdjustmentChange::Delta(number) => request.delta = number.into(),
        }
    }
    request
}

#[test]
fn adjust_stock_answers_the_level_or_a_declared_refusal() {
    let target = check!().with_test_time(TEST_TIME);
    let changes = produce::<Vec<AdjustmentChange>>().with().len(0..4_usize);
    let target = target.with_generator((changes, produce::<Option<Damage>>()));
    let host = Host::start();
    let inventory = host.block_on(Inventory::serve(&[]));
    let known = Uuid::new_v4().to_string();
    assert_eq!(host.block_on(inventory.client.adjust_stock(&known, "KETTLE", 7)).unwrap(), 7);
    let adjust = async |(changes, damage): &(Vec<AdjustmentChange>, Option<Damage>)| {
        let sent = Damage::of(damage.as_ref(), changed_adjustment(changes).encode_to_vec());
        let path = "/inventory.v1.InventoryService/AdjustStock";
        match call(&inventory.client.channel, path, Request::new(sent.clone())).await {
            Ok(answer) => {
                let level = StockLevel::decode(answer.into_inner()).unwrap();
                assert_eq!(level.sku, AdjustStockRequest::decode(sent).unwrap().sku);
                assert_eq!(inventory.client.get_stock(&level.sku).await.unwrap(), level.available);
            }
            Err(refused) => {
                let declared = [
                    "InvalidArgument INVALID_ADJUSTMENT",
                    "InvalidArgument REQUEST_ID_REUSED",
                    "FailedPrecondition INSUFFICIENT_STOCK",
                ];
                is_declared::<AdjustStockRequest>(&refused, &sent, MESSAGE_MAX, &declared);
            }
        }
        let left = inventory.client.get_stock("KETTLE").await.unwrap();
        assert_eq!(inventory.client.adjust_stock(&known, "KETTLE", 7).await.unwrap(), left);
    };
    target.for_each(host.test_each(adjust));
    host.block_on(inventory.stop());
}

/// What a call for a page differs in from a sound one.
#[derive(Debug, TypeGenerator)]
enum PageChange {
    PageSize(Number),
    Token(Text),
    /// Of the name of a list, and where it is to go on.
    EncodedToken(Text, Text),
    /// Where the list of the sound call is to go on.
    After(Text),
}

fn changed_page(sound: &ListStockRequest, changes: &[PageChange]) -> ListStockRequest {
    let mut page = sound.clone();
    for change in changes {
        match change {
            PageChange::PageSize(number) => page.page_size = number.into(),
            PageChange::Token(text) => page.page_token = text.into(),
            PageChange::EncodedToken(list, last) => {
                page.page_token = chassis::encode_page_token(&String::from(list), &String::from(last));
            }
            PageChange::After(last) => page.page_token = chassis::encode_page_token("stock", &String::from(last)),
        }
    }
    page
}

#[test]
fn list_stock_answers_a_page_or_a_declared_refusal() {
    let target = check!().with_test_time(TEST_TIME);
    let changes = produce::<Vec<PageChange>>().with().len(0..4_usize);
    let target = target.with_generator((changes, produce::<Option<Damage>>()));
    let host = Host::start();
    let inventory = host.block_on(Inventory::serve(&[]));
    let sound = host.block_on(async {
        inventory.put_in(&[("A", 1), ("B", 2), ("C", 3)]).await;
        let first = inventory.client.list_stock(2, "").await.unwrap();
        ListStockRequest { page_size: 2, page_token: first.next_page_token }
    });
    let listed = host.block_on(inventory.client.list_stock(sound.page_size, &sound.page_token)).unwrap();
    assert_eq!(listed.levels.len(), 1);
    let ask = async |(changes, damage): &(Vec<PageChange>, Option<Damage>)| {
        let sent = Damage::of(damage.as_ref(), changed_page(&sound, changes).encode_to_vec());
        let path = "/inventory.v1.InventoryService/ListStock";
        match call(&inventory.client.channel, path, Request::new(sent.clone())).await {
            Ok(answer) => {
                ListStockRequest::decode(sent).unwrap();
                let levels = ListStockResponse::decode(answer.into_inner()).unwrap().levels;
                assert!(levels.is_sorted_by(|one, next| one.sku < next.sku), "{levels:?}");
            }
            Err(refused) => {
                is_declared::<ListStockRequest>(&refused, &sent, MESSAGE_MAX, &["InvalidArgument INVALID_PAGE"]);
            }
        }
        let again = inventory.client.list_stock(sound.page_size, &sound.page_token).await.unwrap();
        assert_eq!(again, listed);
    };
    target.for_each(host.test_each(ask));
    host.block_on(inventory.stop());
}

/// A SKU, and how many of it if not one.
type Item = (Text, Option<Number>);

/// What becomes of an order, or is said to.
#[derive(Debug, TypeGenerator)]
enum Change {
    /// With items that differ in their SKUs, so many times over.
    Created(#[generator(produce::<Vec<(Text, Option<Number>)>>().with().len(0..3_usize))] Vec<Item>, Times),
    Cancelled,
}

/// What an event differs in from a sound one.
#[derive(Debug, TypeGenerator)]
enum EventChange {
    Id(Id),
    Source(Text),
    Type(Text),
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
    /// One of few.
    order: u8,
    change: Change,
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

fn changed_event(told: &Told) -> Event {
    let sound = event_of(Uuid::from_u128(told.order.into()), &[("MUG", 1)]);
    let mut event = match &told.change {
        Change::Created(items, times) => {
            let created = created(&sound, items, times);
            Event { data: created.encode_to_vec().into(), ..sound }
        }
        Change::Cancelled => cancellation_of(&sound),
    };
    for change in &told.changes {
        match change {
            EventChange::Id(id) => event.id = id.into(),
            EventChange::Source(text) => event.source = text.into(),
            EventChange::Type(text) => event.r#type = text.into(),
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

/// The order of a sound event, with these items instead, if there are any.
fn created(sound: &Event, items: &[Item], times: &Times) -> OrderCreated {
    let mut created = OrderCreated::decode(sound.data.clone()).unwrap();
    if !items.is_empty() {
        let item = |(sku, quantity): &Item| {
            let quantity = quantity.as_ref().map_or(1, i32::from);
            OrderItem { sku: sku.into(), quantity, unit_price_minor: 100 }
        };
        let items: Vec<_> = items.iter().map(item).collect();
        let numbered = |(number, item): (usize, OrderItem)| OrderItem { sku: format!("{}{number}", item.sku), ..item };
        created.items = repeat(&items, times).into_iter().enumerate().map(numbered).collect();
    }
    created
}

#[test]
fn deliver_answers_a_result_for_each_event_or_a_declared_refusal() {
    let target = check!().with_test_time(TEST_TIME);
    let target = target.with_generator((produce::<Batch>(), produce::<Option<Damage>>()));
    let host = Host::start();
    let inventory = host.block_on(Inventory::serve(&[]));
    let known = order(&[("MUG", 1)]);
    host.block_on(async {
        inventory.put_in(&[("MUG", 1_000_000), ("NAME-1", 1_000_000_000), ("NAME-10", 1)]).await;
        assert_eq!(inventory.client.deliver([&known]).await.unwrap(), ["APPLIED"]);
    });
    let deliver = async |(batch, damage): &(Batch, Option<Damage>)| {
        let events: Vec<_> = batch.events.iter().map(changed_event).collect();
        let batch = DeliverRequest { events: repeat(&events, &batch.copies) };
        let sent = Damage::of(damage.as_ref(), batch.encode_to_vec());
        let decoded = DeliverRequest::decode(sent.clone());
        let path = "/events.v1.EventReceiver/Deliver";
        match call(&inventory.client.channel, path, Request::new(sent.clone())).await {
            Ok(answer) => {
                is_result_of_each(&decoded.unwrap().events, &DeliverResponse::decode(answer.into_inner()).unwrap());
            }
            Err(refused) => {
                let too_many = decoded.is_ok_and(|batch| batch.events.len() > 1000);
                let declared: &[&str] = if too_many { &["InvalidArgument INVALID_BATCH events"] } else { &[] };
                is_declared::<DeliverRequest>(&refused, &sent, BATCH_MAX, declared);
            }
        }
        assert_eq!(inventory.client.deliver([&known]).await.unwrap(), ["DUPLICATE"]);
    };
    target.for_each(host.test_each(deliver));
    host.block_on(async {
        assert_eq!(inventory.answers(&known).await, ["inventory.v1.StockReserved"]);
        inventory.stop().await;
    });
}
