//! Inflicts the faults. Each returns whether it was seen to have an effect.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, PgConnection, Postgres, QueryBuilder, types::time::OffsetDateTime};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{
    callers,
    faults::{Fault, PostgresFault, ReceiverFault},
    garbage::send_garbage,
    points::is_answer,
    poison::{crash_on_event, poison},
    proxy::{Condition, End, Link},
    redeliver::deliver_again,
    site::{LEASE, POOL, Part, Route, SESSIONS_MAX},
    stand_in::StandIn,
    trap::{Hold, Trap},
    wire::Mark,
    world::World,
};

/// How long a fault waits for a message to pass.
const PASS_LIMIT: Duration = Duration::from_secs(6);
/// How long another relay may take to find an expired lease: a poll, and a little more. The receiver stands still
/// before, during and after that time, in all for less than a delivery may take.
const TAKE_OVER: Duration = Duration::from_millis(1600);
const HUNG_BEFORE: Duration = Duration::from_millis(400);
const HUNG_AFTER: Duration = Duration::from_millis(700);
const RESTART_LIMIT: Duration = Duration::from_secs(30);
/// How long a relay may take to log that it has lost a lease.
const LOGGED_LIMIT: Duration = Duration::from_secs(6);

/// Inflicts the fault, and undoes it as far as possible. Returns whether it had an effect.
pub(super) async fn inflict(world: &Arc<World>, fault: &Fault) -> Result<bool> {
    match fault {
        Fault::Kill(part) => Ok(world.site.unit(*part).signal(Signal::KILL)),
        Fault::Crash => Ok(world.crashes.crash().await),
        Fault::Postgres(part, how) => break_postgres(world, *part, *how).await,
        Fault::EndConnections { link, reset } => {
            Ok(nth(world, *link)?.end(if *reset { End::Reset } else { End::Close }) > 0)
        }
        Fault::LoseReply { link } => Ok(lose_reply(nth(world, *link)?).await),
        Fault::HalfOpen { link, lasts } => impair(world, *link, Condition::Blackhole, *lasts).await,
        Fault::Slow { link, late, lasts } => {
            impair(world, *link, late.map_or(Condition::Slice, Condition::Delay), *lasts).await
        }
        Fault::StopPastLease(route) => stop_past_lease(world, *route).await,
        Fault::WrongClock { part, ahead, lasts } => set_clock_wrong(world, *part, *ahead, *lasts).await,
        Fault::Poison(kind) => poison(world, *kind).await,
        Fault::Receiver { part, how: ReceiverFault::Hang(lasts) } => hang(world, *part, *lasts).await,
        Fault::Receiver { part, how: ReceiverFault::CrashOn { times } } => crash_on_event(world, *part, *times).await,
        Fault::FillDisk { lasts } => fill_disk(world, *lasts).await,
        Fault::Exhaust { part, pool: true, lasts } => exhaust_pool(world, *part, *lasts).await,
        Fault::Exhaust { part, pool: false, lasts } => exhaust_sessions(world, *part, *lasts).await,
        Fault::HangUps => Ok(callers::hang_up(world).await),
        Fault::DeliverAgain => deliver_again(world).await,
        Fault::SameRequest => callers::same_request(world).await,
        Fault::Garbage { part, seed } => send_garbage(world, *part, *seed).await,
        Fault::Overload => Ok(callers::overload(world).await),
        Fault::RollingRestart => restart_each(world).await,
        Fault::ReadOnly { part, new_sessions, lasts } => make_read_only(world, *part, *new_sessions, *lasts).await,
        Fault::ServerClock { part, lasts } => set_server_clock_ahead(world, *part, *lasts).await,
        Fault::StandbyAway { part, lasts } => take_standby_away(world, *part, *lasts).await,
        Fault::StandIn { receiver, stand_in, lasts } => Ok(stand_in_for(world, *receiver, *stand_in, *lasts).await),
    }
}

