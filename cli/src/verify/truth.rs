//! The formulas in f64, written out, together with the sizes that an error analysis needs. Nothing here calls the library:
//! what it computes is compared with this, and so are the `*_f64` tensors of the reference data.

/// The factors of one adapter: `delta = scaling * b @ a`.
#[derive(Debug, Clone)]
pub struct Factor {
    /// `[rank, k]`.
    pub a: Vec<f64>,
    /// `[n, rank]`.
    pub b: Vec<f64>,
    /// Rows of `a`.
    pub rank: usize,
    /// What the product is multiplied with.
    pub scaling: f64,
}

/// The factor that DoRA puts on one row, `magnitude / ||W + delta||`.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// The factor.
    pub value: f64,
    /// `|| |W| + |scaling| |b| |a| || / ||W + delta||`: how much cancels in the row; 1 when nothing does.
    pub condition: f64,
    /// Terms of one element of `b @ a`.
    pub rank: usize,
    /// Elements of the row.
    pub k: usize,
}

impl Scale {
    /// No scaling, known exactly.
    pub const ONE: Scale = Scale { value: 1.0, condition: 0.0, rank: 0, k: 0 };
}

/// One element of `y = scale (x W^T + scaling (x a^T) b^T) + bias`.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// The element.
    pub y: f64,
    /// `x W^T`.
    pub base: f64,
    /// `|x| |W|^T`.
    pub base_size: f64,
    /// `scaling (x a^T) b^T`.
    pub lora: f64,
    /// `|scaling| |x a^T| |b|^T`.
    pub shrunk_size: f64,
    /// `|scaling| (|x| |a|^T) |b|^T`.
    pub lora_size: f64,
    /// `|bias|`.
    pub bias: f64,
    /// The same of the adapter's own, scaled.
    pub adapter_bias: f64,
    /// The row's factor.
    pub scale: Scale,
    /// Terms of the base product.
    pub k: usize,
    /// Terms of the second low-rank product.
    pub rank: usize,
}

/// One element of `W' = scale (W + scaling b a)`, or of its inverse.
#[derive(Debug, Clone, Copy)]
pub struct Merged {
    /// The element.
    pub w: f64,
    /// What is rounded on the way to it: `W + delta` scaled, or `W' / scale` and `delta`.
    pub size: f64,
    /// `|scaling| |b| |a|`, scaled like the element.
    pub delta_size: f64,
    /// The row's factor.
    pub scale: Scale,
    /// Terms of the low-rank product.
    pub rank: usize,
}

/// A linear layer and the adapters on it.
pub struct Linear<'a> {
    /// `[n, k]`.
    pub weight: &'a [f64],
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// `[n]`.
    pub bias: Option<&'a [f64]>,
    /// `[n]`, the adapter's own, scaled.
    pub adapter_bias: Option<&'a [f64]>,
    /// `[n]`; absent is [`Scale::ONE`] everywhere.
    pub scale: Option<&'a [Scale]>,
}

impl<'a> Linear<'a> {
    /// A layer without bias and scale.
    pub fn new(weight: &'a [f64], n: usize, k: usize) -> Self {
        assert_eq!(weight.len(), n * k);
        Self { weight, n, k, bias: None, adapter_bias: None, scale: None }
    }

    /// The same layer with `bias`.
    pub fn with_bias(self, bias: Option<&'a [f64]>) -> Self {
        Self { bias, ..self }
    }

    /// The same layer with an adapter that has a bias.
    pub fn with_adapter_bias(self, adapter_bias: Option<&'a [f64]>) -> Self {
        Self { adapter_bias, ..self }
    }

    /// The same layer with `scale`.
    pub fn with_scale(self, scale: Option<&'a [Scale]>) -> Self {
        Self { scale, ..self }
    }

    fn scale(&self, row: usize) -> Scale {
        self.scale.map_or(Scale::ONE, |s| s[row])
    }

