#!/usr/bin/env bash
# A grpcio server with compression on compresses for clients that do not accept it, after their request has taken effect.
#
# Versions: grpcio 1.85.3 (server), tonic 0.14.9 and grpc-go 1.85.0 (clients as they come, without gzip), h2 4.4.1 (bare HTTP/2).
#
# `grpc.server(…, compression=grpc.Compression.Gzip)` does not look at `grpc-accept-encoding`: a client that sends none, or sends
# `identity`, gets `grpc-encoding: gzip` all the same. What the clients make of it depends on the answer:
#
#   answer                                      tonic            grpc-go
#   2 bytes (gzip would not make it smaller)    UNIMPLEMENTED    OK
#   10000 bytes                                 UNIMPLEMENTED    INTERNAL
#   10000 bytes, handler calls
#     set_compression(NoCompression)            UNIMPLEMENTED    INTERNAL
#     disable_next_message_compression()        UNIMPLEMENTED    OK
#   abort(NOT_FOUND)                            NOT_FOUND        NOT_FOUND
#
# tonic refuses by the header, even if the message itself is plain; grpc-go refuses only messages that are compressed.
# `set_compression(NoCompression)` changes nothing, and the handler cannot decide for itself: the metadata that it sees lacks
# `grpc-accept-encoding`.
#
# Why it matters: the handler has run, and its caller reads a code that most retry policies call permanent. With grpc-go it happens
# only if the answer is long enough to be compressed. Leave compression off if you do not know all clients.
#
# Needs: python3 with venv, cargo with a C linker, go. Takes one to three minutes.
# Exit: 0 as stated, 1 the behaviour changed, 2 something could not be installed or started.
set -euo pipefail

TONIC=0.14.9 H2=0.4.20 HYPER=1.12.0 TOKIO=1.54.1 GRPC_GO=1.85.0
PYTHON_PACKAGES=(grpcio==1.85.3 typing-extensions==4.16.0 h2==4.4.1 hpack==4.2.0 hyperframe==6.1.0)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 2' INT TERM
cd "$work"

# Runs a command that must succeed before there is anything to observe.
prepare() {
  timeout 1200 "$@" >prepare.log 2>&1 || { tail -n 15 prepare.log; echo "CANNOT RUN: failed: $*"; exit 2; }
}

echo "== installing ${PYTHON_PACKAGES[*]}, tonic $TONIC, grpc-go $GRPC_GO"
prepare python3 -m venv python
prepare python/bin/pip install --quiet --no-deps --only-binary=:all: "${PYTHON_PACKAGES[@]}"

mkdir rust rust/src go
cat >rust/Cargo.toml <<END
[package]
name = "client"
version = "0.0.0"
edition = "2021"
[dependencies]
bytes = "=1.12.2"
h2 = "=$H2"
http = "=1.5.0"
hyper = "=$HYPER"
tokio = { version = "=$TOKIO", features = ["rt", "macros"] }
tonic = { version = "=$TONIC", default-features = false, features = ["channel"] }
[profile.dev]
debug = 0
END
# One unary call with an empty request; the codec passes bytes on, so that no message needs to be generated.
cat >rust/src/main.rs <<'END'
use bytes::{Buf, BufMut, Bytes};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{transport::Endpoint, Request, Status};

struct Plain;

impl Codec for Plain {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Plain;
    type Decoder = Plain;
    fn encoder(&mut self) -> Plain {
        Plain
    }
    fn decoder(&mut self) -> Plain {
        Plain
    }
}

impl Encoder for Plain {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for Plain {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let target = arguments.next().ok_or("usage: client HOST:PORT PATH")?;
    let path = arguments.next().ok_or("usage: client HOST:PORT PATH")?.parse()?;
    let channel = Endpoint::from_shared(format!("http://{target}"))?.connect().await?;
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await?;
    match client.unary(Request::new(Bytes::new()), path, Plain).await {
        Ok(answer) => println!("OK: {} bytes", answer.into_inner().len()),
        Err(status) => println!("{:?}: {}", status.code(), status.message()),
    }
    Ok(())
}
END
prepare env CARGO_TARGET_DIR="$work/target" cargo build --quiet --manifest-path rust/Cargo.toml

cat >go/main.go <<'END'
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// Passes bytes on, so that no message needs to be generated.
type plain struct{}

func (plain) Name() string                             { return "plain" }
func (plain) Marshal(any) ([]byte, error)              { return nil, nil }
func (plain) Unmarshal(bytes []byte, answer any) error { *answer.(*int) = len(bytes); return nil }

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	client, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		panic(err)
	}
	var answer int
	if err := client.Invoke(ctx, os.Args[2], nil, &answer, grpc.ForceCodec(plain{})); err != nil {
		fmt.Printf("%v: %s\n", status.Code(err), status.Convert(err).Message())
		return
	}
	fmt.Printf("OK: %d bytes\n", answer)
}
END
cd go
prepare go mod init client
prepare go get "google.golang.org/grpc@v$GRPC_GO"
prepare go build -mod=mod -o "$work/client-go" .
cd "$work"

