//! Part 8: what remains of the peak when three times as many orders are offered as the service can place.
//!
//! Load and servers have processors of their own. Whoever overloads a service does so from elsewhere: if the load took the
//! servers' processors, the peak would fall for that reason alone. No relay runs meanwhile.
//!
//! The peak is the rate of callers that wait for each answer, as many as place the most. It is measured between all rounds,
//! since a machine may be half as fast a minute later: a round compares with the peaks before and after it. It offers three
//! times the peak before, however long the answers take. Meanwhile somebody asks after the service's health.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use proto::orders::v1::order_service_client::OrderServiceClient;
use serde_json::json;
use tokio::{
    runtime,
    task::{JoinSet, spawn_blocking},
    time::{MissedTickBehavior, interval, timeout},
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use super::{
    closed_loop::{self, Load},
    open_loop::{Schedule, start_clock},
    processors::{Busy, Processors},
    quantiles::{Latencies, P50, P99, median},
    report::{Report, Table, number},
    requests::{Failures, Shape, connect, place},
    site::{Site, finish, start},
};
use harness::{stress::wait_until_delivered, system::Service};

/// Orders that cost the servers so much more than the load that one processor can offer three times as many as another can
/// place.
const SHAPE: Shape = Shape { skus: 1000, items: 100 };
/// Callers at the peak.
const CALLERS: [u32; 3] = [64, 256, 512];
const TIMES: f64 = 3.0;
/// So many that the median of their ratios is worth something. They are short, so that a ratio's two sides are near.
const ROUNDS: usize = 8;
const WARM_UP: Duration = Duration::from_millis(500);
/// A caller gives up after this. So no order takes much longer, and those who gave up are told apart.
const PATIENCE: Duration = Duration::from_secs(1);
/// Enough connections that no call waits for room on one of them.
const STREAMS: u32 = 8192;
const HEALTH_INTERVAL: Duration = Duration::from_millis(20);
const DRAIN_LIMIT: Duration = Duration::from_secs(300);

/// A closed loop.
#[derive(Clone, Copy)]
struct Peak {
    callers: u32,
    rate: f64,
    p99: f64,
}

/// A load that offers less than this part of what it should does not count.
const OFFERED_MIN: f64 = 0.95;

/// What was answered of the orders that were offered.
#[derive(Default)]
struct Answers {
    /// Calls that were sent before the end.
    sent: u64,
    /// Milliseconds from due to placed.
    placed: Vec<f64>,
    /// The same of refusals.
    refused: Vec<f64>,
    /// Calls whose callers gave up.
    given_up: u64,
    failures: Failures,
}

/// A round.
struct Round {
    /// Those before and after it.
    peaks: [Peak; 2],
    /// All that were sent in a second, placed, refused, and given up.
    offered: f64,
    goodput: f64,
    refusals: f64,
    given_up: f64,
    /// How busy the load was, in percent of one processor.
    busy: f64,
    placed: Latencies,
    refused: Latencies,
    health: Latencies,
}

/// Measures and prints.
pub(super) async fn run(site: &Site, report: &mut Report) -> Result<()> {
    let layout = site.databases("overload").await?;
    let processors = Processors::split().await?;
    let mut processes = start(&layout, &[Service::Inventory, Service::Orders]).await?;
    SHAPE.add_stock(&layout.target()?).await?;
    let mut orders = site.connect(&layout.orders).await?;
    processors.give_servers(&mut orders, &processes).await?;

    site.checkpoint().await?;
    let time = Duration::from_secs(site.size(2, 1));
    let callers = find_callers(layout.order_service, time, site.rounds(), report).await?;
    let mut peak = place_at_once(layout.order_service, time, callers, report).await?;
    let mut rounds = Vec::new();
    for _ in 0..site.size(ROUNDS, 1) {
        let round = measure(layout.order_service, time, peak, report).await?;
        peak = round.peaks[1];
        rounds.push(round);
    }
    report_figures(&rounds, report);
    processors.give_all(&mut orders, &processes).await?;
    processes.extend(start(&layout, &[Service::OrdersRelay, Service::InventoryRelay]).await?);
    wait_until_delivered(&layout.target()?.databases, DRAIN_LIMIT).await?;
    finish(&layout, processes, report).await
}

/// How many callers place the most, by the medians of some turns.
async fn find_callers(address: SocketAddr, time: Duration, turns: usize, report: &mut Report) -> Result<u32> {
    let mut rates = CALLERS.map(|callers| (callers, Vec::new()));
    for _ in 0..turns {
        for (callers, rates) in &mut rates {
            rates.push(place_at_once(address, time, *callers, report).await?.rate);
        }
    }
    let best = rates.into_iter().max_by(|(_, one), (_, other)| median(one).total_cmp(&median(other)));
    best.map(|(callers, _)| callers).context("no number of callers was tried")
}

async fn place_at_once(address: SocketAddr, time: Duration, callers: u32, report: &mut Report) -> Result<Peak> {
    let load = Load { at_once: callers, warm_up: WARM_UP, time, shape: SHAPE };
    let answered = closed_loop::call(address, load).await?;
    report.failed("CreateOrder at the peak", &answered.failures);
    let (rate, p99) = (answered.rate, answered.latencies.at(P99));
    println!("bench: 8  {callers:>3} callers   {:>7}/s  p99 {:>6} ms", number(rate), number(p99));
    Ok(Peak { callers, rate, p99 })
}

/// A round after this peak.
async fn measure(address: SocketAddr, time: Duration, peak: Peak, report: &mut Report) -> Result<Round> {
    let rate = rate_of(peak);
    let asked = ask_health(address);
    let busy = Busy::begin()?;
    let offered = offer(address, Schedule { rate, time: time * 2 }).await?;
    let busy = busy.end()?;
    let health = asked.stop().await?;
    report.failed("CreateOrder under overload", &offered.failures);
    let a_second = |calls: u64| calls as f64 / (time * 2).as_secs_f64();
    let [goodput, refusals] = [&offered.placed, &offered.refused].map(|answers| a_second(answers.len() as u64));
    let (sent, given_up) = (a_second(offered.sent), a_second(offered.given_up));
    if sent < OFFERED_MIN * f64::from(rate) {
        report.invalidate(format!("the load sent {} calls a second in place of {rate}", number(sent)));
    }
    let [placed, refused] = [offered.placed, offered.refused].map(Latencies::of);
    let slowest = health.at(1000);
    println!(
        "bench: 8  {:>6}/s offered  {:>7}/s placed, p50 / p99 {} / {} ms; {} refused, p99 {} ms; {} given up; health at \
         most {} ms; the load was busy by {busy:.0} %",
        number(sent),
        number(goodput),
        number(placed.at(P50)),
        number(placed.at(P99)),
        number(refusals),
        number(refused.at(P99)),
        number(given_up),
        number(slowest),
    );
    let peaks = [peak, place_at_once(address, time, peak.callers, report).await?];
    Ok(Round { peaks, offered: sent, goodput, refusals, given_up, busy, placed, refused, health })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "nobody places four thousand million a second"
)]
fn rate_of(peak: Peak) -> u32 {
    (peak.rate * TIMES) as u32
}

