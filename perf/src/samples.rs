//! What several runs of one measurement gave.

use serde::{Deserialize, Serialize};

/// The values of one figure, one a run.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Samples(Vec<f64>);

/// What is said of many values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// The one in the middle.
    pub median: f64,
    /// The one that at most one in a hundred exceeds.
    pub p99: f64,
}

impl Samples {
    /// Adds the value of one more run.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// How many runs there were.
    pub fn runs(&self) -> usize {
        self.0.len()
    }

    /// Each divided by what `others` has in its place.
    pub fn ratios(&self, others: &Samples) -> Samples {
        Samples(self.0.iter().zip(&others.0).map(|(ours, theirs)| ours / theirs).collect())
    }

    /// What is said of them; none if there was no run.
    pub fn spread(&self) -> Option<Spread> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        // The smallest value that at least `percent` of all do not exceed.
        let at = |percent: usize| sorted.get((sorted.len() * percent).div_ceil(100).max(1) - 1);
        Some(Spread { min: *sorted.first()?, median: *at(50)?, p99: *at(99)? })
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        Samples(values.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_the_last_percent_are_found_in_any_order() {
        let samples: Samples = (1..=200).rev().map(f64::from).collect();

        assert_eq!(samples.spread(), Some(Spread { min: 1.0, median: 100.0, p99: 198.0 }));
    }

    #[test]
    fn of_few_runs_the_largest_is_the_last_percent() {
        let samples: Samples = [5.0, 1.0, 3.0].into_iter().collect();

        assert_eq!(samples.spread(), Some(Spread { min: 1.0, median: 3.0, p99: 5.0 }));
        assert_eq!(Samples::default().spread(), None);
    }

    #[test]
    fn a_ratio_is_that_of_one_run() {
        let ours: Samples = [2.0, 9.0].into_iter().collect();
        let theirs: Samples = [1.0, 3.0].into_iter().collect();

        assert_eq!(ours.ratios(&theirs), [2.0, 3.0].into_iter().collect());
    }
}
