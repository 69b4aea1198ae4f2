//! Which rows of a mixture of experts go to which expert: the router's choices, sorted by expert, for
//! [`expert_matmul`](super::expert_matmul). One launch for all products that share the choices.
//!
//! It fills a buffer of i32 with `start` `[count + 1]`, `expert` `[count]` and `row` `[rows]` one behind the other, where `count` is
//! the smaller one of `rows` and `experts + 2`: group i has the expert `expert[i]` and the rows from `row[start[i]]` to before
//! `row[start[i + 1]]`, in ascending order. Groups are in the order of the experts. Behind them come the rows that have no expert,
//! -1, and those with a wrong number, -2. What is left of the groups is empty. The numbers are the same every time. Without rows nothing is written.

use bytemuck::{Pod, Zeroable};

use super::check::{dimension, find, read_only};
use super::{Kernel, Launch, Properties, Queue, View, ViewMut};
use crate::{Error, Result};

pub(super) const KERNELS: &[Kernel] = &[Kernel::new::<Params>("expert_groups", "expert_groups_i32")];

const THREADS: u32 = 256;

/// The most experts that a stack may have.
pub const MAX_EXPERTS: usize = 4094;

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Rows that have an expert each: `tokens * choices`.
    pub rows: usize,
    /// Experts of the stack.
    pub experts: usize,
}

/// What [`plan`] has chosen for one shape. Its [`Details`] can be read, not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan(Details);

read_only!(Plan, Details);

/// What will run: a block for every expert, and for rows that have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Details {
    /// The shape that it is for.
    pub shape: Shape,
    /// The kernel; none where there are no rows.
    pub kernel: Option<Kernel>,
    /// Groups that there can be.
    pub count: usize,
    /// Blocks.
    pub grid: [u32; 3],
}

/// What [`Plan::run`] has written, or will have when the queue has come so far: rows by expert.
#[derive(Debug, Clone, Copy)]
pub struct Groups<'a> {
    shape: Shape,
    buffer: View<'a, i32>,
}

impl<'a> Groups<'a> {
    /// What a plan of `shape` has written to `buffer`.
    pub(super) fn of(shape: Shape, buffer: View<'a, i32>) -> Self {
        Self { shape, buffer }
    }

    /// The shape of the plan that made them.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Checks that these are of `shape`, in the memory of `device`, and says where `start`, `expert` and `row` are.
    pub(super) fn check(&self, shape: Shape, device: &Properties) -> Result<[u64; 3]> {
        if self.shape != shape {
            let show = |shape: Shape| format!("{} rows of {} experts", shape.rows, shape.experts);
            return Err(Error::argument("groups", show(shape), show(self.shape)));
        }
        self.buffer.check("groups", len(shape.rows, shape.experts), 4, device)?;
        Ok(parts(self.buffer.address(), count(shape.rows, shape.experts)))
    }
}

/// `Params` of `expert_groups.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    expert: u64,
    start: u64,
    group_expert: u64,
    row: u64,
    rows: u32,
    groups: u32,
    experts: u32,
    padding: u32,
}

/// Chooses the grid.
///
/// # Errors
/// [`Error::Argument`] for 2^31 rows and more, or more than [`MAX_EXPERTS`].
pub fn plan(shape: &Shape, _device: &Properties) -> Result<Plan> {
    let Shape { rows, experts } = *shape;
    dimension("rows", rows)?;
    check_experts(experts)?;
    Ok(Plan(Details {
        shape: *shape,
        kernel: (rows > 0).then(|| find(KERNELS, "expert_groups_i32")),
        count: count(rows, experts),
        grid: [experts as u32 + 2, 1, 1],
    }))
}

impl Plan {
    /// Elements of `groups`.
    pub fn len(&self) -> usize {
        len(self.shape.rows, self.shape.experts)
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.shape.rows == 0
    }

    /// Writes `groups` [`len`](Plan::len) from `expert` `[rows]`. -1 is no expert; any other number that is none makes the row's
    /// outputs NaN.
    ///
    /// # Errors
    /// [`Error::Argument`] for views that are not as the plan's shape says, [`Error::Device`] when the launch fails.
    pub fn run<'a>(
        &self,
        queue: &dyn Queue,
        expert: View<'_, i32>,
        groups: ViewMut<'a, i32>,
    ) -> Result<Groups<'a>> {
        let device = queue.properties();
        let Shape { rows, experts } = self.shape;
        expert.check("expert", rows, 4, device)?;
        groups.check("groups", self.len(), 4, device)?;
        let Some(kernel) = self.kernel else {
            return Ok(Groups { shape: self.shape, buffer: groups.into_view() });
        };
        let [start, group_expert, row] = parts(groups.address(), self.count);
        let params = Params {
            expert: expert.address(),
            start,
            group_expert,
            row,
            rows: rows as u32,
            groups: self.count as u32,
            experts: experts as u32,
            padding: 0,
        };
        let launch = Launch {
            kernel,
            grid: self.grid,
            block: [THREADS, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
            overlap: true,
        };
        // SAFETY: the views cover what the kernel reads and writes, and are borrowed: they live until the caller lets go of them.
        unsafe { queue.launch(&launch)? };
        Ok(Groups { shape: self.shape, buffer: groups.into_view() })
    }
}

pub(super) fn check_experts(experts: usize) -> Result<()> {
    match experts <= MAX_EXPERTS {
        true => Ok(()),
        false => Err(Error::argument("experts", format!("at most {MAX_EXPERTS}"), experts)),
    }
}

/// Groups that there can be: one for every expert, for none and for wrong numbers, but not more than rows.
pub(super) const fn count(rows: usize, experts: usize) -> usize {
    if rows < experts + 2 { rows } else { experts + 2 }
}

/// Elements of the buffer.
const fn len(rows: usize, experts: usize) -> usize {
    2 * count(rows, experts) + 1 + rows
}

/// Where `start`, `expert` and `row` are.
fn parts(groups: u64, count: usize) -> [u64; 3] {
    let at = |elements: usize| groups + 4 * elements as u64;
    [groups, at(count + 1), at(2 * count + 1)]
}
