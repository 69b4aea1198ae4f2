//! The 4-bit format where no file can tell: any codebook, any byte, any scale, any shape, and parts that do not fit.

use half::{bf16, f16};
use lora_kernels::nf4::{self, Absmax, Codebook, DYNAMIC_MAP, NestedAbsmax, Nesting, Nf4Matrix, QuantType};
use lora_kernels::{DType, Element, Error, Tensor};
use proptest::prelude::*;

/// `(packed, absmax)` of `x`.
fn quantize<T: Element>(x: &[T], blocksize: usize, codebook: &Codebook) -> (Vec<u8>, Vec<f32>) {
    let mut packed = vec![0xff; nf4::packed_len(x.len())];
    let mut absmax = vec![f32::INFINITY; nf4::block_count(x.len(), blocksize)];
    nf4::quantize(x, blocksize, codebook, &mut packed, &mut absmax).unwrap();
    (packed, absmax)
}

fn dequantize<T: Element>(
    packed: &[u8],
    absmax: &[f32],
    blocksize: usize,
    codebook: &Codebook,
    n: usize,
) -> Vec<T> {
    let mut out = vec![T::from_f32(7.0); n];
    nf4::dequantize(packed, absmax, blocksize, codebook, &mut out).unwrap();
    out
}

fn nibble(packed: &[u8], i: usize) -> u8 {
    if i.is_multiple_of(2) { packed[i / 2] >> 4 } else { packed[i / 2] & 15 }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn blocksizes() -> impl Strategy<Value = usize> {
    prop::sample::select(nf4::BLOCKSIZES.to_vec())
}

/// Elements of every size that a weight may have, with zeros of both signs.
fn elements(len: impl Into<prop::collection::SizeRange>) -> impl Strategy<Value = Vec<f32>> {
    let element = prop_oneof![
        8 => -1.0f32..1.0,
        1 => (-30i32..30).prop_map(|e| 2f32.powi(e)),
        1 => prop::sample::select(vec![0.0, -0.0]),
    ];
    prop::collection::vec(element, len)
}

/// A codebook in no order, with values twice.
fn codebooks() -> impl Strategy<Value = Codebook> {
    let custom = prop::array::uniform16((-16i32..=16).prop_map(|i| i as f32 / 16.0))
        .prop_map(|values| Codebook::from_values(values).unwrap());
    prop_oneof![Just(Codebook::nf4()), Just(Codebook::fp4()), custom]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// No value of the codebook is nearer to an element than the one that its code stands for.
    #[test]
    fn codes_are_the_nearest(x in elements(0..700), blocksize in blocksizes(), codebook in codebooks()) {
        let (packed, absmax) = quantize(&x, blocksize, &codebook);
        for (i, &x) in x.iter().enumerate() {
            let scale = f64::from(absmax[i / blocksize]);
            let error = |value: f32| (f64::from(x) - f64::from(value) * scale).abs();
            let best = codebook.values().iter().map(|&v| error(v)).fold(f64::INFINITY, f64::min);
            let ours = error(codebook.values()[usize::from(nibble(&packed, i))]);
            // Thresholds and x / absmax are rounded to f32; FP4's thresholds are decimals of seven digits (6e-7).
            prop_assert!(ours <= best + scale * 1.2e-6, "{x} of {scale}: {ours} {best}");
        }
        for (absmax, block) in absmax.iter().zip(x.chunks(blocksize)) {
            prop_assert_eq!(*absmax, block.iter().fold(0.0, |m: f32, x| m.max(x.abs())));
        }
        if x.len() % 2 == 1 {
            prop_assert_eq!(packed[x.len() / 2] & 15, codebook.code(0.0));
        }
    }

    /// What has been quantised once loses nothing more, in any type.
    #[test]
    fn quantising_again_changes_nothing(x in elements(0..700), blocksize in blocksizes()) {
        fn again<T: Element>(x: &[f32], blocksize: usize) -> Result<(), TestCaseError> {
            let x: Vec<T> = x.iter().map(|&x| T::from_f32(x / 1024.0)).collect();
            let nf4 = Codebook::nf4();
            let (packed, absmax) = quantize(&x, blocksize, &nf4);
            // f16 has no room below a small scale.
            prop_assume!(T::DTYPE != DType::F16 || absmax.iter().all(|&a| a == 0.0 || a > 1e-3));
            let values = dequantize::<T>(&packed, &absmax, blocksize, &nf4, x.len());
            prop_assert_eq!(quantize(&values, blocksize, &nf4), (packed, absmax));
            Ok(())
        }
        again::<f32>(&x, blocksize)?;
        again::<bf16>(&x, blocksize)?;
        again::<f16>(&x, blocksize)?;
    }

    /// Denormal and huge blocks have the codes of ordinary ones: scaling by a power of two changes the scale alone.
    #[test]
    fn scale_does_not_matter(x in prop::collection::vec(-4096i32..4096, 1..300), blocksize in blocksizes(), e in -149i32..114) {
        let ordinary: Vec<f32> = x.iter().map(|&x| x as f32).collect();
        let scaled: Vec<f32> = x.iter().map(|&x| (f64::from(x) * 2f64.powi(e)) as f32).collect();
        for codebook in [Codebook::nf4(), Codebook::fp4()] {
            let (packed, absmax) = quantize(&scaled, blocksize, &codebook);
            let (wanted, ordinary_absmax) = quantize(&ordinary, blocksize, &codebook);
            prop_assert_eq!(&packed, &wanted);
            let wanted: Vec<f32> = ordinary_absmax.iter().map(|&a| (f64::from(a) * 2f64.powi(e)) as f32).collect();
            prop_assert_eq!(bits(&absmax), bits(&wanted));
        }
    }

    /// Any run of elements, from any element on.
    #[test]
    fn decoding_a_part(
        x in elements(1..700), blocksize in blocksizes(), nested: bool, from: prop::sample::Index, to: prop::sample::Index,
    ) {
        let nesting = if nested { Nesting::Nested } else { Nesting::Plain };
        let matrix = Nf4Matrix::quantize(&x, [x.len()], blocksize, &Codebook::nf4(), nesting).unwrap();
        let (from, to) = (from.index(x.len() + 1), to.index(x.len() + 1));
        let range = from.min(to)..from.max(to);
        let mut part = vec![bf16::NAN; range.len()];
        matrix.decode(range.start, &mut part).unwrap();
        prop_assert_eq!(part, &matrix.dequantize::<bf16>()[range]);
    }

    /// A shape is only a shape.
    #[test]
    fn rows_do_not_matter(rows in 0usize..12, columns in 0usize..90, blocksize in blocksizes(), seed: u32) {
        let x: Vec<f16> = (0..rows * columns).map(|i| f16::from_f32((i as u32 ^ seed) as f32 % 17.0 - 8.0)).collect();
        let flat = Nf4Matrix::quantize(&x, [x.len()], blocksize, &Codebook::nf4(), Nesting::Plain).unwrap();
        let matrix = Nf4Matrix::quantize(&x, [rows, columns], blocksize, &Codebook::nf4(), Nesting::Plain).unwrap();
        prop_assert_eq!(matrix.packed(), flat.packed());
        prop_assert_eq!(matrix.absmax(), flat.absmax());
        let restored = matrix.dequantize_tensor();
        prop_assert_eq!(restored.shape(), [rows, columns]);
    }

    /// The 8-bit code is the one at which the CUDA kernel's binary search ends, also halfway between two values.
    #[test]
    fn eight_bit_codes(x in prop::collection::vec(-1.0f32..=1.0, 1..300)) {
        let mut x = x;
        x.push(1.0);
        let nested = nf4::nest_about(&x, 0.0);
        for (block, x) in x.chunks(256).enumerate() {
            let absmax = x.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
            prop_assert_eq!(nested.absmax()[block], absmax);
            for (i, x) in x.iter().enumerate() {
                prop_assert_eq!(nested.q()[block * 256 + i], binary_search(x * (1.0 / absmax)));
            }
        }
    }
}

/// bitsandbytes' search for the nearest of 256 values: from index 127, in steps that halve, keeping the neighbours that
/// were passed on either side.
fn binary_search(x: f32) -> u8 {
    let (mut pivot, mut lower, mut upper) = (127, 0, 255);
    for step in [64, 32, 16, 8, 4, 2, 1] {
        if x > DYNAMIC_MAP[pivot] {
            lower = pivot;
            pivot += step;
        } else {
            upper = pivot;
            pivot -= step;
        }
    }
    let middle = |neighbour: usize| (DYNAMIC_MAP[neighbour] + DYNAMIC_MAP[pivot]) * 0.5;
    let index = match x > DYNAMIC_MAP[pivot] {
        true if x > middle(upper) => upper,
        false if x < middle(lower) => lower,
        _ => pivot,
    };
    index as u8
}

#[test]
fn eight_bit_ties_go_to_the_even_index() {
    for i in 0..255 {
        let middle = (DYNAMIC_MAP[i] + DYNAMIC_MAP[i + 1]) * 0.5;
        let q = nf4::nest_about(&[1.0, middle, middle.next_down(), middle.next_up()], 0.0).q().to_vec();
        assert_eq!(usize::from(q[1]), i + i % 2, "between {i} and {}", i + 1);
        assert_eq!(
            q[1..],
            [middle, middle.next_down(), middle.next_up()].map(binary_search),
            "about {middle}"
        );
    }
}

/// `value` to nearest even in a type of `digits` binary digits whose smallest step is `2^smallest`.
fn rounded(value: f64, digits: i32, smallest: i32, largest: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let exponent = ((value.to_bits() >> 52 & 0x7ff) as i32) - 1023;
    let step = 2f64.powi((exponent - digits + 1).max(smallest));
    let rounded = (value / step).round_ties_even() * step;
    if rounded.abs() > largest { f64::INFINITY.copysign(value) } else { rounded }
}

/// Every byte under scales of every kind: the product, rounded to f32 and then to the type.
#[test]
fn every_byte() {
    let denormal = f32::from_bits(1);
    let scales = [
        1.0,
        -1.0,
        0.02,
        -3.7,
        0.0,
        -0.0,
        1e-38,
        1e-42,
        -1e-44,
        denormal,
        6e-8,
        65504.0,
        1e5,
        3e38,
        f32::MAX,
        f32::MIN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
    ];
    fn check<T: Element>(codebook: &Codebook, scale: f32, to_t: impl Fn(f64) -> f64) {
        // A block of 512 elements is the 256 bytes.
        let packed: Vec<u8> = (0..=255).collect();
        let out = dequantize::<T>(&packed, &[scale], 512, codebook, 512);
        for (i, out) in out.iter().enumerate() {
            let value = f64::from(codebook.values()[usize::from(nibble(&packed, i))]);
            let wanted = to_t(rounded(value * f64::from(scale), 24, -149, f32::MAX.into()));
            let out = out.to_f64();
            assert!(
                out.to_bits() == wanted.to_bits() || (out.is_nan() && wanted.is_nan()),
                "{scale} {i} {out} {wanted}"
            );
        }
    }
    for codebook in [Codebook::nf4(), Codebook::fp4(), Codebook::from_values([0.3; 16]).unwrap()] {
        for scale in scales {
            check::<f32>(&codebook, scale, |v| v);
            check::<bf16>(&codebook, scale, |v| rounded(v, 8, -133, bf16::MAX.into()));
            check::<f16>(&codebook, scale, |v| rounded(v, 11, -24, f16::MAX.into()));
        }
    }
}

#[test]
fn zero_blocks() {
    for x in [[0.0f32; 96], [-0.0; 96]] {
        let (packed, absmax) = quantize(&x, 32, &Codebook::nf4());
        assert_eq!((packed, bits(&absmax)), (vec![0x77; 48], vec![0; 3]));
        let (packed, absmax) = quantize(&x, 64, &Codebook::fp4());
        assert_eq!((packed, bits(&absmax)), (vec![0; 48], vec![0; 2]));
    }
    let zeros = Nf4Matrix::quantize(&[0.0f32; 96], [96], 32, &Codebook::nf4(), Nesting::Nested).unwrap();
    assert_eq!(bits(&zeros.dequantize()), vec![0; 96]);
    let Absmax::Nested(nested) = zeros.absmax() else { panic!("nested") };
    assert_eq!((nested.q(), nested.absmax(), nested.offset()), (&[127; 3][..], &[0.0][..], 0.0));
}

/// What is not finite makes its block NaN, wherever it stands, and no other block.
#[test]
fn blocks_that_are_not_finite() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for at in [32, 40, 63, 64, 69] {
            let mut x: Vec<f32> = (0..70).map(|i| i as f32 - 30.0).collect();
            x[at] = bad;
            let (packed, absmax) = quantize(&x, 32, &Codebook::nf4());
            let values = dequantize::<f32>(&packed, &absmax, 32, &Codebook::nf4(), 70);
            for (i, value) in values.iter().enumerate() {
                assert_eq!(value.is_nan(), i / 32 == at / 32, "{bad} at {at}: {i} is {value}");
            }
            assert_eq!(absmax[at / 32].to_bits(), 0x7fc0_0000);
            assert_eq!(nibble(&packed, at), 7);

            let nested = Nf4Matrix::quantize(&x, [70], 32, &Codebook::nf4(), Nesting::Nested).unwrap();
            assert!(nested.dequantize::<f32>().iter().all(|v| v.is_nan()));
        }
    }
    let halves = [f16::INFINITY, f16::ONE];
    assert!(quantize(&halves, 32, &Codebook::nf4()).1[0].is_nan());
    let wide = [bf16::NAN, bf16::ONE];
    assert!(quantize(&wide, 32, &Codebook::nf4()).1[0].is_nan());
}

