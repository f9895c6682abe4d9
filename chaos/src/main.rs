//! `harness chaos`: injects faults into the whole system under load, then compares what clients were told with the
//! databases.
//!
//! The processes are the release binaries, unchanged: every fault comes from outside. The modules:
//!
//! - `site`: two durable PostgreSQL clusters, three services and two relays of each outbox. A proxy (`proxy`, `wire`,
//!   `entrance`) stands between every two processes that talk. `unit` restarts a process that has ended; `disk` can be
//!   filled. With `--secure`, `certificates` says who each of them is, and TLS ends at the proxies (`stream`).
//! - `clients`: they place, repeat, hang up, cancel and watch. `history` keeps what they asked for and were told.
//! - `faults`: the schedule, drawn from a seed. `inflict` carries it out, with `crash`, `points`, `trap`, `callers`,
//!   `poison`, `stand_in`, `redeliver` and `garbage`.
//! - `observe`: what must hold at every moment. `check` and `apart`: what must hold at the end.
//!
//! A timeout is not a failure: a call without an answer may have been executed or not, and the checker accepts both.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::Parser;
use rustix::process::Signal;
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use apart::send_away;
use check::{Verdict, check, check_processes};
use crash::kinds_without_crash;
use faults::{Fault, Schedule, TOGETHER};
use history::History;
use inflict::{find_clock, inflict};
use observe::{Observed, observe};
use proxy::Condition;
use report::Report;
use site::{Part, Site};
use world::World;

use harness::interrupt::unless_interrupted;
use testkit::postgres::try_to_install;

mod apart;
mod callers;
mod certificates;
mod check;
mod clients;
mod crash;
mod disk;
mod entrance;
mod faults;
mod garbage;
mod history;
mod inflict;
mod observe;
mod points;
mod poison;
mod proxy;
mod redeliver;
mod report;
mod site;
mod stand_in;
mod stream;
mod trap;
mod unit;
mod wire;
mod world;

const DIRECTORY: &str = "target/chaos";
/// The longest pause between two steps.
const PAUSE_MAX: Duration = Duration::from_millis(900);
/// How much longer a run lasts at most, for classes without effect by the end and kinds of process without a crash.
const OVERTIME_MAX: Duration = Duration::from_secs(60);
/// A fault that takes longer is given up, and does not count.
const FAULT_LIMIT: Duration = Duration::from_secs(120);
const HEALTHY_LIMIT: Duration = Duration::from_secs(60);
/// How long clients may take to finish their last orders.
const CLIENTS_LIMIT: Duration = Duration::from_secs(90);
/// A run of this length has time for an event that crashes its receiver until it is a dead letter.
const DEADLY_FROM_MINUTES: f64 = 3.0;
/// The shortest time between two lines of progress.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Break the system in every known way under load, and check that nothing was lost or applied twice
///
/// Starts two private PostgreSQL clusters with durable commits, three services, and two relays of each outbox. The
/// programs are those beside this one; POSTGRES_URL is not used. A proxy stands between every two processes that talk.
/// Clients place, repeat, cancel and watch orders while faults strike, drawn from the seed: processes are killed at
/// random and before or after a statement; PostgreSQL crashes; connections break; replies get lost; links are half-open
/// or slow; relays are stopped past their lease; clocks are an hour off; events are poison; proxies answer with pages of
/// HTML; the disk is full; and more. At the end all faults are undone, and the checker compares the databases with what
/// the clients were told. Quote the last line of the output.
///
/// Exits with 1 if the checker finds anything, or if the run shows nothing. A run shows nothing if fewer than 70 % of
/// the orders were acknowledged, or if a class of faults had no effect. The same holds if no duplicate was suppressed,
/// no repeated call was answered, or stock, points or sessions were never checked. Each kind of process must crash at a
/// point. From 4 minutes on, a run also shows nothing if it reached fewer than a third of the crash points. From 8
/// minutes on, it must reach every common point, which ordinary work passes. A run that fails keeps its logs, its
/// history and the logs of the databases in target/chaos/failed-SEED. Ctrl-C stops a run.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = "Exit codes: 0 success, 1 failure, 2 wrong arguments.")]
struct Arguments {
    /// How long faults strike. 1.5 minutes are enough for every class of faults. A class without effect by the
    /// end, or a kind of process without a crash at a point, gets up to another minute
    #[arg(long, default_value_t = 4.0, value_parser = minutes)]
    minutes: f64,
    /// Seed of the faults: the same seed draws the same faults in the same order. At which point a process crashes also
    /// depends on what it executes. Random by default
    #[arg(long)]
    seed: Option<u64>,
    /// With mutual TLS and a policy between all processes. The proxies end TLS on both sides, with the certificates of
    /// those that they stand between. All certificates are renewed every ten seconds
    #[arg(long)]
    secure: bool,
}

