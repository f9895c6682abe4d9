//! Answers as text for people.

use std::fmt::Write;

use proto::relay::v1::{
    DeadEvent, DeadEventContent, Diagnosis, GroupDeadEventsResponse, Journey, JourneyEvent, ListDeadEventsResponse,
    ListDeedsResponse, OutboxStatus, dead_event_content::Payload, journey_event::State,
};

use super::{
    deeds::word,
    refuse::{describe, named},
    slow_down::describe_pace,
};

/// The status.
pub(super) fn status(status: &OutboxStatus) -> String {
    let held_back = (status.held_back > 0).then(|| format!("{} of them behind dead events", status.held_back));
    let oldest =
        status.oldest_seconds.map(|seconds| line(["oldest", &age(seconds), "among the events that are not dead"]));
    let numbers = [
        line(["waiting", &status.waiting.to_string(), &held_back.unwrap_or_default()]),
        line(["leased", &status.leased.to_string(), ""]),
        line(["backing off", &status.backing_off.to_string(), ""]),
        line(["dead", &status.dead.to_string(), ""]),
        oldest.unwrap_or_else(|| line(["oldest", "none", ""])),
        line(["in", &format!("{:.1}/s", status.in_per_second), ""]),
        line(["out", &format!("{:.1}/s", status.out_per_second), ""]),
    ];
    let unrouted = match status.unrouted {
        0 => String::new(),
        events => {
            format!("UNROUTED {events} of the waiting events match no subscription: `outbox-relay subscribe` one\n")
        }
    };
    let numbers = table(&numbers, &[1]) + &unrouted;
    let mut page = format!("{numbers}\n{}\n{}", subscriptions(status), routes(status));
    if !status.types.is_empty() {
        page += "\n";
        page += &types(status);
    }
    if !status.failing.is_empty() {
        page += "\n";
        page += &failing(status);
    }
    page
}

/// The subscriptions with their backlogs, and the pauses.
pub(super) fn subscriptions(status: &OutboxStatus) -> String {
    let subscriptions = &status.subscriptions;
    if subscriptions.is_empty() {
        return "no subscriptions\n".into();
    }
    let mut rows = vec![line(["SUBSCRIPTION", "EVENTS", "WAITING", "LEASED", "BACKING OFF", "DEAD", "OLDEST", ""])];
    rows.extend(subscriptions.iter().map(|of| {
        let numbers = [of.waiting, of.leased, of.backing_off, of.dead].map(|number| number.to_string());
        let oldest = of.oldest_seconds.map_or("none".to_owned(), age);
        let paused = match (&of.pause, &of.pace) {
            (Some(_), _) => "PAUSED",
            (None, Some(_)) => "SLOWED",
            (None, None) => "",
        };
        [line([&of.name, &of.pattern]), numbers.to_vec(), line([&oldest, paused])].concat()
    }));
    let paused = status.pause.iter().chain(subscriptions.iter().filter_map(|of| of.pause.as_ref()));
    let paused = paused.map(|pause| format!("PAUSED {}{}\n", named(pause, " "), visible(&describe(pause))));
    let of_all = status.pace.iter().map(|pace| ("", pace));
    let slowed = of_all.chain(subscriptions.iter().filter_map(|of| Some((of.name.as_str(), of.pace.as_ref()?))));
    let slowed = slowed.map(|(name, pace)| {
        let name = if name.is_empty() { String::new() } else { format!("{name} ") };
        format!("SLOWED {name}{}\n", visible(&describe_pace(pace)))
    });
    table(&rows, &[2, 3, 4, 5, 6]) + &paused.collect::<String>() + &slowed.collect::<String>()
}