/// Tasks run in parallel; each block is what it is alone.
#[test]
fn blocks_are_independent() {
    for numel in [65_535, 65_536, 65_537, 131_072 + 4_095] {
        let x: Vec<bf16> =
            (0..numel).map(|i| bf16::from_f32(((i * 7919) % 4001) as f32 - (i % 97) as f32)).collect();
        for blocksize in [32, 4096] {
            let (packed, absmax) = quantize(&x, blocksize, &Codebook::nf4());
            let values = dequantize::<f32>(&packed, &absmax, blocksize, &Codebook::nf4(), numel);
            for (block, x) in x.chunks(blocksize).enumerate() {
                let (alone, scale) = quantize(x, blocksize, &Codebook::nf4());
                assert_eq!(packed[block * blocksize / 2..][..alone.len()], alone);
                assert_eq!(absmax[block], scale[0]);
                let alone = dequantize::<f32>(&alone, &scale, blocksize, &Codebook::nf4(), x.len());
                assert_eq!(values[block * blocksize..][..x.len()], alone);
            }
        }
    }
}

/// More elements than 32 bits count. The memory is never touched but for its end.
#[test]
#[cfg(target_pointer_width = "64")]
fn more_than_two_to_the_31() {
    let numel = (1usize << 32) + 4096 + 33;
    let mut packed = vec![0u8; nf4::packed_len(numel)];
    let mut absmax = vec![0.0; nf4::block_count(numel, 4096)];
    *packed.last_mut().unwrap() = 0xf7;
    packed[1 << 31] = 0x0f;
    *absmax.last_mut().unwrap() = 2.0;
    absmax[1 << 20] = 3.0;
    let shape = [4, numel / 4, 1];
    assert!(
        Nf4Matrix::from_parts(
            shape,
            packed.clone(),
            Absmax::Plain(absmax.clone()),
            4096,
            Codebook::nf4(),
            DType::F32
        )
        .is_err()
    );
    let matrix =
        Nf4Matrix::from_parts([1, numel], packed, Absmax::Plain(absmax), 4096, Codebook::nf4(), DType::F32)
            .unwrap();
    let mut end = [0.0f32; 3];
    matrix.decode(numel - 3, &mut end).unwrap();
    assert_eq!(end, [-2.0, -2.0, 2.0]);
    let mut middle = [0.0f32; 4];
    matrix.decode((1 << 32) - 1, &mut middle).unwrap();
    assert_eq!(middle, [0.0, -3.0, 3.0, -3.0]);
}

