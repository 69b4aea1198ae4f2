//! The kernels.

use half::bf16;
use lora_kernels::DType;
use lora_kernels::adapter::Rounding;
use lora_kernels::cuda::matmul::{Extras, WeightFormat};
use lora_kernels::cuda::{
    AbsmaxView, AdapterTable, AdapterView, LowRank, NestedView, Nf4View, Nf4ViewMut, Queue, UpdateView,
    expert_groups, expert_matmul, lora_shrink, matmul, merge, merge_report, nf4_dequantize, nf4_merge,
    nf4_quantize, nf4_requantize,
};
use lora_kernels::nf4::{Absmax, Nf4Matrix};
use lora_kernels_devices::{Buffer, Device};

use super::{CHOICES, EXPERTS, Engine, Problem, RANK, Timer, chosen, cpu};

pub struct Gpu {
    device: Device,
    shapes: &'static [[usize; 2]],
    /// Weights are taken in turn, so many bytes of them that no cache holds them.
    rotate: usize,
}

/// Llama 3.1 8B: attention output, gate and up, down.
const SHAPES: &[[usize; 2]] = &[[4096, 4096], [28672, 4096], [4096, 14336]];

/// More than twice the L2 cache of an H200.
const ROTATE: usize = 120 << 20;

impl Gpu {
    pub fn find() -> Option<Self> {
        if std::env::var("LORA_KERNELS_DEVICE").is_ok() {
            return Some(Self { device: Device::best(), shapes: cpu::SHAPES, rotate: 0 });
        }
        Some(Self { device: Device::cuda().ok()?, shapes: SHAPES, rotate: ROTATE })
    }

    fn queue(&self) -> &dyn Queue {
        self.device.queue()
    }

    /// As many copies of `bytes` bytes as are taken in turn.
    fn copies<T>(&self, bytes: usize, make: impl Fn() -> T) -> Vec<T> {
        (0..=self.rotate / bytes).map(|_| make()).collect()
    }

    fn upload_nf4(&self, matrix: &Nf4Matrix) -> Stored {
        let absmax = match matrix.absmax() {
            Absmax::Plain(absmax) => StoredAbsmax::Plain(self.device.upload(absmax)),
            Absmax::Nested(nested) => StoredAbsmax::Nested {
                q: self.device.upload(nested.q()),
                absmax: self.device.upload(nested.absmax()),
                map: self.device.upload(nested.map()),
                offset: self.device.upload(&[nested.offset()]),
                blocksize: nested.blocksize(),
            },
        };
        Stored { packed: self.device.upload(matrix.packed()), absmax }
    }

    fn upload_adapters(&self, problem: &Problem, count: usize) -> Vec<[Buffer<bf16>; 2]> {
        let adapters = problem.adapters[..count].iter();
        adapters.map(|factors| factors.each_ref().map(|factor| self.device.upload(factor))).collect()
    }
}

/// A 4-bit matrix on the device.
struct Stored {
    packed: Buffer<u8>,
    absmax: StoredAbsmax,
}

enum StoredAbsmax {
    Plain(Buffer<f32>),
    Nested { q: Buffer<u8>, absmax: Buffer<f32>, map: Buffer<f32>, offset: Buffer<f32>, blocksize: usize },
}

impl Stored {
    fn view<'a>(&'a self, matrix: &'a Nf4Matrix) -> Nf4View<'a> {
        let absmax = match &self.absmax {
            StoredAbsmax::Plain(absmax) => AbsmaxView::Plain(absmax.view()),
            StoredAbsmax::Nested { q, absmax, map, offset, blocksize } => AbsmaxView::Nested(NestedView {
                q: q.view(),
                absmax: absmax.view(),
                map: map.view(),
                offset: offset.view(),
                blocksize: *blocksize,
            }),
        };
        Nf4View {
            packed: self.packed.view(),
            absmax,
            blocksize: matrix.blocksize(),
            codebook: matrix.codebook(),
        }
    }
}

fn adapter_views<'a>(adapters: &'a [[Buffer<bf16>; 2]]) -> Vec<AdapterView<'a, bf16>> {
    let view = |factors: &'a [Buffer<bf16>; 2]| AdapterView {
        lora_a: factors[0].view(),
        lora_b: factors[1].view(),
        rank: RANK,
        scaling: 2.0,
    };
    adapters.iter().map(view).collect()
}

