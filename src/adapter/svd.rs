//! Singular values of a matrix that need not be in memory: it is read in tiles, as often as needed.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::matmul::matmul;
use faer::linalg::svd::{ComputeSvdVectors, svd, svd_scratch};
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::tensor::Data;
use crate::{DType, Element, Error, Result, Tensor};

/// Rows and columns of a tile: with its factors' rows it stays in a core's cache.
const TILE: usize = 256;
/// Columns of the basis beyond the rank (Halko, Martinsson and Tropp 2011, section 4.2, ask for 5 to 10).
const OVERSAMPLING: usize = 10;
/// Passes over the matrix after which a basis that still moves is taken as it is.
const MAX_PASSES: usize = 48;
/// A basis is good when the passes still to come would change the squared error by less than this share of it.
const TOLERANCE: f64 = 2e-7;
/// Smaller sides up to this are decomposed in full: it is as quick.
const SMALL: usize = 512;
/// The rank at which a search by energy begins, and the passes that it takes at each.
const FIRST_RANK: usize = 16;
const SEARCH_PASSES: usize = 6;

/// How large a low-rank approximation is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rank {
    /// This rank.
    Number(usize),
    /// The smallest rank that keeps this share of the squared Frobenius norm, from 0 to 1.
    Energy(f64),
}

impl From<usize> for Rank {
    fn from(rank: usize) -> Self {
        Self::Number(rank)
    }
}

/// How singular values are computed. Each way gives the same bits on any number of threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decomposition {
    /// In full where the smaller side is at most 512 or the rank above a quarter of it; else by subspace iteration, with a
    /// seed of 0.
    #[default]
    Auto,
    /// All singular values, of the whole matrix in memory in f64.
    Full,
    /// The largest ones by subspace iteration from random signs (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm
    /// 4.4), until the error of the approximation settles. Passes over the matrix by tiles; the memory is that of the factors.
    Randomised {
        /// Of the signs.
        seed: u64,
    },
}

/// `[rows, columns]`, read in runs of a row.
pub(crate) struct Matrix<'a> {
    pub rows: usize,
    pub columns: usize,
    /// `read(row, column, out)` writes the elements from there on. They exist.
    pub read: &'a (dyn Fn(usize, usize, &mut [f64]) + Sync),
}

/// `left`ᵀ `diag(sigma)` `right` and what it leaves out.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Svd {
    /// `[rank, rows]`, orthonormal.
    pub left: Vec<f64>,
    /// `[rank, columns]`, orthonormal.
    pub right: Vec<f64>,
    /// In descending order: at least `rank` of them, and all of them if `complete`.
    pub sigma: Vec<f64>,
    pub rank: usize,
    pub rows: usize,
    pub columns: usize,
    pub complete: bool,
    /// The Frobenius norm of the matrix.
    pub norm: f64,
    /// The Frobenius norm of what lies beyond all of `sigma`.
    pub beyond: f64,
}

