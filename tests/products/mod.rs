//! Products with adapters: made up, run on a device, and known in f64.

#![allow(dead_code, reason = "no test needs all of it")]
#![allow(clippy::large_enum_variant, reason = "there are a few of them at a time")]

pub mod transposed;

use half::f16;
use lora_kernels::cuda::{
    AbsmaxView, AdapterTable, AdapterView, LowRank, NestedView, Nf4View, lora_expand, lora_shrink, matmul,
};
use lora_kernels::nf4::{Absmax, Codebook, Nesting, Nf4Matrix};
use lora_kernels::{Element, Result, cpu};
use lora_kernels_devices::{Buffer, Counters, Device};

/// Numbers that look random, and are the same every time.
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Sixty-four bits (splitmix64).
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn number(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    pub fn many<T: Element>(&mut self, len: usize) -> Vec<T> {
        (0..len).map(|_| T::from_f32(self.number())).collect()
    }
}

pub fn widen<T: Element>(values: &[T]) -> Vec<f32> {
    values.iter().map(|v| v.to_f32()).collect()
}

/// Equal to the bit.
pub fn same<T: Element>(a: &[T], b: &[T]) -> bool {
    bytemuck::cast_slice::<T, u8>(a) == bytemuck::cast_slice::<T, u8>(b)
}

#[derive(Debug, Clone)]
pub enum Weight<T> {
    Dense(Vec<T>),
    Nf4(Nf4Matrix),
}

#[derive(Debug, Clone)]
pub struct Adapter<A> {
    pub lora_a: Vec<A>,
    pub lora_b: Vec<A>,
    pub rank: usize,
    pub scaling: f32,
}

/// A product, on the host.
#[derive(Debug, Clone)]
pub struct Problem<T, A = T> {
    pub tokens: usize,
    pub n: usize,
    pub k: usize,
    pub x: Vec<T>,
    pub weight: Weight<T>,
    pub bias: Option<Vec<T>>,
    pub row_scale: Option<Vec<f32>>,
    /// None: no low-rank branch at all.
    pub adapters: Option<Vec<Adapter<A>>>,
    pub index: Option<Vec<i32>>,
}

/// What came of it.
pub struct Outcome<T> {
    pub plan: matmul::Plan,
    pub y: Vec<T>,
    pub counters: Option<Counters>,
}

impl<T: Element, A: Element> Problem<T, A> {
    pub fn dense(tokens: usize, n: usize, k: usize) -> Self {
        let mut numbers = Numbers::new((tokens + 1000 * n + 1_000_000 * k) as u64);
        Self {
            tokens,
            n,
            k,
            x: numbers.many(tokens * k),
            weight: Weight::Dense(numbers.many(n * k)),
            bias: None,
            row_scale: None,
            adapters: None,
            index: None,
        }
    }

    pub fn nf4(tokens: usize, n: usize, k: usize, blocksize: usize) -> Self {
        Self::dense(tokens, n, k).in_4_bits(blocksize, &Codebook::nf4(), Nesting::Plain)
    }

    /// The same with its weight quantised. The scale of the numbers changes from block to block, so that a scale of the
    /// wrong block does not go unseen.
    pub fn in_4_bits(mut self, blocksize: usize, codebook: &Codebook, nesting: Nesting) -> Self {
        let mut numbers = Numbers::new(blocksize as u64);
        let blocks: Vec<f32> = (0..(self.n * self.k).div_ceil(blocksize))
            .map(|_| [0.25, 0.5, 1.0, 1.5][numbers.below(4)])
            .collect();
        let values: Vec<f32> =
            (0..self.n * self.k).map(|i| numbers.number() * blocks[i / blocksize]).collect();
        let nf4 = Nf4Matrix::quantize(&values, [self.n, self.k], blocksize, codebook, nesting).unwrap();
        self.weight = Weight::Nf4(nf4);
        self
    }

    pub fn with_bias_and_scale(mut self) -> Self {
        let mut numbers = Numbers::new(3);
        self.bias = Some(numbers.many(self.n));
        self.row_scale = Some((0..self.n).map(|_| 1.0 + numbers.number() / 2.0).collect());
        self
    }

    /// Adapters of these ranks; tokens choose among them, and none, at random.
    pub fn with_adapters(mut self, ranks: &[usize]) -> Self {
        let mut numbers = Numbers::new(4);
        self.adapters = Some(
            ranks
                .iter()
                .map(|&rank| Adapter {
                    lora_a: numbers.many(rank * self.k),
                    lora_b: numbers.many(self.n * rank),
                    rank,
                    scaling: 1.0 / (rank + 1) as f32 + numbers.number() / 10.0,
                })
                .collect(),
        );
        self.index = Some((0..self.tokens).map(|_| numbers.below(ranks.len() + 1) as i32 - 1).collect());
        self
    }