    /// The outputs for every row of `x` `[m, k]`. Row `i` uses the adapter that `adapter(i)` gives.
    pub fn forward<'f>(&self, x: &[f64], adapter: impl Fn(usize) -> Option<&'f Factor>) -> Vec<Output> {
        let token = |(i, x): (usize, &[f64])| {
            let factor = adapter(i);
            let shrunk: Vec<_> =
                factor.map_or(Vec::new(), |f| f.a.chunks(self.k).map(|a| dot(x, a)).collect());
            (0..self.n).map(|row| self.output(row, x, factor.zip(Some(&shrunk[..])))).collect::<Vec<_>>()
        };
        x.chunks(self.k).enumerate().flat_map(token).collect()
    }

    fn output(&self, row: usize, x: &[f64], lora: Option<(&Factor, &[(f64, f64)])>) -> Output {
        let (base, base_size) = dot(x, &self.weight[row * self.k..][..self.k]);
        let (lora, shrunk_size, lora_size, rank) = lora.map_or((0.0, 0.0, 0.0, 0), |(f, shrunk)| {
            let terms = f.b[row * f.rank..][..f.rank].iter().zip(shrunk);
            let (sum, shrunk, size) = terms.fold((0.0, 0.0, 0.0), |(sum, shrunk, size), (b, v)| {
                (sum + b * v.0, shrunk + (b * v.0).abs(), size + b.abs() * v.1)
            });
            (f.scaling * sum, f.scaling.abs() * shrunk, f.scaling.abs() * size, f.rank)
        });
        let (scale, bias) = (self.scale(row), self.bias.map_or(0.0, |b| b[row]));
        let own = self.adapter_bias.map_or(0.0, |b| b[row]);
        let y = scale.value * (base + lora) + bias + own;
        let (bias, adapter_bias, k) = (bias.abs(), own.abs(), self.k);
        Output { y, base, base_size, lora, shrunk_size, lora_size, bias, adapter_bias, scale, k, rank }
    }

    /// `scale (W + delta)`.
    pub fn merge(&self, factor: &Factor) -> Vec<Merged> {
        self.each_delta(factor, |w, delta, delta_size, scale| {
            let w = scale.value * (w + delta);
            Merged { w, size: w.abs(), delta_size: delta_size * scale.value.abs(), scale, rank: factor.rank }
        })
    }

    /// `W / scale - delta`.
    pub fn unmerge(&self, factor: &Factor) -> Vec<Merged> {
        self.each_delta(factor, |w, delta, delta_size, scale| {
            let direction = w / scale.value;
            Merged { w: direction - delta, size: direction.abs(), delta_size, scale, rank: factor.rank }
        })
    }

    fn each_delta(&self, factor: &Factor, make: impl Fn(f64, f64, f64, Scale) -> Merged) -> Vec<Merged> {
        let delta = delta(factor, self.n, self.k);
        let element =
            |(i, (&w, &(d, size))): (usize, (&f64, &(f64, f64)))| make(w, d, size, self.scale(i / self.k));
        self.weight.iter().zip(&delta).enumerate().map(element).collect()
    }

    /// DoRA's factor of every row, from this layer's weight (its own `scale` does not matter).
    pub fn dora_scale(&self, factor: &Factor, magnitude: &[f64]) -> Vec<Scale> {
        let delta = delta(factor, self.n, self.k);
        let row = |(row, &m): (usize, &f64)| {
            let range = row * self.k..(row + 1) * self.k;
            let pairs = self.weight[range.clone()].iter().zip(&delta[range]);
            let (sum, size) = pairs.fold((0.0, 0.0), |(s, z), (w, (d, size))| {
                (s + (w + d).powi(2), z + (w.abs() + size).powi(2))
            });
            Scale { value: m / sum.sqrt(), condition: (size / sum).sqrt(), rank: factor.rank, k: self.k }
        };
        magnitude.iter().enumerate().map(row).collect()
    }
}

/// `scaling * b @ a` of `[n, k]`, and the same of the absolute values.
pub fn delta(factor: &Factor, n: usize, k: usize) -> Vec<(f64, f64)> {
    let mut out = vec![(0.0, 0.0); n * k];
    for (row, b) in out.chunks_mut(k.max(1)).zip(factor.b.chunks(factor.rank.max(1))) {
        for (b, a) in b.iter().zip(factor.a.chunks(k.max(1))) {
            for (o, a) in row.iter_mut().zip(a) {
                let term = factor.scaling * b * a;
                *o = (o.0 + term, o.1 + term.abs());
            }
        }
    }
    out
}

fn dot(x: &[f64], y: &[f64]) -> (f64, f64) {
    x.iter().zip(y).fold((0.0, 0.0), |(sum, size), (x, y)| (sum + x * y, size + (x * y).abs()))
}

/// `[rows, columns]` to `[columns, rows]`.
pub fn transpose<T: Copy>(values: &[T], rows: usize, columns: usize) -> Vec<T> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect()
}

/// Sweeps over all pairs. Ten are plenty for numbers; what is not a number never converges.
const SWEEPS: usize = 50;

