//! Carries the faults out. Each returns whether it was seen to have had an effect ("bit").

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, PgConnection};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{
    crash::{crash_at, is_answer},
    faults::{Fault, PostgresFault, ReceiverFault},
    provoke,
    proxy::{End, Hold, Link, Trap, Weather},
    site::{LEASE, POOL, Part, SESSIONS_MAX},
    wire::Mark,
    world::World,
};

/// How long something may take to pass that a fault waits for.
const PASS_LIMIT: Duration = Duration::from_secs(6);
/// How long another relay may take to find an expired lease: its poll, and a little more. With the time before and after, in
/// which the receiver stands still as well, it is less than a delivery may take.
const TAKE_OVER: Duration = Duration::from_millis(1600);
const HUNG_BEFORE: Duration = Duration::from_millis(400);
const HUNG_AFTER: Duration = Duration::from_millis(700);
const RESTART_LIMIT: Duration = Duration::from_secs(30);
const SHOWN_LIMIT: Duration = Duration::from_secs(6);

/// Does it, undoes what can be undone, and says whether it bit.
pub(super) async fn inflict(world: &Arc<World>, fault: &Fault) -> Result<bool> {
    match fault {
        Fault::Kill(part) => Ok(world.site.unit(*part).signal(Signal::KILL)),
        Fault::Crash(point) => Ok(crash_at(&world.site, *point).await),
        Fault::Postgres(part, how) => break_postgres(world, *part, *how).await,
        Fault::EndConnections { link, reset } => {
            Ok(nth(world, *link)?.end(if *reset { End::Reset } else { End::Cut }) > 0)
        }
        Fault::LoseReply { link } => Ok(lose_reply(nth(world, *link)?).await),
        Fault::HalfOpen { link, lasts } => spoil(world, *link, Weather::Swallow, *lasts).await,
        Fault::Slow { link, late, lasts } => {
            spoil(world, *link, late.map_or(Weather::Slice, Weather::Delay), *lasts).await
        }
        Fault::StopPastLease(relay) => stop_past_lease(world, *relay).await,
        Fault::WrongClock { part, ahead, lasts } => set_clock_wrong(world, *part, *ahead, *lasts).await,
        Fault::Poison(poison) => provoke::poison(world, *poison).await,
        Fault::Receiver { part, how: ReceiverFault::Hang(lasts) } => hang(world, *part, *lasts).await,
        Fault::Receiver { how: ReceiverFault::CrashOn { times }, .. } => provoke::crash_on_event(world, *times).await,
        Fault::FillDisk { lasts } => fill_disk(world, *lasts).await,
        Fault::Exhaust { part, pool: true, lasts } => use_pool_up(world, *part, *lasts).await,
        Fault::Exhaust { part, pool: false, lasts } => use_sessions_up(world, *part, *lasts).await,
        Fault::HangUps => Ok(provoke::hang_up(world).await),
        Fault::DeliverAgain => provoke::deliver_again(world).await,
        Fault::SameRequest => provoke::same_request(world).await,
        Fault::Garbage { part, seed } => provoke::send_garbage(world, *part, *seed).await,
        Fault::Overload => Ok(provoke::overload(world).await),
        Fault::RollingRestart => restart_each(world).await,
    }
}

fn nth(world: &World, link: usize) -> Result<&Arc<Link>> {
    world.site.links().nth(link).context("no such link")
}

/// What has changed something when it was executed.
const WORK: [&str; 5] =
    ["COMMIT", "orders: create orders", "relay: lease", "relay: delete handled", "relay: reschedule"];

/// The next reply that tells of work that was done never arrives.
async fn lose_reply(link: &Arc<Link>) -> bool {
    let (sprung, springs) = oneshot::channel();
    let _guard = link.set_trap(Trap {
        at: Box::new(|mark| match mark {
            Mark::Executed(name) => WORK.contains(&&**name),
            reply => is_answer(reply),
        }),
        hold: Hold::Lose,
        deed: Box::new(|| {}),
        times: 1,
        sprung: Some(sprung),
    });
    timeout(PASS_LIMIT, springs).await.is_ok()
}

async fn spoil(world: &World, link: usize, weather: Weather, lasts: Duration) -> Result<bool> {
    // The first links are those of the parts to their databases.
    if let Some(part) = Part::ALL.get(link) {
        world.disturb(*part, lasts);
    }
    let link = nth(world, link)?;
    let before = link.spoilt.load(Ordering::Relaxed);
    link.set(weather);
    sleep(lasts).await;
    link.set(Weather::Clear);
    Ok(link.spoilt.load(Ordering::Relaxed) > before)
}