fn minutes(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(minutes) if (1.0..=1440.0).contains(&minutes) => Ok(minutes),
        _ => Err("must be a number from 1 to 1440".into()),
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = chassis::parse::<Arguments>();
    let running = async { Ok(if run(&arguments).await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }) };
    unless_interrupted(Box::pin(running)).await.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Returns whether the run was clean.
async fn run(arguments: &Arguments) -> Result<bool> {
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(1..1_000_000));
    println!(
        "chaos: seed {seed}, {} minutes{}; starting two PostgreSQL clusters, three services and four relays",
        arguments.minutes,
        if arguments.secure { ", with mutual TLS and a policy" } else { "" }
    );
    let directory = std::path::absolute(Path::new(DIRECTORY))?.join("run");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let world = start(&directory, arguments, seed).await?;
    let observed = Arc::new(Mutex::new(Observed::default()));
    let (stop_clients, stop_observing) = (CancellationToken::new(), CancellationToken::new());
    let mut clients = clients::start(&world, &stop_clients);
    let observing = tokio::spawn(observe(world.clone(), observed.clone(), stop_observing.clone()));
    let renewing = tokio::spawn(keep_renewing(world.clone(), stop_observing.clone()));

    let lasted = inject(&world, seed, arguments.minutes).await;
    let mut verdict = Verdict::default();
    if let Err(error) = heal(&world).await {
        verdict.others.push(format!("the system did not recover: {error:#}"));
    }
    send_away(&world).await;
    stop_clients.cancel();
    if timeout(CLIENTS_LIMIT, async { while clients.join_next().await.is_some() {} }).await.is_err() {
        verdict.others.push(format!("clients had no answers {CLIENTS_LIMIT:?} after healing"));
    }
    if let Err(error) = check(&world, &mut verdict).await {
        verdict.others.push(format!("the check did not finish: {error:#}"));
    }
    stop_observing.cancel();
    let _ = (observing.await, renewing.await);
    verdict.others.append(&mut observed.lock().unwrap_or_else(PoisonError::into_inner).violations);
    if let Err(error) = world.site.stop_units().await {
        verdict.others.push(format!("{error:#}"));
    }
    check_processes(&world, &mut verdict)?;
    let report = Report::of(&world, &observed, &verdict, seed, lasted);
    report.print();
    conclude(world, &directory, seed, report.is_clean()).await?;
    Ok(report.is_clean())
}

async fn start(directory: &Path, arguments: &Arguments, seed: u64) -> Result<Arc<World>> {
    if find_clock().is_none() {
        try_to_install("libfaketime").await;
    }
    let site = Site::start(directory, arguments.minutes, arguments.secure).await?;
    let history = History::write_to(&directory.join("history.jsonl"))?;
    Ok(Arc::new(World::of(site, history, find_clock(), seed)?))
}

/// Renews all certificates until `stop`, if there are any.
async fn keep_renewing(world: Arc<World>, stop: CancellationToken) {
    if let Some(certificates) = &world.site.certificates {
        stop.run_until_cancelled(certificates.keep_renewing(&world.history)).await;
    }
}

/// Injects the faults of the schedule until the time is over. That may be a little later, if a class has had no effect
/// by then or a kind of process no crash. Returns how long that took.
async fn inject(world: &Arc<World>, seed: u64, minutes: f64) -> Duration {
    let mut schedule = Schedule::of(seed, minutes >= DEADLY_FROM_MINUTES);
    let _watching = world.crashes.watch(&world.site, &world.history);
    let (began, mut printed) = (Instant::now(), Instant::now());
    loop {
        let left = world.tally().left();
        let over = began.elapsed().saturating_sub(Duration::from_secs_f64(minutes * 60.0));
        let is_complete = || left.is_empty() && kinds_without_crash(&world.crashes.counts()).is_empty();
        if over > OVERTIME_MAX || over > Duration::ZERO && is_complete() {
            return began.elapsed();
        }
        let step = schedule.next_step(&left);
        if printed.elapsed() > LINE_EVERY {
            printed = Instant::now();
            println!("chaos: {:>5.1} min  {}", began.elapsed().as_secs_f64() / 60.0, progress(world));
        }
        inject_together(world, step).await;
        tokio::time::sleep(PAUSE_MAX.mul_f64(fastrand::f64())).await;
    }
}

