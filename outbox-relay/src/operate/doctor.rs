//! Examines an outbox: what would hinder it, or already does, and what to do about that.
//!
//! Everything is read first. What is wrong with it is decided without I/O.

use std::time::{Duration, SystemTime};

use chassis::Tls;
use futures_util::future::join_all;
use proto::relay::v1::{Diagnosis, Finding, OutboxPace, OutboxPause, RelayRoute, finding::Severity};
use sqlx::{PgConnection, types::time::OffsetDateTime};

use super::{
    OperateError,
    pause::read_pauses,
    refuse::{describe, end_of_pause, holds_up, resume_command},
    slow_down::{describe_pace, read_paces},
    status::read_routes,
};
use crate::{
    MIGRATORS,
    count::{Counted, Upkeep, count_by_subscription, read_upkeep},
    deliver::{Description, Receiver},
    park::Swept,
    route::Condition,
    subscription::{Subscription, read_subscriptions},
};

/// Clocks of sound machines differ by less.
const CLOCK_LIMIT: Duration = Duration::from_secs(60);
/// A transaction that is older hinders VACUUM.
const HORIZON_LIMIT: f64 = 600.0;
/// Fewer dead rows cost a scan nothing.
const DEAD_ROWS_LIMIT: i64 = 100_000;
/// What the role needs: a table, and what it does there.
const RIGHTS: [(&str, &str); 9] = [
    ("outbox", "SELECT, UPDATE, DELETE"),
    ("outbox_discarded", "SELECT, INSERT, UPDATE"),
    ("outbox_deeds", "SELECT, INSERT"),
    ("outbox_deed_events", "SELECT, INSERT"),
    ("outbox_paces", "SELECT, INSERT, UPDATE, DELETE"),
    ("outbox_pauses", "SELECT, INSERT, DELETE"),
    ("outbox_routes", "SELECT, INSERT, UPDATE, DELETE"),
    ("outbox_subscriptions", "SELECT, INSERT, UPDATE"),
    ("_outbox_migrations", "SELECT"),
];
/// What `1_roles.sql` gives the role, and why.
const ROLE_SETTINGS: [(&str, &str, &str); 5] = [
    ("enable_seqscan", "off", "a plan made over a nearly empty outbox would later scan a full one"),
    ("jit", "off", "it costs more than it gains"),
    ("statement_timeout", "", "a statement could run for ever"),
    ("idle_in_transaction_session_timeout", "", "a session that stops in a transaction would hold VACUUM for ever"),
    ("synchronous_commit", "off", "each lease would wait for the disk, and nothing is safer by that"),
];

/// What the database says.
#[derive(Debug)]
pub(crate) struct Readings {
    server: Server,
    /// Why the schema does not fit; `None`: it does.
    schema: Option<String>,
    lacking_rights: Vec<String>,
    subscriptions: Vec<Subscription>,
    counted: Vec<Counted>,
    upkeep: Upkeep,
    pauses: Vec<OutboxPause>,
    paces: Vec<(String, OutboxPace)>,
    routes: Vec<RelayRoute>,
    /// This process's time at the reading.
    local_time: OffsetDateTime,
}

#[derive(Clone, Debug)]
struct Server {
    role: String,
    version: i32,
    read_only: bool,
    role_settings: Vec<String>,
    autovacuum: bool,
    /// Replication slots that nobody uses, and that hold the horizon.
    idle_slots: Vec<String>,
    time: OffsetDateTime,
}

/// Reads everything. A schema that does not fit is a finding, unless it is so old that nothing can be read.
///
/// # Errors
/// Those of the database.
pub(crate) async fn read_all(connection: &mut PgConnection) -> Result<Readings, OperateError> {
    let server = read_server(connection).await?;
    #[expect(clippy::disallowed_methods, reason = "it is compared with the database's, to say that they differ")]
    let local_time = OffsetDateTime::from(SystemTime::now());
    let schema = chassis::check_schema(connection, &MIGRATORS).await.err().map(|cause| cause.to_string());
    Ok(Readings {
        server,
        schema,
        lacking_rights: find_lacking_rights(connection).await?,
        subscriptions: read_subscriptions(connection).await?,
        counted: count_by_subscription(connection, &Swept::default()).await?,
        upkeep: read_upkeep(connection).await?,
        pauses: read_pauses(connection).await?,
        paces: read_paces(connection).await?,
        routes: read_routes(connection).await?,
        local_time,
    })
}

