use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// What is known of a layer when ranks are given to the layers of a model: see [`Ranks::within`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spectrum<'a> {
    /// In descending order, as far as they are known.
    pub singular_values: &'a [f64],
    /// Whether they are all.
    pub complete: bool,
    /// What a rank costs: `out + in` parameters.
    pub cost: usize,
}

/// Ranks for the layers of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ranks {
    /// The rank of each layer; 0 leaves it out.
    pub ranks: Vec<usize>,
    /// Layers of which more singular values have to be known: all known ones are kept, and the next might be too. With such layers
    /// the ranks are not final.
    pub open: Vec<usize>,
}

/// A layer's next singular value.
struct Next {
    gain: f64,
    layer: usize,
}

impl Ranks {
    /// Spends `budget` parameters on the layers' singular values, those with the largest σ² per parameter first: each keeps that much of
    /// the squared Frobenius norms that the layers have together. A layer whose next value does not fit any more is done; others
    /// may still fit. Of equal values the earlier layer's comes first. Zeros are not kept.
    pub fn within(budget: u64, layers: &[Spectrum<'_>]) -> Self {
        let (mut left, mut ranks, mut open) = (budget, vec![0; layers.len()], Vec::new());
        let next = |layer: usize, rank: usize| {
            let Spectrum { singular_values, cost, .. } = layers[layer];
            let sigma = singular_values.get(rank).copied().filter(|s| *s > 0.0)?;
            Some(Next { gain: sigma * sigma / cost.max(1) as f64, layer })
        };
        let mut heap: BinaryHeap<Next> = (0..layers.len()).filter_map(|layer| next(layer, 0)).collect();
        while let Some(Next { layer, .. }) = heap.pop() {
            let Spectrum { singular_values, complete, cost } = layers[layer];
            let Some(rest) = left.checked_sub(cost as u64) else { continue };
            left = rest;
            ranks[layer] += 1;
            heap.extend(next(layer, ranks[layer]));
            if ranks[layer] == singular_values.len() && !complete && left >= cost as u64 {
                open.push(layer);
            }
        }
        open.sort_unstable();
        Self { ranks, open }
    }
}

impl Ord for Next {
    fn cmp(&self, other: &Self) -> Ordering {
        self.gain.total_cmp(&other.gain).then(other.layer.cmp(&self.layer))
    }
}

impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Next {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Next {}