fn progress(world: &World) -> String {
    let acknowledged = world.history.known().acknowledged.len();
    let faults = world.tally().faults();
    format!("{acknowledged} orders acknowledged, {faults} faults")
}

async fn inject_together(world: &Arc<World>, step: Vec<Fault>) {
    let together = step.len();
    if together > 1 {
        world.crashes.forget_uncounted();
    }
    let mut injecting = JoinSet::new();
    for fault in step {
        injecting.spawn(inject_one(world.clone(), fault));
    }
    let effective = injecting.join_all().await.into_iter().filter(|effective| *effective).count();
    if together > 1 {
        let mut tally = world.tally();
        *tally.injected.entry(TOGETHER).or_default() += 1;
        *tally.effective.entry(TOGETHER).or_default() += u32::from(effective > 1);
    }
}

async fn inject_one(world: Arc<World>, fault: Fault) -> bool {
    let link = fault.link().and_then(|link| world.site.links().nth(link));
    let name = format!("{fault} {}", link.map_or("", |link| &link.name));
    world.history.fault(&name, "begin");
    let outcome = timeout(FAULT_LIMIT, inflict(&world, &fault)).await;
    let effective = match outcome {
        Ok(Ok(effective)) => effective,
        Ok(Err(error)) => {
            world.history.fault(&format!("{name}: {error:#}"), "failed");
            false
        }
        Err(_) => {
            println!("chaos: gave up after {FAULT_LIMIT:?}: {name}");
            false
        }
    };
    world.history.fault(&name, if effective { "effective" } else { "no effect" });
    world.injected(&fault, effective);
    effective
}

/// Undoes what is left of the faults, and waits until all processes are healthy.
async fn heal(world: &World) -> Result<()> {
    println!("chaos: undoing all faults, then checking");
    for link in world.site.links() {
        link.set_condition(Condition::Normal);
    }
    for part in [Part::Orders, Part::Inventory] {
        world.site.cluster(part).lock().await.recover().await?;
    }
    for part in Part::ALL {
        world.site.unit(part).set_extra(Vec::new());
        world.site.unit(part).signal(Signal::CONT);
    }
    for part in Part::ALL {
        world.site.unit(part).wait_healthy(HEALTHY_LIMIT).await?;
    }
    Ok(())
}

/// Stops the clusters, and keeps the logs of a failed run.
async fn conclude(world: Arc<World>, directory: &Path, seed: u64, clean: bool) -> Result<()> {
    world.history.flush()?;
    if !clean {
        let kept = directory.with_file_name(format!("failed-{seed}"));
        let _ = fs::remove_dir_all(&kept);
        fs::create_dir_all(kept.join("logs"))?;
        let mut files: Vec<(PathBuf, PathBuf)> = vec![(directory.join("history.jsonl"), kept.join("history.jsonl"))];
        for part in Part::ALL {
            let log = world.site.unit(part).plan().log.clone();
            files.push((log, kept.join("logs").join(format!("{}.log", part.name()))));
        }
        for part in [Part::Orders, Part::Inventory] {
            let log = world.site.cluster(part).lock().await.log();
            files.push((log, kept.join("logs").join(format!("postgres-of-{}.log", part.name()))));
        }
        for (from, to) in files {
            fs::copy(&from, &to).with_context(|| from.display().to_string())?;
        }
        let secure = if world.site.certificates.is_some() { " --secure" } else { "" };
        println!("chaos: logs and history are in {}; repeat the faults with --seed {seed}{secure}", kept.display());
    }
    // All tasks that shared it have ended.
    if let Some(world) = Arc::into_inner(world) {
        world.site.stop().await?;
    }
    Ok(())
}