/// Calls when it is time, however long the answers take. An answer that comes after the last call does not count.
async fn offer(address: SocketAddr, schedule: Schedule) -> Result<Answers> {
    let clients = connect(address, STREAMS)?;
    let mut clients = clients.iter().cycle();
    let began = Instant::now() + Duration::from_millis(20);
    let end = began + schedule.time;
    let mut due = start_clock(schedule, began);
    let mut calls: JoinSet<(Instant, Instant, Result<Code>)> = JoinSet::new();
    let mut answers = Answers::default();
    while let (Some(due_at), Some(client)) = (due.recv().await, clients.next()) {
        let client = client.clone();
        answers.sent += u64::from(Instant::now() < end);
        calls.spawn(async move {
            let answer = call(client).await;
            (due_at, Instant::now(), answer)
        });
        while let Some(call) = calls.try_join_next() {
            answers.add(call?, end);
        }
    }
    while let Some(call) = calls.join_next().await {
        answers.add(call?, end);
    }
    Ok(answers)
}

/// Places an order unless the caller gives up. Any answer that is not meant for an overload is an error.
async fn call(mut client: OrderServiceClient<Channel>) -> Result<Code> {
    match timeout(PATIENCE, place(&mut client, SHAPE)).await {
        Ok(Ok(_)) => Ok(Code::Ok),
        Ok(Err(error)) if is_refusal(&error) => Ok(Code::ResourceExhausted),
        Ok(Err(error)) => Err(error),
        Err(_) => Ok(Code::DeadlineExceeded),
    }
}

