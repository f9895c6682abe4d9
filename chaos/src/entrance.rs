//! The address at which all relays find a receiver.
//!
//! The relays of a subscription must be given one URL: one with another URL is refused, since it would lead to another
//! receiver. So they share an address, and yet each has a link of its own, which a fault breaks alone.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use anyhow::Result;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use super::{
    proxy::{Link, accept},
    unit::Unit,
};
use testkit::{ports::connects, processes::free_port};

/// Listens. Connections wait until it is served.
#[derive(Debug)]
pub(super) struct Entrance {
    listener: TcpListener,
    pub(super) address: SocketAddr,
}

impl Entrance {
    pub(super) async fn open() -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, free_port()?)).await?;
        Ok(Self { address: listener.local_addr()?, listener })
    }

    /// Passes each connection to the link of the relay that it comes from, until the returned set is dropped.
    pub(super) fn serve(self, relays: Vec<(Unit, Arc<Link>)>) -> JoinSet<()> {
        let mut serving = JoinSet::new();
        serving.spawn(accept(self.listener, move |client| {
            relays.iter().find(|(relay, _)| is_of(relay, client)).map(|(_, link)| link.clone())
        }));
        serving
    }
}

/// Whether the connection comes from the process. A process that has ended meanwhile has none.
fn is_of(relay: &Unit, connection: &TcpStream) -> bool {
    let (Some(pid), Ok(SocketAddr::V4(client)), Ok(SocketAddr::V4(server))) =
        (relay.pid(), connection.peer_addr(), connection.local_addr())
    else {
        return false;
    };
    connects(pid.as_raw_nonzero().get().cast_unsigned(), client, server)
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, net::TcpStream};

    use super::Entrance;

    #[tokio::test]
    async fn a_connection_of_no_relay_is_closed() {
        let entrance = Entrance::open().await.expect("a port");
        let address = entrance.address;
        let _serving = entrance.serve(Vec::new());
        let mut stranger = TcpStream::connect(address).await.expect("it listens");
        assert_eq!(stranger.read(&mut [0; 1]).await.expect("an end"), 0);
    }
}
