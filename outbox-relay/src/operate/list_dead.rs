//! Lists dead events, or those that fail and are not dead, page by page.

use outbox::{AggregateId, EventId};
use proto::relay::v1::{DeadEvent, ListDeadEventsResponse};
use sqlx::{PgConnection, types::time::OffsetDateTime};
use uuid::Uuid;

use super::{Filter, OperateError, find_subscription};

/// The page to read.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    pub(crate) size: u16,
    /// The last event of the previous page, with its subscription; for the first page, the largest of both.
    pub(crate) before: (EventId, i16),
    pub(crate) filter: Filter,
    /// The events that have failed and are not dead, instead of those that are.
    pub(crate) failing: bool,
}

impl Page {
    /// The position before the first page.
    pub(crate) fn first() -> (EventId, i16) {
        (Uuid::max().into(), i16::MAX)
    }

    /// The list that its page tokens are valid for.
    pub(crate) fn list(filter: &Filter, failing: bool) -> String {
        format!("{} {}", if failing { "failing" } else { "dead" }, filter.name())
    }

    /// The position of a page token.
    pub(crate) fn read_position(text: &str) -> Option<(EventId, i16)> {
        let (event_id, subscription_id) = text.split_once(' ')?;
        Some((Uuid::try_parse(event_id).ok()?.into(), subscription_id.parse().ok()?))
    }
}

/// A row that is dead or fails, without its payload and trace context.
pub(super) struct DeadRow {
    pub(super) event_id: EventId,
    pub(super) subscription_id: i16,
    pub(super) subscription: String,
    pub(super) event_type: String,
    pub(super) aggregate_id: AggregateId,
    pub(super) sequence: i32,
    pub(super) attempts: i32,
    pub(super) failures: i32,
    pub(super) created_at: OffsetDateTime,
    pub(super) age_seconds: f64,
    pub(super) reason: String,
    pub(super) held_back: i64,
}

impl From<DeadRow> for DeadEvent {
    fn from(row: DeadRow) -> Self {
        Self {
            event_id: row.event_id.to_string(),
            r#type: row.event_type,
            subject: row.aggregate_id.to_string(),
            sequence: row.sequence.into(),
            attempts: row.attempts,
            create_time: Some(outbox::timestamp(row.created_at)),
            age_seconds: row.age_seconds,
            reason: row.reason,
            held_back: row.held_back,
            failures: row.failures,
            subscription: row.subscription,
        }
    }
}

/// Newest aggregates first: the ids of their events begin with their time. Reads one row more than the page holds, to know
/// whether another page follows.
///
/// # Errors
/// Those of the database.
pub(crate) async fn list_dead(
    connection: &mut PgConnection,
    page: &Page,
) -> Result<ListDeadEventsResponse, OperateError> {
    let only = find_subscription(connection, page.filter.subscription.as_deref()).await?;
    let mut rows = if page.failing {
        read_failing(connection, page, only).await
    } else {
        read_dead(connection, page, only).await
    }?;
    let more = rows.len() > usize::from(page.size);
    if more {
        rows.pop();
    }
    let list = Page::list(&page.filter, page.failing);
    let last = rows.last().filter(|_| more);
    let next_page_token =
        last.map(|row| chassis::encode_page_token(&list, &format!("{} {}", row.event_id, row.subscription_id)));
    Ok(ListDeadEventsResponse {
        dead_events: rows.into_iter().map(DeadEvent::from).collect(),
        next_page_token: next_page_token.unwrap_or_default(),
        total_size: match page.failing {
            true => count_failing(connection, &page.filter, only).await?,
            false => count_dead(connection, &page.filter, only).await?,
        },
    })
}