impl Answers {
    fn add(&mut self, (due, answered, answer): (Instant, Instant, Result<Code>), end: Instant) {
        let milliseconds = (answered - due).as_secs_f64() * 1e3;
        match answer {
            Ok(Code::Ok) if answered < end => self.placed.push(milliseconds),
            Ok(Code::Ok) => {}
            Ok(Code::ResourceExhausted) => self.refused.push(milliseconds),
            Ok(_) => self.given_up += 1,
            Err(error) => self.failures.add(&error),
        }
    }
}

/// The service said that it has too much to do.
fn is_refusal(error: &anyhow::Error) -> bool {
    error.downcast_ref::<tonic::Status>().is_some_and(|status| status.code() == Code::ResourceExhausted)
}

/// Somebody who asks after the health, on a thread and a connection of his own: the load takes long turns on its thread.
struct Asking {
    answers: thread::JoinHandle<Result<Vec<f64>>>,
    stop: Arc<AtomicBool>,
}

fn ask_health(address: SocketAddr) -> Asking {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let answers = thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(ask_until(address, &stopped))
    });
    Asking { answers, stop }
}

async fn ask_until(address: SocketAddr, stopped: &AtomicBool) -> Result<Vec<f64>> {
    let endpoint = Endpoint::try_from(format!("http://{address}"))?.tcp_nodelay(true);
    let mut health = HealthClient::new(endpoint.connect().await?);
    let mut ticks = interval(HEALTH_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut milliseconds = Vec::new();
    while !stopped.load(Ordering::Relaxed) {
        ticks.tick().await;
        let asked = Instant::now();
        let answer = health.check(HealthCheckRequest::default()).await?.into_inner();
        ensure!(answer.status() == ServingStatus::Serving, "the service says that it does not serve");
        milliseconds.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    Ok(milliseconds)
}

impl Asking {
    async fn stop(self) -> Result<Latencies> {
        self.stop.store(true, Ordering::Relaxed);
        let answers = spawn_blocking(|| self.answers.join()).await?;
        Ok(Latencies::of(answers.map_err(|_| anyhow!("the thread panicked"))?.context("the health was not told")?))
    }
}

impl Round {
    /// Of the peaks before and after.
    fn peak(&self, of: fn(&Peak) -> f64) -> f64 {
        self.peaks.iter().map(of).sum::<f64>() / self.peaks.len() as f64
    }

    fn peak_rate(&self) -> f64 {
        self.peak(|peak| peak.rate)
    }

    fn peak_p99(&self) -> f64 {
        self.peak(|peak| peak.p99)
    }
}

fn report_figures(rounds: &[Round], report: &mut Report) {
    let middle = |of: fn(&Round) -> f64| median(&rounds.iter().map(of).collect::<Vec<_>>());
    let goodput = middle(|round| round.goodput / round.peak_rate());
    let p99 = middle(|round| round.placed.at(P99) / round.peak_p99());
    let health = middle(|round| round.health.at(1000));
    let mut table = Table::new("8. Three times as many orders as can be placed", &["", "peak", "overload", "ratio"]);
    let [rate, placed] = [middle(Round::peak_rate), middle(|round| round.goodput)];
    table.row(["orders/s".into(), number(rate), number(placed), format!("{goodput:.2}")]);
    let [before, after] = [middle(Round::peak_p99), middle(|round| round.placed.at(P99))];
    table.row(["p99, ms".into(), number(before), number(after), format!("{p99:.2}")]);
    table.row(["slowest answer of health, ms".into(), String::new(), number(health), String::new()]);
    for (what, of) in [
        ("offered/s", (|round| round.offered) as fn(&Round) -> f64),
        ("refused/s", |round| round.refusals),
        ("given up after 1 s, /s", |round| round.given_up),
    ] {
        table.row([what.into(), String::new(), number(middle(of)), String::new()]);
    }
    table.print();
    report.figure("overload_goodput_over_peak", goodput);
    report.figure("overload_p99_over_peak", p99);
    report.figure("overload_health_ms", health);
    let raw = rounds.iter().map(|round| {
        json!({
            "callers": round.peaks[0].callers, "peaks": round.peaks.map(|peak| peak.rate),
            "peaks_p99_ms": round.peaks.map(|peak| peak.p99),
            "goodput": round.goodput, "p99_ms": round.placed.at(P99), "refused_p99_ms": round.refused.at(P99),
            "health_ms": round.health.at(1000), "offered": round.offered, "refused": round.refusals,
            "given_up": round.given_up, "load_busy_percent": round.busy,
        })
    });
    report.raw("overload", raw.collect());
}
