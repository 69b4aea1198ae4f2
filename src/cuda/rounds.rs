//! What a launch of tiles takes by a table of what a tile takes, and the tile and number of splits that take least.
//!
//! The multiprocessor with the most blocks decides: it has `rounds` of them, each with its share of the sum's slices and an end. W takes at
//! least what its bytes do to be read. Where blocks share sums, a second launch adds their parts.

/// What a tile takes, in the table's unit of time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cost {
    /// Tokens of the tile.
    pub tokens: usize,
    /// A launch, but for all that follows.
    pub start: f64,
    /// A slice of the sum, of a block that has a multiprocessor for itself.
    pub alone: f64,
    /// The same of each of several blocks.
    pub shared: f64,
    /// What a tile takes besides its slices.
    pub end: f64,
}

/// What is to be computed.
pub(super) struct Work {
    pub tokens: usize,
    /// Tiles side by side, whatever their tokens.
    pub columns: usize,
    /// Sums of a token.
    pub outputs: usize,
    /// Slices of a sum.
    pub slices: usize,
    pub weight_bytes: u64,
}

/// What runs it.
pub(super) struct Machine {
    pub multiprocessors: usize,
    /// What memory delivers in a unit of time.
    pub bytes: f64,
    /// A launch that adds parts of sums, and how many it adds in a unit of time.
    pub finish: f64,
    pub sums: f64,
}

/// Slices that a split has at least.
const LEAST_SLICES: usize = 4;

/// Rounds up to which splits are tried: the last of so many is at most an eighth of the time, and parts of sums stay small (64 KiB for
/// each tile of 128 by 128).
const MOST_ROUNDS: usize = 8;

/// The time of a launch, and what it would be if W came at once.
fn time(work: &Work, machine: &Machine, cost: &Cost, tiles: usize, splits: usize) -> [f64; 2] {
    let rounds = (tiles * splits).div_ceil(machine.multiprocessors);
    let slice = if rounds > 1 { cost.shared } else { cost.alone };
    let work_time = rounds as f64 * (work.slices.div_ceil(splits) as f64 * slice + cost.end);
    let others = cost.start + finish(work, machine, splits);
    [work_time.max(least(work, machine)) + others, work_time + others]
}

/// What it takes to read W.
fn least(work: &Work, machine: &Machine) -> f64 {
    work.weight_bytes as f64 / machine.bytes
}

/// What it takes to add the parts of sums.
fn finish(work: &Work, machine: &Machine, splits: usize) -> f64 {
    match splits {
        1 => 0.0,
        _ => machine.finish + (splits * work.tokens * work.outputs) as f64 / machine.sums,
    }
}

/// The cost and the number of splits that take least, and what they take. Of equals what would take less if W came at once, the earlier cost,
/// and the fewest splits.
pub(super) fn fastest<'a>(work: &Work, machine: &Machine, costs: &'a [Cost]) -> (&'a Cost, usize, f64) {
    let mut fastest: Option<(&Cost, usize, [f64; 2])> = None;
    for cost in costs {
        let tiles = work.tokens.div_ceil(cost.tokens) * work.columns;
        let most = (MOST_ROUNDS * machine.multiprocessors).checked_div(tiles).unwrap_or(1);
        let most = most.min(work.slices / LEAST_SLICES).max(1);
        // All multiprocessors alike, and no end: what no number of splits falls below, but for the parts that are to be added.
        let slices = tiles as f64 * work.slices as f64;
        let even = slices * cost.shared.min(cost.alone) / machine.multiprocessors as f64;
        let bound = cost.start + even.max(least(work, machine));
        for splits in 1..=most {
            if fastest.is_some_and(|(_, _, [time, _])| bound + finish(work, machine, splits) > time) {
                break; // nor will more
            }
            let now = time(work, machine, cost, tiles, splits);
            if fastest.is_none_or(|(_, _, before)| now < before) {
                fastest = Some((cost, splits, now));
            }
        }
    }
    let (cost, splits, [time, _]) = fastest.expect("a table has tiles");
    (cost, splits, time)
}