async fn read_dead(connection: &mut PgConnection, page: &Page, only: Option<i16>) -> Result<Vec<DeadRow>, sqlx::Error> {
    sqlx::query_as!(
        DeadRow,
        r#"-- operate: list dead
        SELECT event_id, subscription_id, event_type, aggregate_id, sequence, attempts, failures, created_at,
            extract(epoch FROM now() - created_at)::double precision AS "age_seconds!",
            coalesce(last_error, '') AS "reason!",
            (SELECT count(*) FROM outbox AS later
             WHERE later.aggregate_id = dead.aggregate_id AND later.subscription_id = dead.subscription_id
               AND later.sequence > dead.sequence) AS "held_back!",
            coalesce((SELECT name FROM outbox_subscriptions AS named WHERE named.subscription_id = dead.subscription_id), '')
                AS "subscription!"
        FROM outbox AS dead
        WHERE visible_at = 'infinity' AND event_id <= $1 AND (event_id, subscription_id) < ($1, $4)
          AND ($2::text IS NULL OR event_type = $2)
          AND ($5::smallint IS NULL OR subscription_id = $5)
          AND ($6::text IS NULL OR split_part(last_error, ':', 1) = $6)
        ORDER BY event_id DESC, subscription_id DESC
        LIMIT $3"#,
        page.before.0 as EventId,
        page.filter.event_type,
        i64::from(page.size) + 1,
        page.before.1,
        only,
        page.filter.code,
    )
    .fetch_all(connection)
    .await
}

/// Reads the whole outbox, like the status: an index would cost every row that fails, and this is rarely asked.
async fn read_failing(
    connection: &mut PgConnection,
    page: &Page,
    only: Option<i16>,
) -> Result<Vec<DeadRow>, sqlx::Error> {
    sqlx::query_as!(
        DeadRow,
        r#"-- operate: list failing
        SELECT event_id, subscription_id, event_type, aggregate_id, sequence, attempts, failures, created_at,
            extract(epoch FROM now() - created_at)::double precision AS "age_seconds!",
            coalesce(last_error, '') AS "reason!",
            (SELECT count(*) FROM outbox AS later
             WHERE later.aggregate_id = failing.aggregate_id AND later.subscription_id = failing.subscription_id
               AND later.sequence > failing.sequence) AS "held_back!",
            coalesce((SELECT name FROM outbox_subscriptions AS named WHERE named.subscription_id = failing.subscription_id), '')
                AS "subscription!"
        FROM outbox AS failing
        WHERE (failures > 0 OR (attempts = 0 AND last_error IS NOT NULL)) AND visible_at < 'infinity'
          AND (event_id, subscription_id) < ($1, $4)
          AND ($2::text IS NULL OR event_type = $2)
          AND ($5::smallint IS NULL OR subscription_id = $5)
          AND ($6::text IS NULL OR split_part(last_error, ':', 1) = $6)
        ORDER BY event_id DESC, subscription_id DESC
        LIMIT $3"#,
        page.before.0 as EventId,
        page.filter.event_type,
        i64::from(page.size) + 1,
        page.before.1,
        only,
        page.filter.code,
    )
    .fetch_all(connection)
    .await
}

async fn count_failing(connection: &mut PgConnection, filter: &Filter, only: Option<i16>) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: count failing
        SELECT count(*) AS "count!" FROM outbox
        WHERE (failures > 0 OR (attempts = 0 AND last_error IS NOT NULL)) AND visible_at < 'infinity'
          AND ($1::text IS NULL OR event_type = $1)
          AND ($2::smallint IS NULL OR subscription_id = $2)
          AND ($3::text IS NULL OR split_part(last_error, ':', 1) = $3)"#,
        filter.event_type,
        only,
        filter.code,
    )
    .fetch_one(connection)
    .await
}

/// The number of these events that are dead.
///
/// # Errors
/// Those of the database.
pub(super) async fn count_dead(
    connection: &mut PgConnection,
    filter: &Filter,
    only: Option<i16>,
) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: count dead
        SELECT count(*) AS "count!" FROM outbox
        WHERE visible_at = 'infinity' AND ($1::text IS NULL OR event_type = $1)
          AND ($2::smallint IS NULL OR subscription_id = $2)
          AND ($3::text IS NULL OR split_part(last_error, ':', 1) = $3)"#,
        filter.event_type,
        only,
        filter.code,
    )
    .fetch_one(connection)
    .await
}
