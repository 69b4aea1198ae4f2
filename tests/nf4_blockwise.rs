//! Quantise, dequantise and double quantisation against what bitsandbytes stores and yields.

mod fixtures;

use std::cell::Cell;
use std::collections::HashSet;

use fixtures::{Fixture, size, text};
use half::{bf16, f16};
use lora_kernels::nf4::{self, Absmax, Codebook, NestedAbsmax, Nesting, Nf4Matrix};
use lora_kernels::tensor::Data;
use lora_kernels::{DType, Element, Tensor};
use serde_json::Value;
use sha2::{Digest, Sha256};

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn nibbles(packed: &[u8]) -> Vec<u8> {
    packed.iter().flat_map(|byte| [byte >> 4, byte & 15]).collect()
}

/// One case of `nf4_blockwise`.
struct Case<'a> {
    file: &'a Fixture,
    json: &'a Value,
    name: &'a str,
    blocksize: usize,
    input: Tensor,
}

impl<'a> Case<'a> {
    fn new(file: &'a Fixture, json: &'a Value) -> Self {
        let name = text(json, "name");
        Self {
            file,
            json,
            name,
            blocksize: size(json, "blocksize"),
            input: file.tensor(&format!("{name}.input")),
        }
    }

    fn key(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    fn has(&self, part: &str) -> bool {
        self.file.has(&self.key(part))
    }

    fn get<T: bytemuck::Pod>(&self, part: &str) -> Vec<T> {
        self.file.get(&self.key(part))
    }

    fn quantize(&self, nesting: Nesting) -> Nf4Matrix {
        Nf4Matrix::quantize_tensor(&self.input, self.blocksize, &Codebook::nf4(), nesting).unwrap()
    }

    /// The stored parts as a matrix.
    fn stored(&self, absmax: Absmax) -> Nf4Matrix {
        let shape = self.input.shape();
        Nf4Matrix::from_parts(
            shape,
            self.get("packed"),
            absmax,
            self.blocksize,
            Codebook::nf4(),
            self.input.dtype(),
        )
        .unwrap()
    }

    /// Blocks in which bitsandbytes' own backends store different bytes: those that the file lists, and short blocks
    /// below 1e-38, for which its torch backend stores 1e-38 as absmax (NOTES 1.7).
    fn informational(&self) -> HashSet<usize> {
        let listed = self.json["informational_blocks"].as_array();
        let mut blocks: HashSet<usize> =
            listed.into_iter().flatten().map(|b| b.as_u64().unwrap() as usize).collect();
        let full = self.input.numel() / self.blocksize;
        let tail = &self.input.to_f32()[full * self.blocksize..];
        if !tail.is_empty() && tail.iter().all(|x| x.abs() < 1e-38) {
            blocks.insert(full);
        }
        blocks
    }

    fn codes_are_bitsandbytes(&self) {
        let ours = self.quantize(Nesting::Plain);
        let informational = self.informational();
        let ambiguous: HashSet<usize> = if self.has("ambiguous_idx") {
            self.get::<i64>("ambiguous_idx").into_iter().map(|i| i as usize).collect()
        } else {
            HashSet::new()
        };
        let theirs = self.get::<f32>("absmax");
        for (block, (our, their)) in ours.absmax().dequantize().iter().zip(&theirs).enumerate() {
            if !informational.contains(&block) {
                assert_eq!(our.to_bits(), their.to_bits(), "{} absmax of block {block}", self.name);
            }
        }
        let (our, their) = (nibbles(ours.packed()), nibbles(&self.get::<u8>("packed")));
        assert_eq!(our.len(), their.len());
        for i in 0..our.len() {
            if !informational.contains(&(i / self.blocksize)) && !ambiguous.contains(&i) {
                assert_eq!(our[i], their[i], "{} code {i}", self.name);
            }
        }
        for block in informational {
            self.informational_block(&ours, block);
        }
    }

    /// Where bytes are not defined: no value is further from its element than half the widest step of the codebook, nor
    /// further than bitsandbytes' is (by more than the rounding of the product).
    fn informational_block(&self, ours: &Nf4Matrix, block: usize) {
        let range = block * self.blocksize..((block + 1) * self.blocksize).min(self.input.numel());
        let x = &self.input.to_f32()[range.clone()];
        let absmax = x.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        assert_eq!(ours.absmax().get(block), absmax);
        let theirs = self.stored(Absmax::Plain(self.get("absmax")));
        let (ours, theirs) = (&ours.dequantize::<f32>()[range.clone()], &theirs.dequantize::<f32>()[range]);
        let widest = (1.0 - 0.696_192_8) / 2.0; // between codes 0 and 1
        for ((&x, &our), &their) in x.iter().zip(ours).zip(theirs) {
            let error = |y: f32| (f64::from(y) - f64::from(x)).abs();
            // A product is off by half an ulp, and an ulp is 2^-149 at least.
            let rounding = f64::from(absmax) * 2f64.powi(-23) + 2f64.powi(-149);
            assert!(error(our) <= f64::from(absmax) * widest + rounding, "{} {x} -> {our}", self.name);
            assert!(error(our) <= error(their) + rounding, "{} {x} -> {our}, not {their}", self.name);
        }
    }

    fn values_are_bitsandbytes(&self) {
        let plain = self.stored(Absmax::Plain(self.get("absmax")));
        self.same(&plain.dequantize_tensor(), "dequant");
        let others = [(DType::F16, "dequant_f16"), (DType::BF16, "dequant_bf16")];
        for (dtype, part) in others.into_iter().filter(|(_, part)| self.has(part)) {
            self.same(&dequantize(&plain, dtype), part);
        }
    }

    fn same(&self, ours: &Tensor, part: &str) {
        assert_eq!(ours.shape(), self.input.shape(), "{}", self.key(part));
        assert!(ours.as_bytes() == self.file.bytes(&self.key(part)), "{}", self.key(part));
    }

    fn restored_absmax_is_bitsandbytes(&self) {
        let stored = Absmax::Nested(stored_nested(self.file, &self.key("dq")));
        let restored = self.get::<f32>("dq.absmax_dequant");
        assert_eq!(bits(&stored.dequantize()), bits(&restored), "{}", self.name);
        let matrix = self.stored(stored);
        if self.has("dq.dequant") {
            self.same(&matrix.dequantize_tensor(), "dq.dequant");
        } else {
            let hash = sha256(matrix.dequantize_tensor().as_bytes());
            assert_eq!(hash, text(self.json, "dq.dequant_sha256"), "{}", self.name);
        }
    }
}

fn stored_nested(file: &Fixture, prefix: &str) -> NestedAbsmax {
    let get = |part: &str| format!("{prefix}.{part}");
    let offset = file.get::<f32>(&get("offset"))[0];
    let (q, absmax) = (file.get(&get("qabsmax")), file.get(&get("nested_absmax")));
    NestedAbsmax::from_parts(q, absmax, Box::new(nf4::DYNAMIC_MAP), offset, nf4::NESTED_BLOCKSIZE).unwrap()
}

fn nested_codes_are_bitsandbytes(absmax: &[f32], theirs: &NestedAbsmax, name: &str) {
    // The mean is exact here, but for one rounding; theirs is a sum of f32 in some order: each of the n - 1 additions is
    // off by 2^-24 of the sum at most.
    let offset = nf4::nest(absmax).offset();
    let bound = offset * absmax.len() as f32 * 2f32.powi(-24);
    assert!((offset - theirs.offset()).abs() <= bound, "{name} {offset} {}", theirs.offset());

    let ours = nf4::nest_about(absmax, theirs.offset());
    assert_eq!(ours.q(), theirs.q(), "{name}");
    for (block, (our, their)) in ours.absmax().iter().zip(theirs.absmax()).enumerate() {
        // For a short block of zeros the torch backend stores its lower limit (NOTES 3.3).
        let wanted = if *their == 1e-38 { 0.0 } else { *their };
        assert_eq!(our.to_bits(), wanted.to_bits(), "{name} nested block {block}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn dequantize(matrix: &Nf4Matrix, dtype: DType) -> Tensor {
    let data: Data = match dtype {
        DType::F32 => Element::into_data(matrix.dequantize::<f32>()),
        DType::F16 => Element::into_data(matrix.dequantize::<f16>()),
        DType::BF16 => Element::into_data(matrix.dequantize::<bf16>()),
    };
    Tensor::new(matrix.shape(), data).unwrap()
}

fn each_case(check: impl Fn(&Case<'_>)) {
    for name in ["plain", "ragged", "special", "double_quant"] {
        let file = Fixture::open(&format!("nf4_blockwise/{name}"));
        for json in file.cases() {
            check(&Case::new(&file, json));
        }
    }
}

#[test]
fn codes_and_absmax() {
    each_case(|case| case.codes_are_bitsandbytes());
}

#[test]
fn values() {
    each_case(|case| case.values_are_bitsandbytes());
}

#[test]
fn double_quantisation() {
    let count = Cell::new(0);
    each_case(|case| {
        if case.has("dq.qabsmax") {
            case.restored_absmax_is_bitsandbytes();
            let nested = stored_nested(case.file, &case.key("dq"));
            nested_codes_are_bitsandbytes(&case.get::<f32>("absmax"), &nested, case.name);
            count.set(count.get() + 1);
        }
    });
    assert_eq!(count.get(), 77);
}

#[test]
fn codebooks() {
    let file = Fixture::open("nf4_blockwise/codebooks");
    let nf4 = Codebook::nf4();
    assert_eq!(bits(nf4.values()), bits(&file.get("nf4_code")));
    assert_eq!(bits(nf4.thresholds()), bits(&file.get("nf4_thresholds")));
    assert_eq!(bits(&nf4::DYNAMIC_MAP), bits(&file.get("dynamic_map_256")));
    let map = bytemuck::cast_slice(&nf4::DYNAMIC_MAP);
    assert_eq!(sha256(map), "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c");
}

/// Two layers of a real model, whole.
#[test]
fn real_weights() {
    for name in ["w0", "w1"] {
        let file = Fixture::open(&format!("real_minilm/{name}"));
        let (weight, blocksize) = (file.tensor("weight"), size(&file.json, "blocksize"));
        let plain = Nf4Matrix::quantize_tensor(&weight, blocksize, &Codebook::nf4(), Nesting::Plain).unwrap();
        assert!(plain.packed() == file.bytes("packed"), "{name}");
        let absmax = plain.absmax().dequantize();
        assert_eq!(bits(&absmax), bits(&file.get("absmax")), "{name}");

        let theirs = stored_nested(&file, "dq");
        nested_codes_are_bitsandbytes(&absmax, &theirs, name);
        let theirs = Absmax::Nested(theirs);
        assert_eq!(bits(&theirs.dequantize()), bits(&file.get("dq.absmax_dequant")), "{name}");
        let packed = file.get("packed");
        let nested =
            Nf4Matrix::from_parts(weight.shape(), packed, theirs, blocksize, Codebook::nf4(), weight.dtype())
                .unwrap();

        for (matrix, prefix) in [(&plain, ""), (&nested, "dq.")] {
            for dtype in DType::ALL {
                let hash = sha256(dequantize(matrix, dtype).as_bytes());
                assert_eq!(
                    hash,
                    text(&file.json["sha256"], &format!("{prefix}dequant_{dtype}")),
                    "{name} {dtype}"
                );
            }
        }
    }
}