/// Dead events by why they died.
pub(super) fn groups(answer: &GroupDeadEventsResponse) -> String {
    if answer.groups.is_empty() {
        return "no dead events\n".into();
    }
    let mut rows = vec![line(["EVENTS", "SUBSCRIPTION", "TYPE", "CODE", "OLDEST", "ONE OF THE REASONS"])];
    rows.extend(answer.groups.iter().map(|of| {
        let oldest = of.oldest_time.unwrap_or_default().to_string();
        line([&of.events.to_string(), &of.subscription, &of.r#type, &of.code, &oldest, &of.reason])
    }));
    let left_out = match answer.left_out {
        0 => String::new(),
        events => format!("and {events} events in smaller groups\n"),
    };
    table(&rows, &[0]) + &left_out
}

/// What operators have done, newest first.
pub(super) fn deeds(list: &ListDeedsResponse) -> String {
    if list.deeds.is_empty() {
        return "no deeds\n".into();
    }
    let mut rows = vec![line(["DEED", "TIME", "BY", "WHAT", "EVENTS", "SUBSCRIPTION", "ABOUT", "REASON", "UNDO"])];
    rows.extend(list.deeds.iter().map(|of| {
        let time = of.time.unwrap_or_default().to_string();
        let undo = match (of.undone_by, of.can_undo) {
            (0, true) => "perhaps".to_owned(),
            (0, false) => String::new(),
            (undone_by, _) => format!("by deed {undone_by}"),
        };
        let (deed_id, events) = (of.deed_id.to_string(), of.events.to_string());
        let (what, subscription) = (word(of.kind()), &of.subscription);
        line([&deed_id, &time, &of.done_by, what, &events, subscription, &of.about, &of.reason, &undo])
    }));
    table(&rows, &[0, 4])
}

fn failing(status: &OutboxStatus) -> String {
    let mut rows = vec![line(["FAILING", "SUBSCRIPTION", "EVENTS", "FAILURES", "REASON"])];
    rows.extend(status.failing.iter().map(|of| {
        let [events, failures] = [of.events, of.failures].map(|number| number.to_string());
        line([&of.r#type, &of.subscription, &events, &failures, &of.reason])
    }));
    table(&rows, &[2, 3])
}

fn routes(status: &OutboxStatus) -> String {
    if status.routes.is_empty() {
        return "no relay has reported within the last 10 seconds\n".into();
    }
    let mut rows = vec![line(["ROUTE", "STATE", "SINCE", "RECEIVER", "RELAY", "REASON"])];
    rows.extend(status.routes.iter().map(|route| {
        let since = route.state_time.unwrap_or_default().to_string();
        line([&route.route, &route.state, &since, &route.receiver, &route.relay_id, &route.reason])
    }));
    table(&rows, &[])
}

fn types(status: &OutboxStatus) -> String {
    let mut rows = vec![line(["TYPE", "WAITING", "LEASED", "BACKING OFF", "DEAD"])];
    rows.extend(status.types.iter().map(|of| {
        let numbers = [of.waiting, of.leased, of.backing_off, of.dead].map(|number| number.to_string());
        [line([&of.r#type]), numbers.to_vec()].concat()
    }));
    table(&rows, &[1, 2, 3, 4])
}

/// What was found, the worst first, each with what to do.
pub(super) fn diagnosis(diagnosis: &Diagnosis) -> String {
    let mut page = String::new();
    for finding in &diagnosis.findings {
        let severity = finding.severity().as_str_name().trim_start_matches("SEVERITY_");
        _ = writeln!(page, "{severity:<8} {}: {}", visible(&finding.about), visible(&finding.text));
        if !finding.todo.is_empty() {
            _ = writeln!(page, "{:<8} {}", "", visible(&finding.todo));
        }
    }
    page
}

/// What is known of a subject's events. `why`: only of those that are left in the outbox.
pub(super) fn journey(journey: &Journey, why: bool) -> String {
    let mut page = String::new();
    if !why {
        let subject = if journey.subject.is_empty() { "unknown" } else { &journey.subject };
        _ = writeln!(page, "subject {subject}\n");
    }
    let shown = |event: &&JourneyEvent| !why || event.state() != State::Discarded;
    let events: Vec<_> = journey.events.iter().filter(shown).collect();
    if events.is_empty() {
        page += if journey.applied.is_empty() {
            "nothing of it is left in this outbox: it was handled, or never enqueued here\n"
        } else {
            "nothing of it is left in this outbox: receivers have applied it\n"
        };
    }
    if events.is_empty() && why {
        page += "`outbox-relay journey` asks receivers; their own events, such as answers, are in their outboxes\n";
    }
    page.extend(events.into_iter().map(step));
    if journey.left_out > 0 {
        _ = writeln!(page, "and {} more events", journey.left_out);
    }
    if !why && !journey.applied.is_empty() {
        let mut rows = vec![line(["APPLIED", "SUBSCRIPTION", "NUMBER", "EVENT"])];
        rows.extend(journey.applied.iter().map(|of| {
            let number = if of.sequence == 0 { "?".to_owned() } else { of.sequence.to_string() };
            line([&of.apply_time.unwrap_or_default().to_string(), &of.subscription, &number, &of.event_id])
        }));
        _ = write!(page, "\n{}", table(&rows, &[2]));
    }
    for receiver in &journey.unanswered {
        _ = writeln!(page, "no answer: {}", visible(receiver));
    }
    page
}

fn step(event: &JourneyEvent) -> String {
    let state = event.state().as_str_name().trim_start_matches("STATE_").replace('_', " ").to_lowercase();
    let subscription = if event.subscription.is_empty() { "no subscription" } else { &event.subscription };
    let mut text =
        format!("{} {} for {subscription}: {state}\n  {}\n", event.sequence, visible(&event.r#type), event.event_id);
    for cause in &event.causes {
        _ = writeln!(text, "  {}", visible(&cause.text));
    }
    text
}

/// A list of events that are dead or `failing`, and the number of older ones.
pub(super) fn events(list: &ListDeadEventsResponse, failing: bool) -> String {
    if list.dead_events.is_empty() {
        return if failing { "no event fails\n" } else { "no dead events\n" }.into();
    }
    let heads = [
        "EVENT",
        "AGE",
        "ATTEMPTS",
        "FAILURES",
        "HOLDS BACK",
        "SUBSCRIPTION",
        "TYPE",
        "AGGREGATE",
        "SEQUENCE",
        "REASON",
    ];
    let mut rows = vec![line(heads)];
    rows.extend(list.dead_events.iter().map(|event| {
        let DeadEvent { event_id, r#type, subject, sequence, age_seconds, reason, subscription, .. } = event;
        let [attempts, failures] = [event.attempts, event.failures].map(|number| number.to_string());
        let [held_back, sequence] = [event.held_back, *sequence].map(|number| number.to_string());
        let event = [event_id, &*age(*age_seconds), &attempts, &failures, &held_back, subscription];
        [line(event), line([r#type, subject, &sequence, reason])].concat()
    }));
    let more = list.total_size - i64::try_from(list.dead_events.len()).unwrap_or(i64::MAX);
    let more = if more > 0 { format!("… and {more} older: raise --limit to see them\n") } else { String::new() };
    table(&rows, &[1, 2, 3, 4, 8]) + &more
}

/// A dead event. `payload` is its payload as JSON, if it could be decoded.
pub(super) fn dead_event(content: &DeadEventContent, payload: Option<&str>) -> String {
    let event = content.event.clone().unwrap_or_default();
    let enqueued = format!("{}, {} ago", event.create_time.unwrap_or_default(), age(event.age_seconds));
    let attempts = match content.attempts_before_requeue {
        0 => event.attempts.to_string(),
        before => format!("{}, {before} of them before it was requeued", event.attempts),
    };
    let later = if event.held_back == 1 { "event" } else { "events" };
    let holds_back = format!("{} later {later} of its aggregate", event.held_back);
    let fields = [
        line(["event", &event.event_id]),
        line(["subscription", &event.subscription]),
        line(["type", &event.r#type]),
        line(["aggregate", &event.subject]),
        line(["sequence", &event.sequence.to_string()]),
        line(["enqueued", &enqueued]),
        line(["attempts", &attempts]),
        line(["reason", &event.reason]),
        line(["holds back", &holds_back]),
        line(["traceparent", if content.traceparent.is_empty() { "none" } else { &content.traceparent }]),
        line(["tracestate", if content.tracestate.is_empty() { "none" } else { &content.tracestate }]),
    ];
    let mut page = table(&fields, &[]);
    match (&content.payload, payload) {
        (_, Some(json)) => page += &format!("payload\n{json}\n"),
        (Some(Payload::Undecodable(reason)), _) => {
            page += &format!("payload      {}\n", visible(reason));
            page += &format!("{} bytes in hex\n{}", content.data.len(), hex(&content.data));
        }
        _ => {}
    }
    page
}

/// 32 bytes per line.
fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.chunks(32) {
        for byte in line {
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        text.push('\n');
    }
    text
}

fn line<const CELLS: usize>(cells: [&str; CELLS]) -> Vec<String> {
    cells.map(visible).to_vec()
}

/// Reasons come from other services. A replacement character stands for each control character, which a terminal would
/// obey.
fn visible(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '\u{FFFD}' } else { char }).collect()
}

/// Columns as wide as their widest cell. The columns with these indices are aligned to the right.
fn table(rows: &[Vec<String>], right_aligned: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if right_aligned.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

/// An age in its two largest units.
fn age(seconds: f64) -> String {
    let seconds = seconds.max(0.0);
    let (days, hours, minutes) = (seconds / 86_400.0, seconds / 3600.0, seconds / 60.0);
    match seconds {
        ..10.0 => format!("{seconds:.1}s"),
        ..60.0 => format!("{seconds:.0}s"),
        ..3600.0 => format!("{:.0}m {:.0}s", minutes.floor(), (seconds % 60.0).floor()),
        ..86_400.0 => format!("{:.0}h {:.0}m", hours.floor(), (minutes % 60.0).floor()),
        _ => format!("{:.0}d {:.0}h", days.floor(), (hours % 24.0).floor()),
    }
}

#[cfg(test)]
mod tests {
    use super::{age, hex, line, table};

    #[test]
    fn an_age_is_shown_in_its_two_largest_units() {
        let ages = [0.04, 59.0, 61.5, 7325.0, 86_400.0 * 3.0 + 3600.0 * 4.5];
        assert_eq!(ages.map(age), ["0.0s", "59s", "1m 1s", "2h 2m", "3d 4h"]);
    }

    #[test]
    fn columns_are_aligned_and_control_characters_are_replaced() {
        let rows = [line(["TYPE", "DEAD", "REASON"]), line(["a.v1.B", "17", "\u{1b}[2Jgone\nnext"])];
        assert_eq!(table(&rows, &[1]), "TYPE    DEAD  REASON\na.v1.B    17  \u{FFFD}[2Jgone\u{FFFD}next\n");
    }

    #[test]
    fn bytes_are_shown_32_per_line() {
        assert_eq!(hex(&[0xab; 33]), format!("{}\nab\n", "ab".repeat(32)));
    }
}