cat >observe.py <<'END'
import socket, subprocess, sys
from concurrent import futures
import grpc, h2.config, h2.connection, h2.events

calls = []


class Handlers(grpc.GenericRpcHandler):
    """Answers each call by the method's name and notes that its handler ran."""

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda _, context: self.answer(details.method, context))

    def answer(self, method, context):
        calls.append(dict(context.invocation_metadata()))
        if method == "/t/Missing":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such order")
        if method == "/t/NoCompression":
            context.set_compression(grpc.Compression.NoCompression)
        if method == "/t/DisableNext":
            context.disable_next_message_compression()
        return b"x" * (2 if method == "/t/Short" else 10000)


def bare_call(path, *accepted):
    """A call whose request headers are written out: the answer's grpc-encoding and the flag of its message."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    headers = [(":method", "POST"), (":scheme", "http"), (":authority", target), (":path", path),
               ("te", "trailers"), ("content-type", "application/grpc")]
    connection.send_headers(1, headers + [("grpc-accept-encoding", name) for name in accepted])
    connection.send_data(1, bytes(5), end_stream=True)
    encoding, body = None, b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as stream:
        while True:
            stream.sendall(connection.data_to_send())
            for event in connection.receive_data(stream.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    encoding = dict(event.headers).get("grpc-encoding")
                if isinstance(event, h2.events.DataReceived):
                    body += event.data
                if isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset, h2.events.ConnectionTerminated)):
                    return encoding, body[:1].hex()


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


failures = 0


def check(what, seen, expected):
    global failures
    same = seen == expected
    failures += not same
    print(f"{'ok     ' if same else 'CHANGED'} {what}: {seen!r}" + ("" if same else f", expected {expected!r}"))


server = grpc.server(futures.ThreadPoolExecutor(2), compression=grpc.Compression.Gzip)
server.add_generic_rpc_handlers((Handlers(),))
port = server.add_insecure_port("127.0.0.1:0")
target = f"127.0.0.1:{port}"
server.start()

print("-- the answer on the wire: grpc-encoding, flag of the message")
check("10000 bytes, nothing accepted", bare_call("/t/Long"), ("gzip", "01"))
check("10000 bytes, identity accepted", bare_call("/t/Long", "identity"), ("gzip", "01"))
check("2 bytes, nothing accepted", bare_call("/t/Short"), ("gzip", "00"))
check("handlers that were shown grpc-accept-encoding", sum("grpc-accept-encoding" in seen for seen in calls), 0)

refused_by_tonic = "Unimplemented: Content is compressed with `gzip` which isn't supported"
refused_by_go = 'Internal: grpc: Decompressor is not installed for grpc-encoding "gzip"'
for method, expected_of_tonic, expected_of_go in [
    ("/t/Short", refused_by_tonic, "OK: 2 bytes"),
    ("/t/Long", refused_by_tonic, refused_by_go),
    ("/t/NoCompression", refused_by_tonic, refused_by_go),
    ("/t/DisableNext", refused_by_tonic, "OK: 10000 bytes"),
    ("/t/Missing", "NotFound: no such order", "NotFound: no such order"),
]:
    print("--", method)
    calls.clear()
    check("tonic", run("target/debug/client", target, method), expected_of_tonic)
    check("grpc-go", run("./client-go", target, method), expected_of_go)
    check("handlers run", len(calls), 2)
server.stop(None).wait()
sys.exit(failures > 0)
END
status=0
timeout 300 python/bin/python observe.py || status=$?
case $status in
  0) echo "AS STATED" ;;
  124) echo "CANNOT RUN: too slow"; exit 2 ;;
  *) echo "CHANGED: see the lines above"; exit 1 ;;
esac
