#!/usr/bin/env bash
# A tonic server names its message limit by two codes: it depends on whether the client compressed the message.
#
# Versions: tonic 0.14.9 and tonic-health 0.14.9 (server and client), tokio 1.54.1.
#
# A server with `max_decoding_message_size(1000)` gets a request of 10,000 equal bytes:
#
#   sent as it is                  OUT_OF_RANGE
#   compressed by gzip (< 100 B)   RESOURCE_EXHAUSTED
#
# Both messages name the limit, so it holds for the decompressed size, as it should. But the code is another one.
#
# Why it matters: gRPC's own list of codes has RESOURCE_EXHAUSTED for this. A client that sends smaller batches after it never does
# so with tonic, unless it compresses. And most retry policies take OUT_OF_RANGE for permanent. A sender has to know both codes.
#
# Needs: cargo with a C linker. Takes about a minute.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail

TONIC=0.14.9 TOKIO=1.54.1

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 2' INT TERM
cd "$work"

mkdir src
cat >Cargo.toml <<END
[package]
name = "limits"
version = "0.0.0"
edition = "2021"
[dependencies]
tokio = { version = "=$TOKIO", features = ["rt", "macros", "net"] }
tokio-stream = { version = "0.1", features = ["net"] }
tonic = { version = "=$TONIC", features = ["gzip"] }
tonic-health = "=$TONIC"
[profile.dev]
debug = 0
END
# The health service is there already, so no message needs to be generated.
cat >src/main.rs <<'END'
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{codec::CompressionEncoding::Gzip, transport::{Endpoint, Server}};
use tonic_health::{
    pb::{health_client::HealthClient, health_server::HealthServer, HealthCheckRequest},
    server::HealthService,
};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (reporter, _) = tonic_health::server::health_reporter();
    let service = HealthService::from_health_reporter(reporter);
    let server = HealthServer::new(service).max_decoding_message_size(1000).accept_compressed(Gzip);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    tokio::spawn(Server::builder().add_service(server).serve_with_incoming(TcpListenerStream::new(listener)));
    let plain = HealthClient::new(Endpoint::from_shared(url)?.connect().await?);
    let compressed = plain.clone().send_compressed(Gzip);
    for (name, mut client) in [("plain", plain), ("gzip", compressed)] {
        let request = HealthCheckRequest { service: "x".repeat(10_000) };
        match client.check(request).await {
            Ok(_) => println!("{name}: OK"),
            Err(status) => println!("{name}: {:?}: {}", status.code(), status.message()),
        }
    }
    Ok(())
}
END
echo "== building with tonic $TONIC"
timeout 1200 cargo build --quiet >build.log 2>&1 || { tail -n 15 build.log; echo "CANNOT RUN: cargo build failed"; exit 2; }

timeout 60 target/debug/limits >seen.txt || { echo "CANNOT RUN: it ended early"; exit 2; }
cat seen.txt
changed=0
expect() { # NAME CODE
  grep -q "^$1: $2: " seen.txt || { echo "CHANGED: $1 is no longer refused with $2"; changed=1; }
}
expect plain OutOfRange
expect gzip ResourceExhausted
[ $changed = 0 ] && echo "as stated"
exit $changed
