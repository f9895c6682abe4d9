//! Requeues or discards all dead events that match, piece by piece.
//!
//! One transaction for millions of events would hold all their locks for minutes. It would exceed the limit of database
//! work, and then nothing of it would be committed. So a [`Walk`] visits the dead events in the order of their ids, and
//! each piece of it is a transaction of its own. Whatever ends the walk, every piece is changed or still dead as a whole.
//! A new walk goes on with those that are still dead.
//!
//! A walk visits each id once, since each piece begins behind the last. An event that dies again during the walk keeps
//! its id, which lies behind the walk. So no event is requeued for ever, however fast it dies. The walk ends at the
//! largest id that was dead when it began, and ids begin with the time of their aggregate. So new aggregates cannot prolong
//! it. An event that dies ahead of the walk is changed along with the others: once.
//!
//! Each piece costs the same. The index of dead rows keeps an entry for each row that was requeued until VACUUM removes
//! it, which it cannot do while an old transaction is open. These entries lie behind the walk as well, so only a later
//! walk passes over them.
//!
//! All pieces of a walk are one deed, which the first piece that changes an event records.

use outbox::EventId;
use proto::relay::v1::deed::Kind;
use sqlx::{PgConnection, Postgres, Transaction};
use uuid::Uuid;

use super::{
    Author, Changed, Filter, OperateError, begin_durable, count,
    deeds::NewDeed,
    discard::give_up,
    find_subscription, free_successors,
    requeue::{MAX_AGE_UNTOLD, make_visible},
    tell_of_change,
};

/// Dead events in one piece. A piece of so many takes a fraction of a second, even on a busy server.
pub(crate) const PIECE: u32 = 5000;
/// Dead events that are counted ahead of a walk, so that the count takes less time than a piece.
const COUNTED_MAX: i64 = 100_000;

/// What a walk does to the events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Those that are too old stay dead.
    Requeue,
    Discard,
}

impl Change {
    fn kind(self) -> Kind {
        match self {
            Self::Requeue => Kind::Requeue,
            Self::Discard => Kind::Discard,
        }
    }

    /// The list that the tokens of such a walk are valid for.
    fn list(self, filter: &Filter) -> String {
        let word = match self {
            Self::Requeue => "requeue",
            Self::Discard => "discard",
        };
        format!("{word} {}", filter.name())
    }
}

/// The part of the dead events that a change of all has yet to visit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Walk {
    change: Change,
    /// The last event it has visited.
    after: EventId,
    /// The last event it visits.
    until: EventId,
    /// It changes only these events. It visits all.
    filter: Filter,
    /// The deed, once an event was changed.
    pub(crate) deed_id: Option<i64>,
}

/// A piece of a walk.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) changed: Changed,
    /// Events that stay dead.
    pub(crate) too_old: i64,
    /// The deed, once an event was changed, in this piece or in one before.
    pub(crate) deed_id: Option<i64>,
    /// What is left of the walk.
    pub(crate) rest: Option<Walk>,
}

struct Locked {
    row: String,
    too_old: bool,
}

impl Walk {
    /// Begins a walk; `None` if nothing is dead.
    ///
    /// # Errors
    /// Those of the database.
    pub(crate) async fn begin(
        connection: &mut PgConnection,
        change: Change,
        filter: Filter,
    ) -> Result<Option<Self>, sqlx::Error> {
        let last = sqlx::query_scalar!(
            r#"-- operate: find the last dead
            SELECT event_id AS "event_id: EventId" FROM outbox
            WHERE visible_at = 'infinity' ORDER BY event_id DESC LIMIT 1"#
        )
        .fetch_optional(connection)
        .await?;
        Ok(last.map(|until| Self { change, after: Uuid::nil().into(), until, filter, deed_id: None }))
    }

    /// A token from which [`Walk::resume`] makes this walk again.
    pub(crate) fn token(&self) -> String {
        let deed_id = self.deed_id.unwrap_or_default();
        let place = format!("{} {} {deed_id}", self.after, self.until);
        chassis::encode_page_token(&self.change.list(&self.filter), &place)
    }

