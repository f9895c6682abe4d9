//! Serves gRPC until shutdown.

use std::{io, sync::Arc, time::Duration};

use clap::Args;
use futures_util::future::try_join_all;
use rustls::ServerConfig;
use tokio::{net::TcpListener, time::sleep};
use tokio_util::sync::CancellationToken;
use tonic::{
    codec::CompressionEncoding,
    service::Routes,
    transport::{Server, server::TcpConnectInfo},
};
use tonic_health::server::HealthReporter;
use tracing::{info, warn};

use crate::{
    Database, Ending, Ops, Tls,
    accept::{Peer, accept, accept_tls},
    authorize::authorize,
    calls::measure_answers,
    connections::{ConnectionSettings, Connections},
    health::report_health,
    shed::{CallSettings, shed},
    trace,
    unread::CountCalls,
};

/// Nobody has to ask for health or reflection with more.
const QUESTION_BYTES_MAX: usize = 16 * 1024;
/// So often callers may break a rule of HTTP/2 on one connection, each time at the cost of one call. A client that is sound
/// does so only by sending on to a call that was refused.
const BROKEN_STREAMS_MAX: usize = 256;
const HEALTH: &str = tonic_health::pb::health_server::SERVICE_NAME;

/// Limits of a server.
#[derive(Args, Clone, Debug)]
pub struct ServeSettings {
    /// Maximum number of seconds for calls in flight to finish at the end. Calls that are still open then are cut off.
    #[arg(long, env = "DRAIN_SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub drain_seconds: u64,
    /// Seconds a call may take. A caller may set a shorter deadline.
    #[arg(long, env = "REQUEST_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub request_seconds: u64,
    /// Maximum number of open calls on one connection.
    #[arg(long, env = "CONCURRENT_STREAMS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub concurrent_streams: u32,
    /// Tell callers which methods there are (gRPC's reflection). grpcurl and others need it.
    #[arg(long, env = "REFLECTION", default_value_t = true, action = clap::ArgAction::Set, value_name = "true|false")]
    pub reflection: bool,
    /// Maximum number of bytes of a message from a caller, once it is decompressed. Batches of events may be larger.
    #[arg(long, env = "MESSAGE_BYTES", default_value_t = 65_536, value_parser = clap::value_parser!(u32).range(16_384..=4_194_304))]
    pub message_bytes: u32,
    /// Which connections a listener keeps.
    #[command(flatten)]
    pub connections: ConnectionSettings,
}

impl ServeSettings {
    /// The largest message that a service takes of a caller.
    pub fn message_max(&self) -> usize {
        self.message_bytes as usize
    }

    /// Until the drain time is over, which begins then.
    pub fn drained(&self, begun: &CancellationToken) -> impl Future<Output = ()> + use<> {
        let (begun, drain) = (begun.clone(), Duration::from_secs(self.drain_seconds));
        async move {
            begun.cancelled().await;
            sleep(drain).await;
        }
    }
}

/// Callers of one kind find their services at one listener, and no others. So whoever may place orders cannot pretend to
/// be a relay, whatever stands before the process.
pub struct Listener {
    /// The socket.
    pub socket: TcpListener,
    /// What is served there.
    pub services: Services,
    /// How many calls may wait for an answer. Relays and operators are few, and wait for each other: nobody has to shed theirs.
    pub calls: Option<CallSettings>,
}

impl Listener {
    /// One that serves this, under these names, with the messages of these descriptors.
    pub fn of(socket: TcpListener, routes: Routes, names: &'static [&'static str], descriptors: &'static [u8]) -> Self {
        Self { socket, services: Services { routes, names, descriptors }, calls: None }
    }

    /// It refuses calls that are too many.
    #[must_use]
    pub fn shedding(self, calls: CallSettings) -> Self {
        Self { calls: Some(calls), ..self }
    }
}

/// What a listener serves besides health and reflection.
pub struct Services {
    /// The services.
    pub routes: Routes,
    /// Their full names, for health checks and reflection.
    pub names: &'static [&'static str],
    /// The encoded descriptors of their messages, for reflection.
    pub descriptors: &'static [u8],
}

