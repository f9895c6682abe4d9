//! Clients: they place orders, repeat calls without an answer, hang up, cancel, and watch.

use std::{sync::Arc, time::Duration};

use proto::{
    inventory::v1::{AdjustStockRequest, inventory_service_client::InventoryServiceClient},
    loyalty::v1::{GetBalanceRequest, loyalty_service_client::LoyaltyServiceClient},
    orders::v1::{
        CancelOrderRequest, CreateOrderRequest, Order, OrderItem, OrderStatus, WatchOrderRequest,
        order_service_client::OrderServiceClient,
    },
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Uri},
};
use uuid::Uuid;

use super::{
    history::{Ending, History},
    world::World,
};
use chassis::connect_lazily;
use harness::stress::check_reply;

const CLIENTS: u32 = 16;
/// The longest pause of a client between two orders.
const PAUSE_MAX: Duration = Duration::from_millis(330);
/// The deadline of a call.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(3);
/// How long a client repeats a call before it gives up the order.
const PATIENCE: Duration = Duration::from_secs(45);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(400);
const WATCH_LIMIT: Duration = Duration::from_secs(20);
/// A caller that hangs up does so within this.
pub(super) const HANG_UP_MAX: Duration = Duration::from_millis(50);
/// SKUs of the demo stock.
const SKUS: [&str; 5] = ["COFFEE-BEANS", "FILTER-PAPER", "GRINDER", "KETTLE", "MUG"];

/// Starts the clients. After `stop` they finish their last orders and end.
pub(super) fn start(world: &World, stop: &CancellationToken) -> JoinSet<()> {
    let mut clients = JoinSet::new();
    for number in 1..=CLIENTS {
        let client = Client::new(format!("client-{number}"), world);
        clients.spawn(client.work(stop.clone()));
    }
    clients
}

/// One client, with a connection of its own.
#[derive(Clone)]
pub(super) struct Client {
    name: Arc<str>,
    orders: OrderServiceClient<Channel>,
    inventory: InventoryServiceClient<Channel>,
    loyalty: LoyaltyServiceClient<Channel>,
    history: Arc<History>,
}

impl Client {
    pub(super) fn new(name: String, world: &World) -> Self {
        let connect = |url: &Uri| connect_lazily(&Endpoint::from(url.clone()), &world.customers);
        Self {
            name: name.into(),
            orders: OrderServiceClient::new(connect(&world.target.order_service)),
            inventory: InventoryServiceClient::new(connect(&world.target.inventory_service)),
            loyalty: LoyaltyServiceClient::new(connect(&world.loyalty)),
            history: world.history.clone(),
        }
    }