    /// The walk of a token; `None` if the token is not one of such a walk over these events.
    pub(crate) fn resume(token: &str, change: Change, filter: Filter) -> Option<Self> {
        let place = chassis::decode_page_token(&change.list(&filter), token)?;
        let mut parts = place.split(' ');
        let mut id = || Uuid::try_parse(parts.next()?).map(EventId::from).ok();
        let (after, until) = (id()?, id()?);
        // The tokens of earlier versions have none.
        let deed_id = parts.next().map_or(Some(0), |deed_id| deed_id.parse().ok())?;
        let deed_id = Some(deed_id).filter(|deed_id| *deed_id > 0);
        Some(Self { change, after, until, filter, deed_id })
    }

    /// The number of dead events ahead, as far as they are among the next hundred thousand.
    ///
    /// # Errors
    /// Those of the database.
    pub(crate) async fn count_remaining(&self, connection: &mut PgConnection) -> Result<i64, sqlx::Error> {
        let mut tx = begin_in_order(connection).await?;
        let counted = sqlx::query_scalar!(
            r#"-- operate: count ahead
            SELECT count(*) AS "count!"
            FROM (
                SELECT event_type, subscription_id, last_error FROM outbox
                WHERE visible_at = 'infinity' AND event_id > $1 AND event_id <= $2
                ORDER BY event_id LIMIT $4) AS ahead
            WHERE ($3::text IS NULL OR event_type = $3)
              AND ($5::text IS NULL OR subscription_id = (SELECT subscription_id FROM outbox_subscriptions WHERE name = $5 AND ended_at IS NULL))
              AND ($6::text IS NULL OR split_part(last_error, ':', 1) = $6)"#,
            self.after as EventId,
            self.until as EventId,
            self.filter.event_type,
            COUNTED_MAX,
            self.filter.subscription,
            self.filter.code,
        )
        .fetch_one(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(counted)
    }

    /// The deed of this walk, which is recorded now if no earlier piece has.
    async fn deed(&self, tx: &mut PgConnection, author: &Author, only: Option<i16>) -> Result<i64, sqlx::Error> {
        let about = format!("all dead events{}", self.filter.describe());
        NewDeed::new(self.change.kind(), author, only, &about).go_on(tx, self.deed_id).await
    }
}

/// Changes the next events of a walk, as [`super::requeue`] and [`super::discard`] do. At most `events_max` dead events are
/// looked at, so a piece is short even if few events match.
///
/// # Errors
/// Those of the database, and [`OperateError::NoSubscription`] if it was ended meanwhile. The piece is then changed as a
/// whole, or not at all; the walk it began with visits it again.
pub(crate) async fn walk_piece(
    connection: &mut PgConnection,
    walk: Walk,
    author: &Author,
    events_max: u32,
) -> Result<Piece, OperateError> {
    let mut tx = begin_in_order(connection).await?;
    let only = find_subscription(&mut tx, walk.filter.subscription.as_deref()).await?;
    let end = find_end(&mut tx, &walk, events_max).await?;
    let piece = Walk { until: end.unwrap_or(walk.until), ..walk.clone() };
    let stays = |dead: &Locked| dead.too_old && walk.change == Change::Requeue;
    let (old, others): (Vec<_>, Vec<_>) = lock(&mut tx, &piece).await?.into_iter().partition(stays);
    let rows: Vec<_> = others.into_iter().map(|dead| dead.row).collect();
    let (mut deed_id, mut positions, mut freed) = (walk.deed_id, Vec::new(), 0);
    if !rows.is_empty() {
        let deed = walk.deed(&mut tx, author, only).await?;
        positions = match walk.change {
            Change::Requeue => make_visible(&mut tx, &rows, deed).await?,
            Change::Discard => give_up(&mut tx, &rows, author, deed, false).await?.positions(),
        };
        freed = free_successors(&mut tx, &positions).await?;
        deed_id = Some(deed);
    }
    tx.commit().await?;
    if !positions.is_empty() {
        tell_of_change(connection, &positions).await;
    }
    let changed = Changed { events: count(positions.len() as u64), freed: count(freed) };
    let rest = (piece.until < walk.until).then_some(Walk { after: piece.until, deed_id, ..walk });
    Ok(Piece { changed, too_old: count(old.len() as u64), deed_id, rest })
}

/// Begins a transaction in which the index of dead rows is scanned in its order. The planner takes a range of ids for a
/// narrow one, unless statistics tell it otherwise. It would then read and sort all dead rows for each piece.
async fn begin_in_order(connection: &mut PgConnection) -> Result<Transaction<'_, Postgres>, sqlx::Error> {
    let mut tx = begin_durable(connection).await?;
    sqlx::query!(
        "-- operate: scan in order
        SELECT set_config('enable_sort', 'off', true) AS sort,
            set_config('enable_bitmapscan', 'off', true) AS bitmaps"
    )
    .fetch_one(&mut *tx)
    .await?;
    Ok(tx)
}