    /// Two adapters for outputs that are slices, `sizes` rows each, which have adapters of their own: these are the second, two times
    /// `sizes.len()`. The problem has them as blocks on the diagonal of larger ones.
    pub fn with_adapters_of_slices(self, sizes: [usize; 3]) -> (Self, Vec<Adapter<A>>) {
        let k = self.k;
        let mut numbers = Numbers::new(5);
        let (mut whole, mut parts) = (Vec::new(), Vec::new());
        for ranks in [[16, 0, 3], [5, 70, 20]] {
            let (rank, scaling) = (ranks.iter().sum(), 0.125);
            let (mut lora_a, mut lora_b) = (Vec::new(), vec![A::from_f32(0.0); self.n * rank]);
            let (mut first_row, mut first_rank) = (0, 0);
            for (rows, own) in sizes.into_iter().zip(ranks) {
                let (a, b) = (numbers.many::<A>(own * k), numbers.many::<A>(rows * own));
                for (i, &b) in b.iter().enumerate() {
                    lora_b[(first_row + i / own) * rank + first_rank + i % own] = b;
                }
                lora_a.extend(&a);
                parts.push(Adapter { lora_a: a, lora_b: b, rank: own, scaling });
                (first_row, first_rank) = (first_row + rows, first_rank + own);
            }
            whole.push(Adapter { lora_a, lora_b, rank, scaling });
        }
        (Self { adapters: Some(whole), ..self.with_adapters(&[1, 1]) }, parts)
    }

    /// The weight as f32, as a plan rounds it; for [`Rounding::Value`](matmul::Rounding::Value) its exact value.
    pub fn weight_values(&self, rounding: matmul::Rounding) -> Vec<f32> {
        match (&self.weight, rounding) {
            (Weight::Dense(values), _) => widen(values),
            (Weight::Nf4(nf4), matmul::Rounding::ToInput) => widen(&nf4.dequantize::<T>()),
            (Weight::Nf4(nf4), matmul::Rounding::Half) => {
                // f16 holds the values in units of a power of two.
                let values = nf4.codebook().values();
                let largest = values.iter().fold(0.0f32, |largest, v| largest.max(v.abs()));
                let unit = f32::from_bits(largest.to_bits() & 0x7f80_0000);
                let halves = values.map(|v| f16::from_f32(v / unit).to_f32());
                let weight = (0..self.n * self.k).map(|i| {
                    let code = nf4.packed()[i / 2] >> (4 * (1 - i % 2)) & 15;
                    let absmax = nf4.absmax().get(i / nf4.blocksize()) * unit;
                    T::from_f32(halves[usize::from(code)] * absmax).to_f32()
                });
                weight.collect()
            }
            (Weight::Nf4(nf4), _) => nf4.dequantize(),
        }
    }

    /// The product in f64, over the weight as the plan rounds it.
    pub fn truth(&self, rounding: matmul::Rounding) -> Vec<cpu::Truth> {
        let weight = self.weight_values(rounding);
        let bias = self.bias.as_ref().map(|bias| widen(bias));
        let adapters: Vec<_> = self.adapters.iter().flatten().map(Adapter::as_cpu).collect();
        let extras = cpu::MatmulExtras {
            bias: bias.as_deref(),
            row_scale: self.row_scale.as_deref(),
            adapters: &adapters,
            adapter_index: self.index.as_deref(),
            dropout: None,
        };
        let weight = cpu::Weight::Dense { data: &weight, n: self.n, k: self.k };
        cpu::truth(&widen(&self.x), self.tokens, &weight, &extras).unwrap()
    }

    /// The largest rank.
    pub fn max_rank(&self) -> usize {
        self.adapters.iter().flatten().map(|adapter| adapter.rank).max().unwrap_or(0)
    }

    /// How far y may be from the truth.
    ///
    /// Let S be the sum of magnitudes ([`cpu::Truth::magnitude`]), u = 2^-24. In a sum of K products, in whatever order,
    /// a term goes through at most K - 1 additions; a step of a tensor core may cut off what it shifts out instead of
    /// rounding it, which counts twice. The branch has exact products; its terms meet 16 others and the sum so far in every
    /// instruction, of which a leaf of x lora_a^T has 2 for each 32 elements and the ranks one for each 16, times at most 9
    /// pairs of pieces of f32; and 6 additions of the tree of leaves, one for each 32 ranks. Row_scale, bias, the scale of
    /// the adapter and the branch's addition have one each. So sums are off by at most 2 steps u S. To that come codebook
    /// values where the plan rounds them to T, a share u_T of |x||w|; and in `prefill` v and b of the branch as two bf16 each,
    /// 2^-16 of |v||b| twice for what is cut off and once for the product left out (4 * 2^-16 in all covers the second
    /// order). The result y' is rounded to T: a share u_T of |y'|, or half the smallest subnormal of T.
    pub fn bound(&self, plan: &matmul::Plan, truth: &cpu::Truth) -> f64 {
        let prefill = plan.kernel.is_some_and(|kernel| kernel.module == "prefill");
        self.bound_of(plan.rounding, prefill, truth)
    }

