//! The console: a page for an operator's browser, and the calls that it makes.
//!
//! The calls are those of RelayAdmin, with their messages as JSON. So console, RelayAdmin and command line have one
//! implementation. Who calls is told by a token in a header, never by a cookie: another site cannot send it. With a policy, a
//! certificate tells it too. A browser shows that to whatever page asks for it, so calls of other sites are refused by
//! what the browser says of them, and by their type of content. Otherwise only programs on this machine are answered, and
//! they may only look.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, to_bytes},
    extract::{Path, Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Redirect, Response},
    routing::{get, post},
};
use chassis::{LogLimit, count_denied};
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
        X_FRAME_OPTIONS,
    },
    request::Parts,
    uri::Authority,
};
use prost::{Message, Name};
use proto::relay::v1::{
    GetStatusRequest,
    relay_admin_server::{RelayAdmin, SERVICE_NAME},
};
use serde_json::{Value, json};
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::{
    access::{Admission, Caller, Denied, Role, check_role, is_method},
    grpc::{Admin, REFUSE, deny},
    operate::{SAMPLE, answer, question},
};

/// Nothing but the files below is loaded, no text becomes a script, and no other page may show this one.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; \
    base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";
const SECURITY: [(HeaderName, &str); 7] = [
    (CONTENT_SECURITY_POLICY, POLICY),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (X_FRAME_OPTIONS, "DENY"),
    (REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    // A relay of another version may answer next time.
    (CACHE_CONTROL, "no-store"),
];
/// The files of the page, with their types.
const FILES: [(&str, &str, &str); 5] = [
    ("", "text/html; charset=utf-8", include_str!("../console/index.html")),
    ("console.js", "text/javascript; charset=utf-8", include_str!("../console/console.js")),
    ("console.css", "text/css; charset=utf-8", include_str!("../console/console.css")),
    ("uplot.js", "text/javascript; charset=utf-8", include_str!("../console/uplot.js")),
    ("uplot.css", "text/css; charset=utf-8", include_str!("../console/uplot.css")),
];
/// Proxies add one of these.
const PASSED_ON: [&str; 5] = ["forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via"];
/// A call ends a little before the server would cut it off, which would not answer in JSON.
const CALL_LIMIT_PART: f64 = 0.9;
/// Time between two lines of the log about callers who were denied.
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// A request that names as many events as it may is smaller.
const REQUEST_BYTES_MAX: usize = 128 * 1024;
/// A status is kept for so many times as long as it took to read: it scans the outbox, however many people look at it.
const STATUS_KEPT: u32 = 19;
/// A failure to read it is told to all who ask meanwhile, and not tried again for so long.
const FAILURE_KEPT: Duration = Duration::from_secs(1);

/// What the console needs.
pub(crate) struct Console {
    pub(crate) admin: Arc<Admin>,
    pub(crate) admission: Admission,
    /// Names by which browsers may ask for it, beside localhost and addresses.
    pub(crate) hosts: Vec<String>,
    pub(crate) status: SharedStatus,
    /// How long a call may take.
    pub(crate) call_limit: Duration,
}

/// The last status that was read, until when it counts, and whether it is being read.
#[derive(Clone, Default)]
pub(crate) struct SharedStatus(Arc<Mutex<Option<Reading>>>);

/// Until when a reading counts, and what was read.
type Reading = (Instant, Result<Value, Status>);

/// The page and its calls.
pub(crate) fn pages(console: Console) -> Router {
    let console = Arc::new(console);
    Router::new()
        .route("/console", get(|| async { Redirect::permanent("console/") }))
        .route("/console/", get(|| async { file("") }))
        .route("/console/{name}", get(|Path(name): Path<String>| async move { file(&name) }))
        .route("/api/me", get(tell_who))
        .route("/api/{method}", post(call))
        .route_layer(middleware::from_fn_with_state(Arc::clone(&console), guard))
        .with_state(console)
}

fn file(name: &str) -> Response {
    match FILES.iter().find(|(of, ..)| *of == name) {
        Some((_, content, text)) => ([(CONTENT_TYPE, *content)], *text).into_response(),
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

/// Refuses what another site may have sent, and tells the browser what this page may do.
async fn guard(State(console): State<Arc<Console>>, request: Request, next: Next) -> Response {
    let mut response = match console.distrusts(&request) {
        Some(why) => refuse(StatusCode::MISDIRECTED_REQUEST, "MISDIRECTED", why),
        None => match timeout(console.call_limit.mul_f64(CALL_LIMIT_PART), next.run(request)).await {
            Ok(response) => response,
            Err(_) => refuse(
                StatusCode::GATEWAY_TIMEOUT,
                "TIMEOUT",
                "the relay has not answered in time; what was asked for may have been done",
            ),
        },
    };
    for (name, value) in SECURITY {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

impl Console {
    /// Another site may let its own name lead to this address (DNS rebinding). Then the browser takes its page for one of
    /// ours. An address in place of a name cannot be so misled.
    fn distrusts(&self, request: &Request) -> Option<&'static str> {
        let of_header = request.headers().get(HOST).and_then(|host| host.to_str().ok());
        let host = request.uri().authority().map(Authority::as_str).or(of_header).unwrap_or_default();
        if !is_trusted(host, &self.hosts) {
            return Some("this name is not one of the console's: start the relay with --console-host NAME");
        }
        let site = request.headers().get("sec-fetch-site").map(HeaderValue::as_bytes);
        let is_own = matches!(site, None | Some(b"same-origin" | b"none"));
        // A link on another page may lead here. It may not call.
        (!is_own && request.uri().path().starts_with("/api/")).then_some("another site may not call this")
    }

    async fn admit(&self, request: &Parts, method: &str) -> Result<Caller, Denied> {
        if let Some(known) = self.admission.admit_by_certificate(&request.extensions, method) {
            return known;
        }
        if let Some(tokens) = &self.admission.tokens {
            return tokens.admit(&request.headers, method).await;
        }
        // The policy says who may look. To be on this machine is no name.
        if self.admission.tls.has_policy() {
            return Err(Denied::NoCertificate);
        }
        let peer = chassis::address_of_peer(&request.extensions);
        let is_local = peer.is_some_and(|peer| peer.ip().to_canonical().is_loopback());
        // A proxy on this machine passes on what others send.
        if !is_local || PASSED_ON.iter().any(|name| request.headers.contains_key(*name)) {
            return Err(Denied::NotLocal);
        }
        let caller = Caller { name: String::new(), role: Role::Viewer };
        check_role(&caller, method)?;
        Ok(caller)
    }
}

/// The host of a request, perhaps with a port.
fn is_trusted(host: &str, names: &[String]) -> bool {
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let (host, has_user) = (authority.host(), authority.as_str().contains('@'));
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let is_own = |name: &str| name.eq_ignore_ascii_case(host);
    !has_user && (address.is_ok() || is_own("localhost") || names.iter().any(|name| is_own(name)))
}

/// Whether a token is needed, and what its owner may do.
async fn tell_who(State(console): State<Arc<Console>>, request: Request) -> Response {
    match console.admit(&request.into_parts().0, "GetStatus").await {
        Ok(Caller { name, role }) => Json(json!({"name": name, "role": role.word()})).into_response(),
        Err(denied) => {
            log_denied("GetStatus", &denied);
            tell(&deny(&denied))
        }
    }
}

async fn call(State(console): State<Arc<Console>>, Path(method): Path<String>, request: Request) -> Response {
    let (request, body) = request.into_parts();
    let caller = match console.admit(&request, &method).await {
        Ok(caller) => caller,
        Err(denied) => {
            log_denied(&method, &denied);
            return tell(&deny(&denied));
        }
    };
    if !is_json(&request.headers) {
        return refuse(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "NOT_JSON",
            "the request must be of the type application/json",
        );
    }
    let Ok(body) = to_bytes(body, REQUEST_BYTES_MAX).await else {
        let why = format!("the request must have at most {REQUEST_BYTES_MAX} bytes");
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "TOO_LARGE", &why);
    };
    match console.dispatch(&method, &body, caller).await {
        Ok(answer) => Json(answer).into_response(),
        Err(status) => tell(&status),
    }
}

/// Whoever reaches the port can cause such lines. So they are few. Of the caller they hold names that a CA has signed.
fn log_denied(method: &str, denied: &Denied) {
    static SAID: LogLimit = LogLimit::new();
    let is_known = is_method(method);
    count_denied(if is_known { format!("{SERVICE_NAME}/{method}") } else { "_OTHER".to_owned() });
    if SAID.allows(Instant::now(), LOG_INTERVAL) {
        let method = if is_known { method } else { "unknown" };
        tracing::warn!(method, %denied, "a call of an operator is denied");
    }
}

fn is_json(headers: &HeaderMap) -> bool {
    let content = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    content.split(';').next().is_some_and(|content| content.trim().eq_ignore_ascii_case("application/json"))
}

impl Console {
    async fn dispatch(&self, method: &str, body: &[u8], caller: Caller) -> Result<Value, Status> {
        let admin = &*self.admin;
        match method {
            "GetStatus" => self.status.read(&self.admin).await,
            "ListDeadEvents" => ask(body, caller, |request| admin.list_dead_events(request)).await,
            "GetDeadEvent" => ask(body, caller, |request| admin.get_dead_event(request)).await,
            "GetJourney" => ask(body, caller, |request| admin.get_journey(request)).await,
            "Diagnose" => ask(body, caller, |request| admin.diagnose(request)).await,
            "GroupDeadEvents" => ask(body, caller, |request| admin.group_dead_events(request)).await,
            "GetBlastRadius" => ask(body, caller, |request| admin.get_blast_radius(request)).await,
            "RequeueDeadEvents" => ask(body, caller, |request| admin.requeue_dead_events(request)).await,
            "DiscardDeadEvents" => ask(body, caller, |request| admin.discard_dead_events(request)).await,
            "DiscardDeadEvent" => ask(body, caller, |request| admin.discard_dead_event(request)).await,
            "RestoreDiscardedEvent" => ask(body, caller, |request| admin.restore_discarded_event(request)).await,
            "Pause" => ask(body, caller, |request| admin.pause(request)).await,
            "Resume" => ask(body, caller, |request| admin.resume(request)).await,
            "ListDeeds" => ask(body, caller, |request| admin.list_deeds(request)).await,
            "UndoDeed" => ask(body, caller, |request| admin.undo_deed(request)).await,
            _ => Err(REFUSE.with(Code::Unimplemented, "NO_METHOD", format!("RelayAdmin has no method {method}"))),
        }
    }
}

/// Calls the method, with messages as JSON.
async fn ask<Q, A, F>(body: &[u8], caller: Caller, method: impl FnOnce(tonic::Request<Q>) -> F) -> Result<Value, Status>
where
    Q: Message + Name + Default,
    A: Message + Name,
    F: Future<Output = Result<tonic::Response<A>, Status>>,
{
    let mut request = tonic::Request::new(
        question(body).map_err(|why| REFUSE.with(Code::InvalidArgument, "INVALID_JSON", why.to_string()))?,
    );
    request.extensions_mut().insert(caller);
    to_json(method(request).await?.get_ref())
}

fn to_json<A: Message + Name>(message: &A) -> Result<Value, Status> {
    answer(message)
        .map_err(|cause| REFUSE.with(Code::Internal, "NO_JSON", format!("the answer has no JSON form: {cause}")))
}

impl SharedStatus {
    /// Reads the status, unless the last one is recent enough. Who comes meanwhile waits for the same reading. It has a task of
    /// its own: whoever began it may be gone, and the others still wait.
    async fn read(&self, admin: &Arc<Admin>) -> Result<Value, Status> {
        let (shared, admin) = (self.clone(), Arc::clone(admin));
        let reading = tokio::spawn(async move {
            let mut last = shared.0.lock().await;
            if let Some((until, status)) = &*last
                && Instant::now() < *until
            {
                return status.clone();
            }
            let began = Instant::now();
            let read = admin.get_status(tonic::Request::new(GetStatusRequest {})).await;
            let status = read.and_then(|status| to_json(status.get_ref()));
            // The reading sleeps for a second, since rates are the difference of two readings.
            let took = began.elapsed().saturating_sub(SAMPLE);
            let kept = if status.is_ok() { took * STATUS_KEPT } else { FAILURE_KEPT };
            *last = Some((Instant::now() + kept, status.clone()));
            status
        });
        reading.await.unwrap_or_else(|_| Err(REFUSE.with(Code::Internal, "INTERNAL", "the status was not read")))
    }
}

/// A refusal of RelayAdmin, as JSON.
fn tell(status: &Status) -> Response {
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone()).unwrap_or_default();
    let fields = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    let fields: Vec<_> = fields.iter().map(|bad| json!({"field": bad.field, "description": bad.description})).collect();
    let code = chassis::code_name(status.code());
    let body = json!({"code": code, "reason": reason, "message": status.message(), "fields": fields});
    (http_status(status.code()), Json(body)).into_response()
}

/// A refusal of the console itself, in the same form.
fn refuse(status: StatusCode, reason: &str, message: &str) -> Response {
    (status, Json(json!({"code": "", "reason": reason, "message": message, "fields": []}))).into_response()
}

fn http_status(code: Code) -> StatusCode {
    match code {
        Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound | Code::Unimplemented => StatusCode::NOT_FOUND,
        Code::FailedPrecondition | Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Lets only those reach RelayAdmin by gRPC who may, and tells it who they are.
pub(crate) fn guard_grpc(routes: Router, admission: Admission) -> Router {
    let check = async move |State(admission): State<Admission>, mut request: Request<Body>, next: Next| {
        let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
        match admission.admit(request.headers(), request.extensions(), &method).await {
            Ok(caller) => {
                if let Some(caller) = caller {
                    request.extensions_mut().insert(caller);
                }
                next.run(request).await
            }
            Err(denied) => {
                log_denied(&method, &denied);
                deny(&denied).into_http()
            }
        }
    };
    routes.layer(middleware::from_fn_with_state(admission, check))
}

#[cfg(test)]
mod tests {
    use super::is_trusted;

    #[test]
    fn only_addresses_and_its_own_names_lead_to_the_console() {
        let names = ["ops.example.com".to_owned()];
        for host in ["localhost", "LOCALHOST:50053", "127.0.0.1:50053", "[::1]:50053", "10.1.2.3", "OPS.example.com:80"]
        {
            assert!(is_trusted(host, &names), "{host}");
        }
        for host in
            ["", "example.com", "ops.example.com.evil.net", "localhost.evil.net:50053", "evil@localhost", "::1", "a b"]
        {
            assert!(!is_trusted(host, &names), "{host}");
        }
    }
}