/// The last event of a piece; `None` if the rest of the walk is not a whole piece.
async fn find_end(
    tx: &mut Transaction<'_, Postgres>,
    walk: &Walk,
    events_max: u32,
) -> Result<Option<EventId>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: find the end of a piece
        SELECT event_id AS "event_id: EventId" FROM outbox
        WHERE visible_at = 'infinity' AND event_id > $1 AND event_id <= $2
        ORDER BY event_id LIMIT 1 OFFSET $3 - 1"#,
        walk.after as EventId,
        walk.until as EventId,
        events_max.cast_signed(),
    )
    .fetch_optional(&mut **tx)
    .await
}

/// Locks the events in the order of their ids, like `operate: lock dead`. If another operator has one of them, this
/// waits. An event that was requeued or discarded meanwhile is not returned.
async fn lock(tx: &mut Transaction<'_, Postgres>, piece: &Walk) -> Result<Vec<Locked>, sqlx::Error> {
    sqlx::query_as!(
        Locked,
        r#"-- operate: lock a piece
        SELECT ctid::text AS "row!", created_at < now() - make_interval(secs => coalesce((
                SELECT max_age_seconds FROM outbox_subscriptions AS named
                WHERE named.subscription_id = outbox.subscription_id), $4)) AS "too_old!"
        FROM outbox
        WHERE visible_at = 'infinity' AND event_id > $1 AND event_id <= $2
          AND ($3::text IS NULL OR event_type = $3)
          AND ($5::text IS NULL OR subscription_id = (SELECT subscription_id FROM outbox_subscriptions WHERE name = $5 AND ended_at IS NULL))
          AND ($6::text IS NULL OR split_part(last_error, ':', 1) = $6)
        ORDER BY event_id, subscription_id
        FOR UPDATE"#,
        piece.after as EventId,
        piece.until as EventId,
        piece.filter.event_type,
        MAX_AGE_UNTOLD,
        piece.filter.subscription,
        piece.filter.code,
    )
    .fetch_all(&mut **tx)
    .await
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection, PgConnection, PgPool};
    use testkit::TestDatabase;
    use tokio::time::{Duration, Instant, sleep};
    use uuid::Uuid;

    use super::{Change, Changed, Filter, Piece, Walk, walk_piece};
    use crate::operate::{Author, Discard, discard};

    /// An outbox with dead events, and an operator's connection.
    struct Outbox {
        pool: PgPool,
        operator: PgConnection,
        test: TestDatabase,
    }

    impl Outbox {
        /// The ids of the dead events are those of [`id`]. Every tenth has a successor that is parked.
        async fn with_dead(events: i64) -> Self {
            let test = TestDatabase::create("orders_owner", &[&outbox::MIGRATOR]).await;
            test.insert_for_subscription(0).await;
            let operator = PgConnection::connect(&test.url_as("outbox_relay")).await.unwrap();
            let outbox = Self { pool: test.pool().await, operator, test };
            outbox.insert_dead(events).await;
            outbox
        }

        async fn insert_dead(&self, events: i64) {
            let dead =
                "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, attempts, last_error,
                    visible_at)
                SELECT gen_random_uuid(), 1, lpad(to_hex(n), 32, '0')::uuid, 'test.v1.Happened', '', 10, 'BUSY: later',
                    'infinity'
                FROM generate_series(1, $1) AS n";
            sqlx::query(dead).bind(events).execute(&self.pool).await.unwrap();
            self.run(
                "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, visible_at)
                SELECT aggregate_id, 2, gen_random_uuid(), event_type, '', now() + interval '5 min'
                FROM (SELECT aggregate_id, event_type, row_number() OVER (ORDER BY event_id) AS n FROM outbox) AS dead
                WHERE n % 10 = 0",
            )
            .await;
        }

        async fn run(&self, sql: &'static str) {
            sqlx::raw_sql(sql).execute(&self.pool).await.unwrap();
        }

        async fn count(&self, sql: &'static str) -> i64 {
            sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
        }

        async fn dead(&self) -> i64 {
            self.count("SELECT count(*) FROM outbox WHERE visible_at = 'infinity'").await
        }

        /// Requeued events, with all their attempts again.
        async fn requeued(&self) -> i64 {
            self.count(
                "SELECT count(*) FROM outbox
                WHERE sequence = 1 AND visible_at <= now() AND attempts = 10 AND attempts_before_requeue = 10",
            )
            .await
        }

        async fn parked(&self) -> i64 {
            self.count("SELECT count(*) FROM outbox WHERE visible_at > now() AND visible_at < 'infinity'").await
        }

        async fn begin(&mut self, event_type: Option<&str>) -> Option<Walk> {
            let filter = Filter { event_type: event_type.map(str::to_owned), ..Filter::default() };
            Walk::begin(&mut self.operator, Change::Requeue, filter).await.unwrap()
        }

        async fn piece(&mut self, walk: Walk, events_max: u32) -> Piece {
            walk_piece(&mut self.operator, walk, &ann(), events_max).await.unwrap()
        }

        /// Walks to the end. Returns the pieces.
        async fn walk(&mut self, walk: Option<Walk>, events_max: u32) -> Vec<Piece> {
            let (mut rest, mut pieces) = (walk, Vec::new());
            while let Some(walk) = rest {
                let piece = self.piece(walk, events_max).await;
                rest = piece.rest.clone();
                pieces.push(piece);
            }
            pieces
        }

        /// Waits until the operator waits for a lock.
        async fn operator_waits(&self) {
            let waits = "SELECT count(*) FROM pg_stat_activity
                WHERE datname = current_database() AND usename = 'outbox_relay' AND wait_event_type = 'Lock'";
            let deadline = Instant::now() + Duration::from_secs(20);
            while self.count(waits).await == 0 {
                assert!(Instant::now() < deadline, "the operator does not wait");
                sleep(Duration::from_millis(10)).await;
            }
        }
    }

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    fn ann() -> Author {
        Author { name: "ann".into(), reason: "inventory is mended".into() }
    }

    fn total(pieces: &[Piece]) -> Changed {
        pieces.iter().fold(Changed::default(), |sum, piece| Changed {
            events: sum.events + piece.changed.events,
            freed: sum.freed + piece.changed.freed,
        })
    }

    #[tokio::test]
    async fn a_walk_requeues_all_dead_events_in_pieces_in_the_order_of_their_ids() {
        let mut outbox = Outbox::with_dead(2500).await;
        let walk = outbox.begin(None).await.unwrap();
        let first = outbox.piece(walk, 400).await;
        assert_eq!(first.changed, Changed { events: 400, freed: 40 });
        let later = "SELECT count(*) FROM outbox WHERE visible_at = 'infinity'
            AND event_id > '00000000-0000-0000-0000-000000000190'";
        assert_eq!((outbox.dead().await, outbox.count(later).await), (2100, 2100));
        let rest = first.rest.unwrap();
        assert_eq!(rest.count_remaining(&mut outbox.operator).await.unwrap(), 2100);

        let pieces = outbox.walk(Some(rest), 400).await;
        let events: Vec<_> = pieces.iter().map(|piece| piece.changed.events).collect();
        assert_eq!(events, [400, 400, 400, 400, 400, 100]);
        assert_eq!((outbox.requeued().await, outbox.dead().await, outbox.parked().await), (2500, 0, 0));
        assert_eq!(outbox.begin(None).await, None);
    }

    #[tokio::test]
    async fn a_walk_interrupted_after_any_piece_loses_nothing_and_a_new_one_goes_on() {
        let mut outbox = Outbox::with_dead(2500).await;
        let mut requeued = 0;
        for pieces in 0..4 {
            let mut walk = outbox.begin(None).await;
            for _ in 0..pieces {
                let piece = outbox.piece(walk.unwrap(), 300).await;
                requeued += piece.changed.events;
                walk = piece.rest;
            }
            assert_eq!((outbox.requeued().await, outbox.dead().await), (requeued, 2500 - requeued));
        }
        assert_eq!(requeued, 1800);
        let walk = outbox.begin(None).await;
        assert_eq!(total(&outbox.walk(walk, 300).await), Changed { events: 700, freed: 70 });
        assert_eq!((outbox.requeued().await, outbox.parked().await), (2500, 0));
    }

    #[tokio::test]
    async fn a_piece_that_the_database_cuts_off_changes_nothing_and_is_visited_again() {
        let mut outbox = Outbox::with_dead(1000).await;
        let walk = outbox.begin(None).await.unwrap();
        let walk = outbox.piece(walk, 300).await.rest.unwrap();
        // The piece has made its events visible when it waits for this successor.
        let mut other = outbox.pool.begin().await.unwrap();
        let successor = "SELECT FROM outbox WHERE sequence = 2
            AND aggregate_id = (SELECT aggregate_id FROM outbox WHERE event_id = $1) FOR UPDATE";
        sqlx::query(successor).bind(id(550)).execute(&mut *other).await.unwrap();
        let mut operator = PgConnection::connect(&outbox.test.url_as("outbox_relay")).await.unwrap();
        let cut = async {
            outbox.operator_waits().await;
            outbox
                .run(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                    WHERE datname = current_database() AND usename = 'outbox_relay' AND wait_event_type = 'Lock'",
                )
                .await;
        };
        let author = ann();
        let (ended, ()) = tokio::join!(walk_piece(&mut operator, walk.clone(), &author, 300), cut);
        ended.unwrap_err();
        other.rollback().await.unwrap();
        assert_eq!((outbox.requeued().await, outbox.dead().await), (300, 700));

        assert_eq!(total(&outbox.walk(Some(walk), 300).await), Changed { events: 700, freed: 70 });
        assert_eq!(outbox.requeued().await, 1000);
    }

    #[tokio::test]
    async fn an_event_that_dies_again_during_the_walk_stays_dead_and_the_walk_ends() {
        let mut outbox = Outbox::with_dead(1000).await;
        let mut rest = outbox.begin(None).await;
        let (mut pieces, mut requeued) = (0, 0);
        while let Some(walk) = rest {
            let piece = outbox.piece(walk, 100).await;
            requeued += piece.changed.events;
            rest = piece.rest;
            pieces += 1;
            // All that were requeued die at once. And one event is enqueued, and dies.
            outbox
                .run("UPDATE outbox SET visible_at = 'infinity', last_error = 'again' WHERE visible_at <= now()")
                .await;
            let new =
                "INSERT INTO outbox (aggregate_id, sequence, event_id, event_type, payload, last_error, visible_at)
                VALUES (gen_random_uuid(), 1, $1, 'test.v1.Happened', '', 'new', 'infinity')";
            sqlx::query(new).bind(Uuid::now_v7()).execute(&outbox.pool).await.unwrap();
            assert!(pieces <= 10, "the walk does not end");
        }
        assert_eq!((pieces, requeued), (10, 1000));
        assert_eq!(outbox.count("SELECT count(*) FROM outbox WHERE last_error = 'new'").await, 10);
        assert_eq!(outbox.count("SELECT count(*) FROM outbox WHERE visible_at <= now()").await, 0);
    }

    /// The planner knows nothing of the dead rows, and takes them for few.
    #[tokio::test]
    async fn a_piece_reads_only_its_own_rows_however_many_are_dead() {
        let mut outbox = Outbox::with_dead(0).await;
        outbox.run("ALTER TABLE outbox SET (autovacuum_enabled = false)").await;
        outbox.insert_dead(200_000).await;
        let walk = outbox.begin(None).await.unwrap();
        let mut operator = PgConnection::connect(&outbox.test.url_as("outbox_relay")).await.unwrap();
        walk_piece(&mut operator, walk, &ann(), 100).await.unwrap();
        // A session reports its statistics when it ends.
        operator.close().await.unwrap();
        let read = "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes WHERE relname = 'outbox'";
        let deadline = Instant::now() + Duration::from_secs(20);
        while outbox.count(read).await < 200 {
            assert!(Instant::now() < deadline, "the session has reported nothing");
            sleep(Duration::from_millis(10)).await;
        }
        assert!(outbox.count(read).await < 2000, "{}", outbox.count(read).await);
    }

    /// The row is at another place when the piece gets its lock.
    #[tokio::test]
    async fn an_event_that_another_session_changes_meanwhile_is_requeued_if_it_is_still_dead() {
        let mut outbox = Outbox::with_dead(100).await;
        let walk = outbox.begin(None).await.unwrap();
        let mut other = outbox.pool.begin().await.unwrap();
        let change = "UPDATE outbox SET last_error = 'changed' WHERE event_id = $1";
        sqlx::query(change).bind(id(50)).execute(&mut *other).await.unwrap();
        let mut operator = PgConnection::connect(&outbox.test.url_as("outbox_relay")).await.unwrap();
        let commit = async {
            outbox.operator_waits().await;
            other.commit().await.unwrap();
        };
        let author = ann();
        let (piece, ()) = tokio::join!(walk_piece(&mut operator, walk, &author, 300), commit);
        assert_eq!(piece.unwrap().changed, Changed { events: 100, freed: 10 });
        assert_eq!((outbox.requeued().await, outbox.dead().await), (100, 0));
    }

    #[tokio::test]
    async fn an_event_that_another_operator_discards_meanwhile_is_not_requeued_and_does_not_stop_the_walk() {
        let mut outbox = Outbox::with_dead(1000).await;
        let walk = outbox.begin(None).await.unwrap();
        let walk = outbox.piece(walk, 300).await.rest;
        let mut other = PgConnection::connect(&outbox.test.url_as("outbox_relay")).await.unwrap();
        // One is gone before its piece, and one goes while its piece waits for it.
        let asked = Discard { event_ids: vec![id(900).into()], subscription: None, author: ann(), refuse: false };
        discard(&mut other, &asked).await.unwrap();
        let mut discarding = outbox.pool.begin().await.unwrap();
        sqlx::query("DELETE FROM outbox WHERE event_id = $1").bind(id(450)).execute(&mut *discarding).await.unwrap();
        let mut operator = PgConnection::connect(&outbox.test.url_as("outbox_relay")).await.unwrap();
        let commit = async {
            outbox.operator_waits().await;
            discarding.commit().await.unwrap();
        };
        let author = ann();
        let (piece, ()) = tokio::join!(walk_piece(&mut operator, walk.unwrap(), &author, 300), commit);
        let piece = piece.unwrap();
        assert_eq!(piece.changed.events, 299);
        assert_eq!(total(&outbox.walk(piece.rest, 300).await).events, 399);
        assert_eq!((outbox.requeued().await, outbox.dead().await), (998, 0));
        assert_eq!(outbox.count("SELECT count(*) FROM outbox_discarded").await, 1);
    }

    #[tokio::test]
    async fn a_walk_requeues_events_of_one_type_and_leaves_those_that_are_too_old() {
        let mut outbox = Outbox::with_dead(1000).await;
        // Of every sixteen, one is of the type, and the first two hundred are too old.
        outbox
            .run(
                "UPDATE outbox SET event_type = 'other.v1.Thing' WHERE right(event_id::text, 1) = '5' AND sequence = 1;
                UPDATE outbox SET created_at = now() - interval '200 hours'
                    WHERE sequence = 1 AND event_id <= '00000000-0000-0000-0000-0000000000c8'",
            )
            .await;
        let of_type = "SELECT count(*) FROM outbox WHERE event_type = 'other.v1.Thing'";
        let (all, old) = (outbox.count(of_type).await, 13);
        let walk = outbox.begin(Some("other.v1.Thing")).await.unwrap();
        assert_eq!(walk.count_remaining(&mut outbox.operator).await.unwrap(), all);
        let pieces = outbox.walk(Some(walk), 100).await;
        assert_eq!(pieces.len(), 10);
        let too_old: i64 = pieces.iter().map(|piece| piece.too_old).sum();
        assert_eq!((total(&pieces).events, too_old), (all - old, old));
        assert_eq!(outbox.dead().await, 1000 - (all - old));
    }

    #[test]
    fn a_token_continues_a_walk_over_the_same_type_only() {
        let of = |event_type: &str| Filter { event_type: Some(event_type.to_owned()), ..Filter::default() };
        let walk = Walk {
            change: Change::Requeue,
            after: id(1).into(),
            until: id(9).into(),
            filter: of("a.B"),
            deed_id: Some(7),
        };
        assert_eq!(Walk::resume(&walk.token(), Change::Requeue, of("a.B")), Some(walk.clone()));
        assert_eq!(Walk::resume(&walk.token(), Change::Discard, of("a.B")), None);
        assert_eq!(Walk::resume(&walk.token(), Change::Requeue, of("a.C")), None);
        assert_eq!(Walk::resume(&walk.token(), Change::Requeue, Filter::default()), None);
        assert_eq!(Walk::resume("no token", Change::Requeue, of("a.B")), None);
        let page = chassis::encode_page_token("requeue a.B", &id(1).to_string());
        assert_eq!(Walk::resume(&page, Change::Requeue, of("a.B")), None);
    }
}
