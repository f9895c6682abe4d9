//! Faults that come from outside: from callers, from events, from whoever reaches a port.

use std::{
    collections::HashSet,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use prost::{Message, Name};
use proto::{
    events::v1::{DeliverRequest, Event, Outcome},
    inventory::v1::StockReserved,
    orders::v1::{CreateOrderRequest, Order, OrderCreated, OrderItem, order_service_client::OrderServiceClient},
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{Code, Status, codegen::http::uri::PathAndQuery, transport::Endpoint};
use uuid::Uuid;

use super::{
    clients::{Client, HANG_UP_MAX, ending_of, limited, request},
    faults::Poison,
    history::Ending,
    proxy::{Hold, Trap, TrapGuard},
    site::Part,
    wire::Mark,
    world::World,
};
use harness::replay::event_again;

const PATIENCE: Duration = Duration::from_secs(20);
/// How long an event that kills its receiver may live.
const DEADLY_LIMIT: Duration = Duration::from_secs(110);
/// Longer than any fault keeps a database away.
const ENQUEUE_LIMIT: Duration = Duration::from_secs(100);
/// How long the inbox may take to forget what it should.
const PRUNE_LIMIT: Duration = Duration::from_secs(20);
const HANG_UPS: u32 = 200;
const SAME: usize = 50;
/// Calls at once, of which a service has room for a fraction.
const OVERLOAD: usize = 1500;
const CALLS_PER_CONNECTION: usize = 150;
const AGAIN: i64 = 20;

fn client(world: &World, name: &str) -> Client {
    Client::new(name.into(), &world.target, world.history.clone())
}

/// Many callers who hang up at any moment of their call.
pub(super) async fn hang_up(world: &Arc<World>) -> bool {
    let mut callers = JoinSet::new();
    let hung_up = || world.history.known().hung_up;
    let (caller, before) = (client(world, "hang-up"), hung_up());
    for _ in 0..HANG_UPS {
        let mut caller = caller.clone();
        callers.spawn(async move {
            sleep(HANG_UP_MAX.mul_f64(fastrand::f64())).await;
            // Most of them early: most calls are short.
            let hang_up = HANG_UP_MAX.mul_f64(fastrand::f64().powi(2));
            caller.place(&request(), Duration::ZERO, Some(hang_up)).await
        });
    }
    callers.join_all().await;
    // Others hang up as well, a few.
    hung_up() - before > u64::from(HANG_UPS / 10)
}

/// The same order many times at once, and then another under its request id.
pub(super) async fn same_request(world: &Arc<World>) -> Result<bool> {
    let content = request();
    let mut callers = JoinSet::new();
    for number in 0..SAME {
        let (mut caller, content) = (client(world, &format!("same-{number}")), content.clone());
        callers.spawn(async move { caller.place(&content, PATIENCE, None).await });
    }
    let placed: Vec<Order> = callers.join_all().await.into_iter().flatten().collect();
    let ids: HashSet<&str> = placed.iter().map(|order| order.order_id.as_str()).collect();
    if ids.len() > 1 {
        world.history.violation(format!("request {} was answered with {} orders", content.request_id, ids.len()));
    }
    if placed.is_empty() {
        return Ok(false);
    }
    let other = CreateOrderRequest { customer_id: "somebody-else".into(), ..content };
    match world.target.orders().create_order(limited(other.clone())).await {
        Ok(order) => {
            let order_id = &order.get_ref().order_id;
            world.history.violation(format!("request {} was used again, for order {order_id}", other.request_id));
            Ok(true)
        }
        Err(status) => Ok(placed.len() > SAME / 2 && ending_of(&status) == Ending::Fail),
    }
}

/// More calls at once than there is room for: some have to be refused, at once and without harm.
pub(super) async fn overload(world: &Arc<World>) -> bool {
    let refused = || world.history.known().codes.get("ResourceExhausted").copied().unwrap_or_default();
    let before = refused();
    for _ in 0..3 {
        let mut callers = JoinSet::new();
        let mut caller = client(world, "overload");
        for number in 0..OVERLOAD {
            if number % CALLS_PER_CONNECTION == 0 {
                caller = client(world, "overload");
            }
            let mut caller = caller.clone();
            callers.spawn(async move { caller.place(&request(), Duration::ZERO, None).await });
        }
        callers.join_all().await;
        if refused() > before {
            return true;
        }
    }
    false
}

/// An event that nobody can apply, as a service with a bug would enqueue it. It has to end dead, and no other.
pub(super) async fn poison(world: &Arc<World>, poison: Poison) -> Result<bool> {
    if poison == Poison::Deadly {
        return be_deadly(world).await;
    }
    let aggregate = Uuid::now_v7();
    let (part, event_type, payload) = match poison {
        Poison::Undecodable => (Part::Orders, OrderCreated::full_name(), vec![0xff; 64]),
        Poison::UnknownType => (Part::Orders, "orders.v1.Unheard".into(), Vec::new()),
        _ => {
            let reserved = StockReserved { order_id: aggregate.into() };
            (Part::Inventory, StockReserved::full_name(), reserved.encode_to_vec())
        }
    };
    let event_id = Uuid::now_v7();
    let began = Instant::now();
    loop {
        let enqueued = enqueue(world, part, aggregate, event_id, &event_type, &payload).await;
        // A failure leaves open whether it is there, and where it is it has to die.
        if enqueued.is_ok() || began.elapsed() > ENQUEUE_LIMIT {
            world.poison(aggregate);
            return enqueued.map(|()| true);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

async fn enqueue(
    world: &World,
    part: Part,
    aggregate: Uuid,
    event_id: Uuid,
    event_type: &str,
    payload: &[u8],
) -> Result<()> {
    sqlx::query(
        "-- chaos: enqueue poison
        INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload) VALUES ($1, 1, $2, $3, $4)
        ON CONFLICT DO NOTHING",
    )
    .bind(aggregate)
    .bind(event_id)
    .bind(event_type)
    .bind(payload)
    .execute(&mut world.site.connect(part).await?)
    .await?;
    Ok(())
}

/// Traps on the way to inventory-service that kill it whenever an event of the customer comes, `times` at most.
fn set_deadly(world: &World, customer: &str, times: u32, kills: &Count) -> Vec<TrapGuard> {
    let set = |relay| {
        let (seen, deed) = (kills.clone(), kills.clone());
        let (customer, receiver) = (customer.to_owned(), world.site.unit(Part::Inventory).clone());
        world.site.to_receiver(relay).set_trap(Trap {
            at: Box::new(move |mark| {
                let carries = |message: &[u8]| message.windows(customer.len()).any(|part| part == customer.as_bytes());
                seen.get() < times && matches!(mark, Mark::Request(message) if carries(message))
            }),
            hold: Hold::Keep,
            deed: Box::new(move || {
                deed.add();
                receiver.signal(Signal::KILL);
            }),
            times: u32::MAX,
            sprung: None,
        })
    };
    [Part::OrdersRelay1, Part::OrdersRelay2].map(set).into()
}

async fn place_for(world: &World, customer: String) -> Option<Uuid> {
    let order = CreateOrderRequest { customer_id: customer, ..request() };
    client(world, "deadly").place(&order, PATIENCE, None).await?.order_id.parse().ok()
}

/// The receiver crashes on one event a few times, and then takes it: no other may suffer for it.
pub(super) async fn crash_on_event(world: &Arc<World>, times: u32) -> Result<bool> {
    let (customer, kills) = (format!("deadly-{}", Uuid::new_v4()), Count::default());
    let _guards = set_deadly(world, &customer, times, &kills);
    let placed = place_for(world, customer).await;
    let began = Instant::now();
    while placed.is_some() && kills.get() < times && began.elapsed() < PATIENCE {
        sleep(Duration::from_millis(50)).await;
    }
    Ok(kills.get() >= times)
}

/// The receiver crashes on one event every time, until the relays have found out which it is.
async fn be_deadly(world: &Arc<World>) -> Result<bool> {
    let (customer, kills) = (format!("deadly-{}", Uuid::new_v4()), Count::default());
    let _guards = set_deadly(world, &customer, u32::MAX, &kills);
    let Some(order_id) = place_for(world, customer).await else { return Ok(false) };
    let began = Instant::now();
    while began.elapsed() < DEADLY_LIMIT {
        // A database that is away is asked again.
        if is_dead(world, order_id).await.unwrap_or(false) {
            world.poison(order_id);
            return Ok(true);
        }
        sleep(Duration::from_millis(200)).await;
    }
    world.history.violation(format!(
        "an event that has killed its receiver {} times is not dead after {DEADLY_LIMIT:?}: order {order_id}",
        kills.get()
    ));
    Ok(false)
}

async fn is_dead(world: &World, order_id: Uuid) -> Result<bool> {
    let dead = sqlx::query_scalar(
        "-- chaos: is dead
        SELECT EXISTS (SELECT FROM outbox WHERE aggregate_id = $1 AND visible_at = 'infinity')",
    );
    Ok(dead.bind(order_id).fetch_one(&mut world.site.connect(Part::Orders).await?).await?)
}

/// Orders that are long delivered: each is delivered again, and one of them after the inbox was made to forget it.
pub(super) async fn deliver_again(world: &Arc<World>) -> Result<bool> {
    let mut events = read_delivered(world).await?;
    let Some(forgotten) = events.pop() else { return Ok(false) };
    let again = outcomes(world, events.clone()).await?;
    for (event, (outcome, reason)) in events.iter().zip(&again) {
        let Event { id, subject, .. } = event;
        match outcome {
            Outcome::Applied => {
                world.history.violation(format!("DOUBLED: event {id} of order {subject} was applied again"));
            }
            Outcome::Rejected => {
                world
                    .history
                    .violation(format!("event {id} of order {subject}, applied long ago, was rejected: {reason}"));
            }
            _ => {}
        }
    }
    let pruned = deliver_pruned(world, forgotten).await?;
    Ok(again.iter().any(|(outcome, _)| *outcome == Outcome::Duplicate) && pruned)
}

/// The inbox forgets what is old, so the event is made old, and the service's own pruning awaited.
async fn deliver_pruned(world: &Arc<World>, mut event: Event) -> Result<bool> {
    let id: Uuid = event.id.parse()?;
    let mut inventory = world.site.connect(Part::Inventory).await?;
    world.forgotten.lock().unwrap_or_else(PoisonError::into_inner).push(id);
    sqlx::query(
        "-- chaos: age processed message
        UPDATE processed_messages SET processed_at = now() - interval '9 days' WHERE message_id = $1",
    )
    .bind(id)
    .execute(&mut inventory)
    .await?;
    let began = Instant::now();
    let on_record = "-- chaos: is on record
        SELECT EXISTS (SELECT FROM processed_messages WHERE message_id = $1)";
    while sqlx::query_scalar(on_record).bind(id).fetch_one(&mut inventory).await? {
        if began.elapsed() > PRUNE_LIMIT {
            return Ok(false);
        }
        sleep(Duration::from_millis(100)).await;
    }
    if let Some(time) = &mut event.time {
        time.seconds -= 9 * 24 * 3600;
    }
    let answers = outcomes(world, vec![event.clone()]).await?;
    let Some((outcome, reason)) = answers.first() else { return Ok(false) };
    if *outcome == Outcome::Applied {
        world.history.violation(format!("DOUBLED: event {} was applied again after it was forgotten", event.id));
    }
    Ok(*outcome == Outcome::Rejected && reason == "STALE")
}

async fn outcomes(world: &World, events: Vec<Event>) -> Result<Vec<(Outcome, String)>> {
    let answer = world.target.receiver().deliver(limited(DeliverRequest { events })).await?.into_inner();
    Ok(answer.results.into_iter().map(|result| (result.outcome(), result.reason)).collect())
}

/// The events of some orders that have had their effect a while ago, as a relay has delivered them.
async fn read_delivered(world: &World) -> Result<Vec<Event>> {
    let order_ids: Vec<Uuid> = sqlx::query_scalar(
        "-- chaos: choose delivered
        SELECT order_id FROM orders
        WHERE created_at < now() - interval '6 s' AND NOT EXISTS (SELECT FROM outbox WHERE aggregate_id = order_id)
        ORDER BY order_id DESC LIMIT $1",
    )
    .bind(AGAIN)
    .fetch_all(&mut world.site.connect(Part::Orders).await?)
    .await?;
    let effects: Vec<(Uuid, Uuid)> = sqlx::query_as(
        "-- chaos: find their events
        SELECT order_id, event_id FROM reservations WHERE order_id = ANY ($1) AND event_id IS NOT NULL",
    )
    .bind(order_ids)
    .fetch_all(&mut world.site.connect(Part::Inventory).await?)
    .await?;
    let mut events = Vec::with_capacity(effects.len());
    for (order_id, event_id) in effects {
        events.push(event_again(&world.target, &order_id.to_string(), event_id).await?);
    }
    Ok(events)
}

/// What a stranger might send to a port: none of it may be accepted, or harm anybody.
pub(super) async fn send_garbage(world: &Arc<World>, part: Part, seed: u64) -> Result<bool> {
    let (mut rng, mut sent) = (fastrand::Rng::with_seed(seed), 0);
    let address = world.site.unit(part).plan().address;
    for kind in 0..6 {
        let Ok(mut stream) = TcpStream::connect(address).await else { continue };
        sent += u32::from(stream.write_all(&garbage(kind, &mut rng)).await.is_ok());
        if kind % 2 == 0 {
            // Let it answer, or hang up on it.
            let _ = timeout(Duration::from_millis(200), stream.read(&mut [0; 1024])).await;
        }
    }
    let channel = Endpoint::from(world.target.order_service.clone()).connect_lazy();
    let mut orders = OrderServiceClient::new(channel).max_encoding_message_size(usize::MAX);
    let (mut refused, mut bad) = (0, 0);
    for order in bad_orders() {
        bad += 1;
        match orders.create_order(limited(order)).await {
            Ok(order) => world.history.violation(format!("a bad order was accepted: {}", order.get_ref().order_id)),
            Err(status) => refused += u32::from(is_refusal(&status)),
        }
    }
    match send_bad_text(world).await {
        Ok(order) => world.history.violation(format!("an order of no text was accepted: {}", order.order_id)),
        Err(status) => refused += u32::from(is_refusal(&status)),
    }
    Ok(sent > 0 && refused == bad + 1)
}

/// Of what was sent, and not of an outage.
fn is_refusal(status: &Status) -> bool {
    std::error::Error::source(status).is_none()
        && matches!(status.code(), Code::InvalidArgument | Code::OutOfRange | Code::Internal)
}

/// An order as the contract's types cannot hold it: its customer is no UTF-8.
#[derive(Clone, PartialEq, Message)]
struct BadText {
    #[prost(bytes = "vec", tag = "2")]
    customer_id: Vec<u8>,
    #[prost(string, tag = "3")]
    currency_code: String,
    #[prost(message, repeated, tag = "4")]
    items: Vec<OrderItem>,
}

async fn send_bad_text(world: &World) -> Result<Order, Status> {
    let CreateOrderRequest { currency_code, items, .. } = request();
    let bad = BadText { customer_id: vec![b'a', 0xc3, 0x28, 0xff], currency_code, items };
    let mut client = tonic::client::Grpc::new(Endpoint::from(world.target.order_service.clone()).connect_lazy());
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::from_static("/orders.v1.OrderService/CreateOrder");
    let codec = tonic_prost::ProstCodec::<BadText, Order>::default();
    Ok(client.unary(limited(bad), path, codec).await?.into_inner())
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn garbage(kind: u8, rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut random = vec![0; rng.usize(1..8192)];
    rng.fill(&mut random);
    match kind {
        0 => random,
        1 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".into(),
        // Frames of random kinds, and one that announces 16 MiB and ends.
        2 => [PREFACE, &random].concat(),
        3 => [PREFACE, &[0xff, 0xff, 0xff, 0, 1, 0, 0, 0, 1], &random].concat(),
        // Headers that are no HPACK, and a greeting that ends half-way.
        4 => [PREFACE, &[0, 0, 4, 1, 5, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]].concat(),
        _ => PREFACE[..rng.usize(1..PREFACE.len())].into(),
    }
}

/// Orders with numbers that overflow, texts that are none, and more of everything than is allowed.
fn bad_orders() -> Vec<CreateOrderRequest> {
    let item = |quantity, unit_price_minor| OrderItem { sku: "MUG".into(), quantity, unit_price_minor };
    let with = |items| CreateOrderRequest { items, ..request() };
    vec![
        with(vec![item(i32::MAX, 1)]),
        with(vec![item(i32::MIN, 1)]),
        with(vec![item(1_000_000, i64::MAX); 100]),
        with(vec![item(1, 1); 100_000]),
        with(Vec::new()),
        CreateOrderRequest { customer_id: "\0\u{fffd}\u{202e}".into(), ..request() },
        CreateOrderRequest { customer_id: "x".repeat(5 << 20), ..request() },
        CreateOrderRequest { request_id: "not a uuid".into(), currency_code: "€".into(), ..request() },
    ]
}

/// How often something was done.
#[derive(Clone, Debug, Default)]
struct Count(Arc<AtomicU32>);

impl Count {
    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}
