//! `v[m] = scaling * x[m] lora_a^T` in f32, with an adapter per token: the first half of the low-rank branch.
//!
//! `v` is `[parts, tokens, v_columns]`: its parts add up to the product. `v_columns` is the largest rank, rounded up to a
//! multiple of 4, for each slice of the outputs. Row m holds token m's own adapter in the first `rank` columns of a slice
//! and zeros behind them: all zeros for a token without an adapter (-1), all NaN for a number that is not an adapter's.
//!
//! Products are exact and sums are f32, with `scaling` put in before the last three additions. Their order depends on k
//! alone: a token's bits do not depend on what is beside it, nor the sum on the number of parts. (An infinite x or lora_a
//! gives NaN where one of them is f32.)
//!
//! In training there are two more: [`Plan::with_dropout`] takes the elements from x that dropout takes, and [`plan_transposed`] is
//! for `u[m] = scaling * dy[m] lora_b`, the first half of the low-rank branch's gradient. All that is said of x, lora_a and k holds
//! for dY, lora_b and the outputs there; u is laid out as v.
//!
//! In a mixture of experts a token has several rows of v, each with the adapter of another expert, and one of x: see
//! [`Plan::with_choices`].
//!
//! Tokens with the same adapter need not be neighbours: a block finds those that share one among 32, and multiplies up to
//! eight of them with what it reads of lora_a.

use bytemuck::{Pod, Zeroable};

use super::adapter_table::{Adapters, MAX_RANK, MAX_SLICES, check_adapter_dtype, v_columns};
use super::check::{blocks, dimension, find, read_only};
use super::{AdapterTable, Kernel, Launch, Properties, Queue, View, ViewMut, dropout};
use crate::cpu::Dropout;
use crate::{DType, Element, Error, Result};

pub(super) const KERNELS: &[Kernel] = &[
    kernel("lora_shrink_f32_f32"),
    kernel("lora_shrink_f16_f16"),
    kernel("lora_shrink_f16_f32"),
    kernel("lora_shrink_bf16_bf16"),
    kernel("lora_shrink_bf16_f32"),
    kernel("lora_shrink_dropout_f32_f32"),
    kernel("lora_shrink_dropout_f16_f16"),
    kernel("lora_shrink_dropout_f16_f32"),
    kernel("lora_shrink_dropout_bf16_bf16"),
    kernel("lora_shrink_dropout_bf16_f32"),
    kernel("lora_shrink_transposed_f32_f32"),
    kernel("lora_shrink_transposed_f16_f16"),
    kernel("lora_shrink_transposed_f16_f32"),
    kernel("lora_shrink_transposed_bf16_bf16"),
    kernel("lora_shrink_transposed_bf16_f32"),
];

const fn kernel(entry: &'static str) -> Kernel {
    Kernel::new::<Params>("lora_shrink", entry)
}

const THREADS: u32 = 256;

/// Tokens that are searched for those that share an adapter, and those of them that a block takes together.
pub(super) const WINDOW: usize = 32;
const GROUP: usize = 8;

/// Rows of lora_a that a block takes.
const RANKS: usize = 16;

/// The most blocks that share a sum over k.
const MAX_PARTS: usize = 8;

/// Blocks that take turns with the groups of a window: as many as there can be groups, but for many tokens, most of which
/// have neighbours with their adapter.
pub(super) fn slots(tokens: usize) -> usize {
    if tokens <= 8 * WINDOW { tokens.min(WINDOW) } else { WINDOW / GROUP }
}

