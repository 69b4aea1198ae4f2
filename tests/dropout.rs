//! Dropout's mask: the generator against its known answers, and which elements go.

use lora_kernels::Error;
use lora_kernels::cpu::{Dropout, philox4x32};

/// `kat_vectors` of Random123.
#[test]
fn known_answers() {
    let ones = u32::MAX;
    for (counter, key, words) in [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ] {
        assert_eq!(philox4x32(counter, key), words);
    }
}

/// The counter and the key, spelt out.
#[test]
fn an_element_goes_by_its_place() {
    let dropout = Dropout::new(0.25, 0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210).unwrap();
    assert_eq!(dropout.threshold(), 1 << 30);
    for (token, feature) in [(0, 0), (0, 3), (5, 4), (77, 4095), (u32::MAX as usize, 1 << 20)] {
        let counter = [feature as u32 / 4, token as u32, 0x7654_3210, 0xfedc_ba98];
        let word = philox4x32(counter, [0x89ab_cdef, 0x0123_4567])[feature % 4];
        assert_eq!(dropout.keeps(token, feature), word >= 1 << 30);
    }
    let piece = dropout.with_first_token(9);
    assert!((0..99).all(|k| piece.keeps(3, k) == dropout.keeps(12, k)));
    let mut features: Vec<f32> = (1..=99).map(|k| k as f32).collect();
    dropout.mask(12, 0.0, &mut features);
    for (k, feature) in features.into_iter().enumerate() {
        assert_eq!(feature, if dropout.keeps(12, k) { (k + 1) as f32 } else { 0.0 });
    }
}

/// As many go as should: a count of 2^18 independent elements is within six standard deviations.
#[test]
fn the_share_that_goes() {
    for p in [0.0, 0.05, 0.5, 0.999] {
        let dropout = Dropout::new(p, 1, 2).unwrap();
        let count = 1 << 18;
        let gone = (0..count).filter(|i| !dropout.keeps(i / 512, i % 512)).count() as f64;
        let (mean, p) = (f64::from(count as u32) * f64::from(p), f64::from(p));
        assert!((gone - mean).abs() <= 6.0 * (mean * (1.0 - p)).sqrt(), "{gone} of {mean}");
    }
    assert_eq!(Dropout::new(0.5, 0, 0).unwrap().scale(), 2.0);
    assert_eq!(Dropout::new(0.0, 0, 0).unwrap().scale(), 1.0);
}

#[test]
fn not_a_probability() {
    for p in [1.0, -0.1, f32::NAN, f32::INFINITY] {
        let Err(Error::Argument { argument, .. }) = Dropout::new(p, 0, 0) else { panic!("{p}") };
        assert_eq!(argument, "probability");
    }
}
