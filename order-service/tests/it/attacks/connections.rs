//! Attacks by connections: those that say nothing, take nothing, or are too many.

use prost::Message;
use proto::orders::v1::{
    CancelOrderRequest, CreateOrderRequest, GetOrderRequest, ListOrdersRequest, OrderItem, WatchOrderRequest,
};
use tokio::{io::AsyncReadExt, task::JoinSet, time::timeout};
use tonic::Code;

use super::{
    LIMIT, MIB, eventually,
    frames::{Connection, DATA, END_HEADERS, END_STREAM, HEADERS, call_of, frame, message},
    victim::Victim,
};
use crate::service::{order, refusal};

const GET: &str = "/orders.v1.OrderService/GetOrder";
const LIST: &str = "/orders.v1.OrderService/ListOrders";
const CREATE: &str = "/orders.v1.OrderService/CreateOrder";

async fn is_closed(connection: &mut Connection) {
    let mut rest = Vec::new();
    let ended = timeout(LIMIT, connection.reader.read_to_end(&mut rest)).await;
    drop(ended.expect("the connection is closed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_say_nothing_are_closed() {
    let victim = Victim::start(&["--hello-seconds", "1"]).await;
    for address in [victim.address, victim.ops] {
        let mut silent = Vec::new();
        for _ in 0..100 {
            silent.push(Connection::silent(address).await);
        }
        // Half of what begins a connection is no more than nothing.
        for connection in &mut silent[..50] {
            connection.send(b"PRI * HTT").await.unwrap();
        }
        victim.serves_the_next_caller().await;
        for connection in &mut silent {
            is_closed(connection).await;
        }
    }
    victim.end().await;
}

/// Their headers have no end, so they cannot answer whether they are still there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_whose_headers_do_not_go_on_are_closed() {
    let victim = Victim::start(&["--ping-seconds", "1", "--ping-timeout-seconds", "1"]).await;
    let mut slow = Vec::new();
    for _ in 0..100 {
        let mut connection = Connection::open(victim.address).await;
        connection.send(&frame(HEADERS, 0, 1, &call_of(CREATE))).await.unwrap();
        slow.push(connection);
    }
    victim.serves_the_next_caller().await;
    for connection in &mut slow {
        is_closed(connection).await;
    }
    victim.end().await;
}

/// They answer pings, so they are not dead; and they keep nobody out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_idle_connections_make_room_for_callers() {
    const IDLE: usize = 10_000;
    let victim = Victim::start(&[]).await;
    let before = victim.resident();
    let mut idle = JoinSet::new();
    for _ in 0..IDLE {
        let mut connection = Connection::open(victim.address).await;
        idle.spawn(async move { while connection.next().await.is_some() {} });
    }
    victim.serves_the_next_caller().await;
    let mut kept = IDLE;
    eventually("most are closed", async || {
        while idle.try_join_next().is_some() {
            kept -= 1;
        }
        kept <= 1000
    })
    .await;
    if let (Some(before), Some(now)) = (before, victim.resident()) {
        assert!(now.saturating_sub(before) < 256 * MIB, "{before} bytes of memory became {now}");
    }
    victim.end().await;
}

/// An order of the largest size for this customer.
fn large_order(customer_id: &str) -> CreateOrderRequest {
    let item = OrderItem { sku: "S".repeat(64), quantity: 1, unit_price_minor: 1 };
    CreateOrderRequest { customer_id: customer_id.into(), items: vec![item; 100], ..order() }
}