fn nth(world: &World, link: usize) -> Result<&Arc<Link>> {
    world.site.links().nth(link).context("no such link")
}

/// Statements that have changed a database for good once they are executed.
const WORK: [&str; 4] = ["COMMIT", "orders: create orders", "relay: lease", "relay: settle"];

/// Drops the next reply to work that is committed, and resets its connection.
async fn lose_reply(link: &Arc<Link>) -> bool {
    let (sprung, springs) = oneshot::channel();
    let _guard = link.set_trap(Trap {
        at: Box::new(|mark| match mark {
            Mark::Executed(name) => WORK.contains(&&**name),
            reply => is_answer(reply),
        }),
        hold: Hold::Lose,
        action: Box::new(|| {}),
        times: 1,
        sprung: Some(sprung),
    });
    timeout(PASS_LIMIT, springs).await.is_ok()
}

async fn impair(world: &World, link: usize, condition: Condition, lasts: Duration) -> Result<bool> {
    // The first links are those of the processes to their databases.
    if let Some(part) = Part::ALL.get(link) {
        world.disturb(*part, lasts);
    }
    let link = nth(world, link)?;
    let before = link.impaired.load(Ordering::Relaxed);
    link.set_condition(condition);
    sleep(lasts).await;
    link.set_condition(Condition::Normal);
    Ok(link.impaired.load(Ordering::Relaxed) > before)
}

/// Stops the relay when the reply to a delivery arrives. It holds a lease then, and knows how to settle its events once
/// it is resumed. By that time another relay has leased them, and is still delivering, since the receiver does not
/// answer. So the settlement must change nothing, and the relay must log that it has lost the lease.
async fn stop_past_lease(world: &World, route: Route) -> Result<bool> {
    let Route { relay, receiver } = route;
    let unit = world.site.unit(relay);
    for part in [relay, receiver] {
        world.disturb(part, LEASE + TAKE_OVER);
    }
    let lost_before = count_lost(world, relay)?;
    let (sprung, springs) = oneshot::channel();
    let stopped = unit.clone();
    let guard = world.site.to_receiver(route).set_trap(Trap {
        at: Box::new(is_answer),
        hold: Hold::PassAfter,
        action: Box::new(move || _ = stopped.signal(Signal::STOP)),
        times: 1,
        sprung: Some(sprung),
    });
    let stopped = timeout(PASS_LIMIT, springs).await.is_ok();
    drop(guard);
    if stopped {
        let receiver = world.site.unit(receiver);
        sleep(LEASE - HUNG_BEFORE).await;
        receiver.signal(Signal::STOP);
        sleep(HUNG_BEFORE + TAKE_OVER).await;
        unit.signal(Signal::CONT);
        sleep(HUNG_AFTER).await;
        receiver.signal(Signal::CONT);
    } else {
        unit.signal(Signal::CONT);
    }
    let resumed = Instant::now();
    while stopped && resumed.elapsed() < LOGGED_LIMIT {
        if count_lost(world, relay)? > lost_before {
            return Ok(true);
        }
        sleep(Duration::from_millis(200)).await;
    }
    Ok(false)
}

/// How often the relay has logged that another relay had leased its events.
fn count_lost(world: &World, relay: Part) -> Result<usize> {
    count_in(&world.site.unit(relay).plan().log, "lease lost: another relay has these events")
}

fn count_in(log: &Path, text: &str) -> Result<usize> {
    Ok(fs::read_to_string(log)?.matches(text).count())
}

/// Answers the relays in place of a receiver, which is not touched. Returns whether a call was answered so.
async fn stand_in_for(world: &World, receiver: Part, stand_in: StandIn, lasts: Duration) -> bool {
    let stood_in = || -> u64 {
        Route::to(receiver).map(|route| world.site.to_receiver(route).stood_in.load(Ordering::Relaxed)).sum()
    };
    let before = stood_in();
    set_stand_in(world, receiver, Some(stand_in));
    sleep(lasts).await;
    set_stand_in(world, receiver, None);
    stood_in() > before
}

