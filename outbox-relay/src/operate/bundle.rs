//! Gathers what somebody else needs to understand an outbox, for a report. It holds no password, token or payload.

use proto::relay::v1::Diagnosis;
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{CommandError, DeedPage, Filter, Outbox, SAMPLE, answer, group_dead, list_deeds, read_status, read_totals};

/// Deeds that are in a bundle.
const DEEDS: u16 = 100;

/// Reads the rest. Takes about a second, since rates are the difference of two readings.
/// What cannot be read is in it as its error: a bundle is
/// wanted most where something fails.
pub(super) async fn gather(outbox: &Outbox, diagnosis: &Diagnosis) -> Value {
    json!({
        "outbox_relay": env!("CARGO_PKG_VERSION"),
        // Without the password.
        "database": outbox.database_url.to_string(),
        "diagnosis": or_error(answer(diagnosis)),
        "server": or_error(server(outbox).await),
        "status": or_error(status(outbox).await),
        "dead": or_error(dead(outbox).await),
        "deeds": or_error(deeds(outbox).await),
    })
}

fn or_error(read: Result<Value, impl std::fmt::Display>) -> Value {
    read.unwrap_or_else(|error| json!({ "error": error.to_string() }))
}

async fn server(outbox: &Outbox) -> Result<Value, CommandError> {
    Ok(serde_json::from_str(&outbox.ask(describe_server).await?)?)
}

async fn status(outbox: &Outbox) -> Result<Value, CommandError> {
    let earlier = outbox.ask(read_totals).await?;
    tokio::time::sleep(SAMPLE).await;
    let (status, _) = outbox.ask(async |connection| read_status(connection, &earlier).await).await?;
    Ok(answer(&status)?)
}

async fn dead(outbox: &Outbox) -> Result<Value, CommandError> {
    let groups = outbox.ask(async |connection| group_dead(connection, &Filter::default()).await).await?;
    Ok(answer(&groups)?)
}

async fn deeds(outbox: &Outbox) -> Result<Value, CommandError> {
    let page = DeedPage { size: DEEDS, before: i64::MAX, event_id: None };
    let deeds = outbox.ask(async |connection| list_deeds(connection, &page).await).await?;
    Ok(answer(&deeds)?)
}

/// Settings that change how an outbox behaves, the sizes of its tables, its migrations, and who is connected. Not the
/// statements of sessions: those hold whatever their programs sent.
async fn describe_server(connection: &mut PgConnection) -> Result<String, sqlx::Error> {
    sqlx::query_scalar!(
        r#"-- operate: describe the server
        SELECT jsonb_build_object(
            'version', version(),
            'settings', (
                SELECT jsonb_object_agg(name, setting || coalesce(' ' || unit, '')) FROM pg_settings
                WHERE name IN ('autovacuum', 'autovacuum_naptime', 'autovacuum_vacuum_cost_delay', 'default_transaction_isolation',
                    'enable_seqscan', 'fsync', 'full_page_writes', 'hot_standby_feedback', 'idle_in_transaction_session_timeout',
                    'jit', 'lock_timeout', 'max_connections', 'max_wal_size', 'plan_cache_mode', 'shared_buffers',
                    'statement_timeout', 'synchronous_commit', 'synchronous_standby_names', 'wal_level', 'work_mem')),
            'tables', (
                SELECT jsonb_agg(jsonb_build_object('table', relname, 'bytes', pg_total_relation_size(relid), 'rows', n_live_tup,
                    'dead_rows', n_dead_tup, 'last_autovacuum', last_autovacuum, 'last_autoanalyze', last_autoanalyze)
                    ORDER BY relname)
                FROM pg_stat_user_tables WHERE relname LIKE 'outbox%' OR relname IN ('processed_messages', 'inbox_pruned')),
            'migrations', (
                SELECT jsonb_agg(jsonb_build_object('version', version, 'description', description, 'installed', installed_on)
                    ORDER BY version)
                FROM _outbox_migrations),
            'sessions', (
                SELECT jsonb_agg(to_jsonb(sessions)) FROM (
                    SELECT usename AS role, application_name AS program, state, count(*) AS sessions,
                        max(extract(epoch FROM now() - xact_start))::integer AS oldest_transaction_seconds
                    FROM pg_stat_activity WHERE datname = current_database()
                    GROUP BY 1, 2, 3 ORDER BY 1, 2, 3) AS sessions)
        )::text AS "server!""#
    )
    .fetch_one(connection)
    .await
}
