//! TCP proxies between the processes. They break the connections that pass through them: closed, reset, dropped
//! silently, late, or byte by byte. A trap (see `trap`) can stop the bytes at a point while something is done to a
//! process. Before a receiver, they can also answer in its place (see `stand_in`).

use std::{
    future::pending,
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Result;
use prost::Message;
use proto::events::v1::{DeliverResponse, Outcome};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    select,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    stand_in::StandIn,
    trap::{Hold, Trap, TrapGuard, Traps},
    wire::{Mark, Protocol, Reader},
};
use testkit::processes::free_port;

/// How long a connection lasts once its bytes are dropped: each holds a session of the database.
const BLACKHOLED_FOR: Duration = Duration::from_secs(20);

/// What a link does to all bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    Normal,
    /// Bytes are dropped and neither side is told. Connections that are open meanwhile never recover.
    Blackhole,
    /// Each piece arrives late, by a random time up to this.
    Delay(Duration),
    /// Bytes arrive one at a time.
    Slice,
    /// New connections lead to a stand-in of the server.
    StandIn(StandIn),
}

/// How a fault ends connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Close,
    Reset,
}

/// The connections of one client to one server.
pub(super) struct Link {
    pub(super) name: String,
    protocol: Protocol,
    /// Whether the client is a relay that delivers events.
    delivers: bool,
    /// The address at which the client finds it.
    pub(super) address: SocketAddr,
    server: SocketAddr,
    condition: watch::Sender<Condition>,
    ended: watch::Sender<End>,
    traps: Arc<Traps>,
    open: AtomicU64,
    /// Pieces that a condition has dropped, delayed or sliced.
    pub(super) impaired: AtomicU64,
    /// Events that a receiver answered as duplicates.
    pub(super) duplicates: AtomicU64,
    /// Calls that a stand-in has answered.
    pub(super) stood_in: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

impl Link {
    /// Listens, and forwards connections until the returned set is dropped.
    pub(super) async fn open(name: String, protocol: Protocol, server: SocketAddr) -> Result<(Arc<Self>, JoinSet<()>)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, free_port()?)).await?;
        let link = Arc::new(Self::new(name, protocol, listener.local_addr()?, server));
        let (mut serving, only) = (JoinSet::new(), link.clone());
        serving.spawn(accept(listener, move |_| Some(only.clone())));
        Ok((link, serving))
    }

    /// The deliveries of a relay. They come in at the `address` of an entrance.
    pub(super) fn of_relay(name: String, address: SocketAddr, receiver: SocketAddr) -> Self {
        Self { delivers: true, ..Self::new(name, Protocol::Grpc, address, receiver) }
    }

    fn new(name: String, protocol: Protocol, address: SocketAddr, server: SocketAddr) -> Self {
        Self {
            name,
            protocol,
            delivers: false,
            address,
            server,
            condition: watch::Sender::new(Condition::Normal),
            ended: watch::Sender::new(End::Close),
            traps: Arc::default(),
            open: AtomicU64::new(0),
            impaired: AtomicU64::new(0),
            duplicates: AtomicU64::new(0),
            stood_in: AtomicU64::new(0),
        }
    }

    pub(super) fn set_condition(&self, condition: Condition) {
        self.condition.send_replace(condition);
    }

    /// Ends all connections, and returns how many there were.
    pub(super) fn end(&self, how: End) -> u64 {
        self.ended.send_replace(how);
        self.open.load(Ordering::Relaxed)
    }

    pub(super) fn set_trap(&self, trap: Trap) -> TrapGuard {
        self.traps.set(trap)
    }

    /// Serves one connection to its end.
    async fn serve(self: Arc<Self>, client: TcpStream) {
        // The end of a fault undoes its condition before it ends the connections. So one that still finds the condition
        // hears of its end.
        let ended = self.ended.subscribe();
        let condition = *self.condition.borrow();
        match condition {
            Condition::StandIn(stand_in) => self.stand_in(client, stand_in, ended).await,
            _ => self.forward(client, ended).await,
        }
    }

    async fn stand_in(&self, client: TcpStream, stand_in: StandIn, mut ended: watch::Receiver<End>) {
        self.open.fetch_add(1, Ordering::Relaxed);
        select! {
            () = stand_in.serve(client, self.server, &self.stood_in) => {}
            _ = ended.changed() => {}
        }
        self.open.fetch_sub(1, Ordering::Relaxed);
    }

    async fn forward(&self, client: TcpStream, mut ended: watch::Receiver<End>) {
        let Ok(server) = TcpStream::connect(self.server).await else {
            let _ = client.set_zero_linger();
            return;
        };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        self.open.fetch_add(1, Ordering::Relaxed);
        let reader = Mutex::new(Reader::of(self.protocol));
        let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
        let (mut up, mut down) = (Pump { from: from_client, to: to_server }, Pump { from: from_server, to: to_client });
        let how = select! {
            how = self.pump(&mut up, Direction::Up, &reader) => how,
            how = self.pump(&mut down, Direction::Down, &reader) => how,
            _ = ended.changed() => *ended.borrow(),
        };
        self.open.fetch_sub(1, Ordering::Relaxed);
        if how == End::Reset {
            for Pump { from, to } in [up, down] {
                let _ = from.as_ref().set_zero_linger();
                // Its drop would shut the connection down in order first.
                to.forget();
            }
        }
    }

    /// Forwards one direction of a connection, until either side or a fault ends it.
    async fn pump(&self, pump: &mut Pump, direction: Direction, reader: &Mutex<Reader>) -> End {
        let mut condition = self.condition.subscribe();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = select! {
                read = pump.from.read(&mut buffer) => read,
                () = becomes_blackhole(&mut condition) => return self.blackhole(pump).await,
            };
            let Ok(length @ 1..) = read else { return End::Close };
            let piece = &buffer[..length];
            let marks = {
                let mut reader = reader.lock().unwrap_or_else(PoisonError::into_inner);
                if direction == Direction::Up { reader.up(piece) } else { reader.down(piece) }
            };
            self.count_duplicates(&marks);
            match self.traps.spring(&marks, false) {
                Some(Hold::Keep) => {
                    // The process that was killed closes the connection in a moment.
                    let _ = timeout(BLACKHOLED_FOR, pump.drain()).await;
                    return End::Close;
                }
                Some(Hold::Lose) => return End::Reset,
                Some(Hold::PassBefore | Hold::PassAfter) | None => {}
            }
            let condition_now = *condition.borrow();
            if self.pass(pump, piece, condition_now).await.is_err() {
                return End::Close;
            }
            self.traps.spring(&marks, true);
        }
    }

    /// Drops all bytes, and does not tell either side that the other has closed.
    async fn blackhole(&self, pump: &mut Pump) -> End {
        self.impaired.fetch_add(1, Ordering::Relaxed);
        let _ = timeout(BLACKHOLED_FOR, async {
            pump.drain().await;
            pending::<()>().await;
        })
        .await;
        End::Reset
    }

    async fn pass(&self, pump: &mut Pump, piece: &[u8], condition: Condition) -> io::Result<()> {
        match condition {
            Condition::Delay(most) => {
                self.impaired.fetch_add(1, Ordering::Relaxed);
                sleep(most.mul_f64(fastrand::f64())).await;
                pump.to.write_all(piece).await
            }
            Condition::Slice => {
                self.impaired.fetch_add(1, Ordering::Relaxed);
                for byte in piece {
                    pump.to.write_all(&[*byte]).await?;
                    tokio::task::yield_now().await;
                }
                Ok(())
            }
            Condition::Normal | Condition::Blackhole | Condition::StandIn(_) => pump.to.write_all(piece).await,
        }
    }

    fn count_duplicates(&self, marks: &[Mark]) {
        for mark in marks {
            if self.delivers
                && let Mark::Reply(message) = mark
                && let Ok(response) = DeliverResponse::decode(message.clone())
            {
                let duplicates =
                    response.results.iter().filter(|result| result.outcome() == Outcome::Duplicate).count();
                self.duplicates.fetch_add(duplicates as u64, Ordering::Relaxed);
            }
        }
    }
}

