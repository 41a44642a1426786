//! The one source of chance in the simulation and in the suites: a number that always unrolls into the same choices.
//!
//! `Seed::new(7).below(6)` is the same throw of a die on every machine and in every version, so a failing seed stays a test for ever;
//! that promise is why this is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in ten lines, and not a library's "small" generator.

/// A stream of choices from one number.
#[derive(Clone, Debug)]
pub struct Seed(u64);

impl Seed {
    /// The stream that belongs to `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A stream of its own, for a part whose choices should not shift those of the rest.
    pub fn split(&mut self) -> Self {
        Self(self.draw())
    }

    /// 64 random bits.
    pub const fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`; 0 where `end` is 0.
    pub fn below(&mut self, end: u64) -> u64 {
        // Scaling by the high half of a product: the bias is below 2^-32 for every `end` used here.
        ((u128::from(self.draw()) * u128::from(end)) >> 64) as u64
    }

    /// A number from `low` to `high`, both included; `low` where the range is empty.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low.saturating_add(self.below(high.saturating_sub(low).saturating_add(1)))
    }

    /// True `permille` times in a thousand.
    pub fn chance(&mut self, permille: u32) -> bool {
        self.below(1000) < u64::from(permille)
    }

    /// Fills `bytes`.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let drawn = self.draw().to_le_bytes();
            for (byte, drawn) in chunk.iter_mut().zip(drawn) {
                *byte = drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_unrolls_the_same_for_ever() {
        // The published test vector of SplitMix64 for seed 1234567.
        let mut seed = Seed::new(1_234_567);
        assert_eq!(
            [seed.draw(), seed.draw(), seed.draw()],
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }

    #[test]
    fn choices_stay_in_their_range() {
        let mut seed = Seed::new(1);
        for _ in 0..1000 {
            assert!(seed.below(6) < 6);
            assert!((3..=5).contains(&seed.between(3, 5)));
        }
        assert_eq!(seed.below(0), 0);
        assert_eq!(seed.between(9, 9), 9);
        assert!(!seed.chance(0));
        assert!(seed.chance(1000));
    }
}