    async fn work(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let request = request();
            // Some calls are not repeated: then nobody knows whether the order was placed.
            let patience = if fastrand::u8(..100) < 90 { PATIENCE } else { Duration::ZERO };
            let hang_up = (fastrand::u8(..100) < 7).then(|| HANG_UP_MAX.mul_f64(fastrand::f64()));
            if let Some(order) = self.place(&request, patience, hang_up).await {
                match fastrand::u8(..100) {
                    0..10 => self.cancel(&order).await,
                    10..14 => self.watch(&order).await,
                    14..16 => self.adjust().await,
                    16..20 => self.ask_balance(&order).await,
                    _ => {}
                }
            }
            let _ = timeout(PAUSE_MAX.mul_f64(fastrand::f64()), stop.cancelled()).await;
        }
    }

    /// Places an order. Repeats the call with the same request id until it is answered, or until `patience` is over.
    /// With `hang_up`, drops the first call after that time.
    pub(super) async fn place(
        &mut self,
        request: &CreateOrderRequest,
        patience: Duration,
        mut hang_up: Option<Duration>,
    ) -> Option<Order> {
        let id: Uuid = request.request_id.parse().unwrap_or_default();
        let began = Instant::now();
        let patient = u64::from(!patience.is_zero());
        self.history.known().asked += patient;
        for attempt in 0_u32.. {
            self.history.invoke(&self.name, "create", id);
            let call = self.orders.create_order(limited(request.clone()));
            let answer = timeout(hang_up.take().unwrap_or(CALL_LIMIT * 2), call).await;
            match self.ending("create", id, answer) {
                Ok(order) => {
                    let order = order.into_inner();
                    self.history.known().answered += patient;
                    self.acknowledged(request, &order, attempt);
                    return Some(order);
                }
                Err((Ending::Fail, code)) => {
                    self.history.violation(format!("a valid order was refused with {code:?}: request {id}"));
                    return None;
                }
                Err(_) if began.elapsed() >= patience => return None,
                Err(_) => sleep(RETRY_PAUSE_MAX.mul_f64(fastrand::f64())).await,
            }
        }
        None
    }

    fn acknowledged(&self, request: &CreateOrderRequest, order: &Order, attempt: u32) {
        let (Ok(request_id), Ok(order_id)) = (request.request_id.parse(), order.order_id.parse()) else {
            return self.history.violation(format!("an order without ids: {order:?}"));
        };
        if let Err(error) = check_status(request, order) {
            self.history.violation(error);
        }
        let mut known = self.history.known();
        let orders: &mut Vec<Uuid> = known.acknowledged.entry(request_id).or_default();
        if !orders.contains(&order_id) {
            orders.push(order_id);
        }
        known.recovered += u64::from(attempt > 0);
    }

    /// Cancels an order, and repeats the call until it is answered.
    async fn cancel(&mut self, order: &Order) {
        let id = Uuid::new_v4();
        let request = CancelOrderRequest { request_id: id.into(), order_id: order.order_id.clone() };
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            self.history.invoke(&self.name, "cancel", id);
            let answer = timeout(CALL_LIMIT * 2, self.orders.cancel_order(limited(request.clone()))).await;
            match self.ending("cancel", id, answer) {
                Ok(cancelled) if cancelled.get_ref().status() == OrderStatus::Cancelled => {
                    return self.history.known().cancelled.extend(order.order_id.parse::<Uuid>());
                }
                Ok(cancelled) => {
                    return self.history.violation(format!("CancelOrder was answered {:?}", cancelled.get_ref()));
                }
                Err((Ending::Fail, Code::FailedPrecondition)) => {
                    return self.history.known().refused.extend(order.order_id.parse::<Uuid>());
                }
                Err((Ending::Fail, code)) => {
                    let order_id = &order.order_id;
                    return self
                        .history
                        .violation(format!("the cancellation of order {order_id} was refused with {code:?}"));
                }
                Err(_) => sleep(RETRY_PAUSE_MAX.mul_f64(fastrand::f64())).await,
            }
        }
    }

    /// Watches an order until it is settled, the stream ends, or the time limit is over.
    async fn watch(&mut self, order: &Order) {
        let id: Uuid = order.order_id.parse().unwrap_or_default();
        self.history.invoke(&self.name, "watch", id);
        let watching = async {
            let request = WatchOrderRequest { order_id: order.order_id.clone() };
            let mut orders = self.orders.watch_order(request).await?.into_inner();
            let mut last = None;
            while let Some(order) = orders.message().await? {
                last = Some(order.status());
            }
            Ok(last)
        };
        match timeout(WATCH_LIMIT, watching).await {
            Ok(Ok(Some(status))) => {
                self.history.end(&self.name, "watch", id, Ending::Ok, status.as_str_name());
                if status != OrderStatus::Pending {
                    self.history.known().settled.push((id, status));
                }
            }
            Ok(Err(status)) => {
                let ending = ending_of(&status);
                self.note_code("watch", id, ending, &status);
                if ending == Ending::Fail {
                    self.history.violation(format!("order {id} could not be watched: {status}"));
                }
            }
            Ok(Ok(None)) | Err(_) => self.history.end(&self.name, "watch", id, Ending::Unknown, ""),
        }
    }

    /// Adds one to the stock of a SKU, exactly once.
    async fn adjust(&mut self) {
        let id = Uuid::new_v4();
        let sku = fastrand::choice(SKUS).unwrap_or_default();
        let request = AdjustStockRequest { request_id: id.into(), sku: sku.into(), delta: 1 };
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            self.history.invoke(&self.name, "adjust", id);
            let answer = timeout(CALL_LIMIT * 2, self.inventory.adjust_stock(limited(request.clone()))).await;
            match self.ending("adjust", id, answer) {
                Ok(_) => return self.history.known().adjusted.push(id),
                Err((Ending::Fail, code)) => {
                    return self
                        .history
                        .violation(format!("a valid adjustment was refused with {code:?}: request {id}"));
                }
                Err(_) => sleep(RETRY_PAUSE_MAX.mul_f64(fastrand::f64())).await,
            }
        }
    }

    /// Asks for the points of the customer, once.
    async fn ask_balance(&mut self, order: &Order) {
        let id: Uuid = order.order_id.parse().unwrap_or_default();
        let request = GetBalanceRequest { customer_id: order.customer_id.clone() };
        self.history.invoke(&self.name, "balance", id);
        let answer = timeout(CALL_LIMIT * 2, self.loyalty.get_balance(limited(request))).await;
        if let Err((Ending::Fail, code)) = self.ending("balance", id, answer) {
            self.history.violation(format!("the balance of {} was refused with {code:?}", order.customer_id));
        }
    }

    fn ending<T>(
        &self,
        call: &'static str,
        id: Uuid,
        answer: Result<Result<T, Status>, tokio::time::error::Elapsed>,
    ) -> Result<T, (Ending, Code)> {
        match answer {
            Ok(Ok(answer)) => {
                self.history.end(&self.name, call, id, Ending::Ok, "");
                Ok(answer)
            }
            Ok(Err(status)) => {
                let ending = ending_of(&status);
                self.note_code(call, id, ending, &status);
                Err((ending, status.code()))
            }
            Err(_) => {
                self.history.known().hung_up += 1;
                self.history.end(&self.name, call, id, Ending::Unknown, "hung up");
                Err((Ending::Unknown, Code::DeadlineExceeded))
            }
        }
    }

    fn note_code(&self, call: &'static str, id: Uuid, ending: Ending, status: &Status) {
        let code = format!("{:?}", status.code());
        *self.history.known().codes.entry(code.clone()).or_default() += 1;
        self.history.end(&self.name, call, id, ending, &format!("{code}: {}", status.message()));
    }
}

