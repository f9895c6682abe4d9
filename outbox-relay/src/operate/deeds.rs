//! Records what operators do, and lists it.
//!
//! A deed is written in the transaction of its effect. So none is missing, and none tells of what was rolled back. The
//! relay's role can add deeds, and can neither change nor delete one.

use outbox::EventId;
use proto::relay::v1::{Deed, ListDeedsResponse, deed::Kind};
use sqlx::{PgConnection, types::time::OffsetDateTime};

/// Events of a deed that are counted.
const COUNTED_MAX: i64 = 100_000;

/// Who does a deed, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Author {
    pub(crate) name: String,
    /// May be empty, unless the deed asks for one.
    pub(crate) reason: String,
}

/// A deed that is about to be done.
#[derive(Debug)]
pub(super) struct NewDeed<'d> {
    pub(super) kind: Kind,
    pub(super) author: &'d Author,
    /// The subscription that it is restricted to.
    pub(super) subscription_id: Option<i16>,
    /// What it is about, for people.
    pub(super) about: &'d str,
    pub(super) can_undo: bool,
    pub(super) undoes: Option<i64>,
}

impl<'d> NewDeed<'d> {
    /// A deed that can be undone.
    pub(super) fn new(kind: Kind, author: &'d Author, subscription_id: Option<i16>, about: &'d str) -> Self {
        Self { kind, author, subscription_id, about, can_undo: true, undoes: None }
    }

    /// The deed with this id, if it is this one, begun by an earlier piece; otherwise a new one. The id comes from a token,
    /// so it may be that of any deed.
    ///
    /// # Errors
    /// Those of the database.
    pub(super) async fn go_on(&self, tx: &mut PgConnection, begun: Option<i64>) -> Result<i64, sqlx::Error> {
        let Some(begun) = begun else { return self.record(tx).await };
        let found = sqlx::query_scalar!(
            "-- operate: find begun deed
            SELECT deed_id FROM outbox_deeds
            WHERE deed_id = $1 AND done_by = $2 AND kind = $3 AND about = $4
              AND subscription_id IS NOT DISTINCT FROM $5 AND undoes IS NOT DISTINCT FROM $6",
            begun,
            self.author.name,
            word(self.kind),
            self.about,
            self.subscription_id,
            self.undoes,
        );
        match found.fetch_optional(&mut *tx).await? {
            Some(deed_id) => Ok(deed_id),
            None => self.record(tx).await,
        }
    }

    /// Writes the deed into the transaction of its effect. Returns its id.
    ///
    /// # Errors
    /// Those of the database.
    pub(super) async fn record(&self, tx: &mut PgConnection) -> Result<i64, sqlx::Error> {
        sqlx::query_scalar!(
            "-- operate: record deed
            INSERT INTO outbox_deeds (done_by, kind, subscription_id, reason, about, can_undo, undoes)
            VALUES ($1, $2, $3, $4, $5, $6, $7)
            RETURNING deed_id",
            self.author.name,
            word(self.kind),
            self.subscription_id,
            self.author.reason,
            self.about,
            self.can_undo,
            self.undoes,
        )
        .fetch_one(tx)
        .await
    }
}

const KINDS: [(Kind, &str); 8] = [
    (Kind::Requeue, "requeue"),
    (Kind::Discard, "discard"),
    (Kind::Restore, "restore"),
    (Kind::Pause, "pause"),
    (Kind::Resume, "resume"),
    (Kind::Subscribe, "subscribe"),
    (Kind::Unsubscribe, "unsubscribe"),
    (Kind::Undo, "undo"),
];

/// The kind, as the database and the command line have it.
pub(super) fn word(kind: Kind) -> &'static str {
    KINDS.iter().find(|(of, _)| *of == kind).map_or("unknown", |(_, word)| word)
}

/// The kind of a word; unspecified if a later version has written it.
pub(super) fn kind(word: &str) -> Kind {
    KINDS.iter().find(|(_, of)| *of == word).map_or(Kind::Unspecified, |(kind, _)| *kind)
}

/// The deeds to list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeedPage {
    pub(crate) size: u16,
    /// The last deed of the previous page; for the first page, the largest id.
    pub(crate) before: i64,
    /// Only the deeds that have changed this event.
    pub(crate) event_id: Option<EventId>,
}

impl DeedPage {
    /// The list that its page tokens are valid for.
    pub(crate) fn list(event_id: Option<EventId>) -> String {
        format!("deeds {}", event_id.map(|id| id.to_string()).unwrap_or_default()).trim_end().to_owned()
    }
}

struct DeedRow {
    deed_id: i64,
    kind: String,
    done_at: OffsetDateTime,
    done_by: String,
    reason: String,
    subscription: String,
    about: String,
    events: i64,
    can_undo: bool,
    undoes: Option<i64>,
    undone_by: Option<i64>,
}

impl From<DeedRow> for Deed {
    fn from(row: DeedRow) -> Self {
        Self {
            deed_id: row.deed_id,
            kind: kind(&row.kind).into(),
            time: Some(outbox::timestamp(row.done_at)),
            done_by: row.done_by,
            reason: row.reason,
            subscription: row.subscription,
            about: row.about,
            events: row.events,
            undoes: row.undoes.unwrap_or_default(),
            undone_by: row.undone_by.unwrap_or_default(),
            can_undo: row.can_undo,
        }
    }
}

/// Newest first. Reads one row more than the page holds, to know whether another page follows. Counts as many events of a
/// deed as take no time that an operator would notice.
///
/// # Errors
/// Those of the database.
pub(crate) async fn list_deeds(
    connection: &mut PgConnection,
    page: &DeedPage,
) -> Result<ListDeedsResponse, sqlx::Error> {
    let mut rows = sqlx::query_as!(
        DeedRow,
        r#"-- operate: list deeds
        SELECT deed_id, kind, done_at, done_by, deeds.reason, coalesce(name, '') AS "subscription!", about,
            (SELECT count(*) FROM (
                SELECT FROM outbox_deed_events AS of_deed WHERE of_deed.deed_id = deeds.deed_id LIMIT $4) AS counted) AS "events!",
            can_undo, undoes,
            (SELECT max(later.deed_id) FROM outbox_deeds AS later WHERE later.undoes = deeds.deed_id) AS undone_by
        FROM outbox_deeds AS deeds LEFT JOIN outbox_subscriptions USING (subscription_id)
        WHERE deed_id < $1
          AND ($3::uuid IS NULL OR deed_id = ANY (ARRAY(
              SELECT of_event.deed_id FROM outbox_deed_events AS of_event WHERE of_event.event_id = $3)))
        ORDER BY deed_id DESC
        LIMIT $2"#,
        page.before,
        i64::from(page.size) + 1,
        page.event_id as Option<EventId>,
        COUNTED_MAX,
    )
    .fetch_all(connection)
    .await?;
    let more = rows.len() > usize::from(page.size);
    if more {
        rows.pop();
    }
    let list = DeedPage::list(page.event_id);
    let last = rows.last().filter(|_| more);
    let next_page_token = last.map(|row| chassis::encode_page_token(&list, &row.deed_id.to_string()));
    Ok(ListDeedsResponse {
        deeds: rows.into_iter().map(Deed::from).collect(),
        next_page_token: next_page_token.unwrap_or_default(),
    })
}