/// Accepts connections for ever, and serves each by the link that it belongs to. One that belongs to none is closed.
pub(super) async fn accept(listener: TcpListener, link_of: impl Fn(&TcpStream) -> Option<Arc<Link>>) {
    let mut serving = JoinSet::new();
    loop {
        select! {
            accepted = listener.accept() => if let Ok((client, _)) = accepted
                && let Some(link) = link_of(&client)
            {
                serving.spawn(link.serve(client));
            },
            Some(_) = serving.join_next() => {}
        }
    }
}

async fn becomes_blackhole(condition: &mut watch::Receiver<Condition>) {
    // The value that `wait_for` returns holds a lock.
    drop(condition.wait_for(|condition| *condition == Condition::Blackhole).await);
}

struct Pump {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
}

impl Pump {
    /// Reads to the end, and drops the bytes.
    async fn drain(&mut self) {
        let mut buffer = vec![0; 16 * 1024];
        while let Ok(1..) = self.from.read(&mut buffer).await {}
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::ErrorKind,
        net::{Ipv4Addr, SocketAddr},
        sync::Arc,
        time::Duration,
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        sync::mpsc,
        task::JoinSet,
        time::timeout,
    };

    use super::{Condition, End, Hold, Link, Trap};
    use crate::wire::{Mark, Protocol};

