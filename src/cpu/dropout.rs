//! Dropout whose mask is never stored: every element's fate is a function of its place.

use crate::{Error, Result};

/// Dropout of the inputs of adapters: `dropout(x)[i, k] = x[i, k] / (1 - p)`, or 0 with probability `p`.
///
/// Whether an element stays is computed from its place by Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
/// as 1, 2, 3"), so that forward and backward, CPU and GPU, and any split of the work agree to the bit:
///
/// ```text
/// key     = (seed's low word, seed's high word)
/// counter = (k / 4, first_token + i mod 2^32, offset's low word, offset's high word)
/// x[i, k] stays  <=>  philox(counter, key)[k mod 4] >= floor(p 2^32)
/// ```
///
/// `offset` must differ between all uses of one seed: between the layers of a step, and between steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    probability: f32,
    seed: u64,
    offset: u64,
    first_token: u32,
}

impl Dropout {
    /// Dropout with the probability `probability`, 0 or more and less than 1.
    ///
    /// # Errors
    /// [`Error::Argument`] when it is not.
    pub fn new(probability: f32, seed: u64, offset: u64) -> Result<Self> {
        match (0.0..1.0).contains(&probability) {
            true => Ok(Self { probability, seed, offset, first_token: 0 }),
            false => Err(Error::argument("probability", "0 <= probability < 1", probability)),
        }
    }

    /// The same for a piece of a batch that begins with the batch's token `first_token`.
    pub fn with_first_token(self, first_token: u32) -> Self {
        Self { first_token, ..self }
    }

    /// The probability that an element is dropped.
    pub fn probability(&self) -> f32 {
        self.probability
    }

    /// The key.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The upper half of the counter.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The number of the first token.
    pub fn first_token(&self) -> u32 {
        self.first_token
    }

    /// `floor(p 2^32)`: a word below it drops its element.
    pub fn threshold(&self) -> u32 {
        (f64::from(self.probability) * 2f64.powi(32)) as u32
    }

    /// `1 / (1 - p)`, rounded once: what the elements that stay are multiplied by. [`super::lora_shrink`] and
    /// [`super::lora_shrink_transposed`] put it into their results, together with the adapter's scaling.
    pub fn scale(&self) -> f32 {
        (1.0 / (1.0 - f64::from(self.probability))) as f32
    }

    /// Whether element `feature` of token `token` stays. (Features above 2^34 repeat.)
    pub fn keeps(&self, token: usize, feature: usize) -> bool {
        self.words(token, feature / 4)[feature % 4] >= self.threshold()
    }

    /// Puts `zero` in the place of the features of a token that are dropped. The others are not scaled.
    pub fn mask<T: Copy>(&self, token: usize, zero: T, features: &mut [T]) {
        self.mask_from(token, 0, zero, features);
    }

    /// The same for features from `start` on, a multiple of 4.
    pub(crate) fn mask_from<T: Copy>(&self, token: usize, start: usize, zero: T, features: &mut [T]) {
        let threshold = self.threshold();
        for (quad, features) in (start / 4..).zip(features.chunks_mut(4)) {
            let words = self.words(token, quad).into_iter().zip(features);
            words.filter(|(word, _)| *word < threshold).for_each(|(_, feature)| *feature = zero);
        }
    }

    fn words(&self, token: usize, quad: usize) -> [u32; 4] {
        let token = self.first_token.wrapping_add(token as u32);
        let [key, upper] = [self.seed, self.offset].map(|word| [word as u32, (word >> 32) as u32]);
        philox4x32([quad as u32, token, upper[0], upper[1]], key)
    }
}

/// Philox4x32 with ten rounds, the function of Random123: four random words for a counter and a key.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let multiply = |a: u32, b: u32| {
        let product = u64::from(a) * u64::from(b);
        ((product >> 32) as u32, product as u32)
    };
    for _ in 0..10 {
        let (high0, low0) = multiply(0xD251_1F53, counter[0]);
        let (high1, low1) = multiply(0xCD9E_8D57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}
