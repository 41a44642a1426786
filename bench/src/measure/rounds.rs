//! Pairs of rounds and what may be concluded from them: medians, spread, ratio.
//!
//! Seven rounds with ratios 1.02, 1.01, 1.90, 1.03, 1.02, 1.01 and 1.02 have the median 1.02: the round in which somebody else compiled
//! does not decide, and the spread says that it was there.

/// The fewest rounds from which a median is reported.
pub const LEAST_ROUNDS: usize = 5;

/// One figure from each round.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series(Vec<f64>);

impl Series {
    /// The figures, in the order of the rounds.
    pub fn new(figures: Vec<f64>) -> Self {
        Self(figures)
    }

    /// The figures, in the order of the rounds.
    pub fn figures(&self) -> &[f64] {
        &self.0
    }

    /// The middle one (the mean of the two middle ones); not a number where there is none.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Distance between first and third quartile, relative to the median: 0.1 means that half of the rounds lie within 10 %.
    pub fn spread(&self) -> f64 {
        (self.quantile(0.75) - self.quantile(0.25)) / self.median()
    }

    /// Where the true median lies with a probability of at least 90 %, whatever the distribution: between the k-th smallest and the k-th
    /// largest figure, k the largest that still gives that (the sign test). Of 5 figures these are the least and the greatest, of 9 the second
    /// of either end; of fewer than 5 nothing is known.
    pub fn interval(&self) -> (f64, f64) {
        let count = self.0.len();
        if count < LEAST_ROUNDS {
            return (f64::NEG_INFINITY, f64::INFINITY);
        }
        // Outside at the lower end: fewer than `k` of `count` fair coins fall that way; the upper end is the same.
        let (mut outside, mut ways, mut left_out) = (0.0, 1.0, 0);
        while left_out < count / 2 {
            outside += 2.0 * ways * 0.5_f64.powi(count as i32);
            if outside > 0.1 {
                break;
            }
            ways *= (count - left_out) as f64 / (left_out + 1) as f64;
            left_out += 1;
        }
        let sorted = self.sorted();
        let k = left_out.max(1);
        (sorted[k - 1], sorted[count - k])
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    fn quantile(&self, quantile: f64) -> f64 {
        let sorted = self.sorted();
        let Some(last) = sorted.len().checked_sub(1) else {
            return f64::NAN;
        };
        let at = quantile * last as f64;
        let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
        low + (high - low) * at.fract()
    }
}

/// What both sides returned, round by round.
#[derive(Clone, Debug)]
pub struct Pairs<A, B = A> {
    /// The first side: native, or the reference.
    pub first: Vec<A>,
    /// The second side: remote, or the subject.
    pub second: Vec<B>,
}

impl<A, B> Pairs<A, B> {
    /// One figure of each round, for both sides.
    pub fn series(&self, of_first: impl Fn(&A) -> f64, of_second: impl Fn(&B) -> f64) -> (Series, Series) {
        let first = self.first.iter().map(of_first).collect();
        let second = self.second.iter().map(of_second).collect();
        (Series(first), Series(second))
    }

    /// Second over first, round by round.
    pub fn ratios(&self, of_first: impl Fn(&A) -> f64, of_second: impl Fn(&B) -> f64) -> Series {
        let (first, second) = self.series(of_first, of_second);
        Series(first.0.iter().zip(&second.0).map(|(first, second)| second / first).collect())
    }
}

/// Runs both sides `rounds` times (at least [`LEAST_ROUNDS`]) in turns, with the order inside a pair reversed from round to round, so that
/// neither a machine that slows down nor whoever went before favours a side. Each is told its round, from 0.
///
/// # Errors
/// What a side answered.
pub fn interleave<A, B, E>(
    rounds: usize,
    mut first: impl FnMut(usize) -> Result<A, E>,
    mut second: impl FnMut(usize) -> Result<B, E>,
) -> Result<Pairs<A, B>, E> {
    let rounds = rounds.max(LEAST_ROUNDS);
    let mut pairs = Pairs { first: Vec::with_capacity(rounds), second: Vec::with_capacity(rounds) };
    for round in 0..rounds {
        if round % 2 == 0 {
            pairs.first.push(first(round)?);
            pairs.second.push(second(round)?);
        } else {
            pairs.second.push(second(round)?);
            pairs.first.push(first(round)?);
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn one_disturbed_round_does_not_decide() {
        let series = Series::new(vec![1.02, 1.01, 1.90, 1.03, 1.02, 1.01, 1.02]);
        assert!((series.median() - 1.02).abs() < 1e-9);
        assert!(series.spread() < 0.02);
        assert!(Series::default().median().is_nan());
        assert!((Series::new(vec![1.0, 2.0]).median() - 1.5).abs() < 1e-9);
    }

    #[test]
    fn the_interval_leaves_out_what_a_tenth_of_chance_allows() {
        let of = |count: u32| Series::new((1..=count).map(f64::from).collect()).interval();
        // Tables of the sign test: 5 to 7 figures need all, 8 to 10 leave out one at each end, 15 leave out three.
        assert_eq!(
            [5, 7, 8, 10, 11, 13, 15].map(of),
            [(1.0, 5.0), (1.0, 7.0), (2.0, 7.0), (2.0, 9.0), (3.0, 9.0), (4.0, 10.0), (4.0, 12.0)]
        );
        assert_eq!(of(4), (f64::NEG_INFINITY, f64::INFINITY));
    }

    #[test]
    fn rounds_alternate_and_a_ratio_compares_neighbours() {
        let order = RefCell::new(String::new());
        let side = |name: char| {
            let order = &order;
            move |round: usize| {
                order.borrow_mut().push(name);
                Ok::<_, ()>(if name == 'n' { 100.0 } else { 110.0 } * (1 << round) as f64)
            }
        };
        let pairs = interleave(1, side('n'), side('r')).unwrap();
        assert_eq!(order.borrow().as_str(), "nrrnnrrnnr", "at least five rounds, the order reversed each time");
        let ratios = pairs.ratios(|figure| *figure, |figure| *figure);
        assert!(ratios.figures().iter().all(|ratio| (ratio - 1.1).abs() < 1e-9));
        assert!(interleave(1, |_| Err::<(), _>("broken"), |_| Ok::<(), _>(())).is_err());
    }
}