    /// The same of any plan's rounding, in `prefill` or not.
    pub fn bound_of(&self, rounding: matmul::Rounding, prefill: bool, truth: &cpu::Truth) -> f64 {
        let (u, u_t) = ((-24f64).exp2(), if T::DTYPE.size() == 4 { 0.0 } else { T::DTYPE.unit_roundoff() });
        let branch = match self.max_rank() {
            0 => 0,
            rank => 17 * 9 * (2 * self.k.div_ceil(2048) + rank.div_ceil(16)) + 6 + rank.div_ceil(32),
        };
        let steps = (self.k + branch + 4) as f64;
        let mut share = 2.0 * steps * u * (1.0 + u).powf(2.0 * steps);
        if rounding == matmul::Rounding::Value {
            share += u_t;
        }
        if prefill && self.adapters.is_some() {
            share += 4.0 * (-16f64).exp2();
        }
        let sum = share * truth.magnitude;
        let smallest = if T::DTYPE == lora_kernels::DType::F16 { (-25f64).exp2() } else { (-134f64).exp2() };
        sum + u_t * (truth.value.abs() + sum) + smallest
    }

    pub fn shape(&self) -> matmul::Shape {
        let weight = match &self.weight {
            Weight::Dense(_) => matmul::WeightFormat::Dense,
            Weight::Nf4(nf4) => matmul::WeightFormat::Nf4 { blocksize: nf4.blocksize() },
        };
        matmul::Shape { tokens: self.tokens, n: self.n, k: self.k, dtype: T::DTYPE, weight }
    }

    pub fn plan(&self, device: &Device) -> matmul::Plan {
        matmul::plan(&self.shape(), device.queue().properties()).unwrap()
    }

    pub fn run(&self, device: &Device) -> Outcome<T> {
        let plan = self.plan(device);
        let (y, counters) = self.run_plan(device, &plan).unwrap();
        Outcome { plan, y, counters }
    }

    pub fn run_plan(&self, device: &Device, plan: &matmul::Plan) -> Result<(Vec<T>, Option<Counters>)> {
        let x = device.upload(&self.x);
        let weight = DeviceWeight::new(device, &self.weight);
        let bias = self.bias.as_ref().map(|bias| device.upload(bias));
        let row_scale = self.row_scale.as_ref().map(|scale| device.upload(scale));
        let index = self.index.as_ref().map(|index| device.upload(index));
        let factors = Factors::new(device, self.adapters.as_deref().unwrap_or(&[]));
        let mut entries = device.alloc(AdapterTable::<A>::bytes(factors.count()));
        let table = match &self.adapters {
            Some(_) => Some(factors.table(device, self.k, self.n, &mut entries)?),
            None => None,
        };
        let v = match &table {
            Some(table) => self.shrink(device, table, &x, index.as_ref())?,
            None => device.upload(&[]),
        };
        let extras = matmul::Extras {
            bias: bias.as_ref().map(|bias| bias.view()),
            row_scale: row_scale.as_ref().map(|scale| scale.view()),
            low_rank: table.as_ref().map(|adapters| LowRank {
                adapters,
                index: index.as_ref().map(|index| index.view()),
                v: v.view(),
            }),
            // The emulator then refuses what is read too early.
            overlap: true,
        };
        let mut y = device.alloc(self.tokens * self.n);
        let mut workspace = device.alloc(plan.workspace_bytes);
        let workspace = workspace.view_mut();
        plan.run(device.queue(), x.view(), &weight.view(), &extras, y.view_mut(), workspace)?;
        Ok((y.download(), device.counters()))
    }

    /// `v` of all tokens.
    pub fn shrink(
        &self,
        device: &Device,
        table: &AdapterTable<'_, A>,
        x: &Buffer<T>,
        index: Option<&Buffer<i32>>,
    ) -> Result<Buffer<f32>> {
        let shape = table.shrink_shape(self.tokens, T::DTYPE);
        let plan = lora_shrink::plan(&shape, device.queue().properties())?;
        let mut v = device.alloc(plan.v_len());
        plan.run(device.queue(), x.view(), table, index.map(|index| index.view()), v.view_mut())?;
        Ok(v)
    }

