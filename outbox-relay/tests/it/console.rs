//! The console's calls, and who may make them.

use std::{collections::HashSet, fs, io, net::SocketAddr, path::PathBuf, process::Command};

use proto::relay::v1::{GetStatusRequest, PauseRequest, relay_admin_client::RelayAdminClient};
use serde_json::{Value, json};
use testkit::http::get;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{Code, Request};

use crate::{
    operator::{Operator, count_dead, insert_many_dead, text},
    outbox::Outbox,
    receiver::{Log, Receiver, Reply},
    relay::Relay,
};

/// A token, and the file with it and others. The file is deleted with the test.
pub(crate) struct Tokens {
    pub(crate) operator: String,
    pub(crate) viewer: String,
    lines: [String; 2],
    file: PathBuf,
}

impl Tokens {
    pub(crate) fn make() -> Self {
        let make = |role, name| {
            let made = Command::new(env!("CARGO_BIN_EXE_outbox-relay")).args(["token", role, name]).output().unwrap();
            assert!(made.status.success(), "{}", text(&made.stderr));
            let said = text(&made.stdout);
            let after = |label: &str| said.lines().find_map(|line| line.strip_prefix(label)).unwrap().trim().to_owned();
            (after("the token:"), after("its line in the token file:"))
        };
        let (operator, line_of_operator) = make("operator", "Ann B.");
        let (viewer, line_of_viewer) = make("viewer", "bob");
        let file = std::env::temp_dir().join(format!("tokens-{}", uuid::Uuid::new_v4().simple()));
        let tokens = Self { operator, viewer, lines: [line_of_operator, line_of_viewer], file };
        tokens.write(&tokens.lines.join("\n"));
        tokens
    }

    fn write(&self, content: &str) {
        fs::write(&self.file, content).unwrap();
    }

    /// Puts a pipe in the place of the file, so that whoever reads it waits.
    fn hang(&self) {
        fs::remove_file(&self.file).unwrap();
        assert!(Command::new("mkfifo").arg(&self.file).status().unwrap().success());
    }

    /// Ends the wait, and puts the file back.
    fn mend(&self) {
        drop(fs::OpenOptions::new().write(true).open(&self.file).unwrap());
        fs::remove_file(&self.file).unwrap();
        self.write(&self.lines.join("\n"));
    }

    pub(crate) fn path(&self) -> &str {
        self.file.to_str().unwrap()
    }
}

impl Drop for Tokens {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.file));
    }
}

/// Status, head and body.
async fn send(address: SocketAddr, request: &str, headers: &str, body: &str) -> io::Result<(u16, String, Value)> {
    let length = body.len();
    let host = if headers.contains("Host:") { String::new() } else { format!("Host: {address}\r\n") };
    let request =
        format!("{request} HTTP/1.1\r\n{host}{headers}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}");
    let mut connection = TcpStream::connect(address).await?;
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok((status, head.to_lowercase(), serde_json::from_str(body).unwrap_or_default()))
}

const JSON: &str = "Content-Type: application/json\r\n";

/// Calls a method of the console, as its page does.
async fn call(address: SocketAddr, token: &str, method: &str, body: &Value) -> (u16, Value) {
    let headers = if token.is_empty() { JSON.to_owned() } else { format!("{JSON}Authorization: Bearer {token}\r\n") };
    let (status, _, answer) = send(address, &format!("POST /api/{method}"), &headers, &body.to_string()).await.unwrap();
    (status, answer)
}

async fn start(flags: &[&str]) -> (Outbox, Receiver, Relay) {
    let outbox = Outbox::create().await;
    let receiver = Receiver::start(Reply::apply).await;
    let relay = Relay::start(&outbox, receiver.address, flags).await;
    relay.serves().await;
    (outbox, receiver, relay)
}

#[tokio::test]
async fn the_page_is_served_with_what_keeps_strangers_out() {
    let (_outbox, _receiver, relay) = start(&[]).await;
    let (status, page) = get(relay.address, "/console/").await.unwrap();
    assert!(status == 200 && page.starts_with("<!doctype html>"), "{page}");
    for file in ["console.js", "console.css", "uplot.js", "uplot.css"] {
        assert!(page.contains(file), "{file}");
        assert_eq!(get(relay.address, &format!("/console/{file}")).await.unwrap().0, 200, "{file}");
    }
    for path in ["/console/", "/console/none", "/api/me"] {
        let (_, head, _) = send(relay.address, &format!("GET {path}"), "", "").await.unwrap();
        for part in [
            "content-security-policy: default-src 'none'; script-src 'self'; ",
            "require-trusted-types-for 'script'",
            "frame-ancestors 'none'",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
            "cache-control: no-store",
        ] {
            assert!(head.contains(part), "{path}: {part}: {head}");
        }
        assert!(!head.contains("set-cookie") && !head.contains("access-control"), "{head}");
    }
    let (status, head, _) = send(relay.address, "GET /console", "", "").await.unwrap();
    assert!(status == 308 && head.contains("location: console/"), "{head}");
    relay.stop().await;
}

