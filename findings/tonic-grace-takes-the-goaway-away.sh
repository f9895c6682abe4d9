#!/usr/bin/env bash
# A tonic server with a grace for old connections never asks their clients to leave: it cuts them off.
#
# Versions: tonic 0.14.9 and tonic-health 0.14.9 (server), h2 0.4.20 (client), tokio 1.54.1.
#
# Two servers have `max_connection_age(1 s)`; one has `max_connection_age_grace(2 s)` as well. A client of each opens a stream
# (health's Watch), and tries to open another one each 100 ms:
#
#   age alone        after 1 s the client is told to leave (GOAWAY) and opens no more streams; the first stream goes on
#   age and grace    no GOAWAY: streams are accepted until 3 s, and then the connection is closed with all of them
#
# Why it matters: the grace is meant for clients that do not leave when they are asked, as in other gRPC servers, and as its own
# documentation says. Here it keeps a server from asking. So clients that would have left in time lose the calls in flight, all at
# once, with an error that does not say whether the server has worked on them.
#
# Needs: cargo with a C linker. Takes about a minute.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail

TONIC=0.14.9 H2=0.4.20 TOKIO=1.54.1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 2' INT TERM
cd "$work"

mkdir src
cat >Cargo.toml <<END
[package]
name = "grace"
version = "0.0.0"
edition = "2021"
[dependencies]
bytes = "1"
h2 = "=$H2"
http = "1"
tokio = { version = "=$TOKIO", features = ["rt", "macros", "net", "time"] }
tokio-stream = { version = "0.1", features = ["net"] }
tonic = "=$TONIC"
tonic-health = "=$TONIC"
[profile.dev]
debug = 0
END

cat >src/main.rs <<'END'
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::{net::{TcpListener, TcpStream}, time::sleep};
use tokio_stream::wrappers::TcpListenerStream;

/// An empty HealthCheckRequest: no compression, no bytes.
const REQUEST: Bytes = Bytes::from_static(&[0; 5]);

#[tokio::main(flavor = "current_thread")]
async fn main() {
    for grace in [None, Some(Duration::from_secs(2))] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = tonic::transport::Server::builder().max_connection_age(Duration::from_secs(1));
        if let Some(grace) = grace {
            server = server.max_connection_age_grace(grace);
        }
        let (_reporter, health) = tonic_health::server::health_reporter();
        tokio::spawn(server.add_service(health).serve_with_incoming(TcpListenerStream::new(listener)));
        watch(address, grace.is_some()).await;
    }
}

async fn watch(address: std::net::SocketAddr, grace: bool) {
    let began = Instant::now();
    let (mut client, connection) = h2::client::handshake(TcpStream::connect(address).await.unwrap()).await.unwrap();
    let running = tokio::spawn(connection);
    let first = open(&mut client).await.expect("a first stream");
    let mut opened_until = Duration::ZERO;
    while began.elapsed() < Duration::from_secs(5) {
        match open(&mut client).await {
            Ok(_) => opened_until = began.elapsed(),
            Err(error) => {
                let at = began.elapsed().as_secs_f64().round();
                println!("grace {grace}: refused at {at} s; asked to leave: {}", error.is_go_away() && error.is_remote());
                break;
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
    println!("grace {grace}: streams are opened until {} s", opened_until.as_secs_f64().round());
    sleep(Duration::from_secs(5).saturating_sub(began.elapsed())).await;
    println!("grace {grace}: the first stream is open after 5 s: {}", is_open(first, &running).await);
}

type Answer = http::Response<h2::RecvStream>;

async fn open(client: &mut h2::client::SendRequest<Bytes>) -> Result<Answer, h2::Error> {
    let request = http::Request::post("http://health/grpc.health.v1.Health/Watch")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let mut ready = client.clone().ready().await?;
    let (answer, mut body) = ready.send_request(request, false)?;
    body.send_data(REQUEST, true)?;
    answer.await
}

/// Nothing more to come, and no error, within a moment: the stream waits for news.
async fn is_open<T>(answer: Answer, running: &tokio::task::JoinHandle<T>) -> bool {
    let mut body = answer.into_body();
    let first = body.data().await;
    let next = tokio::time::timeout(Duration::from_millis(100), body.data()).await;
    matches!(first, Some(Ok(_))) && next.is_err() && !running.is_finished()
}
END

cargo build --quiet 2>build.log || { cat build.log >&2; exit 2; }
timeout 60 cargo run --quiet >seen 2>run.log || { cat run.log >&2; exit 2; }
cat seen

cat >expected <<'END'
grace false: refused at 1 s; asked to leave: true
grace false: streams are opened until 1 s
grace false: the first stream is open after 5 s: true
grace true: refused at 3 s; asked to leave: false
grace true: streams are opened until 3 s
grace true: the first stream is open after 5 s: false
END
diff expected seen >difference || { sed 's/^/CHANGED /' difference; exit 1; }
echo "as stated"