/// The CUDA kernel's tree over magnitudes, as a table: above the threshold, the next code.
#[test]
fn fp4_is_the_tree_of_bitsandbytes() {
    const TREE: [(f32, u8); 7] = [
        (0.00260417, 0b001),
        (0.0859375, 0b110),
        (0.20833333, 0b111),
        (0.29166667, 0b100),
        (0.4166667, 0b101),
        (0.583333, 0b010),
        (0.8333333, 0b011),
    ];
    let tree = |x: f32| {
        let magnitude = TREE.iter().rev().find(|(t, _)| x.abs() > *t).map_or(0, |(_, code)| *code);
        magnitude | if x < 0.0 { 8 } else { 0 }
    };
    let fp4 = Codebook::fp4();
    let near = TREE.iter().flat_map(|&(t, _)| [t.next_down(), t, t.next_up()]);
    let grid = (0..=10_000).map(|i| i as f32 / 10_000.0);
    for x in near.chain(grid).chain([0.0, f32::from_bits(1), f32::MIN_POSITIVE]) {
        assert_eq!(fp4.code(x), tree(x), "{x}");
        assert_eq!(fp4.code(-x), tree(-x), "{}", -x);
    }
    // bitsandbytes makes them as sixteen numbers over twelve.
    let twelfths =
        [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0];
    let stored = Codebook::from_values(twelfths.map(|v: f32| v / 12.0)).unwrap();
    assert_eq!(stored.quant_type(), QuantType::Fp4);
    assert_eq!(
        (stored.values(), stored.thresholds(), stored.codes()),
        (fp4.values(), fp4.thresholds(), fp4.codes())
    );
}