/// Asks the receivers of all routes to describe themselves, and says what is found.
pub(crate) async fn diagnose(readings: Readings, tls: &Tls) -> Diagnosis {
    let asking = readings.routes.iter().map(|route| async move {
        let described = match route.receiver.parse() {
            Ok(uri) => Receiver::connect_to_ask(uri, tls).describe().await,
            Err(_) => {
                let reason = "its URL cannot be read".into();
                Description::Unavailable { reason, retry_after: Duration::ZERO }
            }
        };
        (route, described)
    });
    let described = join_all(asking).await;
    let mut findings = judge(&readings);
    for (route, description) in described {
        let subscription = readings.subscriptions.iter().find(|of| of.name == route.route);
        findings.push(judge_receiver(route, subscription, description));
    }
    // What is worst comes first.
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
    Diagnosis { time: Some(outbox::timestamp(readings.server.time)), findings }
}

fn finding(severity: Severity, about: &str, text: impl Into<String>, todo: impl Into<String>) -> Finding {
    Finding { severity: severity.into(), about: about.into(), text: text.into(), todo: todo.into() }
}

fn ok(about: &str, text: impl Into<String>) -> Finding {
    finding(Severity::Ok, about, text, "")
}

fn judge(readings: &Readings) -> Vec<Finding> {
    let mut findings = judge_server(readings);
    findings.extend(judge_vacuum(readings));
    for of in &readings.counted {
        findings.extend(if of.name.is_empty() { judge_unrouted(of) } else { judge_subscription(of, readings) });
    }
    if readings.subscriptions.is_empty() {
        let todo = "make one for each receiver: `outbox-relay subscribe NAME PATTERN`";
        findings.push(finding(Severity::Warning, "subscriptions", "there is none, so nobody gets an event", todo));
    }
    findings
}

fn judge_server(readings: &Readings) -> Vec<Finding> {
    let Readings { server, schema, lacking_rights, local_time, .. } = readings;
    let version = server.version / 10_000;
    let mut findings = vec![match version {
        14..=18 => ok("server", format!("PostgreSQL {version}")),
        _ => finding(Severity::Warning, "server", format!("PostgreSQL {version} is not tested"), "use 14 to 18"),
    }];
    if server.read_only {
        let todo = "name the primary, or all servers as host:port,host:port: the one that can write is used";
        findings.push(finding(Severity::Fault, "server", "this server can only read", todo));
    }
    findings.push(match schema {
        None => ok("schema", "complete, but perhaps for contracting migrations"),
        Some(cause) => finding(Severity::Fault, "schema", cause.clone(), "see docs/operating.md, deployment order"),
    });
    findings.push(if lacking_rights.is_empty() {
        ok("rights", format!("{} has what a relay needs", server.role))
    } else {
        let text = format!("{} lacks {}", server.role, lacking_rights.join("; "));
        finding(Severity::Fault, "rights", text, "connect as outbox_relay, or run the migrations as the owner again")
    });
    let set = |name: &str| {
        let prefix = format!("{name}=");
        server.role_settings.iter().find_map(|setting| setting.strip_prefix(prefix.as_str()))
    };
    let missing =
        ROLE_SETTINGS.iter().filter(|(name, value, _)| set(name).is_none_or(|is| !value.is_empty() && is != *value));
    for (name, value, why) in missing {
        let value = if value.is_empty() { "'10s'" } else { value };
        let todo = format!("ALTER ROLE {} SET {name} = {value}; it takes effect in new sessions", server.role);
        let text = format!("{name} is not set for the role: {why}");
        findings.push(finding(Severity::Warning, "role settings", text, todo));
    }
    let apart = (server.time - *local_time).unsigned_abs();
    findings.push(if apart < CLOCK_LIMIT {
        ok("clocks", "this machine's and the database's agree")
    } else {
        let text = format!("this machine's and the database's are {:.0} s apart", apart.as_secs_f64());
        finding(Severity::Warning, "clocks", text, "set the wrong one right: ages of events are compared with both")
    });
    findings
}

