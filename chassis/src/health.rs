//! Reports the health of this process, and asks another process for its health.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_check_response, health_client::HealthClient},
    server::HealthReporter,
};
use tracing::{info, warn};

use crate::{
    Tls, TlsFiles,
    connect::{connect_to_own, explain, last_cause},
    probe::Probe,
};

/// How often the database is probed.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Timeout of a health check of another process.
const CHECK_LIMIT: Duration = Duration::from_secs(3);

/// Whether this process can do its work now. Clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Readiness(Arc<Mutex<State>>);

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    #[default]
    Starts,
    Serves,
    /// The database cannot be written to.
    Hindered {
        cause: String,
    },
    Ends,
}

impl Readiness {
    pub(crate) fn state(&self) -> State {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, state: State) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }
}

/// Reports SERVING of the services of each listener while the database can be written to, and NOT_SERVING otherwise.
///
/// At `shutdown` it reports NOT_SERVING and then returns.
pub(crate) async fn report_health(
    listeners: Vec<(HealthReporter, &'static [&'static str])>,
    readiness: Readiness,
    mut database: Probe,
    shutdown: CancellationToken,
) {
    let mut ticks = interval(PROBE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reported = None;
    while shutdown.run_until_cancelled(ticks.tick()).await.is_some() {
        let Some(asked) = shutdown.run_until_cancelled(database.can_write()).await else {
            break;
        };
        let can_write = asked.is_ok();
        readiness.set(asked.clone().map_or_else(|cause| State::Hindered { cause }, |()| State::Serves));
        if reported != Some(can_write) {
            match (reported, &asked) {
                (_, Err(cause)) => warn!(cause, "not serving: the database cannot be written to"),
                (Some(false), Ok(())) => info!("serving: the database can be written to again"),
                _ => {}
            }
            set(&listeners, if can_write { ServingStatus::Serving } else { ServingStatus::NotServing }).await;
            reported = Some(can_write);
        }
    }
    readiness.set(State::Ends);
    set(&listeners, ServingStatus::NotServing).await;
}

async fn set(listeners: &[(HealthReporter, &[&str])], status: ServingStatus) {
    for (reporter, services) in listeners {
        for service in services.iter().chain(&[""]) {
            reporter.set_service_status(service, status).await;
        }
    }
}

/// The process cannot be reached, or does not serve.
#[derive(Debug, thiserror::Error)]
#[error("{address} {state}")]
pub struct NotServing {
    address: SocketAddr,
    state: String,
}

/// Asks the process that listens on `address` for its health. An address of all interfaces, such as 0.0.0.0, is asked
/// on loopback.
///
/// # Errors
/// [`NotServing`].
pub async fn healthcheck(mut address: SocketAddr, tls: &TlsFiles) -> Result<(), NotServing> {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    let not_serving = |state: String| NotServing { address, state };
    let scheme = if tls.tls_cert_file.is_some() { "https" } else { "http" };
    let endpoint =
        Endpoint::from_shared(format!("{scheme}://{address}")).map_err(|error| not_serving(error.to_string()))?;
    let endpoint = endpoint.connect_timeout(CHECK_LIMIT).timeout(CHECK_LIMIT);
    if tls.tls_cert_file.is_some() && tls.tls_ca_file.is_none() {
        return Err(not_serving("cannot be asked: give --tls-ca-file, by which its certificate is trusted".into()));
    }
    let certificates = Tls::read(tls).map_err(|error| not_serving(error.to_string()))?;
    let channel = connect_to_own(endpoint, &certificates).await.map_err(|error| not_serving(unreachable(&error)))?;
    let answer = HealthClient::new(channel).check(HealthCheckRequest::default()).await;
    match answer.map(|response| response.into_inner().status()) {
        Ok(health_check_response::ServingStatus::Serving) => Ok(()),
        Ok(other) => Err(not_serving(format!("reports {}", other.as_str_name()))),
        Err(status) => Err(not_serving(format!("does not answer: {}", explain(&status)))),
    }
}

fn unreachable(error: &tonic::transport::Error) -> String {
    format!("cannot be reached: check that the process runs and listens there ({})", last_cause(error))
}
