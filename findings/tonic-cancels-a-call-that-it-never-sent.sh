#!/usr/bin/env bash
# A tonic client that is asked to leave a connection on which it has a stream open cancels its next call, and never sends it.
#
# Versions: tonic 0.14.9 and tonic-health 0.14.9 (server and client), hyper 1.12.0, h2 0.4.20, tokio 1.54.1; grpcio 1.85.3 (client).
#
# A server asks clients to leave a connection after a second (max_connection_age). A client calls health's Check again and again:
#
#   tonic, nothing else open         every call succeeds
#   tonic, with a Watch open         the first call after the GOAWAY fails: CANCELLED, "operation was canceled"; the next succeed
#   grpcio, with a Watch open        every call succeeds
#
# The server sees one call less than the client has made.
#
# Why it matters: servers send a GOAWAY whenever they end or rotate connections, and it is there so that no call is lost. Retry
# policies do not repeat CANCELLED, since it stands for what a caller wanted. Here it means the opposite: nobody wanted it, and
# repeating is safe. A client with a stream that never ends, such as a watch, meets this at every deployment of its server.
#
# Needs: cargo with a C linker, and Python 3 with venv. Takes about two minutes.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail

TONIC=0.14.9 HYPER=1.12.0 H2=0.4.20 TOKIO=1.54.1 GRPCIO=1.85.3

work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 2' INT TERM
cd "$work"

mkdir src
cat >Cargo.toml <<END
[package]
name = "leave"
version = "0.0.0"
edition = "2021"
[dependencies]
h2 = "=$H2"
hyper = "=$HYPER"
tokio = { version = "=$TOKIO", features = ["rt", "macros", "net", "time"] }
tokio-stream = { version = "0.1", features = ["net"] }
tonic = "=$TONIC"
tonic-health = "=$TONIC"
[profile.dev]
debug = 0
END

cat >src/main.rs <<'END'
use std::{collections::BTreeMap, sync::atomic::{AtomicUsize, Ordering}, time::{Duration, Instant}};

use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{transport::{Channel, Server}, Request, Status};
use tonic_health::pb::{health_client::HealthClient, HealthCheckRequest};

/// Checks, not watches.
static SEEN: AtomicUsize = AtomicUsize::new(0);

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (_reporter, health) = tonic_health::server::health_reporter();
    let count = |request: Request<()>| -> Result<Request<()>, Status> {
        if request.metadata().contains_key("counted") {
            SEEN.fetch_add(1, Ordering::Relaxed);
        }
        Ok(request)
    };
    let health = tonic::service::interceptor::InterceptedService::new(health, count);
    let server = Server::builder().max_connection_age(Duration::from_secs(1)).add_service(health);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    if std::env::args().nth(1).as_deref() == Some("serve") {
        println!("{address}");
        tokio::time::sleep(Duration::from_secs(60)).await;
        return;
    }
    for watch in [false, true] {
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        let mut client = HealthClient::new(channel);
        let watched = if watch { Some(client.watch(HealthCheckRequest::default()).await.unwrap()) } else { None };
        SEEN.store(0, Ordering::Relaxed);
        let (began, mut calls, mut failed) = (Instant::now(), 0, BTreeMap::<String, usize>::new());
        while began.elapsed() < Duration::from_millis(1900) {
            let mut request = Request::new(HealthCheckRequest::default());
            request.metadata_mut().insert("counted", "1".parse().unwrap());
            calls += 1;
            if let Err(error) = client.check(request).await {
                *failed.entry(format!("{:?} {:?}", error.code(), error.message())).or_default() += 1;
            }
        }
        let failed: Vec<_> = failed.iter().collect();
        println!("tonic, watch {watch}: failed {failed:?}; not sent {}", calls - SEEN.load(Ordering::Relaxed));
        drop(watched);
    }
}
END

cat >client.py <<'END'
import collections, sys, time
import grpc

channel = grpc.insecure_channel(sys.argv[1])
check = channel.unary_unary("/grpc.health.v1.Health/Check")
watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
next(watch)
failed, end = collections.Counter(), time.monotonic() + 1.9
while time.monotonic() < end:
    try:
        check(b"", timeout=5)
    except grpc.RpcError as error:
        failed[error.code().name] += 1
print(f"grpcio, watch true: failed {sorted(failed.items())}")
END

cargo build --quiet 2>build.log || { cat build.log >&2; exit 2; }
python3 -m venv venv >venv.log 2>&1 && venv/bin/pip install -q grpcio==$GRPCIO typing-extensions==4.16.0 >pip.log 2>&1 || { cat venv.log pip.log >&2; exit 2; }

timeout 30 target/debug/leave >seen 2>run.log || { cat run.log >&2; exit 2; }
target/debug/leave serve >address &
server=$!
for _ in $(seq 50); do [ -s address ] && break; sleep 0.1; done
timeout 30 venv/bin/python client.py "$(cat address)" >>seen 2>run.log || { cat run.log >&2; exit 2; }
cat seen

cat >expected <<'END'
tonic, watch false: failed []; not sent 0
tonic, watch true: failed [("Cancelled \"operation was canceled\"", 1)]; not sent 1
grpcio, watch true: failed []
END
diff expected seen >difference || { sed 's/^/CHANGED /' difference; exit 1; }
echo "as stated"