fn judge_vacuum(readings: &Readings) -> Vec<Finding> {
    let Readings { server, upkeep, .. } = readings;
    let mut findings = Vec::new();
    if !server.autovacuum {
        let todo = "turn autovacuum on, for the server and for the table outbox";
        findings.push(finding(Severity::Fault, "autovacuum", "it is off, and leases get slower and slower", todo));
    } else if upkeep.dead_rows > DEAD_ROWS_LIMIT {
        let text = format!("{} versions of rows wait for VACUUM", upkeep.dead_rows);
        let todo = "look for what holds the horizon; otherwise lower autovacuum_vacuum_cost_delay";
        findings.push(finding(Severity::Warning, "autovacuum", text, todo));
    } else {
        findings.push(ok("autovacuum", format!("on; {} versions of rows wait", upkeep.dead_rows)));
    }
    match upkeep.horizon_seconds {
        None => {
            let todo = format!("GRANT pg_read_all_stats TO {}", server.role);
            let text = "cannot see other sessions, so not whether one holds it";
            findings.push(finding(Severity::Note, "horizon", text, todo));
        }
        Some(seconds) if seconds > HORIZON_LIMIT => {
            let text = format!("a transaction has been open for {seconds:.0} s, and VACUUM removes nothing since");
            let todo = "find it in pg_stat_activity, oldest xact_start first, and end it";
            findings.push(finding(Severity::Warning, "horizon", text, todo));
        }
        Some(_) => findings.push(ok("horizon", "no transaction holds it for long")),
    }
    for slot in &server.idle_slots {
        let text = format!("replication slot {slot} holds it, and nobody reads from that");
        let todo = format!("let its reader come back, or SELECT pg_drop_replication_slot('{slot}')");
        findings.push(finding(Severity::Warning, "horizon", text, todo));
    }
    findings
}

fn judge_unrouted(of: &Counted) -> Vec<Finding> {
    let events = of.waiting + of.leased + of.backing_off + of.dead;
    if events == 0 {
        return Vec::new();
    }
    let todo = "`outbox-relay status` names their types; `outbox-relay subscribe` one for them";
    vec![finding(Severity::Warning, "unrouted", format!("{events} events match no subscription"), todo)]
}

fn judge_subscription(of: &Counted, readings: &Readings) -> Vec<Finding> {
    let about = format!("subscription {}", of.name);
    let mut findings = Vec::new();
    let mut add = |severity, text: String, todo: String| findings.push(finding(severity, &about, text, todo));
    for pause in readings.pauses.iter().filter(|pause| holds_up(pause, &of.name)) {
        let todo = format!("{} once its reason is gone", resume_command(pause));
        add(Severity::Warning, format!("paused {}", describe(pause)), todo);
    }
    for (name, pace) in readings.paces.iter().filter(|(name, _)| name.is_empty() || *name == of.name) {
        let todo = format!("{} once the backlog is gone", end_of_pause(name));
        add(Severity::Warning, format!("slowed {}", describe_pace(pace)), todo);
    }
    let routes: Vec<_> = readings.routes.iter().filter(|route| route.route == of.name).collect();
    if routes.is_empty() {
        let todo = format!("start a relay with --route {}=URL", of.name);
        add(Severity::Fault, "no relay that delivers it has reported for 10 s".into(), todo);
    } else if routes.iter().all(|route| route.state != Condition::Open.as_str()) {
        let of_routes = routes.iter().map(|route| format!("{} is {}: {}", route.receiver, route.state, route.reason));
        add(
            Severity::Fault,
            of_routes.collect::<Vec<_>>().join("; "),
            "repair the receiver, or correct the route".into(),
        );
    }
    if of.dead > 0 {
        let todo = format!("`outbox-relay dead list --subscription {}`, then requeue or discard them", of.name);
        add(Severity::Warning, format!("{} events are dead", of.dead), todo);
    }
    match (of.oldest_seconds, of.max_age_seconds) {
        (Some(age), Some(max_age)) if age > max_age / 2.0 => {
            let hours = (max_age - age) / 3600.0;
            let todo = "find out why it waits: `outbox-relay status`, and `outbox-relay why` for its order";
            add(Severity::Fault, format!("its oldest event dies of age in {hours:.1} h"), todo.into());
        }
        _ => {}
    }
    if findings.is_empty() {
        findings.push(ok(&about, format!("{} events wait, an open route delivers them", of.waiting)));
    }
    findings
}

