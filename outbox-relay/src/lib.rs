//! outbox-relay: leases outbox rows, delivers them over gRPC, and deletes the rows that were handled.
//!
//! It knows nothing of any domain. It runs beside any database with the outbox table, and delivers to any service that
//! implements `events.v1.EventReceiver`.

mod access;
mod ahead;
mod announce;
#[cfg(test)]
mod answer_tests;
mod console;
mod count;
mod deliver;
mod delivery;
mod failures;
mod fate;
mod floor;
mod grpc;
mod http_answer;
mod isolate;
mod lease;
#[cfg(test)]
mod lease_time;
mod leased_row;
mod live;
mod maintain;
mod measure;
pub mod operate;
#[cfg(test)]
mod outage_model;
mod pace;
mod park;
mod relay;
mod reopen;
mod route;
mod run;
mod settings;
mod settle;
mod subscription;
mod sweep;
mod trace_events;
mod unhide;
mod wake;

use std::{sync::Arc, time::Duration};

use axum::Router;
use chassis::{Database, DatabaseUrl, Ops, RunError, Services, Tls};
use proto::relay::v1::relay_admin_server::{RelayAdminServer, SERVICE_NAME};
use sqlx::migrate::Migrator;
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tonic::{codec::CompressionEncoding, service::Routes};
use tracing::{info, warn};

use crate::{
    access::Admission,
    ahead::Ahead,
    announce::{OtherReceiver, claim},
    console::{Console, SharedStatus, guard_grpc, pages},
    deliver::Receiver,
    failures::Failures,
    floor::Floor,
    grpc::Admin,
    lease::LeaseQuery,
    live::{RelayId, hold_lock},
    maintain::{Maintenance, Served},
    measure::measure_outbox,
    operate::OperateError,
    relay::Worker,
    route::Route,
    subscription::{Subscription, read_subscriptions},
    unhide::longest_hidden,
    wake::Wake,
};

pub use crate::{
    access::{Role, TokenFile, TokenFileError},
    route::RouteSettings,
    settings::Settings,
};

/// Connections for the calls of RelayAdmin, beside those of the workers.
const OPERATORS_CONNECTIONS: u32 = 2;

static MIGRATORS: [&Migrator; 1] = [&outbox::MIGRATOR];

/// Relays until `shutdown`. Then it leases nothing more, and settles or releases the events in flight within the drain
/// time.
///
/// # Errors
/// [`RunError`].
pub async fn run([ops]: [TcpListener; 1], settings: Settings, shutdown: CancellationToken) -> Result<(), RunError> {
    info!(?settings, "outbox-relay starts");
    if let Some([one, _]) = find_pair(&settings.routes, |one, other| one.subscription == other.subscription) {
        let name = &one.subscription;
        return Err(RunError::Arguments(format!("two routes for {name}: give each subscription one receiver")));
    }
    if let Some([one, other]) = find_pair(&settings.routes, |one, other| one.receiver == other.receiver) {
        let (subscriptions, receiver) = ([&one.subscription, &other.subscription], &one.receiver);
        warn!(
            ?subscriptions,
            %receiver,
            "two subscriptions have one receiver: it applies an event that both take once, and calls the other a duplicate"
        );
    }
    let tls = Tls::start(&settings.tls, &[ops.local_addr()?])?;
    for route in &settings.routes {
        tls.check(&settings.tls, &route.receiver)?;
    }
    // Operators see it until its work has ended.
    let work_ended = CancellationToken::new();
    let drained = settings.serve.drained(&shutdown);
    let mut ops = Ops::serve(ops, &settings.serve, &tls, work_ended.clone().cancelled_owned(), drained);
    measure::describe();
    if !settings.ops_listen.ip().is_loopback() && settings.token_file.is_none() && !settings.tls.files.are_mutual() {
        warn!(
            address = %settings.ops_listen,
            "whoever reaches this address may do deeds by RelayAdmin: give the relay a --token-file, or keep others out"
        );
    }
    // Losing a lease or a settlement in a crash only delivers an event again, and its receiver knows it.
    let url = settings.database_url.clone().with_setting("synchronous_commit", "off").with_generic_plans();
    let connecting = Database::connect(&url, &settings.database, &MIGRATORS, &shutdown);
    let Some(database) = connecting.await? else { return Ok(()) };
    let of_operators = database.with_plans_by_parameters(OPERATORS_CONNECTIONS);
    let relay = RelayId::new();
    info!(relay_id = %relay.uuid(), "connected");
    let Some(subscriptions) = shutdown.run_until_cancelled(take_up(&database, &relay, &settings)).await else {
        return Ok(());
    };
    let asking = database.url_of_own_session(settings.listen_database_url.as_ref());
    let Some(own_session) = shutdown.run_until_cancelled(asking).await else { return Ok(()) };
    let admin = Arc::new(Admin { database: of_operators, descriptors: settings.descriptors.clone(), tls: tls.clone() });
    let (services, pages) = offer_to_operators(admin, &settings);
    ops.add(services, pages, &database, shutdown.clone())?;
    let own_session = own_session?;
    let working =
        run_workers(database.clone(), own_session, settings.clone(), tls, relay, subscriptions?, shutdown.clone());
    let (end, end_of_work) = (shutdown.clone().drop_guard(), work_ended.drop_guard());
    let workers = tokio::spawn(async move {
        // A panic ends the process too.
        let _ends = (end, end_of_work);
        working.await
    });
    let served = ops.ended().await;
    // Perhaps the listener failed. What the workers have leased is settled or released all the same.
    shutdown.cancel();
    let worked = workers.await.unwrap_or(Err(RunError::Panicked("a worker")));
    info!("outbox-relay ended");
    served.and(worked)
}