/// Stops the relay at the moment the reply to a delivery arrives, so that it holds a lease, and knows, when it is resumed,
/// what it would do with its events. By then another relay has them, and is still at it, since the receiver does not answer:
/// the settlement has to change nothing, and say so.
async fn stop_past_lease(world: &World, relay: Part) -> Result<bool> {
    let unit = world.site.unit(relay);
    for part in [relay, relay.receiver()] {
        world.disturb(part, LEASE + TAKE_OVER);
    }
    let lost_before = count_lost(world, relay)?;
    let (sprung, springs) = oneshot::channel();
    let stopped = unit.clone();
    let guard = world.site.to_receiver(relay).set_trap(Trap {
        at: Box::new(is_answer),
        hold: Hold::PassAfter,
        deed: Box::new(move || _ = stopped.signal(Signal::STOP)),
        times: 1,
        sprung: Some(sprung),
    });
    let stopped = timeout(PASS_LIMIT, springs).await.is_ok();
    drop(guard);
    if stopped {
        let receiver = world.site.unit(relay.receiver());
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
    while stopped && resumed.elapsed() < SHOWN_LIMIT {
        if count_lost(world, relay)? > lost_before {
            return Ok(true);
        }
        sleep(Duration::from_millis(200)).await;
    }
    Ok(false)
}

/// How often the relay has found that another had its events.
fn count_lost(world: &World, relay: Part) -> Result<usize> {
    count_in(&world.site.unit(relay).plan().log, "lease lost: another relay has these events")
}

fn count_in(log: &Path, text: &str) -> Result<usize> {
    Ok(fs::read_to_string(log)?.matches(text).count())
}

async fn hang(world: &World, part: Part, lasts: Duration) -> Result<bool> {
    let unit = world.site.unit(part);
    world.disturb(part, lasts);
    let hung = unit.signal(Signal::STOP);
    sleep(lasts).await;
    unit.signal(Signal::CONT);
    Ok(hung)
}

/// The library that lends a process another time of day, if it is installed.
pub(super) fn find_clock() -> Option<PathBuf> {
    let below = fs::read_dir("/usr/lib").ok()?.flatten().map(|entry| entry.path());
    let beside = PathBuf::from("/usr/lib");
    below.chain([beside]).map(|place| place.join("faketime/libfaketime.so.1")).find(|path| path.is_file())
}

/// Runs the process for a while with another time of day. Leases, back-off and retention go by the database's clock, and
/// limits by a monotonic one.
async fn set_clock_wrong(world: &World, part: Part, ahead: bool, lasts: Duration) -> Result<bool> {
    let Some(library) = &world.clock else { return Ok(false) };
    let unit = world.site.unit(part);
    let environment = [
        ("LD_PRELOAD", library.display().to_string()),
        ("FAKETIME", if ahead { "+1h" } else { "-1h" }.into()),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".into()),
        ("DONT_FAKE_MONOTONIC", "1".into()),
    ];
    unit.set_extra(environment.map(|(name, value)| (name.to_owned(), value)).into());
    let restarted = unit.restart(RESTART_LIMIT).await;
    sleep(lasts).await;
    let was_wrong = is_wrong(world, part, ahead).await;
    unit.set_extra(Vec::new());
    unit.restart(RESTART_LIMIT).await?;
    restarted?;
    was_wrong
}

/// Whether the process writes down another time of day than its database has.
async fn is_wrong(world: &World, part: Part, ahead: bool) -> Result<bool> {
    let unit = world.site.unit(part);
    let log = fs::read_to_string(&unit.plan().log)?;
    let last = log.lines().rev().find_map(|line| {
        let entry: serde_json::Value = serde_json::from_str(line).ok()?;
        entry["timestamp"].as_str().map(str::to_owned)
    });
    // Times of day as text, of the same form, are in the order of time.
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
            // The server ends all sessions, and recovers by itself.
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
        WHERE usename IN ('order_service', 'inventory_service', 'outbox_relay')",
    );
    Ok(ended.fetch_one(connection).await?)
}

async fn fill_disk(world: &World, lasts: Duration) -> Result<bool> {
    let Some(disk) = &world.site.disk else { return Ok(false) };
    let count_full = |log: &Path| count_in(log, "No space left");
    // Its log is on the same disk, and so cannot tell of what it has no room for.
    let log = world.site.cluster(Part::Inventory).lock().await.log();
    let before = count_full(&log)?;
    let ballast = disk.fill().await?;
    sleep(lasts).await;
    drop(ballast);
    world.site.cluster(Part::Inventory).lock().await.recover().await?;
    sleep(Duration::from_millis(200)).await;
    Ok(count_full(&log)? > before)
}

/// Locks a table, so that whoever comes keeps a connection of its pool for as long.
async fn use_pool_up(world: &World, part: Part, lasts: Duration) -> Result<bool> {
    let mut connection = world.site.connect(part).await?;
    let mut tx = connection.begin().await?;
    let statement = if part == Part::Orders {
        "-- chaos: lock table\nLOCK TABLE orders IN ACCESS EXCLUSIVE MODE"
    } else {
        "-- chaos: lock table\nLOCK TABLE stock IN ACCESS EXCLUSIVE MODE"
    };
    sqlx::raw_sql(statement).execute(&mut *tx).await?;
    sleep(lasts).await;
    let waiting: i64 = sqlx::query_scalar(
        "-- chaos: count waiting
        SELECT count(*) FROM pg_stat_activity
        WHERE wait_event_type = 'Lock' AND usename IN ('order_service', 'inventory_service')",
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.rollback().await?;
    Ok(waiting >= i64::from(POOL))
}

/// Takes all sessions that the server has for anybody but superusers, ends those of the services, and gives them no other.
async fn use_sessions_up(world: &World, part: Part, lasts: Duration) -> Result<bool> {
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
