//! Any input of a stranger gets an answer of the contract, and does no harm to the service.
//!
//! A failure prints how to repeat it. `FUZZ_SECONDS=600` feeds each target for ten minutes; `testkit::fuzz` tells more.

use proptest::{collection::vec, option, prelude::*};
use prost::{Message, bytes::Bytes};
use proto::{
    events::v1::{DeliverRequest, DeliverResponse, Event},
    inventory::v1::{AdjustStockRequest, ListStockRequest, ListStockResponse, StockLevel},
    orders::v1::{OrderCreated, OrderItem},
};
use testkit::fuzz::{
    BATCH_MAX, Damage, EventChange, Host, MESSAGE_MAX, Text, call, change_event, damage, doublings, event_changes, id,
    is_refused_by_transport, is_result_of_each, number, number_i32, repeat, text,
};
use tonic::{Request, Status};
use uuid::Uuid;

use crate::{
    client::refusal,
    inventory::Inventory,
    orders::{cancellation_of, event_of, order},
};

/// Asserts that the contract declares this refusal for what was sent: the transport's own for bytes that are too large or no
/// message, else one of `declared`, with its reason.
fn is_declared<M: Message + Default>(status: &Status, sent: &Bytes, limit: usize, declared: &[&str]) {
    if !is_refused_by_transport::<M>(status, sent, limit) {
        let refused = refusal(status);
        assert!(declared.iter().any(|declared| refused.starts_with(declared)), "{refused}");
    }
}

/// How an adjustment differs from a sound one.
#[derive(Clone, Debug)]
enum AdjustmentChange {
    RequestId(Text),
    Sku(Text),
    Delta(i64),
}

fn adjustment_change() -> impl Strategy<Value = AdjustmentChange> {
    prop_oneof![
        id().prop_map(AdjustmentChange::RequestId),
        text().prop_map(AdjustmentChange::Sku),
        number().prop_map(AdjustmentChange::Delta),
    ]
}

fn changed_adjustment(changes: &[AdjustmentChange]) -> AdjustStockRequest {
    let mut request = AdjustStockRequest { request_id: Uuid::new_v4().into(), sku: "MUG".into(), delta: -1 };
    for change in changes {
        match change {
            AdjustmentChange::RequestId(id) => request.request_id = id.into(),
            AdjustmentChange::Sku(text) => request.sku = text.into(),
            AdjustmentChange::Delta(number) => request.delta = *number,
        }
    }
    request
}

#[test]
fn adjust_stock_answers_the_level_or_a_declared_refusal() {
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
    host.test_each(&(vec(adjustment_change(), 0..=3), damage()), &adjust);
    host.block_on(inventory.stop());
}

/// How a call for a page differs from a sound one.
#[derive(Clone, Debug)]
enum PageChange {
    PageSize(i32),
    Token(Text),
    /// A token of the list of this name, for what follows this SKU.
    EncodedToken(Text, Text),
    /// A token of the sound call's list, for what follows this SKU.
    After(Text),
}

fn page_change() -> impl Strategy<Value = PageChange> {
    prop_oneof![
        number_i32().prop_map(PageChange::PageSize),
        text().prop_map(PageChange::Token),
        (text(), text()).prop_map(|(list, last)| PageChange::EncodedToken(list, last)),
        text().prop_map(PageChange::After),
    ]
}

fn changed_page(sound: &ListStockRequest, changes: &[PageChange]) -> ListStockRequest {
    let mut page = sound.clone();
    for change in changes {
        match change {
            PageChange::PageSize(number) => page.page_size = *number,
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
    host.test_each(&(vec(page_change(), 0..=3), damage()), &ask);
    host.block_on(inventory.stop());
}

/// A change of an order, real or invented.
#[derive(Clone, Debug)]
enum Change {
    /// Created with these items, doubled this often, each with a SKU of its own. Without items: with one sound item.
    Created(Vec<Item>, u32),
    Cancelled,
}

/// A SKU, and how many of it, if not one.
type Item = (Text, Option<i32>);

fn change() -> impl Strategy<Value = Change> {
    let items = vec((text(), option::of(number_i32())), 0..=2);
    prop_oneof![
        (items, doublings()).prop_map(|(items, doublings)| Change::Created(items, doublings)),
        Just(Change::Cancelled),
    ]
}

/// An event, and how it differs from a sound one.
#[derive(Clone, Debug)]
struct Told {
    /// One of few.
    order: u8,
    change: Change,
    changes: Vec<EventChange>,
}

fn told() -> impl Strategy<Value = Told> {
    (any::<u8>(), change(), event_changes()).prop_map(|(order, change, changes)| Told { order, change, changes })
}

/// Events, and how often all of them are doubled.
type Batch = (Vec<Told>, u32);

fn event(told: &Told) -> Event {
    let sound = event_of(Uuid::from_u128(told.order.into()), &[("MUG", 1)]);
    let event = match &told.change {
        Change::Created(items, doublings) => {
            let created = created(&sound, items, *doublings);
            Event { data: created.encode_to_vec().into(), ..sound }
        }
        Change::Cancelled => cancellation_of(&sound),
    };
    change_event(event, &told.changes)
}

/// The order of a sound event, with these items instead, if there are any.
fn created(sound: &Event, items: &[Item], doublings: u32) -> OrderCreated {
    let mut created = OrderCreated::decode(sound.data.clone()).unwrap();
    if !items.is_empty() {
        let item = |(sku, quantity): &Item| {
            let quantity = quantity.unwrap_or(1);
            OrderItem { sku: sku.into(), quantity, unit_price_minor: 100 }
        };
        let items: Vec<_> = items.iter().map(item).collect();
        let numbered = |(number, item): (usize, OrderItem)| OrderItem { sku: format!("{}{number}", item.sku), ..item };
        created.items = repeat(&items, doublings).into_iter().enumerate().map(numbered).collect();
    }
    created
}

#[test]
fn deliver_answers_a_result_for_each_event_or_a_declared_refusal() {
    let host = Host::start();
    let inventory = host.block_on(Inventory::serve(&[]));
    let known = order(&[("MUG", 1)]);
    host.block_on(async {
        inventory.put_in(&[("MUG", 1_000_000), ("NAME-1", 1_000_000_000), ("NAME-10", 1)]).await;
        assert_eq!(inventory.client.deliver([&known]).await.unwrap(), ["APPLIED"]);
    });
    let deliver = async |((events, copies), damage): &(Batch, Option<Damage>)| {
        let events: Vec<_> = events.iter().map(event).collect();
        let batch = DeliverRequest { events: repeat(&events, *copies) };
        let sent = Damage::of(damage.as_ref(), batch.encode_to_vec());
        let decoded = DeliverRequest::decode(sent.clone());
        let path = "/events.v1.EventReceiver/Deliver";
        match call(&inventory.client.events, path, Request::new(sent.clone())).await {
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
    host.test_each(&((vec(told(), 0..=3), doublings()), damage()), &deliver);
    host.block_on(async {
        assert_eq!(inventory.answers(&known).await, ["inventory.v1.StockReserved"]);
        inventory.stop().await;
    });
}