/// As many of the plan's slots as a table of `adapters` can make groups in a window: for each a last one that is not full,
/// besides those that are.
pub(super) fn few_slots(slots: usize, adapters: usize) -> usize {
    slots.min(adapters.saturating_add(WINDOW / GROUP)).max(1)
}

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows of x.
    pub tokens: usize,
    /// Columns of x and of every lora_a; transposed, columns of dY.
    pub k: usize,
    /// The largest rank of the adapters.
    pub max_rank: usize,
    /// Slices of the outputs that have factors of their own.
    pub slices: usize,
    /// The type of x.
    pub dtype: DType,
    /// The type of the adapters: that of x, or f32.
    pub adapter_dtype: DType,
}

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// The kernel; none where v has no elements.
    pub kernel: Option<Kernel>,
    /// Blocks: for 32 tokens, `slots` of them; for every slice and 16 rows of lora_a; for every part.
    pub grid: [u32; 3],
    /// Blocks that take turns with the groups of 32 tokens. A table of few adapters, which can make few groups, gets fewer.
    pub slots: usize,
    /// Blocks that share a sum over k: 1, 2, 4 or 8. Each leaves a part.
    pub parts: usize,
    /// Whether rows are read in pieces of 16 bytes: k is a multiple of 8. Else element by element.
    pub vectors: bool,
    /// Whether lora_b is multiplied; see [`plan_transposed`].
    pub transposed: bool,
    /// What x goes through before; see [`Plan::with_dropout`].
    pub dropout: Option<Dropout>,
    /// Rows of v for each of x; see [`Plan::with_choices`].
    pub choices: usize,
}

/// `Params` of `lora_shrink.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    x: u64,
    v: u64,
    adapters: Adapters,
    tokens: u32,
    k: u32,
    slots: u32,
    vectors: u32,
    dropout: dropout::Params,
    factor: f32,
    choices: u32,
}

/// Chooses the kernel and the grid.
///
/// # Errors
/// [`Error::Argument`] for a rank above [`MAX_RANK`], slices that are none or more than [`MAX_SLICES`], an adapter type that
/// does not go with x, or sizes of 2^31 and above.
pub fn plan(shape: &Shape, device: &Properties) -> Result<Plan> {
    plan_of("lora_shrink", shape, device)
}

/// The same for the backward pass: `u = scaling * dy lora_b` for each slice's part of `dy` `[tokens, k]`. The shape is that of
/// [`AdapterTable::shrink_transposed_shape`].
///
/// # Errors
/// As [`plan`].
pub fn plan_transposed(shape: &Shape, device: &Properties) -> Result<Plan> {
    let Plan(details) = plan_of("lora_shrink_transposed", shape, device)?;
    Ok(Plan(Details { transposed: true, ..details }))
}

fn plan_of(operation: &str, shape: &Shape, device: &Properties) -> Result<Plan> {
    dimension("tokens", shape.tokens)?;
    dimension("k", shape.k)?;
    check_adapter_dtype(shape.adapter_dtype, shape.dtype)?;
    if shape.max_rank > MAX_RANK {
        return Err(Error::argument("max_rank", format!("at most {MAX_RANK}"), shape.max_rank));
    }
    if shape.slices == 0 || shape.slices > MAX_SLICES {
        return Err(Error::argument("slices", format!("1 to {MAX_SLICES}"), shape.slices));
    }
    let tiles = shape.max_rank.div_ceil(RANKS) * shape.slices;
    let (windows, slots) = (shape.tokens.div_ceil(WINDOW), slots(shape.tokens));
    // Where each token has an adapter of its own, no more than half of the blocks come second.
    let enough = device.sm_count as usize * 3 / 2;
    let parts = match tiles * shape.tokens {
        0 => 1,
        blocks => 1 << (enough / blocks).clamp(1, MAX_PARTS).ilog2(),
    };
    let entry = format!("{operation}_{}_{}", shape.dtype, shape.adapter_dtype);
    Ok(Plan(Details {
        shape: *shape,
        kernel: (windows > 0 && tiles > 0).then(|| find(KERNELS, &entry)),
        grid: [blocks("tokens", (windows * slots) as u64)?, tiles as u32, parts as u32],
        slots,
        parts,
        vectors: shape.k.is_multiple_of(8),
        transposed: false,
        dropout: None,
        choices: 1,
    }))
}

impl Plan {
    /// The same with sums that are not shared, so that v is one part: for those who read v themselves.
    pub fn in_one_part(self) -> Self {
        let Details { grid: [x, y, _], .. } = self.0;
        Self(Details { parts: 1, grid: [x, y, 1], ..self.0 })
    }