impl Matrix<'_> {
    /// The Frobenius norm.
    ///
    /// # Errors
    /// The place and the value of the first element that is not finite.
    pub fn norm(&self) -> std::result::Result<f64, ([usize; 2], f64)> {
        let row_square = |row: usize| {
            let (mut run, mut sum) = (vec![0.0; TILE.min(self.columns)], 0.0);
            for column in (0..self.columns).step_by(TILE) {
                let run = &mut run[..TILE.min(self.columns - column)];
                (self.read)(row, column, run);
                if let Some(i) = run.iter().position(|v| !v.is_finite()) {
                    return Err(([row, column + i], run[i]));
                }
                sum += run.iter().map(|v| v * v).sum::<f64>();
            }
            Ok(sum)
        };
        let squares: Vec<_> = (0..self.rows).into_par_iter().map(row_square).collect();
        let squares: Vec<f64> = squares.into_iter().collect::<std::result::Result<_, _>>()?;
        Ok(squares.iter().sum::<f64>().sqrt())
    }

    /// The best approximation. `norm` is [`Matrix::norm`].
    ///
    /// # Errors
    /// [`Error::Argument`] when the rank exceeds the smaller side, the energy is no share, or (which has not been seen) an
    /// iteration does not converge.
    pub fn svd(&self, rank: Rank, method: Decomposition, norm: f64) -> Result<Svd> {
        let side = self.rows.min(self.columns);
        let seed = match (check_share(rank)?, method) {
            (Rank::Number(rank), _) if rank > side => {
                return Err(Error::argument("rank", format!("at most {side}"), rank));
            }
            (_, Decomposition::Full) => None,
            (_, Decomposition::Randomised { seed }) => Some(seed),
            (Rank::Energy(_), Decomposition::Auto) => (side > SMALL).then_some(0),
            (Rank::Number(rank), Decomposition::Auto) => {
                (side > SMALL && rank <= self.largest_rank()).then_some(0)
            }
        };
        match (rank, seed) {
            (_, None) => self.full(rank, norm),
            (Rank::Number(rank), Some(seed)) => self.truncated(rank, &mut Vec::new(), MAX_PASSES, seed, norm),
            (Rank::Energy(share), Some(seed)) => {
                let (mut basis, mut rank) = (Vec::new(), FIRST_RANK.min(side));
                loop {
                    let enough = self.truncated(rank, &mut basis, SEARCH_PASSES, seed, norm)?.rank_for(share);
                    if let Some(rank) = enough {
                        // Singular values grow from pass to pass, so that this is enough, or more than that.
                        let mut svd = self.truncated(rank, &mut basis, MAX_PASSES, seed, norm)?;
                        svd.cut(svd.rank_for(share).unwrap_or(rank));
                        return Ok(svd);
                    }
                    if rank == side || method == Decomposition::Auto && 2 * rank > self.largest_rank() {
                        return self.full(Rank::Energy(share), norm);
                    }
                    rank = (2 * rank).min(side);
                }
            }
        }
    }

    /// The largest rank for which subspace iteration is quicker than a whole decomposition.
    fn largest_rank(&self) -> usize {
        self.rows.min(self.columns) / 4
    }

    fn full(&self, rank: Rank, norm: f64) -> Result<Svd> {
        let mut elements = super::update::zeros("tuned - base", self.rows, self.columns)?;
        elements
            .par_chunks_mut(self.columns.max(1))
            .enumerate()
            .for_each(|(row, out)| (self.read)(row, 0, out));
        let (left, sigma, right) =
            thin_svd(MatRef::from_row_major_slice(&elements, self.rows, self.columns))?;
        let all = sigma.len();
        let mut svd = Svd {
            left: by_rank(&left, all),
            right: by_rank(&right, all),
            sigma,
            rank: all,
            rows: self.rows,
            columns: self.columns,
            complete: true,
            norm,
            beyond: 0.0,
        };
        svd.cut_to(rank);
        Ok(svd)
    }

    /// Subspace iteration. `basis`, `[columns, any]`, is where it begins (random signs are added) and where it has ended.
    fn truncated(
        &self,
        rank: usize,
        basis: &mut Vec<f64>,
        max_passes: usize,
        seed: u64,
        norm: f64,
    ) -> Result<Svd> {
        let width = (rank + OVERSAMPLING).min(self.rows).min(self.columns);
        let mut from = widened(basis, self.columns, width, seed);
        // Whether `from` spans columns: it takes turns.
        let mut of_columns = true;
        let (mut last, mut gain) = (vec![0.0; width], f64::INFINITY);
        for pass in 0.. {
            let product = self.times(&from, width, of_columns);
            let (outer, inner) =
                if of_columns { (self.rows, self.columns) } else { (self.columns, self.rows) };
            let (to, sigma, turn) = thin_svd(MatRef::from_row_major_slice(&product, outer, width))?;
            // From the second pass on `from` is orthonormal, so that these are singular values of a projection: each is at
            // most the true one, and grows from pass to pass, down to what rounding errors of sums move it by.
            let rounding = 4.0 * (inner as f64).sqrt() * f64::EPSILON * sigma.first().copied().unwrap_or(0.0);
            let last_gain = std::mem::replace(&mut gain, growth(&last[..rank], &sigma[..rank], rounding));
            let all: f64 = sigma.iter().rev().map(|s| s * s).sum();
            let rest = sigma[rank..].iter().map(|s| s * s).sum::<f64>() + (norm * norm - all).max(0.0);
            // What the passes to come would add, if they converge as the last ones.
            let ratio = (gain / last_gain).min(1.0 - 1e-3);
            let to_come = gain * ratio / (1.0 - ratio);
            let settled = pass > 1 && gain == 0.0 || pass > 2 && to_come <= TOLERANCE * rest;
            last = sigma;
            if settled || pass + 1 == max_passes {
                let from = MatRef::from_row_major_slice(&from, inner, width);
                let mut other = Mat::zeros(inner, width);
                matmul(other.as_mut(), Accum::Replace, from, turn.as_ref(), 1.0, Par::Seq);
                let (left, right) = if of_columns { (&to, &other) } else { (&other, &to) };
                *basis = by_row(right);
                let mut svd = Svd {
                    left: by_rank(left, rank),
                    right: by_rank(right, rank),
                    sigma: last[..rank].to_vec(),
                    rank,
                    rows: self.rows,
                    columns: self.columns,
                    complete: false,
                    norm,
                    beyond: 0.0,
                };
                svd.beyond = self.rest(&svd.left, &svd.scaled_right(), rank);
                return Ok(svd);
            }
            from = by_row(&to);
            of_columns = !of_columns;
        }
        unreachable!("the passes are bounded")
    }

    /// The product with a basis `[columns, width]`, or of the transpose with `[rows, width]`. Every sum has one order.
    fn times(&self, basis: &[f64], width: usize, of_columns: bool) -> Vec<f64> {
        let (outer, inner) = if of_columns { (self.rows, self.columns) } else { (self.columns, self.rows) };
        let mut product = vec![0.0; outer * width];
        product.par_chunks_mut((TILE * width).max(1)).enumerate().for_each_init(
            || vec![0.0; TILE * TILE],
            |tile, (i, product)| {
                let (first, count) = (i * TILE, product.len() / width);
                let mut sum = MatMut::from_row_major_slice_mut(product, count, width);
                for k in (0..inner).step_by(TILE) {
                    let depth = TILE.min(inner - k);
                    let tile = match of_columns {
                        true => self.tile(first, count, k, depth, tile),
                        false => self.tile(k, depth, first, count, tile).transpose(),
                    };
                    let basis =
                        MatRef::from_row_major_slice(&basis[k * width..][..depth * width], depth, width);
                    matmul(sum.as_mut(), Accum::Add, tile, basis, 1.0, Par::Seq);
                }
            },
        );
        product
    }

    /// `|| self - left`ᵀ` right ||`, of factors `[rank, rows]` and `[rank, columns]`.
    pub fn rest(&self, left: &[f64], right: &[f64], rank: usize) -> f64 {
        let left = MatRef::from_row_major_slice(left, rank, self.rows).transpose();
        let right = MatRef::from_row_major_slice(right, rank, self.columns);
        let square = |tile: &mut Vec<f64>, row: usize| {
            let (count, mut sum) = (TILE.min(self.rows - row), 0.0);
            for column in (0..self.columns).step_by(TILE) {
                let width = TILE.min(self.columns - column);
                self.tile(row, count, column, width, tile);
                let elements = &mut tile[..count * width];
                let rest = MatMut::from_row_major_slice_mut(elements, count, width);
                let (left, right) = (left.subrows(row, count), right.subcols(column, width));
                matmul(rest, Accum::Add, left, right, -1.0, Par::Seq);
                sum += elements.iter().map(|v| v * v).sum::<f64>();
            }
            sum
        };
        let rows: Vec<usize> = (0..self.rows).step_by(TILE).collect();
        let squares: Vec<f64> = rows.into_par_iter().map_init(|| vec![0.0; TILE * TILE], square).collect();
        squares.iter().sum::<f64>().sqrt()
    }

    /// Reads a tile into `out`.
    fn tile<'o>(
        &self,
        row: usize,
        rows: usize,
        column: usize,
        columns: usize,
        out: &'o mut [f64],
    ) -> MatRef<'o, f64> {
        let out = &mut out[..rows * columns];
        for (i, run) in out.chunks_exact_mut(columns).enumerate() {
            (self.read)(row + i, column, run);
        }
        MatRef::from_row_major_slice(out, rows, columns)
    }
}

