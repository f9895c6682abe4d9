//! `harness chaos`: the system under fire, and a checker that holds what clients were told against what is left.
//!
//! The processes are the release binaries as they are; every fault comes from outside. A part of the run each:
//!
//! - `site`: two durable PostgreSQL clusters, both services, two relays each way, and a proxy (`proxy`, `wire`) between every
//!   two that talk to each other; `unit` starts a process again that ended, `disk` can be filled.
//! - `clients`: place, repeat, hang up, cancel, watch; `history` keeps what they asked for and were told.
//! - `faults`: what strikes, drawn from a seed; `inflict`, `crash` and `provoke` do it.
//! - `observe`: what must hold at any moment; `check`: what must hold in the end.
//!
//! A timeout is never taken for a failure: what was not answered may have happened, and both are right.

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

use check::{Verdict, check, check_processes};
use faults::{Fault, Schedule, TOGETHER};
use history::History;
use inflict::{find_clock, inflict};
use observe::{Observed, observe};
use proxy::Weather;
use report::Report;
use site::{Part, Site};
use world::World;

use harness::interrupt::unless_interrupted;
use testkit::postgres::try_to_install;

mod check;
mod clients;
mod crash;
mod disk;
mod faults;
mod history;
mod inflict;
mod observe;
mod provoke;
mod proxy;
mod report;
mod site;
mod unit;
mod wire;
mod world;

const DIRECTORY: &str = "target/chaos";
/// Between two steps at most.
const BREATH_MAX: Duration = Duration::from_millis(900);
/// For classes that have had no effect by the end.
const OVERTIME_MAX: Duration = Duration::from_secs(60);
/// No fault takes longer than this; one that does is given up, and does not count.
const FAULT_LIMIT: Duration = Duration::from_secs(120);
const HEALTHY_LIMIT: Duration = Duration::from_secs(60);
/// How long clients may take to end what they are about.
const CLIENTS_LIMIT: Duration = Duration::from_secs(90);
/// From here on a run has time for an event that kills its receiver until it is found out.
const DEADLY_FROM_MINUTES: f64 = 3.0;
/// Between two lines of progress at least.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Break the system in every way known, under load, and check that nothing was lost and nothing applied twice
///
/// Starts two private durable PostgreSQL clusters, both services and two relays each way, from the binaries beside this one,
/// with a proxy between every two, whatever POSTGRES_URL says. Clients place, repeat, cancel and watch orders while faults
/// strike, drawn from the seed: processes killed at random and at named points, PostgreSQL crashed, connections cut, replies
/// lost, links half-open or slow, relays stopped past their lease, clocks an hour off, poison, a full disk, and more. In the
/// end everything is healed, and the checker reads both databases. The last line of what it prints is to be quoted.
///
/// Exits with 1 on any finding, and when the run was vacuous: under 70 % of the orders acknowledged, a class of faults without
/// effect, no duplicate suppressed, nothing recovered. Logs, history and databases' logs of such a run are kept in
/// target/chaos/failed-SEED. Ctrl-C ends it.
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = "Exit codes: 0 it worked, 1 it failed, 2 it was asked for wrongly.")]
struct Arguments {
    /// How long faults strike: one and a half are enough for all classes to have their turn. A class that has had no effect by
    /// the end is given another minute
    #[arg(long, default_value_t = 4.0, value_parser = minutes)]
    minutes: f64,
    /// Draws the schedule of faults; the same seed draws the same one. Drawn itself if not given
    #[arg(long)]
    seed: Option<u64>,
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
    let raging = async { Ok(if rage(&arguments).await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }) };
    unless_interrupted(Box::pin(raging)).await.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Returns whether the run was clean.