fn judge_receiver(route: &RelayRoute, subscription: Option<&Subscription>, described: Description) -> Finding {
    let about = format!("receiver {}", route.receiver);
    let (types, retention) = match described {
        Description::Ready { types, retention, .. } => (types, retention),
        Description::Unknown(text) => return finding(Severity::Fault, &about, text, "deploy one that does"),
        Description::Barred { reason } => {
            return finding(Severity::Fault, &about, reason, "let the relay call it, or correct the route");
        }
        Description::Unavailable { reason, .. } => {
            let todo = "if the relay reaches it and this machine does not, that is the network; otherwise repair it";
            return finding(Severity::Warning, &about, format!("does not answer here: {reason}"), todo);
        }
    };
    let pattern = subscription.map_or("*", |of| of.pattern.as_str());
    if !types.is_empty() && !types.iter().any(|known| matches(pattern, known)) {
        let text = format!("knows none of the types {pattern} of {}: it knows {}", route.route, types.join(", "));
        return finding(Severity::Fault, &about, text, "correct the route, or the pattern of the subscription");
    }
    let days = retention.as_secs_f64() / 86_400.0;
    ok(&about, format!("answers, knows {} types, remembers events for {days:.1} days", types.len()))
}

/// Whether a subscription's pattern matches a type.
fn matches(pattern: &str, event_type: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == event_type, |prefix| event_type.starts_with(prefix))
}

async fn read_server(connection: &mut PgConnection) -> Result<Server, sqlx::Error> {
    sqlx::query_as!(
        Server,
        r#"-- operate: examine the server
        SELECT current_user::text AS "role!", current_setting('server_version_num')::integer AS "version!",
            pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on' AS "read_only!",
            coalesce((SELECT rolconfig FROM pg_roles WHERE rolname = current_user), '{}') AS "role_settings!",
            current_setting('autovacuum') = 'on' AND coalesce((
                SELECT NOT 'autovacuum_enabled=false' = ANY (reloptions)
                FROM pg_class WHERE oid = to_regclass('outbox')), true) AS "autovacuum!",
            ARRAY (
                SELECT slot_name::text FROM pg_replication_slots
                WHERE NOT active AND (xmin IS NOT NULL OR (catalog_xmin IS NOT NULL AND database = current_database()))
                ORDER BY slot_name) AS "idle_slots!",
            clock_timestamp() AS "time!""#
    )
    .fetch_one(connection)
    .await
}