#[test]
fn codebooks_of_any_order() {
    let nf4 = Codebook::nf4();
    assert_eq!(Codebook::from_values(*nf4.values()).unwrap(), nf4);
    assert_eq!((nf4.quant_type(), Codebook::fp4().quant_type()), (QuantType::Nf4, QuantType::Fp4));
    assert_eq!(nf4.codes(), &std::array::from_fn(|i| i as u8));

    let mut reversed = *nf4.values();
    reversed.reverse();
    let reversed = Codebook::from_values(reversed).unwrap();
    assert_eq!(reversed.quant_type(), QuantType::Custom);
    for x in (-1000..=1000).map(|i| i as f32 / 1000.0).chain(*nf4.thresholds()) {
        assert_eq!(reversed.code(x), 15 - nf4.code(x), "{x}");
    }

    // Of equal values the lowest code is taken.
    let steps = Codebook::from_values(std::array::from_fn(|i| [0.0, 1.0, -0.0, -1.0][i % 4])).unwrap();
    for (x, code) in [(-1.0, 3), (-0.6, 3), (-0.4, 0), (0.0, 0), (0.4, 0), (0.6, 1), (1.0, 1)] {
        assert_eq!(steps.code(x), code, "{x}");
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut values = *nf4.values();
        values[4] = bad;
        refused("values[4]", Codebook::from_values(values));
    }
}