impl Svd {
    /// `|| matrix - approximation ||` in the Frobenius norm.
    pub fn error(&self) -> f64 {
        // The smallest first, so that they are not lost against the largest.
        self.sigma[self.rank..].iter().rev().fold(self.beyond.powi(2), |sum, s| sum + s * s).sqrt()
    }

    /// Leaves the `rank` largest singular values, of those that it has.
    pub fn cut(&mut self, rank: usize) {
        self.rank = self.rank.min(rank);
        self.left.truncate(self.rank * self.rows);
        self.right.truncate(self.rank * self.columns);
    }

    /// The same, by number or by energy, of a decomposition that is complete.
    pub fn cut_to(&mut self, rank: Rank) {
        self.cut(match rank {
            Rank::Number(rank) => rank,
            Rank::Energy(share) => self.rank_for(share).unwrap_or(self.rank),
        });
    }

    /// The smallest rank that keeps this share of the squared norm, if these singular values do. What is zero but for the
    /// rounding errors of the decomposition counts as zero.
    pub fn rank_for(&self, share: f64) -> Option<usize> {
        let rounding = f64::EPSILON * (self.rows + self.columns) as f64 * self.norm;
        let may_lose = (1.0 - share) * self.norm * self.norm + rounding * rounding;
        let mut lost = self.beyond * self.beyond;
        if lost > may_lose {
            return None;
        }
        let droppable = self.sigma.iter().rev().take_while(|s| {
            lost += *s * *s;
            lost <= may_lose
        });
        Some(self.sigma.len() - droppable.count())
    }

    /// `diag(sigma) right`.
    fn scaled_right(&self) -> Vec<f64> {
        scaled(&self.right, self.columns, &self.sigma, |s| s)
    }

