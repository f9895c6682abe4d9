//! The listener for operations: operators and their tools ask it how the process is.
//!
//! It is apart from the port that callers use. So they see nothing of it, and it answers whatever they do. It answers from
//! the start to the end: while the database is away, an orchestrator must not take the process for a dead one.

use std::{
    future::pending,
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
};

use axum::{
    Router,
    extract::Request,
    http::{StatusCode, Version, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tower::ServiceExt as _;
use tracing::error;

use crate::{
    Database, RunError, ServeError, ServeSettings, Services,
    entry::bind,
    health::{Readiness, State, report_health},
    serve::{serve_routes, server, with_health},
};

const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What this process serves to operators. The listener is closed when this is dropped.
#[derive(Debug)]
pub struct Ops {
    pub(crate) readiness: Readiness,
    /// What is served besides, once there is a database for it.
    added: Arc<OnceLock<Router>>,
    serving: Option<AbortOnDropHandle<Result<(), ServeError>>>,
    reporting: Option<AbortOnDropHandle<()>>,
}

impl Ops {
    /// Serves on the address, if there is one, until this is dropped.
    ///
    /// # Errors
    /// Those of the socket.
    pub async fn start(address: Option<SocketAddr>, settings: &ServeSettings) -> io::Result<Self> {
        let Some(address) = address else {
            return Ok(Self { readiness: Readiness::default(), added: Arc::default(), serving: None, reporting: None });
        };
        Ok(Self::serve(bind(address).await?, settings, pending(), pending()))
    }

    /// Serves until `stopped`. Then calls in flight have until `drained`.
    pub fn serve(
        listener: TcpListener,
        settings: &ServeSettings,
        stopped: impl Future<Output = ()> + Send + 'static,
        drained: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let (readiness, added) = (Readiness::default(), Arc::default());
        let routes = route(record_metrics(), readiness.clone(), Arc::clone(&added)).into();
        let server = server(settings).accept_http1(true);
        let serving = tokio::spawn(async move {
            let ended = serve_routes(listener, server, routes, stopped, drained).await;
            if let Err(error) = &ended {
                error!(%error, "the listener for operations has failed");
            }
            ended
        });
        Self { readiness, added, serving: Some(AbortOnDropHandle::new(serving)), reporting: None }
    }

    /// Serves these gRPC services too, and reports by health whether the database can be written to.
    ///
    /// # Errors
    /// When their descriptors cannot be decoded.
    pub fn add(
        &mut self,
        services: Services,
        database: &Database,
        shutdown: CancellationToken,
    ) -> Result<(), ServeError> {
        let names = services.names;
        let (routes, reporter) = with_health(services)?;
        // Only the first counts, and there is one.
        self.added.get_or_init(|| routes.into_axum_router());
        let reporting = report_health(reporter, names, self.readiness.clone(), database.probe(), shutdown);
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

fn route(metrics: PrometheusHandle, readiness: Readiness, added: Arc<OnceLock<Router>>) -> Router {
    let render = move || async move {
        // Samples of a histogram are kept until it is run, and names wait for their descriptions.
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

/// Only gRPC is passed on. Otherwise a page in an operator's browser could call what is served here: tonic looks at the
/// path alone. Browsers speak no HTTP/2 without TLS, and ask before they send this type of content elsewhere.
///
/// A gRPC client takes the one status for UNAVAILABLE, and the other for UNIMPLEMENTED.
async fn pass_on(added: Arc<OnceLock<Router>>, state: State, request: Request) -> Response {
    let content = request.headers().get(CONTENT_TYPE).map_or(&[][..], |value| value.as_bytes());
    let is_grpc = request.version() == Version::HTTP_2
        && content
            .strip_prefix(b"application/grpc")
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')));
    match added.get().filter(|_| is_grpc) {
        Some(router) => router.clone().oneshot(request).await.into_response(),
        None if is_grpc && state == State::Starts => StatusCode::SERVICE_UNAVAILABLE.into_response(),
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
        let recorder = PrometheusBuilder::new().build_recorder();
        let metrics = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            error!("metrics are recorded elsewhere: /metrics stays empty");
        }
        metrics
    });
    recorded.clone()
}