#[tokio::test]
async fn without_a_token_file_programs_on_this_machine_may_look_and_not_act() {
    let (outbox, _receiver, relay) = start(&[]).await;
    insert_many_dead(&outbox, 1).await;
    let (status, _, me) = send(relay.address, "GET /api/me", "", "").await.unwrap();
    assert_eq!((status, me), (200, json!({"name": "", "role": "viewer"})));
    let (status, answer) = call(relay.address, "", "GetStatus", &json!({})).await;
    assert_eq!((status, &answer["dead"]), (200, &json!(1)), "{answer}");
    assert_eq!(answer["subscriptions"][0]["name"], "all");
    let pause = json!({"paused_by": "mallory", "reason": "why not"});
    let (status, refused) = call(relay.address, "", "Pause", &pause).await;
    assert_eq!((status, &refused["reason"]), (403, &json!("OPERATORS_ONLY")));
    let everything = json!({"all": true, "requeued_by": "mallory"});
    assert_eq!(call(relay.address, "", "RequeueDeadEvents", &everything).await.0, 403);
    assert_eq!(count_dead(&outbox).await, 1);
    relay.stop().await;
}

#[tokio::test]
async fn other_sites_are_refused() {
    let (_outbox, _receiver, relay) = start(&["--console-host", "ops.example.com"]).await;
    let port = relay.address.port();
    let ask = async |headers: &str| {
        send(relay.address, "POST /api/GetStatus", &format!("{JSON}{headers}"), "{}").await.unwrap().0
    };
    for (headers, status) in [
        ("Sec-Fetch-Site: same-origin\r\n".to_owned(), 200),
        (format!("Host: localhost:{port}\r\n"), 200),
        (format!("Host: ops.example.com:{port}\r\n"), 200),
        (format!("Host: rebound.example.net:{port}\r\n"), 421),
        ("Host: \r\n".to_owned(), 421),
        ("Sec-Fetch-Site: cross-site\r\n".to_owned(), 421),
        ("Sec-Fetch-Site: same-site\r\n".to_owned(), 421),
    ] {
        assert_eq!(ask(&headers).await, status, "{headers}");
    }
    let foreign = "Content-Type: text/plain\r\n";
    assert_eq!(send(relay.address, "POST /api/GetStatus", foreign, "{}").await.unwrap().0, 415);
    // A link to it may be followed.
    let (status, ..) = send(relay.address, "GET /console/", "Sec-Fetch-Site: cross-site\r\n", "").await.unwrap();
    assert_eq!(status, 200);
    relay.stop().await;
}

#[tokio::test]
async fn a_token_says_who_acts_and_one_that_is_taken_out_is_refused_at_once() {
    let tokens = Tokens::make();
    let (outbox, _receiver, relay) = start(&["--token-file", tokens.path()]).await;
    insert_many_dead(&outbox, 3).await;
    let (status, refused) = call(relay.address, "", "GetStatus", &json!({})).await;
    assert_eq!((status, &refused["reason"]), (401, &json!("TOKEN_REQUIRED")));
    let (status, refused) = call(relay.address, "guess", "GetStatus", &json!({})).await;
    assert_eq!((status, &refused["reason"]), (401, &json!("TOKEN_UNKNOWN")));
    assert_eq!(call(relay.address, &tokens.viewer, "ListDeadEvents", &json!({})).await.1["total_size"], 3);
    let pause = json!({"paused_by": "mallory", "reason": "moving"});
    assert_eq!(call(relay.address, &tokens.viewer, "Pause", &pause).await.0, 403);
    let (status, paused) = call(relay.address, &tokens.operator, "Pause", &pause).await;
    assert_eq!((status, &paused["paused_by"]), (200, &json!("Ann B.")));
    let requeue = json!({"all": true, "code": "BUSY"});
    let (status, done) = call(relay.address, &tokens.operator, "RequeueDeadEvents", &requeue).await;
    assert_eq!((status, &done["requeued"], &done["deed_id"]), (200, &json!(3), &json!(2)));
    let deeds = Operator::of(&outbox).reads(&["deeds", "--json"]).await;
    let by: Vec<_> = deeds["deeds"].as_array().unwrap().iter().map(|deed| deed["done_by"].clone()).collect();
    assert_eq!(by, ["Ann B.", "Ann B."]);

    tokens.write(&tokens.lines[0]);
    assert_eq!(call(relay.address, &tokens.viewer, "GetStatus", &json!({})).await.0, 401);
    tokens.write("viewer");
    let (status, refused) = call(relay.address, &tokens.operator, "GetStatus", &json!({})).await;
    assert_eq!((status, &refused["reason"]), (503, &json!("TOKEN_FILE_BROKEN")));
    relay.stop().await;
}

