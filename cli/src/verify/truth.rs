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
    /// `[n]`; absent is [`Scale::ONE`] everywhere.
    pub scale: Option<&'a [Scale]>,
}

impl<'a> Linear<'a> {
    /// A layer without bias and scale.
    pub fn new(weight: &'a [f64], n: usize, k: usize) -> Self {
        assert_eq!(weight.len(), n * k);
        Self { weight, n, k, bias: None, scale: None }
    }

    /// The same layer with `bias`.
    pub fn with_bias(self, bias: Option<&'a [f64]>) -> Self {
        Self { bias, ..self }
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
        let y = scale.value * (base + lora) + bias;
        Output { y, base, base_size, lora, shrunk_size, lora_size, bias: bias.abs(), scale, k: self.k, rank }
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