/// Why a server ended without a shutdown.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket failed.
    #[error("cannot listen: {0}")]
    Listen(#[from] io::Error),
    /// The server failed.
    #[error("cannot serve: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The descriptors cannot be decoded.
    #[error("cannot serve reflection: {0}")]
    Reflect(#[from] tonic_reflection::server::Error),
}

/// Serves on all listeners until the end has begun. Health reports NOT_SERVING on each from when it was announced.
///
/// # Errors
/// [`ServeError`].
pub async fn serve<const N: usize>(
    listeners: [Listener; N],
    settings: &ServeSettings,
    tls: &Tls,
    database: &Database,
    ops: &Ops,
    ending: Ending,
) -> Result<(), ServeError> {
    let mut health = Vec::new();
    let reported = CancellationToken::new();
    let mut serving = Vec::new();
    for Listener { socket, services, calls } in listeners {
        let (names, descriptors) = (services.names, services.descriptors);
        let (routes, reporter) = with_health(services, settings.reflection)?;
        health.push((reporter, names));
        let descriptors = with_own(descriptors);
        let mut routes = authorize(routes.into_axum_router(), tls, &descriptors);
        if let Some(calls) = calls {
            routes = shed(routes, &calls);
        }
        if ops.is_on() || trace::is_on() {
            routes = measure_answers(routes, &descriptors);
        }
        let mut server = server(settings);
        if let Some(age) = ending.connection_age {
            // Connections of one process may end together. Those of several should not. There is no grace: with one, tonic
            // would not ask clients to leave, and would cut them off later.
            server = server.max_connection_age(age.mul_f64(0.9 + fastrand::f64() / 5.0));
        }
        let (reported, begun) = (reported.clone(), ending.begun.clone());
        let stopped = Box::pin(async move {
            // In this order, so that a load balancer that watches health is told before it finds the door closed.
            reported.cancelled().await;
            begun.cancelled().await;
        });
        let tls = tls.clone();
        let socket = (socket, move || tls.server());
        let connections = Connections::new(&settings.connections);
        serving.push(serve_routes(
            socket,
            server,
            connections,
            routes.into(),
            stopped,
            settings.drained(&ending.begun),
        ));
    }
    let reporting = async {
        report_health(health, ops.readiness.clone(), database.probe(), ending.announced).await;
        reported.cancel();
        Ok(())
    };
    tokio::try_join!(try_join_all(serving), reporting).map(drop)
}

/// And those of what every listener serves.
fn with_own(descriptors: &[u8]) -> [&[u8]; 4] {
    [
        descriptors,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ]
}

/// The services, health, and reflection unless it is off.
pub(crate) fn with_health(services: Services, reflects: bool) -> Result<(Routes, HealthReporter), ServeError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(services.descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // With these, clients can print the details of errors.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET);
        let served = services.names.iter().chain(&[HEALTH]);
        served.fold(builder, |builder, name| builder.with_service_name(*name))
    };
    // A client that compresses does so in all of its calls.
    let health = health.accept_compressed(CompressionEncoding::Gzip).max_decoding_message_size(QUESTION_BYTES_MAX);
    let routes = services.routes.add_service(health);
    if !reflects {
        return Ok((routes, reporter));
    }
    // ghz asks for v1alpha.
    let (reflection, reflection_v1alpha) = (reflection().build_v1()?, reflection().build_v1alpha()?);
    let routes = routes
        .add_service(
            reflection.accept_compressed(CompressionEncoding::Gzip).max_decoding_message_size(QUESTION_BYTES_MAX),
        )
        .add_service(
            reflection_v1alpha
                .accept_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(QUESTION_BYTES_MAX),
        );
    Ok((routes, reporter))
}

/// Serves until `stopped`. Then it accepts no more connections, and lets calls in flight finish.
///
/// Once `drained` it closes the connections that are left. Without that deadline, a client that stays silent on an open
/// connection would block the shutdown for ever (hyperium/hyper#4170).
///
/// Whether there is TLS does not change while a process runs. What it is made of does.
pub(crate) async fn serve_routes(
    (listener, tls): (TcpListener, impl Fn() -> Option<Arc<ServerConfig>> + Send + 'static),
    server: Server,
    connections: Connections,
    routes: Routes,
    stopped: impl Future<Output = ()>,
    drained: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let (address, has_tls) = (listener.local_addr()?, tls().is_some());
    let serving = async {
        if has_tls {
            let mut server = server.layer(CountCalls::<Peer>::new());
            // By value, so that the socket is closed as soon as no more connections are accepted.
            let incoming = Box::pin(connections.keep(accept_tls(listener, tls)));
            Box::pin(server.add_routes(routes).serve_with_incoming_shutdown(incoming, stopped)).await
        } else {
            let mut server = server.layer(CountCalls::<TcpConnectInfo>::new());
            let incoming = Box::pin(connections.keep(accept(listener)));
            Box::pin(server.add_routes(routes).serve_with_incoming_shutdown(incoming, stopped)).await
        }
    };
    info!(tls = has_tls, "listening on {address}");
    tokio::select! {
        ended = serving => ended?,
        () = connections.cut_stalled() => {}
        () = drained => warn!("drain time is over: closing the remaining connections to {address}"),
    }
    Ok(())
}

pub(crate) fn server(settings: &ServeSettings) -> Server {
    Server::builder()
        // tonic sets neither limit by default. Without them one connection may open any number of streams, and may
        // cause any number of resets by its own errors.
        .max_concurrent_streams(settings.concurrent_streams)
        .http2_max_local_error_reset_streams(Some(BROKEN_STREAMS_MAX))
        .http2_keepalive_interval(Some(Duration::from_secs(settings.connections.ping_seconds)))
        .http2_keepalive_timeout(Some(Duration::from_secs(settings.connections.ping_timeout_seconds)))
        .timeout(Duration::from_secs(settings.request_seconds))
}
