//! Says whether a process can do its work, and asks another.

use std::{net::SocketAddr, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, transport::Endpoint};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_check_response, health_client::HealthClient},
    server::HealthReporter,
};
use tracing::{info, warn};

use crate::database::Probe;

/// How often the database is asked.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a health check of another process may take.
const CHECK_LIMIT: Duration = Duration::from_secs(3);

/// Reports the server's health until `shutdown`, then reports NOT_SERVING: a load balancer that watches has turned away
/// before the server stops accepting.
pub(crate) async fn report_health(
    reporter: HealthReporter,
    services: &'static [&'static str],
    mut database: Probe,
    shutdown: CancellationToken,
) {
    let mut ticks = interval(PROBE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reported = None;
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        let Some(answers) = shutdown.run_until_cancelled(database.answers()).await else {
            break;
        };
        if reported != Some(answers) {
            match (reported, answers) {
                (_, false) => warn!("not serving: the database does not answer"),
                (Some(false), true) => info!("serving: the database answers again"),
                _ => {}
            }
            set(&reporter, services, if answers { ServingStatus::Serving } else { ServingStatus::NotServing }).await;
            reported = Some(answers);
        }
    }
    set(&reporter, services, ServingStatus::NotServing).await;
}

async fn set(reporter: &HealthReporter, services: &[&str], status: ServingStatus) {
    for service in services.iter().chain(&[""]) {
        reporter.set_service_status(service, status).await;
    }
}

/// Asks the process listening on `address` for its health; an address that means "all interfaces" is asked on loopback.
///
/// # Errors
/// UNAVAILABLE when it is not reached or does not serve.
pub async fn healthcheck(address: SocketAddr) -> Result<(), Status> {
    let loopback = match address {
        SocketAddr::V4(_) => SocketAddr::from(([127, 0, 0, 1], address.port())),
        SocketAddr::V6(_) => SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], address.port())),
    };
    let asked = if address.ip().is_unspecified() { loopback } else { address };
    let unavailable = |error: &dyn std::error::Error| Status::new(Code::Unavailable, error.to_string());
    let channel = Endpoint::from_shared(format!("http://{asked}"))
        .map_err(|error| unavailable(&error))?
        .connect_timeout(CHECK_LIMIT)
        .timeout(CHECK_LIMIT)
        .connect()
        .await
        .map_err(|_| Status::unavailable(format!("nothing listens on {asked}")))?;
    let status = HealthClient::new(channel).check(HealthCheckRequest::default()).await?.into_inner().status();
    if status == health_check_response::ServingStatus::Serving {
        return Ok(());
    }
    Err(Status::unavailable(format!("{asked} reports {}", status.as_str_name())))
}
