//! TCP proxies between the processes. They break the connections that pass through them: closed, reset, dropped
//! silently, late, or byte by byte. A trap (see `trap`) can stop the bytes at a point while something is done to a
//! process. Before a receiver, they can also answer in its place (see `stand_in`). If the two sides speak with TLS, it ends
//! here on both (see `stream`).

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
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::{TcpListener, TcpStream},
    select,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    stand_in::{Receiver, StandIn},
    stream::{Ends, Stream},
    trap::{Hold, Trap, TrapGuard, Traps},
    wire::{Mark, Protocol, Reader},
};
use testkit::processes::free_port;

/// How long a connection lasts once its bytes are dropped: each holds a session of the database.
const BLACKHOLED_FOR: Duration = Duration::from_secs(20);
/// How long the handshakes of a connection may take. It is longer than any process waits for one: a process gives up
/// first, as it would without a proxy.
const HANDSHAKES_LIMIT: Duration = Duration::from_secs(15);
/// How long a side may take to be told that the other has closed.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

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
    /// For whom it stands, if they speak with TLS.
    ends: Option<Ends>,
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
    pub(super) async fn open(
        name: String,
        protocol: Protocol,
        server: SocketAddr,
        ends: Option<Ends>,
    ) -> Result<(Arc<Self>, JoinSet<()>)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, free_port()?)).await?;
        let link = Arc::new(Self::new(name, protocol, listener.local_addr()?, server, ends));
        let (mut serving, only) = (JoinSet::new(), link.clone());
        serving.spawn(accept(listener, move |_| Some(only.clone())));
        Ok((link, serving))
    }

    /// The deliveries of a relay. They come in at the `address` of an entrance.
    pub(super) fn of_relay(name: String, address: SocketAddr, receiver: SocketAddr, ends: Option<Ends>) -> Self {
        Self { delivers: true, ..Self::new(name, Protocol::Grpc, address, receiver, ends) }
    }

    fn new(name: String, protocol: Protocol, address: SocketAddr, server: SocketAddr, ends: Option<Ends>) -> Self {
        Self {
            name,
            protocol,
            delivers: false,
            address,
            server,
            ends,
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
        let Ok(mut client) = Stream::of_client(client, self.ends.as_ref()) else { return };
        let receiver = Receiver::at(self.server, self.ends.as_ref());
        self.open.fetch_add(1, Ordering::Relaxed);
        let serving = async {
            if let Ok(Ok(())) = timeout(HANDSHAKES_LIMIT, client.shake_hands()).await {
                stand_in.serve(client, receiver, &self.stood_in).await;
            }
        };
        select! {
            () = serving => {}
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
        let ends = self.ends.as_ref();
        let (Ok(mut client), Ok(mut server)) = (Stream::of_client(client, ends), Stream::of_server(server, ends))
        else {
            return;
        };
        self.open.fetch_add(1, Ordering::Relaxed);
        let how = select! {
            how = self.connect(&mut client, &mut server) => how,
            _ = ended.changed() => *ended.borrow(),
        };
        self.open.fetch_sub(1, Ordering::Relaxed);
        for mut side in [client, server] {
            match how {
                End::Reset => side.will_reset(),
                End::Close => side.close().await,
            }
        }
    }

    /// Forwards both directions, until either side or a condition ends the connection.
    async fn connect(&self, client: &mut Stream, server: &mut Stream) -> End {
        if let Err(how) = self.shake_hands(client, server).await {
            return how;
        }
        let reader = Mutex::new(Reader::of(self.protocol));
        let ((from_client, to_client), (from_server, to_server)) = (split(client), split(server));
        let (mut up, mut down) = (Pump { from: from_client, to: to_server }, Pump { from: from_server, to: to_client });
        select! {
            how = self.pump(&mut up, Direction::Up, &reader) => how,
            how = self.pump(&mut down, Direction::Down, &reader) => how,
        }
    }

    /// Begins TLS on both sides, if they speak with it. The server comes first: a client must not seem to be connected
    /// while its server does not answer. The conditions hold here as well, except that nothing is sliced.
    async fn shake_hands(&self, client: &mut Stream, server: &mut Stream) -> Result<(), End> {
        if client.is_ready() && server.is_ready() {
            return Ok(());
        }
        let mut condition = self.condition.subscribe();
        let late = match *condition.borrow() {
            Condition::Delay(most) => most.mul_f64(fastrand::f64()),
            _ => Duration::ZERO,
        };
        let shaking = async {
            sleep(late).await;
            server.shake_hands().await?;
            client.shake_hands().await
        };
        select! {
            biased;
            () = becomes_blackhole(&mut condition) => {
                self.impaired.fetch_add(1, Ordering::Relaxed);
                // Neither side hears of the other, nor from here.
                sleep(BLACKHOLED_FOR).await;
                Err(End::Reset)
            }
            shaken = timeout(HANDSHAKES_LIMIT, shaking) => match shaken {
                Ok(Ok(())) => Ok(()),
                Ok(Err(_)) | Err(_) => Err(End::Reset),
            },
        }
    }

    /// Forwards one direction of a connection, until either side or a fault ends it.
    async fn pump(&self, pump: &mut Pump<'_>, direction: Direction, reader: &Mutex<Reader>) -> End {
        let mut condition = self.condition.subscribe();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let read = select! {
                read = pump.from.read(&mut buffer) => read,
                () = becomes_blackhole(&mut condition) => return self.blackhole(pump).await,
            };
            let length = match read {
                Ok(length @ 1..) => length,
                Ok(_) => {
                    // A process that has ended in order says so by TLS, and one that was killed does not.
                    let _ = timeout(CLOSE_LIMIT, pump.to.shutdown()).await;
                    return End::Close;
                }
                Err(_) => return End::Close,
            };
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
    async fn blackhole(&self, pump: &mut Pump<'_>) -> End {
        self.impaired.fetch_add(1, Ordering::Relaxed);
        let _ = timeout(BLACKHOLED_FOR, async {
            pump.drain().await;
            pending::<()>().await;
        })
        .await;
        End::Reset
    }

    async fn pass(&self, pump: &mut Pump<'_>, piece: &[u8], condition: Condition) -> io::Result<()> {
        match condition {
            Condition::Delay(most) => {
                self.impaired.fetch_add(1, Ordering::Relaxed);
                sleep(most.mul_f64(fastrand::f64())).await;
                pump.send(piece).await
            }
            Condition::Slice => {
                self.impaired.fetch_add(1, Ordering::Relaxed);
                for byte in piece {
                    pump.send(&[*byte]).await?;
                    tokio::task::yield_now().await;
                }
                Ok(())
            }
            Condition::Normal | Condition::Blackhole | Condition::StandIn(_) => pump.send(piece).await,
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

struct Pump<'a> {
    from: ReadHalf<&'a mut Stream>,
    to: WriteHalf<&'a mut Stream>,
}

impl Pump<'_> {
    /// TLS would keep bytes back that fill no record.
    async fn send(&mut self, piece: &[u8]) -> io::Result<()> {
        self.to.write_all(piece).await?;
        self.to.flush().await
    }

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
        sync::{Arc, PoisonError},
        time::Duration,
    };

    use chassis::{Tls, connect_lazily};
    use harness::identities::{CUSTOMERS, Identities};
    use proto::events::v1::{DeliverRequest, DescribeRequest, event_receiver_client::EventReceiverClient};
    use testkit::{Scratch, certificates::Authority};
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, split},
        net::{TcpListener, TcpStream},
        sync::mpsc,
        task::JoinSet,
        time::timeout,
    };
    use tonic::{Code, transport::Endpoint};

    use super::{Condition, End, Hold, Link, Receiver, Trap};
    use crate::{
        stand_in::{Answer, StandIn},
        stream::{Ends, Identity, Stream, names_of_peer},
        wire::{Mark, Protocol},
    };

    const QUERY: &[u8] = b"\0\0\0\x08\0\x03\0\0Q\0\0\0\x0aBEGIN\0";
    /// Longer than any answer here takes, and shorter than a connection in a black hole lasts.
    const SILENCE: Duration = Duration::from_millis(300);
    const LIMIT: Duration = Duration::from_secs(20);
    const RELAY: &str = "orders-relay";
    const SERVER: &str = "inventory-service";

    fn identity(identities: &Identities, name: &'static str) -> Identity {
        Identity { name, tls: Tls::read(&identities.files(name)).expect("certificates") }
    }

    /// Those of a relay and of its receiver, and those of others.
    fn identities() -> (Scratch, Identities, Ends) {
        let directory = Scratch::new();
        let authority = Authority::new().expect("an authority");
        let identities = Identities::make(&directory.join("certificates"), &authority).expect("certificates");
        let ends = Ends { client: identity(&identities, RELAY), server: identity(&identities, SERVER) };
        (directory, identities, ends)
    }

    /// A listener, and the server that serves each connection in this way.
    async fn serve<F: Future<Output = ()> + Send + 'static>(
        ends: Option<Ends>,
        connection: impl Fn(Stream) -> F + Clone + Send + 'static,
    ) -> (SocketAddr, JoinSet<()>) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let (address, mut serving) = (listener.local_addr().expect("its address"), JoinSet::new());
        serving.spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let mut stream = Stream::of_client(tcp, ends.as_ref()).expect("certificates");
                let connection = connection.clone();
                tokio::spawn(async move {
                    if stream.shake_hands().await.is_ok() {
                        connection(stream).await;
                    }
                });
            }
        });
        (address, serving)
    }

    struct Proxied {
        link: Arc<Link>,
        ends: Option<Ends>,
        client: Stream,
        _serving: [JoinSet<()>; 2],
    }

    /// A link to a server that echoes every byte.
    async fn proxied(ends: Option<Ends>) -> Proxied {
        let (server, echoing) = serve(ends.clone(), async |stream| {
            let (mut from, mut to) = split(stream);
            let mut buffer = [0; 1024];
            while let Ok(length @ 1..) = from.read(&mut buffer).await {
                to.write_all(&buffer[..length]).await.expect("an open connection");
                to.flush().await.expect("an open connection");
            }
        })
        .await;
        let link = Link::open("test".into(), Protocol::Postgres, server, ends.clone()).await;
        let (link, serving) = link.expect("another port");
        let client = connect(&link, ends.as_ref()).await;
        Proxied { link, ends, client, _serving: [serving, echoing] }
    }

    async fn connect(link: &Link, ends: Option<&Ends>) -> Stream {
        let tcp = TcpStream::connect(link.address).await.expect("the proxy listens");
        Stream::of_server(tcp, ends).expect("certificates")
    }

    impl Proxied {
        async fn echoes(&mut self) -> bool {
            let echo = async {
                self.client.shake_hands().await?;
                self.client.write_all(QUERY).await?;
                self.client.flush().await?;
                let mut answer = vec![0; QUERY.len()];
                self.client.read_exact(&mut answer).await?;
                std::io::Result::Ok(answer == QUERY)
            };
            matches!(timeout(SILENCE, echo).await, Ok(Ok(true)))
        }

        async fn end(&mut self) -> Result<usize, ErrorKind> {
            let read = timeout(SILENCE, self.client.read(&mut [0; 1])).await.expect("an end in time");
            read.map_err(|error| error.kind())
        }
    }

    #[tokio::test]
    async fn bytes_arrive_whole_also_in_slices_and_late() {
        let (_directory, _, ends) = identities();
        for ends in [None, Some(ends)] {
            let mut proxied = proxied(ends).await;
            for condition in [Condition::Normal, Condition::Slice, Condition::Delay(Duration::from_millis(50))] {
                proxied.link.set_condition(condition);
                assert!(proxied.echoes().await, "{condition:?}");
            }
        }
    }

    /// With TLS, a network that breaks cannot say so by TLS.
    #[tokio::test]
    async fn connections_are_closed_in_order_or_reset() {
        let (_directory, _, ends) = identities();
        for (ends, in_order) in [(None, Ok(0)), (Some(ends), Err(ErrorKind::UnexpectedEof))] {
            let (mut closed, mut reset) = (proxied(ends.clone()).await, proxied(ends).await);
            for (proxied, how) in [(&mut closed, End::Close), (&mut reset, End::Reset)] {
                assert!(proxied.echoes().await);
                assert_eq!(proxied.link.end(how), 1);
            }
            assert_eq!(closed.end().await, in_order);
            assert_eq!(reset.end().await, Err(ErrorKind::ConnectionReset));
        }
    }

    #[tokio::test]
    async fn a_half_open_connection_never_recovers_and_a_new_one_works() {
        let (_directory, _, ends) = identities();
        for ends in [None, Some(ends)] {
            let mut proxied = proxied(ends).await;
            assert!(proxied.echoes().await);
            proxied.link.set_condition(Condition::Blackhole);
            assert!(!proxied.echoes().await);
            let first = std::mem::replace(&mut proxied.client, connect(&proxied.link, proxied.ends.as_ref()).await);
            assert!(!proxied.echoes().await, "a connection that has begun in the black hole");
            proxied.link.set_condition(Condition::Normal);
            assert!(!proxied.echoes().await, "the connection recovered");
            proxied.client = first;
            assert!(!proxied.echoes().await, "the connection recovered");
            proxied.client = connect(&proxied.link, proxied.ends.as_ref()).await;
            assert!(proxied.echoes().await);
        }
    }

    #[tokio::test]
    async fn a_trap_springs_at_its_mark_as_often_as_it_should() {
        let (_directory, _, ends) = identities();
        for ends in [None, Some(ends)] {
            for (hold, arrives) in [(Hold::Keep, false), (Hold::PassBefore, true), (Hold::PassAfter, true)] {
                let mut proxied = proxied(ends.clone()).await;
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

    /// Each end sees the certificate of the other one, and not that of a proxy.
    #[tokio::test]
    async fn each_end_sees_the_names_of_the_other_and_others_are_refused() {
        let (_directory, identities, ends) = identities();
        let (seen, mut names) = mpsc::unbounded_channel();
        let (server, _answering) = serve(Some(ends.clone()), move |stream| {
            let Stream::Tls(stream) = stream else { panic!("no TLS") };
            seen.send(names_of_peer(&stream)).expect("the test looks");
            std::future::pending()
        })
        .await;
        let opened = Link::open("test".into(), Protocol::Grpc, server, Some(ends.clone())).await;
        let (link, _serving) = opened.expect("another port");
        let mut client = connect(&link, Some(&ends)).await;
        client.shake_hands().await.expect("the proxy knows the client");
        let Stream::Tls(stream) = client else { panic!("no TLS") };
        assert_eq!(names_of_peer(&stream), ["localhost", SERVER]);
        assert_eq!(names.recv().await.expect("a connection"), ["localhost", RELAY]);

        let other = Ends { client: identity(&identities, CUSTOMERS), ..ends };
        let mut stranger = connect(&link, Some(&other)).await;
        // In TLS 1.3 a client does not know yet whether its certificate is taken.
        let refused = async {
            stranger.shake_hands().await?;
            stranger.read(&mut [0; 1]).await
        };
        assert!(timeout(LIMIT, refused).await.expect("an end in time").is_err());
    }

    /// A call passes, its messages are seen, and a stand-in answers in place of its receiver as it does without TLS.
    #[tokio::test]
    async fn calls_pass_and_a_stand_in_passes_descriptions_on() {
        let (_directory, _, ends) = identities();
        let behind = StandIn { answer: Answer::DeadlineExceeded, describes: false };
        let (server, _answering) = serve(Some(ends.clone()), move |stream| async move {
            let nobody = Receiver::at(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)), None);
            behind.serve(stream, nobody, &std::sync::atomic::AtomicU64::new(0)).await;
        })
        .await;
        let opened = Link::open("test".into(), Protocol::Grpc, server, Some(ends.clone())).await;
        let (link, _serving) = opened.expect("another port");
        let endpoint = Endpoint::from_shared(format!("https://{}", link.address)).expect("a URL");
        let mut client = EventReceiverClient::new(connect_lazily(&endpoint, &ends.client.tls));
        let messages = Arc::new(std::sync::Mutex::new(Vec::new()));
        let seen = messages.clone();
        let _guard = link.set_trap(Trap {
            at: Box::new(move |mark| {
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(mark.clone());
                false
            }),
            hold: Hold::PassAfter,
            action: Box::new(|| {}),
            times: 1,
            sprung: None,
        });
        let answer = client.describe(DescribeRequest {}).await.expect_err("the server answers so");
        assert_eq!(answer.code(), Code::DeadlineExceeded, "{answer:?}");
        let messages = messages.lock().unwrap_or_else(PoisonError::into_inner).clone();
        assert_eq!(messages, [Mark::Request(prost::bytes::Bytes::new())]);

        link.set_condition(Condition::StandIn(StandIn { answer: Answer::Unknown, describes: true }));
        link.end(End::Close);
        let mut client = EventReceiverClient::new(connect_lazily(&endpoint, &ends.client.tls));
        let delivered = client.deliver(DeliverRequest::default()).await.expect_err("the stand-in answers so");
        assert_eq!(delivered.code(), Code::Unknown, "{delivered:?}");
        let described = client.describe(DescribeRequest {}).await.expect_err("the server answers so");
        assert_eq!(described.code(), Code::DeadlineExceeded, "{described:?}");
    }
}
