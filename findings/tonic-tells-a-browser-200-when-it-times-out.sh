#!/usr/bin/env bash
# A plain HTTP page that a tonic server serves beside its services is answered with 200, and no body, when it takes too long.
#
# Versions: tonic 0.14.9 (server), axum 0.8.9 (the page), hyper 1 and hyper-util 0.1 (client), tokio 1.54.1.
#
# tonic's router is an axum router, so pages can be served on the same port, with HTTP/1.1 too. The server has a timeout of 300 ms:
#
#   a page that takes no time    200, text/plain, its text
#   a page that takes a second   200, application/grpc, grpc-status 1, nothing else
#
# Why it matters: a browser, a script or a load balancer reads the HTTP status, and takes a page that was cut off for an empty one
# that is well. tonic's timeout is for all that the server answers, and it answers in gRPC whatever was asked. Such pages need a
# shorter time limit of their own.
#
# Needs: cargo with a C linker. Takes about a minute.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail

TONIC=0.14.9 AXUM=0.8.9 TOKIO=1.54.1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 2' INT TERM
cd "$work"

mkdir src
cat >Cargo.toml <<END
[package]
name = "page"
version = "0.0.0"
edition = "2021"
[dependencies]
axum = { version = "=$AXUM", default-features = false, features = ["http1", "tokio"] }
http-body-util = "0.1"
hyper = { version = "1", features = ["client", "http1"] }
hyper-util = { version = "0.1", features = ["tokio"] }
tokio = { version = "=$TOKIO", features = ["rt", "macros", "net", "time"] }
tokio-stream = { version = "0.1", features = ["net"] }
tonic = "=$TONIC"
[profile.dev]
debug = 0
END

cat >src/main.rs <<'END'
use std::{net::SocketAddr, time::Duration};

use axum::{body::Body, routing::get, Router};
use http_body_util::BodyExt;
use hyper_util::rt::TokioIo;
use tokio::{net::{TcpListener, TcpStream}, time::sleep};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{service::Routes, transport::Server};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let slow = || async {
        sleep(Duration::from_secs(1)).await;
        "slow"
    };
    let pages = Router::new().route("/quick", get(|| async { "quick" })).route("/slow", get(slow));
    let server = Server::builder().accept_http1(true).timeout(Duration::from_millis(300));
    let mut server = server;
    let serving = server.add_routes(Routes::from(pages)).serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(serving);
    for page in ["/quick", "/slow"] {
        ask(address, page).await;
    }
}

async fn ask(address: SocketAddr, page: &str) {
    let connection = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (mut client, running) = hyper::client::conn::http1::handshake(connection).await.unwrap();
    tokio::spawn(running);
    let request = hyper::Request::get(page).header("host", "page").body(Body::empty()).unwrap();
    let answer = client.send_request(request).await.unwrap();
    let of = |name: &str| answer.headers().get(name).map_or("none", |value| value.to_str().unwrap()).to_owned();
    let (status, content, grpc) = (answer.status().as_u16(), of("content-type"), of("grpc-status"));
    let text = answer.into_body().collect().await.unwrap().to_bytes();
    println!("{page}: {status}, {content}, grpc-status {grpc}, {} bytes", text.len());
}
END

cargo build --quiet 2>build.log || { cat build.log >&2; exit 2; }
timeout 60 cargo run --quiet >seen 2>run.log || { cat run.log >&2; exit 2; }
cat seen

cat >expected <<'END'
/quick: 200, text/plain; charset=utf-8, grpc-status none, 5 bytes
/slow: 200, application/grpc, grpc-status 1, 0 bytes
END
diff expected seen >difference || { sed 's/^/CHANGED /' difference; exit 1; }
echo "as stated"