    const QUERY: &[u8] = b"\0\0\0\x08\0\x03\0\0Q\0\0\0\x0aBEGIN\0";
    /// Longer than any answer here takes, and shorter than a connection in a black hole lasts.
    const SILENCE: Duration = Duration::from_millis(300);

    struct Proxied {
        link: Arc<Link>,
        client: TcpStream,
        _serving: JoinSet<()>,
    }

    /// A link to a server that echoes every byte.
    async fn proxied() -> Proxied {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let server: SocketAddr = listener.local_addr().expect("its address");
        let (link, mut serving) = Link::open("test".into(), Protocol::Postgres, server).await.expect("another port");
        serving.spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.into_split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        let client = TcpStream::connect(link.address).await.expect("the proxy listens");
        Proxied { link, client, _serving: serving }
    }

    impl Proxied {
        async fn echoes(&mut self) -> bool {
            self.client.write_all(QUERY).await.expect("an open connection");
            let mut answer = vec![0; QUERY.len()];
            let read = timeout(SILENCE, self.client.read_exact(&mut answer)).await;
            matches!(read, Ok(Ok(_))) && answer == QUERY
        }

        async fn end(&mut self) -> Result<usize, ErrorKind> {
            let read = timeout(SILENCE, self.client.read(&mut [0; 1])).await.expect("an end in time");
            read.map_err(|error| error.kind())
        }
    }

    #[tokio::test]
    async fn bytes_arrive_whole_also_in_slices_and_late() {
        let mut proxied = proxied().await;
        for condition in [Condition::Normal, Condition::Slice, Condition::Delay(Duration::from_millis(50))] {
            proxied.link.set_condition(condition);
            assert!(proxied.echoes().await, "{condition:?}");
        }
    }

    #[tokio::test]
    async fn connections_are_closed_in_order_or_reset() {
        let (mut closed, mut reset) = (proxied().await, proxied().await);
        for (proxied, how) in [(&mut closed, End::Close), (&mut reset, End::Reset)] {
            assert!(proxied.echoes().await);
            assert_eq!(proxied.link.end(how), 1);
        }
        assert_eq!(closed.end().await, Ok(0));
        assert_eq!(reset.end().await, Err(ErrorKind::ConnectionReset));
    }

    #[tokio::test]
    async fn a_half_open_connection_never_recovers_and_a_new_one_works() {
        let mut proxied = proxied().await;
        assert!(proxied.echoes().await);
        proxied.link.set_condition(Condition::Blackhole);
        assert!(!proxied.echoes().await);
        proxied.link.set_condition(Condition::Normal);
        assert!(!proxied.echoes().await, "the connection recovered");
        proxied.client = TcpStream::connect(proxied.link.address).await.expect("the proxy listens");
        assert!(proxied.echoes().await);
    }

    #[tokio::test]
    async fn a_trap_springs_at_its_mark_as_often_as_it_should() {
        for (hold, arrives) in [(Hold::Keep, false), (Hold::PassBefore, true), (Hold::PassAfter, true)] {
            let mut proxied = proxied().await;
            let (acted, mut actions) = mpsc::unbounded_channel();
            let _guard = proxied.link.set_trap(Trap {
                at: Box::new(|mark| *mark == Mark::Statement("BEGIN".into())),
                hold,
                action: Box::new(move || _ = acted.send(())),
                times: 1,
                sprung: None,
            });
            assert_eq!(proxied.echoes().await, arrives, "{hold:?}");
            assert_eq!(actions.recv().await, Some(()));
            assert_eq!(actions.recv().await, None, "the trap is gone");
        }
    }
}
