//! Bytes and messages that no proper client sends. None may be accepted, or harm anybody.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Result;
use prost::Message;
use proto::orders::v1::{CreateOrderRequest, Order, OrderItem, order_service_client::OrderServiceClient};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::{
    Code, Status,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

use super::{
    clients::{limited, request},
    site::Part,
    stream::{Ends, Stream},
    world::World,
};
use chassis::connect_lazily;

const KINDS: u8 = 6;

/// Sends random bytes to the ports of a process, and bad orders to order-service.
pub(super) async fn send_garbage(world: &Arc<World>, part: Part, seed: u64) -> Result<bool> {
    let (mut rng, mut sent, mut sent_behind_tls, mut has_tls) = (fastrand::Rng::with_seed(seed), 0, 0, false);
    for (address, ends) in world.site.listeners(part)? {
        for kind in 0..KINDS {
            sent += u32::from(send(address, None, kind, &garbage(kind, &mut rng)).await.is_ok());
            // As far as TLS is, and then behind it.
            if ends.is_some() {
                has_tls = true;
                sent_behind_tls +=
                    u32::from(send(address, ends.as_ref(), kind, &garbage(kind, &mut rng)).await.is_ok());
            }
        }
    }
    let channel = connect(world);
    let mut orders = OrderServiceClient::new(channel).max_encoding_message_size(usize::MAX);
    let (mut refused, mut bad) = (0, 0);
    for order in bad_orders() {
        bad += 1;
        match orders.create_order(limited(order)).await {
            Ok(order) => world.history.violation(format!("a bad order was accepted: {}", order.get_ref().order_id)),
            Err(status) => refused += u32::from(is_refusal(&status)),
        }
    }
    match send_bad_text(world).await {
        Ok(order) => world
            .history
            .violation(format!("an order with a customer that is not UTF-8 was accepted: {}", order.order_id)),
        Err(status) => refused += u32::from(is_refusal(&status)),
    }
    Ok(sent > 0 && (sent_behind_tls > 0 || !has_tls) && refused == bad + 1)
}

fn connect(world: &World) -> Channel {
    connect_lazily(&Endpoint::from(world.target.order_service.clone()), &world.customers)
}

async fn send(address: SocketAddr, ends: Option<&Ends>, kind: u8, garbage: &[u8]) -> io::Result<()> {
    let mut stream = Stream::of_server(TcpStream::connect(address).await?, ends)?;
    // A process that is stopped would keep the handshake for ever.
    timeout(Duration::from_secs(1), stream.shake_hands()).await??;
    stream.write_all(garbage).await?;
    let sent = stream.flush().await;
    if kind.is_multiple_of(2) {
        // Half of them read an answer, the others hang up.
        let _ = timeout(Duration::from_millis(200), stream.read(&mut [0; 1024])).await;
    }
    sent
}

/// Whether the service has refused the message, and was not merely down.
fn is_refusal(status: &Status) -> bool {
    std::error::Error::source(status).is_none()
        && matches!(status.code(), Code::InvalidArgument | Code::OutOfRange | Code::Internal)
}

/// An order that the contract's types cannot hold: its customer is not UTF-8.
#[derive(Clone, PartialEq, Message)]
struct BadText {
    #[prost(bytes = "vec", tag = "2")]
    customer_id: Vec<u8>,
    #[prost(string, tag = "3")]
    currency_code: String,
    #[prost(message, repeated, tag = "4")]
    items: Vec<OrderItem>,
}

async fn send_bad_text(world: &World) -> Result<Order, Status> {
    let CreateOrderRequest { currency_code, items, .. } = request();
    let bad = BadText { customer_id: vec![b'a', 0xc3, 0x28, 0xff], currency_code, items };
    let mut client = tonic::client::Grpc::new(connect(world));
    client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let path = PathAndQuery::from_static("/orders.v1.OrderService/CreateOrder");
    let codec = tonic_prost::ProstCodec::<BadText, Order>::default();
    Ok(client.unary(limited(bad), path, codec).await?.into_inner())
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn garbage(kind: u8, rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut random = vec![0; rng.usize(1..8192)];
    rng.fill(&mut random);
    match kind {
        0 => random,
        1 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".into(),
        // Frames of random kinds, and one that announces the greatest length and ends.
        2 => [PREFACE, &random].concat(),
        3 => [PREFACE, &[0xff, 0xff, 0xff, 0, 1, 0, 0, 0, 1], &random].concat(),
        // Headers that are not HPACK, and a preface that ends half-way.
        4 => [PREFACE, &[0, 0, 4, 1, 5, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]].concat(),
        _ => PREFACE[..rng.usize(1..PREFACE.len())].into(),
    }
}

/// Orders with numbers that overflow, with control characters, without ids, and too large in every way.
fn bad_orders() -> Vec<CreateOrderRequest> {
    let item = |quantity, unit_price_minor| OrderItem { sku: "MUG".into(), quantity, unit_price_minor };
    let with = |items| CreateOrderRequest { items, ..request() };
    vec![
        with(vec![item(i32::MAX, 1)]),
        with(vec![item(i32::MIN, 1)]),
        with(vec![item(1_000_000, i64::MAX); 100]),
        with(vec![item(1, 1); 100_000]),
        with(Vec::new()),
        CreateOrderRequest { customer_id: "\0\u{fffd}\u{202e}".into(), ..request() },
        CreateOrderRequest { customer_id: "x".repeat(5 << 20), ..request() },
        CreateOrderRequest { request_id: "not a uuid".into(), currency_code: "€".into(), ..request() },
    ]
}