async fn find_lacking_rights(connection: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    let (tables, rights): (Vec<_>, Vec<_>) = RIGHTS
        .iter()
        .flat_map(|(table, rights)| rights.split(", ").map(|right| ((*table).to_owned(), right.to_owned())))
        .unzip();
    sqlx::query_scalar!(
        r#"-- operate: find lacking rights
        SELECT right_of || ' on ' || name AS "lacking!"
        FROM unnest($1::text[], $2::text[]) AS needed (name, right_of)
        WHERE to_regclass(name) IS NOT NULL AND NOT CASE right_of
            WHEN 'DELETE' THEN has_table_privilege(to_regclass(name), right_of)
            ELSE has_any_column_privilege(to_regclass(name), right_of) END
        ORDER BY name, right_of"#,
        &tables,
        &rights,
    )
    .fetch_all(connection)
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::Ranges;

    const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

    fn sound() -> Readings {
        let settings =
            ROLE_SETTINGS.map(|(name, value, _)| format!("{name}={}", if value.is_empty() { "10s" } else { value }));
        let server = Server {
            role: "outbox_relay".into(),
            version: 150_004,
            read_only: false,
            role_settings: settings.to_vec(),
            autovacuum: true,
            idle_slots: Vec::new(),
            time: NOW,
        };
        let route = RelayRoute {
            route: "inventory".into(),
            receiver: "http://inventory:52052/".into(),
            state: "OPEN".into(),
            ..RelayRoute::default()
        };
        Readings {
            server,
            schema: None,
            lacking_rights: Vec::new(),
            subscriptions: vec![subscription()],
            counted: vec![counted("inventory"), counted("")],
            upkeep: Upkeep { horizon_seconds: Some(1.0), ..Upkeep::default() },
            pauses: Vec::new(),
            paces: Vec::new(),
            routes: vec![route],
            local_time: NOW + Duration::from_secs(1),
        }
    }

    fn subscription() -> Subscription {
        Subscription {
            id: 1,
            name: "inventory".into(),
            pattern: "orders.v1.*".into(),
            type_like: "orders.v1.%".into(),
            created_at: NOW,
            created_by: "a test".into(),
        }
    }

    fn counted(name: &str) -> Counted {
        Counted { name: name.into(), estimated: Ranges::default(), max_age_seconds: Some(1000.0), ..Counted::default() }
    }

    fn not_ok(readings: &Readings) -> Vec<(Severity, String)> {
        let bad = judge(readings).into_iter().filter(|finding| finding.severity() != Severity::Ok);
        bad.map(|finding| {
            assert!(!finding.todo.is_empty(), "each says what to do: {finding:?}");
            (finding.severity(), finding.about)
        })
        .collect()
    }

    #[test]
    fn a_sound_outbox_has_no_findings() {
        assert_eq!(not_ok(&sound()), []);
    }

    #[test]
    fn each_fault_is_found_and_nothing_else() {
        type Damage = fn(&mut Readings);
        let damages: [(&str, Severity, Damage); 16] = [
            ("server", Severity::Warning, |of| of.server.version = 130_000),
            ("server", Severity::Fault, |of| of.server.read_only = true),
            ("schema", Severity::Fault, |of| of.schema = Some("lacks migration 19".into())),
            ("rights", Severity::Fault, |of| of.lacking_rights.push("UPDATE on outbox".into())),
            ("role settings", Severity::Warning, |of| of.server.role_settings.retain(|of| !of.starts_with("jit"))),
            ("role settings", Severity::Warning, |of| of.server.role_settings[0] = "enable_seqscan=on".into()),
            ("clocks", Severity::Warning, |of| of.local_time = NOW - Duration::from_secs(61)),
            ("autovacuum", Severity::Fault, |of| of.server.autovacuum = false),
            ("autovacuum", Severity::Warning, |of| of.upkeep.dead_rows = DEAD_ROWS_LIMIT + 1),
            ("horizon", Severity::Note, |of| of.upkeep.horizon_seconds = None),
            ("horizon", Severity::Warning, |of| of.upkeep.horizon_seconds = Some(601.0)),
            ("horizon", Severity::Warning, |of| of.server.idle_slots.push("gone".into())),
            ("unrouted", Severity::Warning, |of| of.counted[1].waiting = 1),
            ("subscription inventory", Severity::Fault, |of| of.routes.clear()),
            ("subscription inventory", Severity::Fault, |of| of.routes[0].state = "DOWN".into()),
            ("subscription inventory", Severity::Warning, |of| of.counted[0].dead = 1),
        ];
        for (about, severity, damage) in damages {
            let mut readings = sound();
            damage(&mut readings);
            assert_eq!(not_ok(&readings), [(severity, about.to_owned())]);
        }
        let old = |seconds| {
            let mut readings = sound();
            readings.counted[0].oldest_seconds = Some(seconds);
            not_ok(&readings).len()
        };
        assert_eq!((old(499.0), old(501.0)), (0, 1));
        let paused = |subscription: &str| {
            let mut readings = sound();
            readings.pauses.push(OutboxPause { subscription: subscription.into(), ..OutboxPause::default() });
            not_ok(&readings).len()
        };
        assert_eq!((paused(""), paused("inventory"), paused("loyalty")), (1, 1, 0));
    }

    #[test]
    fn a_receiver_that_knows_none_of_the_types_is_a_fault() {
        let (route, subscription) = (RelayRoute::default(), subscription());
        let severity = |types: &[&str]| {
            let types = types.iter().map(|name| (*name).to_owned()).collect();
            let retention = Duration::from_hours(168);
            let described = Description::Ready { retention, types, sources: Vec::new(), ordered: true };
            judge_receiver(&route, Some(&subscription), described).severity()
        };
        assert_eq!(severity(&[]), Severity::Ok);
        assert_eq!(severity(&["inventory.v1.StockReserved", "orders.v1.OrderCreated"]), Severity::Ok);
        assert_eq!(severity(&["inventory.v1.StockReserved"]), Severity::Fault);
        let away = Description::Unavailable { reason: "no answer".into(), retry_after: Duration::ZERO };
        assert_eq!(judge_receiver(&route, None, away).severity(), Severity::Warning);
        assert!(matches("*", "a.B") && matches("a.B", "a.B") && !matches("a.B", "a.Bc"));
    }
}
