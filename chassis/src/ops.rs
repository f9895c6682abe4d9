//! The listener for operations: operators and their tools ask it how the process is.
//!
//! It is apart from the port that callers use. So they see nothing of it, and it answers whatever they do. It answers from
//! the start to the end: while the database is away, an orchestrator must not take the process for a dead one.

use std::{
    future::pending,
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    Router,
    extract::Request,
    http::{StatusCode, Version, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::{net::TcpListener, time::interval};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tower::ServiceExt as _;
use tracing::error;

use crate::{
    Database, RunError, ServeError, ServeSettings, Services, Tls, accept, authorize, calls,
    connections::{self, Connections},
    entry::bind,
    health::{Readiness, State, report_health},
    serve::{serve_routes, server, with_health},
    shed, tls, validity,
};

const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// The samples of histograms are kept until they are counted, whether or not anybody asks for the metrics.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);
/// For times of all kinds: from a commit without a disk to the age at which an event dies.
const SECONDS: [f64; 22] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0,
    14400.0, 43200.0, 86400.0, 604_800.0,
];
/// For numbers of things that are handled together.
const COUNTS: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

/// What else is served.
#[derive(Debug)]
struct Added {
    grpc: Router,
    pages: Router,
}

/// What this process serves to operators. The listener is closed when this is dropped.
#[derive(Debug)]
pub struct Ops {
    pub(crate) readiness: Readiness,
    /// What is served besides, once there is a database for it.
    added: Arc<OnceLock<Added>>,
    reflection: bool,
    serving: Option<AbortOnDropHandle<Result<(), ServeError>>>,
    reporting: Option<AbortOnDropHandle<()>>,
    _upkeep: Option<AbortOnDropHandle<()>>,
}

impl Ops {
    /// Serves on the address, if there is one, until this is dropped.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn start(address: Option<SocketAddr>, settings: &ServeSettings, tls: &Tls) -> io::Result<Self> {
        let Some(address) = address else {
            return Ok(Self {
                readiness: Readiness::default(),
                added: Arc::default(),
                reflection: settings.reflection,
                serving: None,
                reporting: None,
                _upkeep: None,
            });
        };
        Ok(Self::serve(bind(address).await?, settings, tls, pending(), pending()))
    }

    /// Serves until `stopped`. Then calls in flight have until `drained`.
    pub fn serve(
        listener: TcpListener,
        settings: &ServeSettings,
        tls: &Tls,
        stopped: impl Future<Output = ()> + Send + 'static,
        drained: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let (readiness, added) = (Readiness::default(), Arc::default());
        let metrics = record_metrics();
        tls.measure();
        let routes = route(metrics.clone(), readiness.clone(), Arc::clone(&added)).into();
        let (server, tls) = (server(settings).accept_http1(true), tls.clone());
        let connections = Connections::new(&settings.connections);
        let serving = tokio::spawn(async move {
            let ended =
                serve_routes((listener, move || tls.ops()), server, connections, routes, stopped, drained).await;
            if let Err(error) = &ended {
                error!(%error, "the listener for operations has failed");
            }
            ended
        });
        let upkeep = tokio::spawn(async move {
            let mut ticks = interval(UPKEEP_INTERVAL);
            loop {
                ticks.tick().await;
                metrics.run_upkeep();
            }
        });
        Self {
            readiness,
            added,
            reflection: settings.reflection,
            serving: Some(AbortOnDropHandle::new(serving)),
            reporting: None,
            _upkeep: Some(AbortOnDropHandle::new(upkeep)),
        }
    }

    /// Whether there is a listener, and so somebody who may ask for metrics.
    pub(crate) fn is_on(&self) -> bool {
        self.serving.is_some()
    }

    /// Serves these gRPC services and pages too, and reports by health whether the database can be written to.
    ///
    /// # Errors
    /// When their descriptors cannot be decoded.
    pub fn add(
        &mut self,
        services: Services,
        pages: Router,
        database: &Database,
        shutdown: CancellationToken,
    ) -> Result<(), ServeError> {
        let names = services.names;
        let (routes, reporter) = with_health(services, self.reflection)?;
        // Only the first counts, and there is one.
        self.added.get_or_init(|| Added { grpc: routes.into_axum_router(), pages });
        let reporting = report_health(vec![(reporter, names)], self.readiness.clone(), database.probe(), shutdown);
        self.reporting = Some(AbortOnDropHandle::new(tokio::spawn(reporting)));
        Ok(())
    }

    /// Waits until it is stopped, and calls in flight have ended.
    ///
    /// # Errors
    /// When the server failed, or a task of it panicked.
    pub async fn ended(self) -> Result<(), RunError> {
        const PANICKED: RunError = RunError::Panicked("the listener for operations");
        let serving = async {
            let Some(serving) = self.serving else { return Ok(()) };
            Ok::<_, RunError>(serving.await.map_err(|_| PANICKED)??)
        };
        let reporting = async {
            let Some(reporting) = self.reporting else { return Ok(()) };
            reporting.await.map_err(|_| PANICKED)
        };
        tokio::try_join!(serving, reporting).map(drop)
    }
}

