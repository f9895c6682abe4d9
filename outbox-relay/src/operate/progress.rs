//! Shows on stderr how far a long command is.

use std::{
    io::{self, IsTerminal, Write},
    time::{Duration, Instant},
};

/// Between two lines in a log or a file.
const LINE_INTERVAL: Duration = Duration::from_secs(1);
/// Between two redrawn lines on a terminal.
const REDRAW_INTERVAL: Duration = Duration::from_millis(100);

/// The progress of a change of all. A command shorter than the interval shows nothing.
pub(super) struct Progress {
    /// What is done to the events, such as `requeued`.
    done: &'static str,
    total: i64,
    is_terminal: bool,
    shown_at: Instant,
    is_drawn: bool,
}

impl Progress {
    /// Of that many events.
    pub(super) fn of(done: &'static str, total: i64) -> Self {
        Self { done, total, is_terminal: io::stderr().is_terminal(), shown_at: Instant::now(), is_drawn: false }
    }

    pub(super) fn show(&mut self, events: i64) {
        let interval = if self.is_terminal { REDRAW_INTERVAL } else { LINE_INTERVAL };
        if self.shown_at.elapsed() < interval {
            return;
        }
        self.shown_at = Instant::now();
        let text = format!("{} {} of {}", self.done, grouped(events), grouped(self.total));
        // The command goes on even if nobody can see how far it is.
        if self.is_terminal {
            self.is_drawn = true;
            drop(write!(io::stderr(), "\r\x1b[K{text}"));
        } else {
            drop(writeln!(io::stderr(), "{text}"));
        }
    }
}

/// Clears the redrawn line, so that whatever is printed next begins at the left.
impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_drawn {
            drop(write!(io::stderr(), "\r\x1b[K"));
        }
    }
}

/// A number with a comma between each three digits.
fn grouped(number: i64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn digits_are_grouped_in_threes() {
        let numbers = [0, 999, 1000, 125_000, 2_500_000, 12_345_678];
        assert_eq!(numbers.map(grouped), ["0", "999", "1,000", "125,000", "2,500,000", "12,345,678"]);
    }
}