    /// The same after `dropout`: what it takes from x is left out, and `scaling` is multiplied by [`Dropout::scale`]. Of a
    /// transposed plan, which has no x, only the latter.
    #[must_use]
    pub fn with_dropout(self, dropout: Dropout) -> Self {
        let Shape { dtype, adapter_dtype, .. } = self.shape;
        let dropping = || find(KERNELS, &format!("lora_shrink_dropout_{dtype}_{adapter_dtype}"));
        let kernel = self.kernel.map(|kernel| if self.transposed { kernel } else { dropping() });
        Self(Details { kernel, dropout: Some(dropout), ..self.0 })
    }

    /// The same with one row of x for every `choices` rows of v, one behind the other: x is `[tokens / choices, k]`.
    ///
    /// # Errors
    /// [`Error::Argument`] when the plan's tokens are no multiple of `choices`, or it is transposed.
    pub fn with_choices(self, choices: usize) -> Result<Self> {
        if self.transposed {
            return Err(Error::argument("choices", "a plan that is not transposed", choices));
        }
        match choices > 0 && self.shape.tokens.is_multiple_of(choices) {
            true => Ok(Self(Details { choices, ..self.0 })),
            false => {
                let wanted = format!("a divisor of {} tokens", self.shape.tokens);
                Err(Error::argument("choices", wanted, choices))
            }
        }
    }

    /// Elements of v.
    pub fn v_len(&self) -> usize {
        self.parts * self.shape.tokens * v_columns(self.shape.max_rank) * self.shape.slices
    }

    /// Computes `v` `[parts, tokens, v_columns]` from `x` `[tokens / choices, k]`, both aligned to 16 bytes. `index` `[tokens]` names every
    /// token's adapter (-1: none); without it all use adapter 0. Transposed, computes `u` from `dy`.
    ///
    /// # Errors
    /// [`Error::Argument`] for views or adapters that are not as the plan's shape says, [`Error::Device`] when the launch
    /// fails.
    pub fn run<T: Element, A: Element>(
        &self,
        queue: &dyn Queue,
        x: View<'_, T>,
        adapters: &AdapterTable<'_, A>,
        index: Option<View<'_, i32>>,
        v: ViewMut<'_, f32>,
    ) -> Result<()> {
        let device = queue.properties();
        let Shape { tokens, k, max_rank, slices, dtype, adapter_dtype } = self.shape;
        if T::DTYPE != dtype {
            return Err(Error::argument("x", dtype.name(), T::DTYPE));
        }
        if A::DTYPE != adapter_dtype {
            return Err(Error::argument("adapters", adapter_dtype.name(), A::DTYPE));
        }
        let (length, name) =
            if self.transposed { (adapters.n(), "adapters.n") } else { (adapters.k(), "adapters.k") };
        if length != k {
            return Err(Error::argument(name, k.to_string(), length));
        }
        if adapters.max_rank() != max_rank {
            return Err(Error::argument("adapters.max_rank", max_rank.to_string(), adapters.max_rank()));
        }
        if adapters.slices().len() != slices {
            return Err(Error::argument("adapters.slices", slices.to_string(), adapters.slices().len()));
        }
        x.check("x", tokens / self.choices * k, 16, device)?;
        v.check("v", self.v_len(), 16, device)?;
        let table_len = adapters.len();
        // Transposed, a slice's part of dY begins where the ones before it end.
        let vectors =
            self.vectors && (!self.transposed || adapters.slices().iter().all(|rows| rows % 8 == 0));
        let adapters = adapters.choose(index, tokens, device)?;
        let Some(kernel) = self.kernel else { return Ok(()) };
        let slots = few_slots(self.slots, table_len);
        let params = Params {
            x: x.address(),
            v: v.address(),
            adapters,
            tokens: tokens as u32,
            k: k as u32,
            slots: slots as u32,
            vectors: u32::from(vectors),
            dropout: dropout::Params::new(self.dropout.as_ref()),
            factor: self.dropout.map_or(1.0, |dropout| dropout.scale()),
            choices: self.choices as u32,
        };
        let launch = Launch {
            kernel,
            grid: [self.grid[0] / self.slots as u32 * slots as u32, self.grid[1], self.grid[2]],
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: true,
        };
        // SAFETY: the views cover what the kernel reads and writes: x, v, the index and the table were checked above, the
        // factors when the table was made; they are borrowed, so they live until the caller lets go of them.
        unsafe { queue.launch(&launch) }
    }
}
