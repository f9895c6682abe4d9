//! `harness bench`: what the system can do, against what PostgreSQL and gRPC can do on the same machine.
//!
//! A figure is nearly always a ratio: of the system to something simpler that does the same work, in the same run, on the
//! same private durable cluster (`fsync` and `synchronous_commit` on), measured by turns, each at least three times, and
//! the median taken. So it says something on any machine, also on a busy one. The parts, and how each thing is measured,
//! are a module each:
//!
//! 1. `create_order`: orders a second, against pgbench and against a bound.
//! 2. `drain`: a backlog through the relay into inventory-service.
//! 3. `latency`: from accepted to stock and to CONFIRMED, at constant rates.
//! 4. `hot_sku`: one SKU that every order wants.
//! 5. `lease`: the time of a lease, whatever is in the outbox.
//! 6. `soak`: ten minutes at one rate; only when asked for.
//!
//! The system is the real binaries with their default settings, in databases of each part's own. Every answer is checked,
//! every part that places orders ends with an audit, and a run in which anything was wrong does not count.

use std::{
    fs,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use report::Report;
use serde_json::{Map, Value};
use site::Site;

use harness::interrupt::unless_interrupted;

mod backlog;
mod closed_loop;
mod commit_times;
mod create_order;
mod drain;
mod grouped_inserts;
mod hot_sku;
mod latency;
mod lease;
mod machine;
mod noop;
mod open_loop;
mod pgbench;
mod plot;
mod quantiles;
mod report;
mod requests;
mod site;
mod soak;
mod statement_log;
mod stub_receiver;

/// As in the services, so that what is compared is built alike.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const DIRECTORY: &str = "target/bench";
/// All but the soak.
const PARTS: [u8; 5] = [1, 2, 3, 4, 5];
const SOAK: u8 = 6;

/// Measure the system against what PostgreSQL and gRPC alone can do here
///
/// Takes up to 15 minutes and a machine that does nothing else. Starts a private durable PostgreSQL, whatever
/// POSTGRES_URL says, runs the real binaries on it, prints a table for each part and the figures against their targets at the end, and writes
/// target/bench/summary.json and plots (SVG) beside it. Exits with 1 when the run does not count: a call failed, an audit
/// was not clean, a deadlock happened, or something could not be measured; never for a figure.
///
/// Parts: 1 CreateOrder against pgbench; 2 draining a backlog; 3 latency at constant rates; 4 one hot SKU; 5 lease time;
/// 6 ten minutes at 2,000 orders/s, only with --only 6 (writes target/bench/soak.json instead).
#[derive(Clone, Debug, Parser)]
#[command(version, after_help = "Exit codes: 0 it worked, 1 it failed, 2 it was asked for wrongly.")]
struct Arguments {
    #[command(subcommand)]
    part: Option<Part>,
    /// Run this part only
    #[arg(long, value_name = "PART", value_parser = clap::value_parser!(u8).range(1..=6))]
    only: Option<u8>,
    /// Small sizes and one round, to see that it works: a minute a part, and figures that mean little
    #[arg(long)]
    quick: bool,
}

/// A program that a part of the bench starts.
#[derive(Clone, Debug, Subcommand)]
enum Part {
    #[command(hide = true)]
    Noop(noop::Arguments),
}

/// On one thread: a load that is measured is to take little of the processors it shares, and what answers at once runs as
/// the services do.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = chassis::parse::<Arguments>();
    let outcome = match &arguments.part {
        Some(Part::Noop(noop)) => noop::run(noop).await,
        None => {
            let measuring =
                async { Ok(if measure(&arguments).await? { ExitCode::SUCCESS } else { ExitCode::FAILURE }) };
            unless_interrupted(Box::pin(measuring)).await
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Returns whether the run counts.
async fn measure(arguments: &Arguments) -> Result<bool> {
    let directory = std::path::absolute(DIRECTORY)?;
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let began = Instant::now();
    println!("bench: starting PostgreSQL");
    let site = Site::start(&directory, arguments.quick).await?;
    // Processes append to their logs. Only now is it sure that no other bench is at work here.
    let _ = fs::remove_dir_all(directory.join("logs"));
    let machine = site.describe().await?;
    print_machine(&machine);

    let mut report = Report::default();
    let parts = arguments.only.map_or_else(|| PARTS.to_vec(), |part| vec![part]);
    for part in &parts {
        let part_began = Instant::now();
        if let Err(error) = run_part(*part, &site, &mut report).await {
            report.invalidate(format!("part {part}: {error:#}"));
        }
        println!("bench: {part}  took {}", minutes(part_began.elapsed()));
    }
    report.deadlocked(site.count_deadlocks().await?);
    site.stop().await?;
    let counts = report.conclude(&parts);
    report.print();
    // The soak leaves the summary of the other parts alone.
    let summary = Path::new(DIRECTORY).join(if parts == [SOAK] { "soak.json" } else { "summary.json" });
    report.write(&summary, &machine, arguments.quick)?;
    let verdict = if counts { "the run counts" } else { "the run does NOT count, see INVALID above" };
    if arguments.quick {
        println!("bench: this was a quick run: small sizes, one round, and figures that mean little");
    }
    println!("bench: {verdict}; {} in all; {} and plots beside it", minutes(began.elapsed()), summary.display());
    Ok(counts)
}

async fn run_part(part: u8, site: &Site, report: &mut Report) -> Result<()> {
    match part {
        1 => create_order::run(site, report).await,
        2 => drain::run(site, report).await,
        3 => latency::run(site, report).await,
        4 => hot_sku::run(site, report).await,
        5 => lease::run(site, report).await,
        _ => soak::run(site, report).await,
    }
}

fn print_machine(machine: &Value) {
    println!();
    for (name, value) in machine.as_object().into_iter().flatten() {
        let value = value.as_object().map_or_else(|| text(value), list);
        println!("  {name:<14}{value}");
    }
    println!();
}

fn list(values: &Map<String, Value>) -> String {
    let values: Vec<String> = values.iter().map(|(name, value)| format!("{name}: {}", text(value))).collect();
    values.join("; ")
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn minutes(time: Duration) -> String {
    format!("{} min {:02} s", time.as_secs() / 60, time.as_secs() % 60)
}