fn refused<V: std::fmt::Debug>(wanted: &str, result: Result<V, Error>) {
    match result {
        Err(Error::Argument { argument, .. }) => assert_eq!(argument, wanted),
        other => panic!("{wanted}: {other:?}"),
    }
}

#[test]
fn parts_that_do_not_fit() {
    let build = |shape: &[usize], packed: usize, blocks: usize, blocksize: usize| {
        let absmax = Absmax::Plain(vec![0.0; blocks]);
        Nf4Matrix::from_parts(shape, vec![0; packed], absmax, blocksize, Codebook::nf4(), DType::BF16)
    };
    assert!(build(&[10, 13], 65, 3, 64).is_ok());
    assert!(build(&[], 1, 1, 64).is_ok(), "one element");
    assert!(build(&[5, 0], 0, 0, 64).is_ok());
    refused("packed", build(&[10, 13], 64, 3, 64));
    refused("packed", build(&[10, 13], 66, 3, 64));
    refused("packed", build(&[10, 13], 130, 3, 64));
    refused("absmax", build(&[10, 13], 65, 2, 64));
    refused("absmax", build(&[10, 13], 65, 4, 64));
    for blocksize in [0, 1, 16, 48, 63, 65, 8192, usize::MAX] {
        refused("blocksize", build(&[10, 13], 65, 3, blocksize));
    }
    refused("shape", build(&[1 << 40, 1 << 40], 65, 3, 64));
    refused("shape", build(&[usize::MAX], 65, 3, 64));
    refused("packed", build(&[usize::MAX >> 4], 65, 3, 64));
    refused("packed", build(&[1 << 40], 65, 3, 64));

    let nested = |q: usize, absmax: usize, blocksize: usize| {
        NestedAbsmax::from_parts(vec![0; q], vec![0.0; absmax], Box::new(DYNAMIC_MAP), 0.0, blocksize)
    };
    assert!(nested(257, 2, 256).is_ok());
    refused("nested.absmax", nested(257, 1, 256));
    refused("nested.absmax", nested(257, 3, 256));
    refused("nested.blocksize", nested(257, 2, 255));
    let absmax = Absmax::Nested(nested(4, 1, 256).unwrap());
    refused("absmax", Nf4Matrix::from_parts([10, 13], vec![0; 65], absmax, 64, Codebook::nf4(), DType::F32));
}

