//! An adaptive binary range coder (Martin 1979; the carry as in LZMA), and the numbers that are coded with it.

/// Codes bits: an encoder writes those that it is given, a decoder disregards them; both return the bit. So a format is
/// written down once, for both.
pub trait Coder {
    /// One bit, of which `probability` learns.
    fn bit(&mut self, probability: &mut Probability, bit: bool) -> bool;

    /// The low `count` bits, all equally likely, the highest first.
    fn raw(&mut self, count: u32, bits: u32) -> u32 {
        (0..count).rev().fold(0, |value, i| {
            let mut even = Probability::EVEN;
            value << 1 | u32::from(self.bit(&mut even, (bits >> i) & 1 == 1))
        })
    }
}

/// How likely a bit is 0, of 2^15.
#[derive(Debug, Clone, Copy)]
pub struct Probability(u16);

impl Probability {
    const BITS: u32 = 15;
    /// How slowly it learns.
    const RATE: u32 = 5;
    pub const EVEN: Self = Self(1 << (Self::BITS - 1));

    fn learn(&mut self, bit: bool) {
        match bit {
            false => self.0 += ((1 << Self::BITS) - self.0) >> Self::RATE,
            true => self.0 -= self.0 >> Self::RATE,
        }
    }
}

/// Below this a range is made 256 times as large, by one more byte.
const NARROW: u32 = 1 << 24;

/// Writes bits to bytes.
pub struct Encoder {
    low: u64,
    range: u32,
    /// The last byte that is out but for a carry, and how many bytes of 0xff follow it.
    last: Option<u8>,
    full: usize,
    bytes: Vec<u8>,
}

impl Encoder {
    pub fn new() -> Self {
        Self { low: 0, range: u32::MAX, last: None, full: 0, bytes: Vec::new() }
    }

    fn shift(&mut self) {
        let (carry, byte) = ((self.low >> 32) as u8, (self.low >> 24) as u8);
        if carry == 0 && byte == 0xff {
            self.full += 1;
        } else {
            self.bytes.extend(self.last.map(|last| last + carry));
            self.bytes.extend(std::iter::repeat_n(0xffu8.wrapping_add(carry), self.full));
            (self.last, self.full) = (Some(byte), 0);
        }
        self.low = (self.low << 8) & 0xffff_ffff;
    }

    pub fn finish(mut self) -> Vec<u8> {
        (0..5).for_each(|_| self.shift());
        self.bytes
    }
}

impl Coder for Encoder {
    #[inline]
    fn bit(&mut self, probability: &mut Probability, bit: bool) -> bool {
        let bound = (self.range >> Probability::BITS) * u32::from(probability.0);
        if bit {
            self.low += u64::from(bound);
            self.range -= bound;
        } else {
            self.range = bound;
        }
        probability.learn(bit);
        while self.range < NARROW {
            self.range <<= 8;
            self.shift();
        }
        bit
    }
}

/// Reads bits from bytes; zeros when there are no more.
pub struct Decoder<'a> {
    code: u32,
    range: u32,
    bytes: &'a [u8],
    next: usize,
}

impl<'a> Decoder<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        let mut decoder = Self { code: 0, range: u32::MAX, bytes, next: 0 };
        (0..4).for_each(|_| decoder.shift());
        decoder
    }

    fn shift(&mut self) {
        self.code = self.code << 8 | u32::from(self.bytes.get(self.next).copied().unwrap_or(0));
        self.next += 1;
    }

    /// Whether exactly the given bytes have been read.
    pub fn is_done(&self) -> bool {
        self.next == self.bytes.len()
    }
}

impl Coder for Decoder<'_> {
    #[inline]
    fn bit(&mut self, probability: &mut Probability, _: bool) -> bool {
        let bound = (self.range >> Probability::BITS) * u32::from(probability.0);
        let bit = self.code >= bound;
        if bit {
            self.code -= bound;
            self.range -= bound;
        } else {
            self.range = bound;
        }
        probability.learn(bit);
        while self.range < NARROW {
            self.range <<= 8;
            self.shift();
        }
        bit
    }
}

/// Integers that are mostly near zero.
#[derive(Debug, Clone)]
pub struct Integers {
    zero: Probability,
    /// Whether the sign is the expected one.
    sign: Probability,
    /// Whether the magnitude has more bits than this.
    longer: [Probability; 32],
    /// The second highest bit, for each number of bits.
    second: [Probability; 33],
}

impl Integers {
    pub const NEW: Self = Self {
        zero: Probability::EVEN,
        sign: Probability::EVEN,
        longer: [Probability::EVEN; 32],
        second: [Probability::EVEN; 33],
    };

    /// One integer; when it is not 0, it is thought to be negative or not.
    #[inline]
    pub fn code(&mut self, coder: &mut impl Coder, value: i32, negative: bool) -> i32 {
        if !coder.bit(&mut self.zero, value != 0) {
            return 0;
        }
        let sign = coder.bit(&mut self.sign, (value < 0) != negative) != negative;
        let magnitude = value.unsigned_abs();
        let mut length = 1;
        while length < 32 && coder.bit(&mut self.longer[length], magnitude >> length != 0) {
            length += 1;
        }
        let mut coded = 1u32;
        if length >= 2 {
            let second = (magnitude >> (length - 2)) & 1 == 1;
            coded = 2 | u32::from(coder.bit(&mut self.second[length], second));
            let rest = length as u32 - 2;
            coded = coded << rest | coder.raw(rest, magnitude);
        }
        if sign { (coded as i32).wrapping_neg() } else { coded as i32 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn integers_come_back(values in prop::collection::vec(
            (prop_oneof![any::<i32>(), -3..3i32, Just(i32::MIN), Just(i32::MAX)], any::<bool>()), 0..300)) {
            let mut encoder = Encoder::new();
            let mut model = Integers::NEW;
            for &(value, negative) in &values {
                prop_assert_eq!(model.code(&mut encoder, value, negative), value);
            }
            let bytes = encoder.finish();
            let (mut decoder, mut model) = (Decoder::new(&bytes), Integers::NEW);
            for &(value, negative) in &values {
                prop_assert_eq!(model.code(&mut decoder, 0, negative), value);
            }
            prop_assert!(decoder.is_done());
        }

        #[test]
        fn any_bytes_decode(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let (mut decoder, mut model) = (Decoder::new(&bytes), Integers::NEW);
            for _ in 0..1000 {
                model.code(&mut decoder, 0, false);
            }
        }
    }

    /// A carry runs through bytes that are full.
    #[test]
    fn carries_come_back() {
        for ones in 0..2000 {
            let bits = |i: usize| i % 97 != 3 || i > ones;
            let mut encoder = Encoder::new();
            let mut p = Probability::EVEN;
            (0..2000).for_each(|i| {
                encoder.bit(&mut p, bits(i));
            });
            let bytes = encoder.finish();
            let (mut decoder, mut p) = (Decoder::new(&bytes), Probability::EVEN);
            assert!((0..2000).all(|i| decoder.bit(&mut p, false) == bits(i)), "{ones}");
        }
    }
}