/// Each would hold a page of most of a megabyte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_are_never_read_cost_little_memory() {
    const ANSWERS: u32 = 100;
    const ATTACKERS: usize = 2;
    let patient = ["--database-acquire-ms", "60000", "--request-seconds", "60"];
    let victim = Victim::start(&[&patient[..], &["--unread-mib", "8"]].concat()).await;
    let mut orders = JoinSet::new();
    for _ in 0..100 {
        let mut caller = victim.connect();
        orders.spawn(async move { caller.create_order(large_order("large")).await.unwrap() });
    }
    orders.join_all().await;
    let before = victim.resident();
    let page = ListOrdersRequest { customer_id: "large".into(), page_size: 100, page_token: String::new() };
    let asked = message(&page.encode_to_vec());
    let mut attackers = JoinSet::new();
    for _ in 0..ATTACKERS {
        let (asked, address) = (asked.clone(), victim.address);
        attackers.spawn(async move {
            let mut connection = Connection::open_without_window(address).await;
            // One after the other: it is no flood of queries.
            for call in 0..ANSWERS {
                let begin = frame(HEADERS, END_HEADERS, 1 + 2 * call, &call_of(LIST));
                let body = frame(DATA, END_STREAM, 1 + 2 * call, &asked);
                let is_sent = connection.send(&[begin, body].concat()).await.is_ok();
                if !is_sent || connection.find("an answer", |frame| frame.kind == HEADERS).await.is_none() {
                    return call;
                }
            }
            ANSWERS
        });
    }
    victim.serves_the_next_caller().await;
    let answers = attackers.join_all().await;
    assert!(answers.iter().all(|answers| *answers < ANSWERS), "nobody was shed after {answers:?} answers");
    if let (Some(before), Some(now)) = (before, victim.resident()) {
        assert!(now.saturating_sub(before) < 64 * MIB, "{before} bytes of memory became {now}");
    }
    victim.end().await;
}

/// The caller that waits for its order takes what there is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_takes_nothing_is_closed_and_one_that_waits_is_not() {
    let victim = Victim::start(&["--unread-seconds", "1"]).await;
    let mut caller = victim.connect();
    let order_id = caller.create_order(large_order("ann")).await.unwrap().into_inner().order_id;
    let watched = caller.watch_order(WatchOrderRequest { order_id: order_id.clone() }).await;
    let mut watched = watched.unwrap().into_inner();
    assert!(watched.message().await.unwrap().is_some());
    let mut connection = Connection::open_without_window(victim.address).await;
    let asked = message(&GetOrderRequest { order_id: order_id.clone() }.encode_to_vec());
    let call = [frame(HEADERS, END_HEADERS, 1, &call_of(GET)), frame(DATA, END_STREAM, 1, &asked)].concat();
    connection.send(&call).await.unwrap();
    connection.find("an answer", |frame| frame.kind == HEADERS).await.unwrap();
    victim.serves_the_next_caller().await;
    is_closed(&mut connection).await;
    caller.cancel_order(CancelOrderRequest { order_id, request_id: String::new() }).await.unwrap();
    assert!(timeout(LIMIT, watched.message()).await.expect("news").unwrap().is_some());
    victim.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_of_one_customer_leave_room_for_those_of_others() {
    let victim = Victim::start(&["--watchers", "100", "--watchers-per-customer", "50"]).await;
    let place = async |customer_id: &str| {
        let request = CreateOrderRequest { customer_id: customer_id.into(), ..order() };
        victim.connect().create_order(request).await.unwrap().into_inner().order_id
    };
    let (greedy, modest) = (place("greedy").await, place("modest").await);
    let mut caller = victim.connect();
    let mut watching = Vec::new();
    for watcher in 0..60 {
        let watched = caller.watch_order(WatchOrderRequest { order_id: greedy.clone() }).await;
        if watcher < 50 {
            watching.push(watched.unwrap());
        } else {
            refusal(watched.map(|_| tonic::Response::new(()))).is(Code::ResourceExhausted, "TOO_MANY_WATCHERS");
        }
    }
    let mut others = victim.connect().watch_order(WatchOrderRequest { order_id: modest }).await.unwrap().into_inner();
    assert!(others.message().await.unwrap().is_some());
    victim.serves_the_next_caller().await;
    victim.end().await;
}
