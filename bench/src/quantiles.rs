//! Exact quantiles: all latencies are kept.

/// In thousandths: the median.
pub(super) const P50: usize = 500;
pub(super) const P99: usize = 990;
pub(super) const P99_9: usize = 999;

/// Latencies in milliseconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Latencies(Vec<f64>);

impl Latencies {
    pub(super) fn of(mut milliseconds: Vec<f64>) -> Self {
        milliseconds.sort_unstable_by(f64::total_cmp);
        Self(milliseconds)
    }

    /// The smallest latency that this many thousandths of all do not exceed. NaN if there are none.
    pub(super) fn at(&self, thousandths: usize) -> f64 {
        let rank = (self.0.len() * thousandths).div_ceil(1000);
        self.0.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    /// NaN if there are none.
    pub(super) fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// From the shortest to the longest.
    pub(super) fn all(&self) -> &[f64] {
        &self.0
    }
}

/// The value in the middle, or the mean of the two in the middle. NaN if there are none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let (lower, upper) = (sorted.get(sorted.len().saturating_sub(1) / 2), sorted.get(sorted.len() / 2));
    lower.zip(upper).map_or(f64::NAN, |(lower, upper)| f64::midpoint(*lower, *upper))
}

#[cfg(test)]
mod tests {
    use super::{Latencies, P50, P99, P99_9, median};

    #[test]
    fn quantiles_are_latencies_that_occurred() {
        let latencies = Latencies::of((1..=1000).rev().map(f64::from).collect());
        assert_eq!((latencies.at(P50), latencies.at(P99), latencies.at(P99_9)), (500.0, 990.0, 999.0));
        assert_eq!(Latencies::of(vec![7.0]).at(P99_9), 7.0);
        assert!(Latencies::default().at(P50).is_nan());
    }

    #[test]
    fn the_mean_of_no_latencies_is_not_a_number() {
        assert_eq!(Latencies::of(vec![1.0, 1.0, 4.0]).mean(), 2.0);
        assert!(Latencies::default().mean().is_nan());
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_two() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