/// RelayAdmin by gRPC, and the console.
fn offer_to_operators(admin: Arc<Admin>, settings: &Settings) -> (Services, Router) {
    let service = RelayAdminServer::from_arc(Arc::clone(&admin)).accept_compressed(CompressionEncoding::Gzip);
    let admission = Admission {
        tokens: settings.token_file.clone(),
        tls: admin.tls.clone(),
        is_mutual: settings.tls.files.are_mutual(),
    };
    let routes = Routes::from(guard_grpc(Routes::new(service).into_axum_router(), admission.clone()));
    let hosts = settings.console_hosts.clone();
    let call_limit = Duration::from_secs(settings.serve.request_seconds);
    let console = Console { admin, admission, hosts, status: SharedStatus::default(), call_limit };
    (Services { routes, names: &[SERVICE_NAME], descriptors: proto::DESCRIPTORS }, pages(console))
}

/// The first two routes for which this holds.
fn find_pair(
    routes: &[RouteSettings],
    holds: impl Fn(&RouteSettings, &RouteSettings) -> bool,
) -> Option<[&RouteSettings; 2]> {
    let later = |(place, one)| routes[place + 1..].iter().map(move |other| [one, other]);
    routes.iter().enumerate().flat_map(later).find(|[one, other]| holds(one, other))
}

/// How often reading the subscriptions is tried, a second apart: a database may be just coming back.
const TRIES: u32 = 15;

/// Finds the subscription of each route, and announces the routes.
///
/// # Errors
/// When there is no such subscription, or another relay delivers it elsewhere, or the database fails again and again.
async fn take_up(database: &Database, relay: &RelayId, settings: &Settings) -> Result<Vec<Subscription>, RunError> {
    let (relay_id, longest_hidden) = (relay.uuid(), longest_hidden(settings));
    let mut tries_left = TRIES;
    loop {
        tries_left -= 1;
        let routes = settings.routes.clone();
        let taken = database.run(move |connection| {
            Box::pin(async move {
                let there = read_subscriptions(connection).await?;
                let found = match find(&there, &routes) {
                    Ok(found) => found,
                    Err(refused) => return Ok(Err(refused)),
                };
                Ok(match claim(connection, relay_id, &routes, longest_hidden).await? {
                    None => Ok(Some(found)),
                    Some(other) if other.may_be_dead && tries_left > 0 => Ok(None),
                    Some(other) => Err(refuse(other)),
                })
            })
        });
        let taken: Result<_, sqlx::Error> = taken.await;
        match taken {
            Ok(Ok(Some(found))) => return Ok(found),
            Ok(Ok(None)) => {}
            Ok(Err(refused)) => return Err(refused),
            Err(cause) if tries_left == 0 => {
                return Err(RunError::Unusable(format!("cannot take up the subscriptions: {cause}")));
            }
            Err(cause) => warn!(%cause, "cannot take up the subscriptions"),
        }
        sleep(Duration::from_secs(1)).await;
    }
}

fn find(there: &[Subscription], routes: &[RouteSettings]) -> Result<Vec<Subscription>, RunError> {
    let of = |name: &str| there.iter().find(|subscription| subscription.name == name);
    let unknown: Vec<_> = routes.iter().map(|route| &*route.subscription).filter(|name| of(name).is_none()).collect();
    if unknown.is_empty() {
        return Ok(routes.iter().filter_map(|route| of(&route.subscription)).cloned().collect());
    }
    let nobody = OperateError::no_subscription(&unknown, there);
    Err(RunError::Arguments(format!("{nobody}: subscribe it with `outbox-relay subscribe {} PATTERN`", unknown[0])))
}

