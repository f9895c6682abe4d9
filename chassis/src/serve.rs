//! Serves gRPC until told to stop.

use std::{future::pending, io, time::Duration};

use clap::Args;
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tracing::{info, warn};

use crate::{Database, health::report_health};

const HEALTH: &str = tonic_health::pb::health_server::SERVICE_NAME;

/// Limits of a server.
#[derive(Args, Clone, Debug)]
pub struct ServeSettings {
    /// Seconds after SIGTERM within which the process has ended, whatever its clients do.
    #[arg(long, env = "DRAIN_SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub drain_seconds: u64,
    /// Seconds a call may take; a caller's own deadline may be shorter.
    #[arg(long, env = "REQUEST_SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub request_seconds: u64,
    /// Calls one connection may have open at once.
    #[arg(long, env = "CONCURRENT_STREAMS", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub concurrent_streams: u32,
}

/// What a server offers besides health and reflection.
pub struct Services {
    /// The services.
    pub routes: Routes,
    /// Their full names, for health.
    pub names: &'static [&'static str],
    /// The encoded descriptors of their contract, for reflection.
    pub descriptors: &'static [u8],
}

/// Why a server ended other than by being told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The socket.
    #[error("cannot listen: {0}")]
    Listen(#[from] io::Error),
    /// The server.
    #[error("cannot serve: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The contract's descriptors.
    #[error("cannot describe the contract: {0}")]
    Reflect(#[from] tonic_reflection::server::Error),
}

/// Serves until `shutdown`; then reports NOT_SERVING, accepts nothing more, and lets calls in flight finish for at most
/// the drain time. A client that stays silent on an open connection would hold a graceful shutdown for ever
/// (hyperium/hyper#4170), so that deadline is hard.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    listener: TcpListener,
    settings: &ServeSettings,
    services: Services,
    database: &Database,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(services.descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that clients can show the details that refusals carry.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET);
        let served = services.names.iter().chain(&[HEALTH]);
        served.fold(builder, |builder, name| builder.with_service_name(*name))
    };
    // ghz still asks for v1alpha.
    let (reflection, reflection_v1alpha) = (reflection().build_v1()?, reflection().build_v1alpha()?);
    let routes = services.routes.add_service(health).add_service(reflection).add_service(reflection_v1alpha);
    let address = listener.local_addr()?;
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(Duration::from_secs(30)));

    let reported = Box::pin(report_health(reporter, services.names, database.probe(), shutdown.clone()));
    let server = server(settings).add_routes(routes).serve_with_incoming_shutdown(incoming, reported);
    info!("listening on {address}");

    let drain = Duration::from_secs(settings.drain_seconds);
    let drained = async {
        shutdown.cancelled().await;
        timeout(drain, pending::<()>()).await
    };
    tokio::select! {
        ended = server => ended?,
        _ = drained => warn!("drain time of {drain:?} is over: closing the connections that are left"),
    }
    Ok(())
}

fn server(settings: &ServeSettings) -> Server {
    Server::builder()
        // Both guards are off in tonic unless set: without them one connection may open any number of streams, or have
        // any number reset for errors of its own making.
        .max_concurrent_streams(settings.concurrent_streams)
        .http2_max_local_error_reset_streams(Some(1024))
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .timeout(Duration::from_secs(settings.request_seconds))
}