/// Leads the relays to a stand-in, or back to the receiver. They must connect anew.
pub(super) fn set_stand_in(world: &World, receiver: Part, stand_in: Option<StandIn>) {
    for route in Route::to(receiver) {
        let link = world.site.to_receiver(route);
        link.set_condition(stand_in.map_or(Condition::Normal, Condition::StandIn));
        link.end(End::Close);
    }
}

async fn hang(world: &World, part: Part, lasts: Duration) -> Result<bool> {
    let unit = world.site.unit(part);
    world.disturb(part, lasts);
    let hung = unit.signal(Signal::STOP);
    sleep(lasts).await;
    unit.signal(Signal::CONT);
    Ok(hung)
}

/// The path of libfaketime, which gives a process another time of day, if it is installed.
pub(super) fn find_clock() -> Option<PathBuf> {
    let below = fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path());
    let beside = PathBuf::from("/usr/lib");
    below.chain([beside]).map(|place| place.join("faketime/libfaketime.so.1")).find(|path| path.is_file())
}

/// Runs the process for a while with another time of day. That must harm nothing: leases, back-off and retention follow
/// the clock of the database, and timeouts a monotonic clock. A relay asks its own clock only about events that are too
/// old, and there are none.
async fn set_clock_wrong(world: &World, part: Part, ahead: bool, lasts: Duration) -> Result<bool> {
    let Some(library) = &world.clock else { return Ok(false) };
    let unit = world.site.unit(part);
    unit.set_extra(time_of_day(library, if ahead { "+1h" } else { "-1h" }));
    let restarted = unit.restart(RESTART_LIMIT).await;
    sleep(lasts).await;
    let was_wrong = is_wrong(world, part, ahead).await;
    unit.set_extra(Vec::new());
    unit.restart(RESTART_LIMIT).await?;
    restarted?;
    was_wrong
}