    /// `lora_a` `[rank, columns]` and `lora_b` `[rows, rank]`, each with the square roots of the singular values; changed
    /// over and transposed when the matrix is stored `[in, out]`.
    pub fn factors(&self, fan_in_fan_out: bool) -> (Vec<f64>, Vec<f64>) {
        let left = scaled(&self.left, self.rows, &self.sigma, f64::sqrt);
        let right = scaled(&self.right, self.columns, &self.sigma, f64::sqrt);
        let (a, b, outputs) =
            if fan_in_fan_out { (left, right, self.columns) } else { (right, left, self.rows) };
        let b = (0..outputs).flat_map(|n| b.iter().skip(n).step_by(outputs).copied()).collect();
        (a, b)
    }
}

/// Checks that an energy is a share.
pub(crate) fn check_share(rank: Rank) -> Result<Rank> {
    match rank {
        Rank::Energy(share) if !(0.0..=1.0).contains(&share) => {
            Err(Error::argument("energy", "a share from 0 to 1", share))
        }
        rank => Ok(rank),
    }
}

/// A tensor of `dtype` from f64 values.
///
/// # Errors
/// [`Error::Argument`] naming `argument` when an element overflows.
pub(crate) fn round(
    argument: &str,
    shape: impl Into<Vec<usize>>,
    values: &[f64],
    dtype: DType,
) -> Result<Tensor> {
    let data = match dtype {
        DType::F32 => Data::F32(values.iter().map(|&v| Element::from_f64(v)).collect()),
        DType::F16 => Data::F16(values.iter().map(|&v| Element::from_f64(v)).collect()),
        DType::BF16 => Data::BF16(values.iter().map(|&v| Element::from_f64(v)).collect()),
    };
    let rounded = Tensor::new(shape, data)?;
    match rounded.to_f32().iter().position(|v| !v.is_finite()) {
        None => Ok(rounded),
        Some(i) => Err(Error::argument(argument, format!("elements that fit in {dtype}"), values[i])),
    }
}

/// `matrix = U diag(sigma) Vᵀ` with as many columns as its smaller side, on one thread.
pub(crate) fn thin_svd(matrix: MatRef<'_, f64>) -> Result<(Mat<f64>, Vec<f64>, Mat<f64>)> {
    let (rows, columns) = matrix.shape();
    let side = rows.min(columns);
    let (mut u, mut v, mut sigma) = (Mat::zeros(rows, side), Mat::zeros(columns, side), Diag::zeros(side));
    let vectors = ComputeSvdVectors::Thin;
    let scratch = svd_scratch::<f64>(rows, columns, vectors, vectors, Par::Seq, Default::default());
    svd(
        matrix,
        sigma.as_mut(),
        Some(u.as_mut()),
        Some(v.as_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    )
    .map_err(|e| Error::argument("tuned - base", "a convergent decomposition", format!("{e:?}")))?;
    Ok((u, sigma.column_vector().iter().copied().collect(), v))
}

/// By how much the sum of squares has grown, where that is more than rounding errors.
fn growth(from: &[f64], to: &[f64], rounding: f64) -> f64 {
    let grown = from.iter().zip(to).filter(|(from, to)| *to - *from > rounding);
    grown.map(|(from, to)| (to - from) * (to + from)).sum()
}

/// The first columns, one after another.
pub(super) fn by_rank(matrix: &Mat<f64>, rank: usize) -> Vec<f64> {
    (0..rank).flat_map(|r| matrix.col(r).iter().copied()).collect()
}

/// Row-major.
fn by_row(matrix: &Mat<f64>) -> Vec<f64> {
    matrix.row_iter().flat_map(|row| row.iter().copied()).collect()
}

/// Vectors of this length that follow one another, each times `factor` of its singular value.
fn scaled(vectors: &[f64], length: usize, sigma: &[f64], factor: impl Fn(f64) -> f64) -> Vec<f64> {
    vectors.iter().enumerate().map(|(i, v)| v * factor(sigma[i / length])).collect()
}

/// `basis` `[rows, any]` with random signs in the columns that it lacks.
fn widened(basis: &[f64], rows: usize, width: usize, seed: u64) -> Vec<f64> {
    let has = basis.len() / rows.max(1);
    let element = |i: usize| {
        let (row, column) = (i / width, i % width);
        if column < has { basis[row * has + column] } else { sign(seed, i as u64) }
    };
    (0..rows * width).map(element).collect()
}

/// The `i`-th sign of a seed (splitmix64, Steele, Lea and Flood 2014).
fn sign(seed: u64, i: u64) -> f64 {
    let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    if (z ^ (z >> 31)) >> 63 == 0 { 1.0 } else { -1.0 }
}
