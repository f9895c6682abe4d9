//! Lets callers do what the policy allows them, and nothing else.

use std::{collections::HashSet, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
};
use metrics::{SharedString, counter, describe_counter};
use tokio::time::Instant;
use tonic::Code;
use tracing::warn;

use crate::{LogLimit, Refuse, Tls, calls::method_names};

const DENIED: &str = "calls_denied_total";
/// Orchestrators and load balancers ask it, and need no line in a policy.
pub(crate) const EXEMPT: &str = "grpc.health.v1.Health/";
/// Time between two lines of the log about calls that were denied.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
const REFUSE: Refuse = Refuse { domain: "policy" };

/// Why a call is not allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAllowed {
    /// The connection shows nobody's name.
    #[error("this needs a certificate with a name that the policy knows")]
    NoCertificate,
    /// The policy has no such line.
    #[error("the policy of this process does not allow this to {}", if .0.is_empty() { "a certificate without names" } else { .0 })]
    Names(String),
}

pub(crate) fn describe() {
    describe_counter!(DENIED, "Calls that were refused because of who made them, by method");
}

/// Counts a call that was refused because of who made it. The method has to be one that there is, or `_OTHER`.
pub fn count_denied(method: impl Into<SharedString>) {
    counter!(DENIED, "rpc_method" => method.into()).increment(1);
}

/// The policy, and the methods that a metric may name.
#[derive(Debug)]
struct Authority {
    tls: Tls,
    methods: HashSet<String>,
}

/// Lets each call of the routes pass that the policy allows, and tells it by which name. Without a policy all may pass.
pub(crate) fn authorize(routes: Router, tls: &Tls, descriptors: &[&[u8]]) -> Router {
    if !tls.has_policy() {
        return routes;
    }
    let methods = descriptors.iter().flat_map(|encoded| method_names(encoded)).collect();
    let authority = Arc::new(Authority { tls: tls.clone(), methods });
    routes.layer(from_fn_with_state(authority, check))
}

async fn check(State(authority): State<Arc<Authority>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let method = path.strip_prefix('/').unwrap_or(path);
    if method.starts_with(EXEMPT) {
        return next.run(request).await;
    }
    match authority.tls.allow(request.extensions(), method) {
        Some(Ok(allowed)) => {
            request.extensions_mut().insert(allowed);
            next.run(request).await
        }
        Some(Err(why)) => {
            let known = authority.methods.get(method).map_or("_OTHER", String::as_str);
            count_denied(known.to_owned());
            log_denied(known, &why);
            deny(&why)
        }
        None => next.run(request).await,
    }
}

/// Whoever has a certificate can cause such lines. So they are few, and the path is told only if there is such a method.
fn log_denied(method: &str, why: &NotAllowed) {
    static SAID: LogLimit = LogLimit::new();
    if SAID.allows(Instant::now(), LOG_INTERVAL) {
        warn!(method, %why, "a call is denied (said once a second at most)");
    }
}

fn deny(why: &NotAllowed) -> Response {
    let (code, reason) = match why {
        NotAllowed::NoCertificate => (Code::Unauthenticated, "CERTIFICATE_REQUIRED"),
        NotAllowed::Names(_) => (Code::PermissionDenied, "NOT_ALLOWED"),
    };
    REFUSE.with(code, reason, why.to_string()).into_http()
}
