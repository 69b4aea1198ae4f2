//! A merged weight to 4-bit codes again, in the ways of [`Requantize`](crate::adapter::Requantize).

use crate::adapter::{Grid, Rounding, gain_bits, panel_len};
use crate::nf4::{Absmax, Nf4Matrix, block_count, check_len, largest_magnitude, packed_len};
use crate::{Error, Result};

/// The scale of each block with the least squared error ([`Scale::LeastError`](crate::adapter::Scale)): of the one that the weight `before` the
/// merge has there, the largest magnitude and shares of it, and what suits the codes of the best of these, for plain scales.
///
/// `wanted` are the merged elements in f32 ([`nf4_merge_dense`](super::nf4_merge_dense)). The largest magnitudes are
/// [`nf4_merge`](super::nf4_merge())'s own.
///
/// # Errors
/// [`Error::Argument`] when a length does not fit. Nothing is written then.
pub fn nf4_requantize_scales(before: &Nf4Matrix, wanted: &[f32], absmax: &mut [f32]) -> Result<()> {
    let blocksize = before.blocksize();
    check_len("wanted", before.numel(), "elements", wanted.len())?;
    check_len("absmax", block_count(wanted.len(), blocksize), "blocks", absmax.len())?;
    let grid = Grid::new(before.codebook());
    for (i, (block, absmax)) in wanted.chunks(blocksize).zip(absmax).enumerate() {
        *absmax = grid.least_error(block, before.absmax().get(i), largest_magnitude(block));
    }
    Ok(())
}

/// Codes for the merged elements `wanted`, by the scales that they will be decoded with. [`Rounding::KeepGain`] goes by the delta
/// `wanted - before`, the weight before the merge decoded to its dtype, in panels of whole rows and blocks.
///
/// # Errors
/// [`Error::Argument`] when the weight is not a matrix, or a length does not fit. Nothing is written then.
pub fn nf4_requantize(
    before: &Nf4Matrix,
    wanted: &[f32],
    absmax: &Absmax,
    rounding: Rounding,
    packed: &mut [u8],
) -> Result<()> {
    let &[_, columns] = before.shape() else {
        return Err(Error::argument("before.shape", "[N, K]", format!("{:?}", before.shape())));
    };
    let blocksize = before.blocksize();
    check_len("wanted", before.numel(), "elements", wanted.len())?;
    check_len("absmax", block_count(wanted.len(), blocksize), "blocks", absmax.len())?;
    check_len("packed", packed_len(wanted.len()), "bytes", packed.len())?;
    let (grid, scales) = (Grid::new(before.codebook()), absmax.dequantize());
    let mut ranks = vec![grid.coder.zero_rank(); 2 * packed.len()];
    let (of_elements, _) = ranks.split_at_mut(wanted.len());
    for ((block, ranks), absmax) in
        wanted.chunks(blocksize).zip(of_elements.chunks_mut(blocksize)).zip(&*scales)
    {
        grid.coder.nearest(block, *absmax, ranks);
    }
    match rounding {
        Rounding::Nearest => {}
        Rounding::Stochastic { seed } => grid.stochastic(seed, 0, wanted, blocksize, &scales, of_elements),
        Rounding::KeepGain => {
            let weight = before.dequantize_tensor().to_f32();
            let delta: Vec<f32> = wanted.iter().zip(&weight).map(|(x, w)| x - w).collect();
            let panel = panel_len(columns, blocksize);
            let panels = wanted.chunks(panel).zip(delta.chunks(panel)).zip(weight.chunks(panel));
            for (((wanted, delta), weight), (ranks, scales)) in
                panels.zip(of_elements.chunks_mut(panel).zip(scales.chunks(panel / blocksize)))
            {
                grid.compensate([wanted, delta, weight], gain_bits(panel), blocksize, scales, ranks);
            }
        }
    }
    grid.coder.pack(&ranks, packed);
    Ok(())
}