async fn rage(arguments: &Arguments) -> Result<bool> {
    let seed = arguments.seed.unwrap_or_else(|| fastrand::u64(1..1_000_000));
    println!(
        "chaos: seed {seed}, {} minutes; starting two PostgreSQL clusters, two services and four relays",
        arguments.minutes
    );
    let directory = std::path::absolute(Path::new(DIRECTORY))?.join("run");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let world = start(&directory, arguments.minutes).await?;
    let observed = Arc::new(Mutex::new(Observed::default()));
    let (stop_clients, stop_observing) = (CancellationToken::new(), CancellationToken::new());
    let mut clients = clients::start(&world.target, &world.history, &stop_clients);
    let observing = tokio::spawn(observe(world.clone(), observed.clone(), stop_observing.clone()));

    let struck = strike(&world, seed, arguments.minutes).await;
    let mut verdict = Verdict::default();
    if let Err(error) = heal(&world).await {
        verdict.others.push(format!("not healed: {error:#}"));
    }
    stop_clients.cancel();
    if timeout(CLIENTS_LIMIT, async { while clients.join_next().await.is_some() {} }).await.is_err() {
        verdict.others.push(format!("clients were not answered within {CLIENTS_LIMIT:?} after all was healed"));
    }
    if let Err(error) = check(&world, &mut verdict).await {
        verdict.others.push(format!("not checked to the end: {error:#}"));
    }
    stop_observing.cancel();
    let _ = observing.await;
    verdict.others.append(&mut observed.lock().unwrap_or_else(PoisonError::into_inner).violations);
    if let Err(error) = world.site.stop_units().await {
        verdict.others.push(format!("{error:#}"));
    }
    check_processes(&world, &mut verdict)?;
    let report = Report::of(&world, &observed, &verdict, seed, struck);
    report.print();
    conclude(world, &directory, seed, report.is_clean()).await?;
    Ok(report.is_clean())
}

async fn start(directory: &Path, minutes: f64) -> Result<Arc<World>> {
    if find_clock().is_none() {
        try_to_install("libfaketime").await;
    }
    let site = Site::start(directory, minutes).await?;
    let history = History::write_to(&directory.join("history.jsonl"))?;
    Ok(Arc::new(World::of(site, history, find_clock())?))
}

/// Lets fault after fault strike until the time is over, or a little longer if a class has had no effect by then. Returns for
/// how long.
async fn strike(world: &Arc<World>, seed: u64, minutes: f64) -> Duration {
    let mut schedule = Schedule::of(seed, minutes >= DEADLY_FROM_MINUTES);
    let (began, mut said) = (Instant::now(), Instant::now());
    loop {
        let left = world.tally().left();
        let over = began.elapsed().saturating_sub(Duration::from_secs_f64(minutes * 60.0));
        if over > OVERTIME_MAX || over > Duration::ZERO && left.is_empty() {
            return began.elapsed();
        }
        let step = schedule.next_step(&left);
        if said.elapsed() > LINE_EVERY {
            said = Instant::now();
            println!("chaos: {:>5.1} min  {}", began.elapsed().as_secs_f64() / 60.0, progress(world));
        }
        strike_together(world, step).await;
        tokio::time::sleep(BREATH_MAX.mul_f64(fastrand::f64())).await;
    }
}

fn progress(world: &World) -> String {
    let acknowledged = world.history.known().acknowledged.len();
    let faults = world.tally().faults();
    format!("{acknowledged} orders acknowledged, {faults} faults")
}

async fn strike_together(world: &Arc<World>, step: Vec<Fault>) {
    let together = step.len();
    let mut striking = JoinSet::new();
    for fault in step {
        let world = world.clone();
        striking.spawn(async move {
            let link = fault.link().and_then(|link| world.site.links().nth(link));
            let name = format!("{fault} {}", link.map_or("", |link| &link.name));
            world.history.fault(&name, "begin");
            let outcome = timeout(FAULT_LIMIT, inflict(&world, &fault)).await;
            let bit = match outcome {
                Ok(Ok(bit)) => bit,
                Ok(Err(error)) => {
                    world.history.fault(&format!("{name}: {error:#}"), "failed");
                    false
                }
                Err(_) => {
                    println!("chaos: given up after {FAULT_LIMIT:?}: {name}");
                    false
                }
            };
            world.history.fault(&name, if bit { "bit" } else { "end" });
            world.struck(&fault, bit);
            bit
        });
    }
    let bit = striking.join_all().await.into_iter().filter(|bit| *bit).count();
    if together > 1 {
        let mut tally = world.tally();
        *tally.struck.entry(TOGETHER).or_default() += 1;
        *tally.bit.entry(TOGETHER).or_default() += u32::from(bit > 1);
    }
}

/// Undoes whatever may be left of any fault, and waits until everything is up.
async fn heal(world: &World) -> Result<()> {
    println!("chaos: healing");
    for link in world.site.links() {
        link.set(Weather::Clear);
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

/// Ends the clusters; keeps what a failed run leaves behind.
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
        println!("chaos: logs and history are kept in {}; repeat the schedule with --seed {seed}", kept.display());
    }
    // Nobody else holds it any more.
    if let Some(world) = Arc::into_inner(world) {
        world.site.stop().await?;
    }
    Ok(())
}