fn route(metrics: PrometheusHandle, readiness: Readiness, added: Arc<OnceLock<Added>>) -> Router {
    let render = move || async move {
        // Names wait in it for their descriptions.
        metrics.run_upkeep();
        ([(CONTENT_TYPE, PROMETHEUS_TEXT)], metrics.render())
    };
    let later = readiness.clone();
    Router::new()
        // It says that the process works through its tasks, and asks nothing else: a restart mends no database.
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(|| async move { page(readiness.state()) }))
        .route("/metrics", get(render))
        .fallback(move |request| pass_on(added, later.state(), request))
}

/// Only gRPC reaches the services. Otherwise a page in an operator's browser could call them: tonic looks at the path
/// alone. Browsers speak no HTTP/2 without TLS. With it, they ask before they send this type of content elsewhere.
///
/// A gRPC client takes the one status for UNAVAILABLE, and the other for UNIMPLEMENTED.
async fn pass_on(added: Arc<OnceLock<Added>>, state: State, request: Request) -> Response {
    let content = request.headers().get(CONTENT_TYPE).map_or(&[][..], |value| value.as_bytes());
    let is_grpc = request.version() == Version::HTTP_2
        && content
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')));
    match added.get() {
        Some(Added { grpc, .. }) if is_grpc => grpc.clone().oneshot(request).await.into_response(),
        Some(Added { pages, .. }) => pages.clone().oneshot(request).await.into_response(),
        // A gRPC client reads the status alone.
        None if is_grpc && state == State::Starts => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        None if state == State::Starts => page(state).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn page(state: State) -> (StatusCode, String) {
    let not_ready = |why: &str| (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n"));
    match state {
        State::Serves => (StatusCode::OK, "ready\n".to_owned()),
        State::Starts => not_ready("it starts"),
        State::Hindered { cause } => not_ready(&format!("the database cannot be written to: {cause}")),
        State::Ends => not_ready("it ends"),
    }
}

/// Records the metrics of this process from now on. Without this call they cost next to nothing.
fn record_metrics() -> PrometheusHandle {
    static RECORDED: OnceLock<PrometheusHandle> = OnceLock::new();
    let recorded = RECORDED.get_or_init(|| {
        let builder = PrometheusBuilder::new();
        // It fails only without limits. Histograms without theirs become summaries, which nobody can add up.
        let with_limits = builder
            .set_buckets_for_metric(Matcher::Prefix("rpc_".into()), &calls::BUCKETS)
            .and_then(|builder| builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS))
            .and_then(|builder| builder.set_buckets(&COUNTS));
        let recorder = with_limits.unwrap_or_default().build_recorder();
        let metrics = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            error!("metrics are recorded elsewhere: /metrics stays empty");
        }
        calls::describe();
        accept::describe();
        authorize::describe();
        connections::describe();
        shed::describe();
        tls::describe();
        validity::describe();
        metrics
    });
    recorded.clone()
}
