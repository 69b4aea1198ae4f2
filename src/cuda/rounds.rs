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
fn time(work: &Work, machine: &Machine, cost: &Cost, splits: usize) -> [f64; 2] {
    let units = work.tokens.div_ceil(cost.tokens) * work.columns * splits;
    let rounds = units.div_ceil(machine.multiprocessors);
    let slice = if rounds > 1 { cost.shared } else { cost.alone };
    let tiles = rounds as f64 * (work.slices.div_ceil(splits) as f64 * slice + cost.end);
    let finish = match splits {
        1 => 0.0,
        _ => machine.finish + (splits * work.tokens * work.outputs) as f64 / machine.sums,
    };
    [tiles.max(work.weight_bytes as f64 / machine.bytes), tiles].map(|tiles| cost.start + tiles + finish)
}

/// The cost and the number of splits that take least, and what they take. Of equals what would take less if W came at once, the earlier cost,
/// and the fewest splits.
pub(super) fn fastest<'a>(work: &Work, machine: &Machine, costs: &'a [Cost]) -> (&'a Cost, usize, f64) {
    let choices = costs.iter().flat_map(|cost| {
        let tiles = work.tokens.div_ceil(cost.tokens) * work.columns;
        let most = (MOST_ROUNDS * machine.multiprocessors).checked_div(tiles).unwrap_or(1);
        let most = most.min(work.slices / LEAST_SLICES).max(1);
        (1..=most).map(move |splits| (cost, splits, time(work, machine, cost, splits)))
    });
    let fastest = choices.min_by(|(_, _, a), (_, _, b)| a[0].total_cmp(&b[0]).then(a[1].total_cmp(&b[1])));
    let (cost, splits, [time, _]) = fastest.expect("a table has tiles");
    (cost, splits, time)
}