/// The singular values of `[rows, columns]`, in descending order, by one-sided Jacobi rotations (Hestenes 1958): pairs of
/// columns are made orthogonal until all are, and then their lengths are the singular values.
pub fn singular_values(values: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let (count, length) = (rows.min(columns), rows.max(columns));
    let lines = if rows < columns { values.to_vec() } else { transpose(values, rows, columns) };
    let mut lines: Vec<Vec<f64>> = lines.chunks(length.max(1)).map(<[f64]>::to_vec).collect();
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for p in 0..count {
            for q in p + 1..count {
                let (before, after) = lines.split_at_mut(q);
                rotated |= orthogonalise(&mut before[p], &mut after[0]);
            }
        }
        if !rotated {
            break;
        }
    }
    let mut lengths: Vec<f64> = lines.iter().map(|line| dot(line, line).0.sqrt()).collect();
    lengths.sort_by(|a, b| b.total_cmp(a));
    lengths
}

/// Rotates two vectors in their plane so that they are orthogonal; `false` when they are, to rounding.
fn orthogonalise(p: &mut [f64], q: &mut [f64]) -> bool {
    let (pp, qq, (pq, size)) = (dot(p, p).0, dot(q, q).0, dot(p, q));
    let rounding = f64::EPSILON * (p.len() as f64 * size).max((pp * qq).sqrt());
    if pq.abs() <= rounding {
        return false;
    }
    let zeta = (qq - pp) / (2.0 * pq);
    let tangent = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
    let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
    let sine = cosine * tangent;
    for (p, q) in p.iter_mut().zip(q) {
        (*p, *q) = (cosine * *p - sine * *q, sine * *p + cosine * *q);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn singular_values_of_known_matrices() {
        assert_eq!(singular_values(&[3.0, 0.0, 0.0, 0.0, -5.0, 0.0], 2, 3), [5.0, 3.0]);
        // [[1, 1], [1, 1]] has rank 1 and norm 2; [[1, 1], [0, 1]] has the golden ratio and its inverse.
        let close = |got: Vec<f64>, want: [f64; 2]| got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-15);
        assert!(close(singular_values(&[1.0; 4], 2, 2), [2.0, 0.0]));
        let golden = (1.0 + 5f64.sqrt()) / 2.0;
        assert!(close(singular_values(&[1.0, 1.0, 0.0, 1.0], 2, 2), [golden, 1.0 / golden]));
        assert!(singular_values(&[], 0, 4).is_empty());
        assert!(singular_values(&[f64::NAN; 4], 2, 2)[0].is_nan());
        assert_eq!(singular_values(&[0.0; 6], 3, 2), [0.0, 0.0]);
    }

    #[test]
    fn a_layer_by_hand() {
        // W = [[1, 2], [3, 4]], a = [1, -1], b = [2, 0.5], scaling 2: delta = [[4, -4], [1, -1]].
        let factor = Factor { a: vec![1.0, -1.0], b: vec![2.0, 0.5], rank: 1, scaling: 2.0 };
        let weight = [1.0, 2.0, 3.0, 4.0];
        let linear = Linear::new(&weight, 2, 2);
        let values = |merged: Vec<Merged>| merged.iter().map(|t| t.w).collect::<Vec<_>>();
        assert_eq!(values(linear.merge(&factor)), [5.0, -2.0, 4.0, 3.0]);
        let y: Vec<f64> = linear.forward(&[1.0, 1.0], |_| Some(&factor)).iter().map(|t| t.y).collect();
        assert_eq!(y, [3.0, 7.0]);
        // Rows of W + delta have the norms sqrt(29) and 5; with these magnitudes the factors are 1 and 2.
        let scale = linear.dora_scale(&factor, &[29f64.sqrt(), 10.0]);
        assert_eq!([scale[0].value, scale[1].value], [1.0, 2.0]);
        let bias = [0.5, -1.0];
        let dora = Linear::new(&weight, 2, 2).with_scale(Some(&scale)).with_bias(Some(&bias));
        assert_eq!(values(dora.merge(&factor)), [5.0, -2.0, 8.0, 6.0]);
        let y: Vec<f64> = dora.forward(&[1.0, 1.0], |_| Some(&factor)).iter().map(|t| t.y).collect();
        assert_eq!(y, [3.5, 13.0]);
        let merged = [5.0, -2.0, 8.0, 6.0];
        let back = Linear::new(&merged, 2, 2).with_scale(Some(&scale)).unmerge(&factor);
        assert_eq!(values(back), weight);
    }
}