#[tokio::test]
async fn with_a_token_file_grpc_needs_a_token_too() {
    let tokens = Tokens::make();
    let (outbox, _receiver, relay) = start(&["--token-file", tokens.path()]).await;
    let mut client = RelayAdminClient::connect(format!("http://{}", relay.address)).await.unwrap();
    let refused = client.get_status(GetStatusRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    let with = |token: &str| {
        let pause = PauseRequest { paused_by: "mallory".into(), reason: "moving".into(), ..PauseRequest::default() };
        let mut request = Request::new(pause);
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        request
    };
    let refused = client.pause(with(&tokens.viewer)).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    let paused = client.pause(with(&tokens.operator)).await.unwrap().into_inner();
    assert_eq!(paused.paused_by, "Ann B.");
    // Health needs none: an orchestrator asks for it.
    chassis::healthcheck(relay.address, &chassis::TlsFiles::default()).await.unwrap();
    assert_eq!(Operator::of(&outbox).reads(&["status", "--json"]).await["pause"]["paused_by"], "Ann B.");
    relay.stop().await;
}

#[tokio::test]
async fn bad_calls_are_refused_in_words() {
    let (_outbox, _receiver, relay) = start(&[]).await;
    for (method, body, status) in [
        ("None", "{}".to_owned(), 403),
        ("GetJourney", r#"{"id": "x"}"#.to_owned(), 400),
        ("GetJourney", r#"{"identity": "x"}"#.to_owned(), 400),
        ("GetJourney", "{".to_owned(), 400),
        ("GetJourney", r#"{"id": "0192f0c1-2345-7abc-8def-0123456789ab"}"#.to_owned(), 404),
        ("ListDeadEvents", format!(r#"{{"type": "{}"}}"#, "x".repeat(200_000)), 413),
        ("ListDeadEvents", String::new(), 200),
    ] {
        let (found, _, answer) = send(relay.address, &format!("POST /api/{method}"), JSON, &body).await.unwrap();
        assert_eq!(found, status, "{method}: {answer}");
        assert!(status == 200 || !answer["message"].as_str().unwrap().is_empty(), "{answer}");
    }
    let (_, _, answer) = send(relay.address, "POST /api/GetJourney", JSON, r#"{"id": "x"}"#).await.unwrap();
    assert_eq!((&answer["code"], &answer["reason"]), (&json!("INVALID_ARGUMENT"), &json!("INVALID_ID")));
    assert_eq!(answer["fields"][0]["field"], "id");
    relay.stop().await;
}

/// A reading takes a second. Those who come meanwhile wait for it, and none begins one of its own.
#[tokio::test]
async fn many_who_look_at_the_status_cost_one_reading() {
    let (_outbox, _receiver, relay) = start(&[]).await;
    let address = relay.address;
    let look = || tokio::spawn(async move { call(address, "", "GetStatus", &json!({})).await });
    let looks: Vec<_> = (0..8).map(|_| look()).collect();
    let mut times = Vec::new();
    for look in looks {
        let (status, answer) = look.await.unwrap();
        assert_eq!(status, 200);
        times.push(answer["time"].clone());
    }
    let readings: HashSet<_> = times.iter().map(ToString::to_string).collect();
    // One may have begun just before another look.
    assert!(readings.len() <= 2, "{readings:?}");
    relay.stop().await;
}

/// The file may be on a network. A reader that waits must not pile up with others.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_file_that_hangs_lets_nobody_in_and_hinders_nothing_else() {
    let tokens = Tokens::make();
    let (outbox, receiver, relay) = start(&["--token-file", tokens.path()]).await;
    tokens.hang();
    assert_eq!(call(relay.address, "", "GetStatus", &json!({})).await.0, 401);
    let (address, token) = (relay.address, tokens.operator.clone());
    let ask = || {
        let token = token.clone();
        tokio::spawn(async move { call(address, &token, "GetStatus", &json!({})).await })
    };
    let asked: Vec<_> = (0..20).map(|_| ask()).collect();
    for asked in asked {
        let (status, refused) = asked.await.unwrap();
        assert_eq!((status, &refused["reason"]), (503, &json!("TOKEN_FILE_BROKEN")));
        let said = refused["message"].as_str().unwrap();
        assert!(!said.contains(tokens.path()), "{said}");
    }
    let event_id = outbox.insert_one().await;
    outbox.wait_until_gone(event_id).await;
    assert_eq!(receiver.read(Log::ids), [event_id]);
    tokens.mend();
    assert_eq!(call(relay.address, &tokens.operator, "GetStatus", &json!({})).await.0, 200);
    relay.stop().await;
}

/// A proxy on the relay's machine makes everybody look local.
#[tokio::test]
async fn what_a_proxy_passes_on_is_not_taken_for_local() {
    let (_outbox, _receiver, relay) = start(&[]).await;
    for header in ["X-Forwarded-For: 192.0.2.7", "Forwarded: for=192.0.2.7", "Via: 1.1 proxy"] {
        let headers = format!("{JSON}{header}\r\n");
        let (status, _, refused) = send(relay.address, "POST /api/GetStatus", &headers, "{}").await.unwrap();
        assert_eq!((status, &refused["reason"]), (403, &json!("LOCAL_ONLY")), "{header}");
    }
    relay.stop().await;
}