/// The environment of a process whose time of day differs by this.
fn time_of_day(library: &Path, difference: &str) -> Vec<(String, String)> {
    let library = library.display().to_string();
    let variables = [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME", difference),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
    ];
    variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// Crashes a server, starts it with another clock for a while, and crashes it again to set the clock right. Returns
/// whether an event was applied meanwhile.
async fn set_server_clock_ahead(world: &World, part: Part, lasts: Duration) -> Result<bool> {
    let Some(library) = &world.clock else { return Ok(false) };
    for other in Part::ALL {
        world.disturb(other, lasts);
    }
    restart_server(world, part, &time_of_day(library, "+10d")).await?;
    let applied = applies_within(world, part, lasts).await;
    restart_server(world, part, &[]).await?;
    applied
}

/// Whether an event is applied in this time, by the clock of its server.
async fn applies_within(world: &World, part: Part, lasts: Duration) -> Result<bool> {
    let mut server = world.site.connect(part).await?;
    let begin: OffsetDateTime = sqlx::query_scalar("SELECT now()").fetch_one(&mut server).await?;
    sleep(lasts).await;
    // Another fault may have ended the session.
    let mut server = world.site.connect(part).await?;
    let applied = sqlx::query_scalar(
        "-- chaos: find event applied since
        SELECT EXISTS (SELECT FROM processed_messages WHERE processed_at > $1)",
    );
    Ok(applied.bind(begin).fetch_one(&mut server).await?)
}

async fn restart_server(world: &World, part: Part, environment: &[(String, String)]) -> Result<()> {
    let mut cluster = world.site.cluster(part).lock().await;
    cluster.crash().await?;
    cluster.recover_with(environment).await
}

/// Whether the time of day in the log of the process differs from that of its database.
async fn is_wrong(world: &World, part: Part, ahead: bool) -> Result<bool> {
    let unit = world.site.unit(part);
    let log = fs::read_to_string(&unit.plan().log)?;
    let last = log.lines().rev().find_map(|line| {
        let entry: serde_json::Value = serde_json::from_str(line).ok()?;
        entry["timestamp"].as_str().map(str::to_owned)
    });
    // Timestamps of one format sort as text.
    let half_way: String = sqlx::query_scalar(
        "-- chaos: read clock
        SELECT to_char(now() AT TIME ZONE 'UTC' + make_interval(mins => $1), 'YYYY-MM-DD\"T\"HH24:MI:SS')",
    )
    .bind(if ahead { 30 } else { -30 })
    .fetch_one(&mut world.site.connect(part).await?)
    .await?;
    Ok(last.is_some_and(|last| (last > half_way) == ahead))
}

async fn restart_each(world: &World) -> Result<bool> {
    for part in Part::ALL {
        world.site.unit(part).restart(RESTART_LIMIT).await?;
    }
    Ok(true)
}

async fn break_postgres(world: &World, part: Part, how: PostgresFault) -> Result<bool> {
    match how {
        PostgresFault::Crash { down } => {
            let mut cluster = world.site.cluster(part).lock().await;
            cluster.crash().await?;
            sleep(down).await;
            cluster.recover().await?;
            Ok(true)
        }
        PostgresFault::KillBackend => {
            let pid: Option<i32> = sqlx::query_scalar(
                "-- chaos: choose backend
                SELECT pid FROM pg_stat_activity
                WHERE backend_type = 'client backend' AND usename <> 'postgres' ORDER BY random() LIMIT 1",
            )
            .fetch_optional(&mut world.site.connect(part).await?)
            .await?;
            let Some(pid) = pid.and_then(Pid::from_raw) else { return Ok(false) };
            kill_process(pid, Signal::KILL)?;
            // The server then ends all sessions, and recovers.
            world.site.cluster(part).lock().await.recover().await?;
            Ok(true)
        }
        PostgresFault::TerminateSessions => Ok(terminate_sessions(&mut world.site.connect(part).await?).await? > 0),
    }
}

/// Ends the sessions of services and relays, and returns how many there were.
async fn terminate_sessions(connection: &mut PgConnection) -> Result<i64> {
    let ended = sqlx::query_scalar(
        "-- chaos: terminate sessions
        SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE usename IN ('order_service', 'inventory_service', 'loyalty_service', 'outbox_relay')",
    );
    Ok(ended.fetch_one(connection).await?)
}

/// Makes the sessions of a server read-only; those that begin from now on only if `new_sessions` is set. Returns whether a
/// statement was refused for it.
async fn make_read_only(world: &World, part: Part, new_sessions: bool, lasts: Duration) -> Result<bool> {
    let log = world.site.cluster(part).lock().await.log();
    let before = count_in(&log, READ_ONLY)?;
    let mut superuser = world.site.connect(part).await?;
    // The settings of roles beat those of the server. A session has them from its beginning.
    let of_roles =
        if new_sessions { "RESET default_transaction_read_only" } else { "SET default_transaction_read_only = off" };
    execute(&mut superuser, "SET default_transaction_read_only = off").await?;
    execute(&mut superuser, &format!("ALTER ROLE ALL {of_roles}")).await?;
    set_server(&mut superuser, "default_transaction_read_only = on").await?;
    sleep(lasts).await;
    set_server(&mut superuser, "default_transaction_read_only = off").await?;
    execute(&mut superuser, "ALTER ROLE ALL RESET default_transaction_read_only").await?;
    Ok(count_in(&log, READ_ONLY)? > before)
}

/// What PostgreSQL says of a statement that writes in such a session.
const READ_ONLY: &str = "in a read-only transaction";

/// Makes commits wait for a standby that does not exist. Returns whether one waited.
async fn take_standby_away(world: &World, part: Part, lasts: Duration) -> Result<bool> {
    for other in Part::ALL {
        world.disturb(other, lasts);
    }
    let mut superuser = world.site.connect(part).await?;
    set_server(&mut superuser, "synchronous_standby_names = 'nobody'").await?;
    sleep(lasts).await;
    let waiting: i64 = sqlx::query_scalar(
        "-- chaos: count commits that wait for a standby
        SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query NOT LIKE '-- chassis%'",
    )
    .fetch_one(&mut superuser)
    .await?;
    set_server(&mut superuser, "synchronous_standby_names = ''").await?;
    Ok(waiting > 0)
}

async fn set_server(superuser: &mut PgConnection, setting: &str) -> Result<()> {
    execute(superuser, &format!("ALTER SYSTEM SET {setting}")).await?;
    execute(superuser, "SELECT pg_reload_conf()").await
}

/// Outside a transaction, and without a plan.
async fn execute(superuser: &mut PgConnection, statement: &str) -> Result<()> {
    QueryBuilder::<Postgres>::new(statement).build().persistent(false).execute(superuser).await?;
    Ok(())
}

async fn fill_disk(world: &World, lasts: Duration) -> Result<bool> {
    let Some(disk) = &world.site.disk else { return Ok(false) };
    let count_full = |log: &Path| count_in(log, "No space left");
    // The log is on the same disk. It may say so only once there is room again.
    let log = world.site.cluster(Part::Inventory).lock().await.log();
    let before = count_full(&log)?;
    let ballast = disk.fill().await?;
    sleep(lasts).await;
    drop(ballast);
    world.site.cluster(Part::Inventory).lock().await.recover().await?;
    sleep(Duration::from_millis(200)).await;
    Ok(count_full(&log)? > before)
}

/// Locks a table. Each statement that needs it waits, and keeps a connection of the pool.
async fn exhaust_pool(world: &World, part: Part, lasts: Duration) -> Result<bool> {
    let mut connection = world.site.connect(part).await?;
    let mut tx = connection.begin().await?;
    let statement = match part {
        Part::Orders => "-- chaos: lock table\nLOCK TABLE orders IN ACCESS EXCLUSIVE MODE",
        Part::Inventory => "-- chaos: lock table\nLOCK TABLE stock IN ACCESS EXCLUSIVE MODE",
        _ => "-- chaos: lock table\nLOCK TABLE points IN ACCESS EXCLUSIVE MODE",
    };
    sqlx::raw_sql(statement).execute(&mut *tx).await?;
    sleep(lasts).await;
    let waiting: i64 = sqlx::query_scalar(
        "-- chaos: count waiting
        SELECT count(*) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND datname = current_database() AND usename <> 'outbox_relay'",
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.rollback().await?;
    Ok(waiting >= i64::from(POOL))
}

/// Takes all sessions that the server has for others than superusers. Those of the services and relays are terminated
/// and taken as well.
async fn exhaust_sessions(world: &World, part: Part, lasts: Duration) -> Result<bool> {
    let (url, mut taken) = (world.site.owner_url(part), Vec::new());
    let mut superuser = world.site.connect(part).await?;
    let refused = loop {
        ensure!(taken.len() < 2 * SESSIONS_MAX as usize, "the server has more sessions than it should");
        match PgConnection::connect(&url).await {
            Ok(connection) => taken.push(connection),
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("53300") => break true,
            // Another fault has struck.
            Err(_) => break false,
        }
    };
    let ended = terminate_sessions(&mut superuser).await?;
    while let Ok(connection) = PgConnection::connect(&url).await {
        taken.push(connection);
    }
    sleep(lasts).await;
    Ok(refused && ended > 0)
}

#[cfg(test)]
mod tests {
    use super::WORK;
    use crate::points::STATEMENTS;

    /// If a statement gets another name, its replies would silently not be lost any more.
    #[test]
    fn the_statements_whose_replies_are_lost_exist() {
        for name in WORK {
            assert!(name == "COMMIT" || STATEMENTS.iter().any(|(_, named)| *named == name), "no statement \"{name}\"");
        }
    }
}