#[test]
fn slices_that_do_not_fit() {
    let x = [1.0f32; 100];
    let nf4 = Codebook::nf4();
    let (mut packed, mut absmax) = ([9u8; 50], [9.0; 2]);
    refused("packed", nf4::quantize(&x, 64, &nf4, &mut packed[..49], &mut absmax));
    refused("absmax", nf4::quantize(&x, 64, &nf4, &mut packed, &mut absmax[..1]));
    refused("blocksize", nf4::quantize(&x, 60, &nf4, &mut packed, &mut absmax));
    assert_eq!((packed, absmax), ([9; 50], [9.0; 2]));

    let mut out = [9.0f32; 100];
    refused("packed", nf4::dequantize(&packed[..49], &absmax, 64, &nf4, &mut out));
    refused("absmax", nf4::dequantize(&packed, &[1.0; 3], 64, &nf4, &mut out));
    refused("blocksize", nf4::dequantize(&packed, &absmax, 0, &nf4, &mut out));
    let matrix = Nf4Matrix::quantize(&x, [4, 25], 64, &nf4, Nesting::Plain).unwrap();
    refused("out", matrix.decode(1, &mut out));
    refused("out", matrix.decode(usize::MAX, &mut out));
    assert_eq!(out, [9.0; 100]);

    refused("data", Nf4Matrix::quantize(&x, [4, 26], 64, &nf4, Nesting::Plain));
    refused("data", Nf4Matrix::quantize(&x, [1 << 40, 1 << 40], 64, &nf4, Nesting::Plain));
    let tensor = Tensor::from_f32([100], &x, DType::F16).unwrap();
    refused("blocksize", Nf4Matrix::quantize_tensor(&tensor, 100, &nf4, Nesting::Nested));
}