    /// Checks every output of `outcome` against the truth.
    pub fn check(&self, outcome: &Outcome<T>) {
        let truth = self.truth(outcome.plan.rounding);
        for (i, (y, truth)) in outcome.y.iter().zip(&truth).enumerate() {
            let (error, bound) = ((y.to_f64() - truth.value).abs(), self.bound(&outcome.plan, truth));
            assert!(
                error <= bound,
                "{:?}: y[{}, {}] is {y:?}, wanted {} +- {bound:e}",
                outcome.plan,
                i / self.n,
                i % self.n,
                truth.value
            );
        }
    }

    pub fn run_and_check(&self, device: &Device) -> Outcome<T> {
        let outcome = self.run(device);
        self.check(&outcome);
        outcome
    }
}

impl<A: Element> Adapter<A> {
    pub fn as_cpu(&self) -> cpu::LowRank<'_, A> {
        cpu::LowRank { lora_a: &self.lora_a, lora_b: &self.lora_b, rank: self.rank, scaling: self.scaling }
    }
}

/// A weight on the device.
pub enum DeviceWeight<T> {
    Dense(Buffer<T>),
    Nf4 { packed: Buffer<u8>, absmax: DeviceAbsmax, blocksize: usize, codebook: Codebook },
}

pub enum DeviceAbsmax {
    Plain(Buffer<f32>),
    Nested { q: Buffer<u8>, absmax: Buffer<f32>, map: Buffer<f32>, offset: Buffer<f32>, blocksize: usize },
}

impl<T: Element> DeviceWeight<T> {
    pub fn new(device: &Device, weight: &Weight<T>) -> Self {
        match weight {
            Weight::Dense(values) => Self::Dense(device.upload(values)),
            Weight::Nf4(nf4) => Self::Nf4 {
                packed: device.upload(nf4.packed()),
                absmax: match nf4.absmax() {
                    Absmax::Plain(absmax) => DeviceAbsmax::Plain(device.upload(absmax)),
                    Absmax::Nested(nested) => DeviceAbsmax::Nested {
                        q: device.upload(nested.q()),
                        absmax: device.upload(nested.absmax()),
                        map: device.upload(nested.map()),
                        offset: device.upload(&[nested.offset()]),
                        blocksize: nested.blocksize(),
                    },
                },
                blocksize: nf4.blocksize(),
                codebook: nf4.codebook().clone(),
            },
        }
    }

    pub fn view(&self) -> matmul::Weight<'_, T> {
        match self {
            Self::Dense(values) => matmul::Weight::Dense(values.view()),
            Self::Nf4 { packed, absmax, blocksize, codebook } => matmul::Weight::Nf4(Nf4View {
                packed: packed.view(),
                absmax: match absmax {
                    DeviceAbsmax::Plain(absmax) => AbsmaxView::Plain(absmax.view()),
                    DeviceAbsmax::Nested { q, absmax, map, offset, blocksize } => {
                        AbsmaxView::Nested(NestedView {
                            q: q.view(),
                            absmax: absmax.view(),
                            map: map.view(),
                            offset: offset.view(),
                            blocksize: *blocksize,
                        })
                    }
                },
                blocksize: *blocksize,
                codebook,
            }),
        }
    }
}

/// The factors of adapters on the device.
pub struct Factors<A>(Vec<(Buffer<A>, Buffer<A>, usize, f32)>);

impl<A: Element> Factors<A> {
    pub fn new(device: &Device, adapters: &[Adapter<A>]) -> Self {
        let upload = |a: &Adapter<A>| (device.upload(&a.lora_a), device.upload(&a.lora_b), a.rank, a.scaling);
        Self(adapters.iter().map(upload).collect())
    }

    pub fn count(&self) -> usize {
        self.0.len()
    }

    pub fn views(&self) -> Vec<AdapterView<'_, A>> {
        self.0
            .iter()
            .map(|(a, b, rank, scaling)| AdapterView {
                lora_a: a.view(),
                lora_b: b.view(),
                rank: *rank,
                scaling: *scaling,
            })
            .collect()
    }

    pub fn table<'a>(
        &'a self,
        device: &Device,
        k: usize,
        n: usize,
        entries: &'a mut Buffer<u8>,
    ) -> Result<AdapterTable<'a, A>> {
        AdapterTable::upload(device.queue(), &self.views(), k, n, entries.view_mut())
    }
}

/// A shape of `lora_expand`.
pub fn expand_shape<T: Element, A: Element>(tokens: usize, n: usize) -> lora_expand::Shape {
    lora_expand::Shape { tokens, n, dtype: T::DTYPE, adapter_dtype: A::DTYPE }
}
