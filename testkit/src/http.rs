//! Asks a process over HTTP, as an operator's tool does.

use std::{io, net::SocketAddr, ops::Add, str::FromStr};

use anyhow::Result;
use axum::{
    body::{Body, to_bytes},
    http::{Request, Response},
};
use chassis::{Tls, TlsFiles, connect_lazily};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::transport::{Channel, Endpoint};
use tower::ServiceExt as _;

/// The status and the body of a page.
///
/// # Errors
/// Nobody listens there, or the answer is not HTTP.
pub async fn get(address: SocketAddr, path: &str) -> io::Result<(u16, String)> {
    ask(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")).await
}

/// The same for a request that is spelt out, and ends the connection.
///
/// # Errors
/// Nobody listens there, or the answer is not HTTP.
pub async fn ask(address: SocketAddr, request: &str) -> io::Result<(u16, String)> {
    let mut connection = TcpStream::connect(address).await?;
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await?;
    let read = answer.split_once("\r\n\r\n").and_then(|(head, body)| {
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some((status, body.to_owned()))
    });
    read.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no HTTP answer: {answer:?}")))
}

/// A page of a process with these certificates; of one without TLS if there are none.
///
/// # Errors
/// Nobody listens there, the certificates are of no use, or the answer is no text.
pub async fn get_by(files: &TlsFiles, address: SocketAddr, path: &str) -> Result<String> {
    if files.tls_ca_file.is_none() {
        return Ok(get(address, path).await?.1);
    }
    let url = format!("https://{address}");
    let channel = connect_lazily(&Endpoint::from_shared(url.clone())?, &Tls::read(files)?);
    Ok(ask_by(channel, Request::get(url + path).body(String::new())?).await?.into_body())
}

/// The same for a request that is spelt out, over a connection that there is.
///
/// # Errors
/// Nobody listens there, or the answer is no text.
pub async fn ask_by(channel: Channel, request: Request<String>) -> Result<Response<String>> {
    let answer = channel.oneshot(request.map(|body| tonic::body::Body::new(Body::from(body)))).await?;
    let (head, body) = answer.into_parts();
    let page = to_bytes(Body::new(body), usize::MAX).await?;
    Ok(Response::from_parts(head, String::from_utf8(page.to_vec())?))
}

/// The sum of a metric over all samples that have these labels, on a page of metrics; `None` if there is none.
pub fn sum_metric<T: FromStr + Add<Output = T>>(page: &str, name: &str, labels: &[(&str, &str)]) -> Option<T> {
    let samples = page.lines().filter_map(|line| {
        let (labelled, value) = line.strip_prefix(name)?.rsplit_once(' ')?;
        let is_it = labelled.is_empty() || (labelled.starts_with('{') && labelled.ends_with('}'));
        let has = |(label, value): &(&str, &str)| labelled.contains(&format!("{label}=\"{value}\""));
        (is_it && labels.iter().all(has)).then(|| value.parse().ok())?
    });
    samples.reduce(Add::add)
}

#[cfg(test)]
mod tests {
    use super::sum_metric;

    #[test]
    fn the_samples_that_have_the_labels_are_added() {
        let page = "# TYPE events_total counter\nevents_total{route=\"a\",outcome=\"handled\"} 40\n\
                    events_total{route=\"b\",outcome=\"handled\"} 2\nevents_total{route=\"a\",outcome=\"died\"} 1\n\
                    events 7\n";
        assert_eq!(sum_metric(page, "events_total", &[("outcome", "handled")]), Some(42));
        assert_eq!(sum_metric(page, "events_total", &[("outcome", "handled"), ("route", "b")]), Some(2));
        assert_eq!(sum_metric(page, "events", &[]), Some(7.0));
        assert_eq!(sum_metric(page, "events_total", &[("route", "c")]), None::<u64>);
    }
}