impl Engine for Gpu {
    fn name(&self) -> &'static str {
        "gpu"
    }

    fn shapes(&self) -> &'static [[usize; 2]] {
        self.shapes
    }

    fn synchronize(&self) {
        self.device.synchronize();
    }

    fn quantize(&self, problem: &Problem, timer: Timer<'_>) {
        let (blocksize, codebook) = (problem.plain.blocksize(), problem.plain.codebook());
        let shape = nf4_quantize::Shape { numel: problem.weight.len(), blocksize, dtype: DType::BF16 };
        let plan = nf4_quantize::plan(&shape, codebook, self.queue().properties()).unwrap();
        let weights = self.copies(2 * problem.weight.len(), || self.device.upload(&problem.weight));
        let mut packed = self.device.alloc(problem.plain.packed().len());
        let mut absmax = self.device.alloc(problem.plain.absmax().len());
        let mut weights = weights.iter().cycle();
        timer(&mut || {
            let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
            plan.run(self.queue(), weights.next().unwrap().view(), out).unwrap();
        });
    }

    fn dequantize(&self, problem: &Problem, timer: Timer<'_>) {
        let numel = problem.weight.len();
        let shape = nf4_dequantize::Shape { numel, blocksize: problem.plain.blocksize(), dtype: DType::BF16 };
        let plan = nf4_dequantize::plan(&shape, self.queue().properties()).unwrap();
        let weights = self.copies(numel / 2, || self.upload_nf4(&problem.plain));
        let mut out = self.device.alloc::<bf16>(numel);
        let mut weights = weights.iter().cycle();
        timer(&mut || {
            let weight = weights.next().unwrap().view(&problem.plain);
            plan.run(self.queue(), &weight, out.view_mut()).unwrap();
        });
    }

    fn matmul(&self, problem: &Problem, m: usize, adapters: usize, timer: Timer<'_>) {
        let (queue, device) = (self.queue(), self.queue().properties());
        let Problem { n, k, .. } = *problem;
        let weight = WeightFormat::Nf4 { blocksize: problem.nested.blocksize() };
        let shape = matmul::Shape { tokens: m, n, k, dtype: DType::BF16, weight };
        let plan = matmul::plan(&shape, device).unwrap();
        let shape = lora_shrink::Shape {
            tokens: m,
            k,
            max_rank: if adapters > 0 { RANK } else { 0 },
            slices: 1,
            dtype: DType::BF16,
            adapter_dtype: DType::BF16,
        };
        let shrink = lora_shrink::plan(&shape, device).unwrap();

        let weights = self.copies(n * k / 2, || self.upload_nf4(&problem.nested));
        let x = self.device.upload(&problem.x[..m * k]);
        let factors = self.upload_adapters(problem, adapters);
        let mut table = self.device.alloc(AdapterTable::<bf16>::bytes(adapters));
        let table = AdapterTable::upload(queue, &adapter_views(&factors), k, n, table.view_mut()).unwrap();
        let index = self.device.upload(&(0..m as i32).collect::<Vec<_>>());
        let index = (adapters > 1).then(|| index.view());
        let mut v = self.device.alloc(shrink.v_len());
        let mut y = self.device.alloc::<bf16>(m * n);
        let mut workspace = self.device.alloc(plan.workspace_bytes);
        let mut weights = weights.iter().cycle();
        timer(&mut || {
            let weight = matmul::Weight::Nf4(weights.next().unwrap().view(&problem.nested));
            let mut extras = Extras::<bf16>::default();
            if adapters > 0 {
                shrink.run(queue, x.view(), &table, index, v.view_mut()).unwrap();
                extras.low_rank = Some(LowRank { adapters: &table, index, v: v.view() });
            }
            plan.run(queue, x.view(), &weight, &extras, y.view_mut(), workspace.view_mut()).unwrap();
        });
    }

    fn experts(&self, problem: &Problem, m: usize, timer: Timer<'_>) {
        let (queue, device) = (self.queue(), self.queue().properties());
        let (n, k) = (problem.n / EXPERTS, problem.k);
        let weight = WeightFormat::Nf4 { blocksize: problem.nested.blocksize() };
        let (tokens, choices, experts) = (m, CHOICES, EXPERTS);
        let shape = expert_matmul::Shape { tokens, choices, experts, n, k, dtype: DType::BF16, weight };
        let plan = expert_matmul::plan(&shape, device).unwrap();
        let sort = expert_groups::plan(&plan.groups_shape(), device).unwrap();
        let weights = self.copies(problem.n * k / 2, || self.upload_nf4(&problem.nested));
        let (x, expert) = (self.device.upload(&problem.x[..m * k]), self.device.upload(&chosen(m)));
        let (mut groups, mut y) = (self.device.alloc(sort.len()), self.device.alloc::<bf16>(plan.rows * n));
        let mut weights = weights.iter().cycle();
        timer(&mut || {
            let weight = matmul::Weight::Nf4(weights.next().unwrap().view(&problem.nested));
            let groups = sort.run(queue, expert.view(), groups.view_mut()).unwrap();
            plan.run(queue, x.view(), &weight, &groups, &Extras::<bf16>::default(), y.view_mut()).unwrap();
        });
    }

    fn merge(&self, problem: &Problem, timer: Timer<'_>) {
        let Problem { n, k, .. } = *problem;
        let shape = merge::Shape {
            n,
            k,
            fan_in_fan_out: false,
            dtype: DType::BF16,
            direction: merge::Direction::Merge,
        };
        let plan = merge::plan(&shape, self.queue().properties()).unwrap();
        let factors = self.upload_adapters(problem, 1);
        let adapters = adapter_views(&factors);
        let update = UpdateView { adapters: &adapters, row_scale: None };
        let weights = self.copies(2 * n * k, || self.device.upload(&problem.weight));
        let mut merged = self.device.alloc::<bf16>(n * k);
        let mut weights = weights.iter().cycle();
        timer(&mut || {
            plan.run(self.queue(), weights.next().unwrap().view(), &update, merged.view_mut()).unwrap();
        });
    }

    fn nf4_merge(&self, problem: &Problem, timer: Timer<'_>) {
        let Problem { n, k, .. } = *problem;
        let matrix = &problem.plain;
        let shape = nf4_merge::Shape {
            n,
            k,
            blocksize: matrix.blocksize(),
            dtype: DType::BF16,
            target: nf4_merge::Target::Nf4,
        };
        let plan = nf4_merge::plan(&shape, matrix.codebook(), self.queue().properties()).unwrap();
        let factors = self.upload_adapters(problem, 1);
        let adapters = adapter_views(&factors);
        let update = UpdateView { adapters: &adapters, row_scale: None };
        let weights = self.copies(n * k / 2, || self.upload_nf4(matrix));
        let mut packed = self.device.alloc(matrix.packed().len());
        let mut absmax = self.device.alloc(matrix.absmax().len());
        let mut weights = weights.iter().cycle();
        timer(&mut || {
            let out = Nf4ViewMut { packed: packed.view_mut(), absmax: absmax.view_mut() };
            plan.run(self.queue(), &weights.next().unwrap().view(matrix), &update, out).unwrap();
        });
    }

    fn merge_report(&self, problem: &Problem, timer: Timer<'_>) {
        let Problem { n, k, .. } = *problem;
        let matrix = &problem.plain;
        let storage =
            merge_report::Storage::Nf4 { blocksize: matrix.blocksize(), dtype: DType::BF16, nested: None };
        let shape = merge_report::Shape { n, k, fan_in_fan_out: false, storage };
        let plan = merge_report::plan(&shape, self.queue().properties()).unwrap();
        let factors = self.upload_adapters(problem, 1);
        let adapters = adapter_views(&factors);
        let update = UpdateView { adapters: &adapters, row_scale: None };
        let weights = self.copies(n * k / 2, || self.upload_nf4(matrix));
        let merged = self.upload_nf4(matrix);
        let (mut workspace, mut sums) = (self.device.alloc(plan.workspace_bytes()), self.device.alloc(1));
        let mut weights = weights.iter().cycle();
        timer(&mut || {
            let (weight, merged) = (weights.next().unwrap().view(matrix), merged.view(matrix));
            plan.run_nf4(self.queue(), &weight, &merged, &update, workspace.view_mut(), sums.view_mut())
                .unwrap();
        });
    }

    fn nf4_requantize(&self, problem: &Problem, timer: Timer<'_>) {
        let Problem { n, k, .. } = *problem;
        let (matrix, rounding) = (&problem.plain, Rounding::KeepGain);
        let shape =
            nf4_requantize::Shape { n, k, blocksize: matrix.blocksize(), dtype: DType::BF16, rounding };
        let plan = nf4_requantize::plan(&shape, self.queue().properties()).unwrap();
        let before = self.upload_nf4(matrix);
        let wanted = matrix.dequantize::<f32>();
        let wanted = self.copies(4 * n * k, || self.device.upload(&wanted));
        let mut packed = self.device.alloc(matrix.packed().len());
        let mut absmax = self.device.alloc(matrix.absmax().len());
        let mut wanted = wanted.iter().cycle();
        timer(&mut || {
            let (before, wanted) = (before.view(matrix), wanted.next().unwrap().view());
            plan.run_scales(self.queue(), &before, wanted, absmax.view_mut()).unwrap();
            plan.run_codes(
                self.queue(),
                &before,
                wanted,
                AbsmaxView::Plain(absmax.view()),
                packed.view_mut(),
            )
            .unwrap();
        });
    }
}