fn refuse(other: OtherReceiver) -> RunError {
    let OtherReceiver { relay_id, subscription, receiver, .. } = other;
    RunError::Unusable(format!(
        "relay {relay_id} delivers subscription {subscription} to {receiver}: two receivers would share its events; stop \
         that relay first, or make a subscription of its own for the other receiver"
    ))
}

/// Runs the workers until `shutdown`. Then they have most of the drain time to settle their batches; deliveries that
/// take longer are cancelled, and their events released. A worker that ends early shuts the process down.
async fn run_workers(
    database: Database,
    own_session: Option<DatabaseUrl>,
    settings: Settings,
    tls: Tls,
    relay: RelayId,
    subscriptions: Vec<Subscription>,
    shutdown: CancellationToken,
) -> Result<(), RunError> {
    let cancel_deliveries = CancellationToken::new();
    // Held until the last lease is settled.
    let _lock = own_session
        .clone()
        .map(|url| AbortOnDropHandle::new(tokio::spawn(hold_lock(relay.clone(), url, database.clone()))));
    let wakes = Wake::listen(own_session, &shutdown, settings.routes.len());
    let how = (&settings, &tls);
    let mut tasks = start(&database, how, &relay, subscriptions, wakes, &shutdown, &cancel_deliveries);
    let ended = loop {
        tokio::select! {
            () = shutdown.cancelled() => break Ok(()),
            ended = tasks.join_next() => match ended {
                // Of a route whose subscription has ended.
                Some(Ok(Ok(()))) => {}
                Some(ended) => break ended.unwrap_or(Err(RunError::Panicked("a worker"))),
                None => break Ok(()),
            },
        }
    };
    shutdown.cancel();
    let drain = Duration::from_secs(settings.serve.drain_seconds);
    if timeout(drain.mul_f32(0.6), join_all(&mut tasks)).await.is_err() {
        cancel_deliveries.cancel();
        if timeout(drain.mul_f32(0.3), join_all(&mut tasks)).await.is_err() {
            warn!("drain time is over: events still leased are delivered again after their leases expire");
        }
    }
    ended
}

/// Starts the workers of every route, and the maintenance.
fn start(
    database: &Database,
    (settings, tls): (&Settings, &Tls),
    relay: &RelayId,
    subscriptions: Vec<Subscription>,
    wakes: Vec<Wake>,
    shutdown: &CancellationToken,
    cancel_deliveries: &CancellationToken,
) -> JoinSet<Result<(), RunError>> {
    let poll = Duration::from_millis(settings.poll_ms);
    let serve = |(route, subscription)| Served {
        route: Route::new(route),
        subscription,
        floor: Arc::new(Floor::new()),
        end: shutdown.child_token(),
    };
    let served: Vec<_> = settings.routes.iter().cloned().zip(subscriptions).map(serve).collect();
    let lease_failures = Arc::new(Failures::default());
    let mut tasks = JoinSet::new();
    for (Served { route, subscription, floor, end }, wake) in served.iter().zip(wakes) {
        let lease_query = LeaseQuery::of(settings, relay, subscription, floor);
        for number in 1..=settings.workers {
            // A channel is one HTTP/2 connection. Each worker has its own, so that a receiver's replicas share the
            // load.
            let worker = Worker {
                number,
                database: database.clone(),
                receiver: Receiver::connect_lazily(
                    route.settings().receiver.clone(),
                    settings.source.clone(),
                    subscription.into(),
                    Duration::from_secs(settings.lease_seconds.into()),
                    tls,
                ),
                settings: settings.clone(),
                route: route.clone(),
                lease_query: lease_query.clone(),
                wake: wake.clone(),
                taken: None,
                ahead: Ahead::default(),
                lease_failures: lease_failures.clone(),
                shutdown: end.clone(),
                cancel_deliveries: cancel_deliveries.clone(),
            };
            tasks.spawn(worker.run());
        }
    }
    let floors = served.iter().map(|served| (served.subscription.id, served.floor.clone())).collect();
    let measuring = measure_outbox(database.clone(), floors, shutdown.clone());
    tasks.spawn(async move {
        measuring.await;
        Ok(())
    });
    let longest_hidden = longest_hidden(settings);
    let maintenance = Maintenance {
        database: database.clone(),
        relay: relay.clone(),
        served,
        poll,
        longest_hidden,
        failures: Failures::default(),
        shutdown: shutdown.clone(),
        paces_read_at: None,
    };
    tasks.spawn(maintenance.run());
    tasks
}

async fn join_all(tasks: &mut JoinSet<Result<(), RunError>>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            warn!(%error, "a worker ended early; its lease will expire");
        }
    }
}