/// A status with a source comes from the client's own library: its connection broke. The policy allows clients all of their
/// calls, so a denial is a finding.
pub(super) fn ending_of(status: &Status) -> Ending {
    let refused = matches!(
        status.code(),
        Code::InvalidArgument
            | Code::FailedPrecondition
            | Code::NotFound
            | Code::PermissionDenied
            | Code::Unauthenticated
    );
    if refused && std::error::Error::source(status).is_none() { Ending::Fail } else { Ending::Unknown }
}

pub(super) fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_LIMIT);
    request
}

/// A repeated call may find the order in any status except CANCELLED: only its client could cancel it.
fn check_status(request: &CreateOrderRequest, order: &Order) -> Result<(), String> {
    let mut settled = order.clone();
    if order.status() == OrderStatus::Rejected {
        settled.set_status(OrderStatus::Confirmed);
    }
    check_reply(request, &settled).map_err(|error| format!("{error:#}"))
}

/// An order of one or two items. A few items do not exist.
pub(super) fn request() -> CreateOrderRequest {
    let sku = || if fastrand::u8(..100) == 0 { "NO-SUCH-SKU" } else { fastrand::choice(SKUS).unwrap_or_default() };
    let item =
        |_| OrderItem { sku: sku().into(), quantity: fastrand::i32(1..4), unit_price_minor: fastrand::i64(1..100_000) };
    CreateOrderRequest {
        request_id: Uuid::new_v4().into(),
        customer_id: format!("chaos-{}", fastrand::u32(..100)),
        currency_code: "EUR".into(),
        items: (0..fastrand::u8(1..3)).map(item).collect(),
    }
}
