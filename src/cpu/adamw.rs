//! AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), with moments in f32 or in blocks of 8 bits.

use crate::nf4::{DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP, block_count, check_len, decode, encode};
use crate::{Element, Error, Result};

/// Elements that share a scale of 8-bit moments, as in bitsandbytes.
pub const MOMENT_BLOCKSIZE: usize = 256;

/// What stays the same over the steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// How much of the first moment stays.
    pub beta1: f64,
    /// How much of the second moment stays.
    pub beta2: f64,
    /// What is added to the root of the second moment.
    pub epsilon: f64,
    /// What share of a parameter is taken off, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    /// As `torch.optim.AdamW`: 0.9, 0.999, 1e-8, 0.01.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.01 }
    }
}

/// The factors of one step, each computed in f64 and rounded once: what a kernel needs to know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// beta1 and 1 - beta1.
    pub first: [f32; 2],
    /// beta2 and 1 - beta2.
    pub second: [f32; 2],
    /// `1 - learning_rate * weight_decay`.
    pub decay: f32,
    /// `learning_rate / (1 - beta1^step)`.
    pub step_size: f32,
    /// `sqrt(1 - beta2^step)`.
    pub correction: f32,
    /// As it is.
    pub epsilon: f32,
}

impl AdamW {
    /// The factors of step number `step`, which counts from 1.
    ///
    /// # Errors
    /// [`Error::Argument`] when a beta is not in [0, 1), epsilon not above 0, `step` is 0, or a number is not finite.
    pub fn step(&self, learning_rate: f64, step: u64) -> Result<AdamWStep> {
        let check = |name: &str, wanted: &str, value: f64, fits: bool| match fits {
            true => Ok(()),
            false => Err(Error::argument(name, wanted, value)),
        };
        check("beta1", "0 <= beta1 < 1", self.beta1, (0.0..1.0).contains(&self.beta1))?;
        check("beta2", "0 <= beta2 < 1", self.beta2, (0.0..1.0).contains(&self.beta2))?;
        check("epsilon", "a number above 0", self.epsilon, self.epsilon > 0.0 && self.epsilon.is_finite())?;
        check("weight_decay", "a finite number", self.weight_decay, self.weight_decay.is_finite())?;
        check("learning_rate", "a finite number", learning_rate, learning_rate.is_finite())?;
        check("step", "1 or more", 0.0, step > 0)?;
        Ok(AdamWStep {
            first: [self.beta1 as f32, (1.0 - self.beta1) as f32],
            second: [self.beta2 as f32, (1.0 - self.beta2) as f32],
            decay: (1.0 - learning_rate * self.weight_decay) as f32,
            step_size: (learning_rate / (1.0 - power(self.beta1, step))) as f32,
            correction: (1.0 - power(self.beta2, step)).sqrt() as f32,
            epsilon: self.epsilon as f32,
        })
    }
}

/// `base^exponent` by squaring: the same bits on every machine.
fn power(mut base: f64, mut exponent: u64) -> f64 {
    let mut power = 1.0;
    while exponent > 0 {
        if exponent & 1 == 1 {
            power *= base;
        }
        base *= base;
        exponent >>= 1;
    }
    power
}

/// The moments of one tensor: moving averages of its gradient, and of the gradient's square.
#[derive(Debug)]
pub enum MomentsMut<'a> {
    /// In f32, as long as the tensor.
    F32 {
        /// The first moment.
        m: &'a mut [f32],
        /// The second moment.
        v: &'a mut [f32],
    },
    /// In 8 bits, as long as the tensor, with a scale for every [`MOMENT_BLOCKSIZE`] elements of the flattened tensor
    /// (Dettmers et al. 2022, arXiv:2110.02861): `moment[i] = map[code[i]] * absmax[i / 256]`, rounded once.
    Blockwise {
        /// Codes of the first moment, in [`DYNAMIC_MAP`](crate::nf4::DYNAMIC_MAP).
        m: &'a mut [u8],
        /// Its scales.
        m_absmax: &'a mut [f32],
        /// Codes of the second moment, in [`UNSIGNED_DYNAMIC_MAP`](crate::nf4::UNSIGNED_DYNAMIC_MAP).
        v: &'a mut [u8],
        /// Its scales.
        v_absmax: &'a mut [f32],
    },
}

/// One step of one tensor, element by element, in f32, every operation rounded:
///
/// ```text
/// g <- gradient_scale g
/// m <- beta1 m + (1 - beta1) g
/// v <- beta2 v + ((1 - beta2) g) g
/// p <- round_T(decay p - step_size (m / (sqrt(v) / correction + epsilon)))
/// ```
///
/// 8-bit moments are decoded before and encoded after this: with the block's largest magnitude as its scale, to the nearest value
/// of the map (halfway, to the even index). The parameter sees them before they are encoded. bitsandbytes does the same, but for
/// the order of some roundings, and that on GPUs it moves a negative first moment that would become 0 to the code below.
///
/// # Errors
/// [`Error::Argument`] when a length does not fit. Nothing is written then.
pub fn adamw<T: Element>(
    step: &AdamWStep,
    gradient_scale: f32,
    parameter: &mut [T],
    gradient: &[f32],
    moments: MomentsMut<'_>,
) -> Result<()> {
    check_len("gradient", parameter.len(), "elements", gradient.len())?;
    moments.check(parameter.len())?;
    match moments {
        MomentsMut::F32 { m, v } => {
            for (((p, g), m), v) in parameter.iter_mut().zip(gradient).zip(m).zip(v) {
                *p = T::from_f32(step.element(p.to_f32(), gradient_scale * g, m, v));
            }
        }
        MomentsMut::Blockwise { m, m_absmax, v, v_absmax } => {
            let blocks = parameter.chunks_mut(MOMENT_BLOCKSIZE).zip(gradient.chunks(MOMENT_BLOCKSIZE));
            let codes = m.chunks_mut(MOMENT_BLOCKSIZE).zip(v.chunks_mut(MOMENT_BLOCKSIZE));
            let scales = m_absmax.iter_mut().zip(v_absmax);
            for (((p, g), (m, v)), (m_absmax, v_absmax)) in blocks.zip(codes).zip(scales) {
                let mut m_values = decode(&DYNAMIC_MAP, m, *m_absmax);
                let mut v_values = decode(&UNSIGNED_DYNAMIC_MAP, v, *v_absmax);
                for (((p, g), m), v) in p.iter_mut().zip(g).zip(&mut m_values).zip(&mut v_values) {
                    *p = T::from_f32(step.element(p.to_f32(), gradient_scale * g, m, v));
                }
                *m_absmax = encode(&DYNAMIC_MAP, &m_values, m);
                *v_absmax = encode(&UNSIGNED_DYNAMIC_MAP, &v_values, v);
            }
        }
    }
    Ok(())
}

impl AdamWStep {
    /// The new parameter.
    fn element(&self, p: f32, g: f32, m: &mut f32, v: &mut f32) -> f32 {
        *m = self.first[0] * *m + self.first[1] * g;
        *v = self.second[0] * *v + self.second[1] * g * g;
        self.decay * p - self.step_size * (*m / (v.sqrt() / self.correction + self.epsilon))
    }
}

impl MomentsMut<'_> {
    /// Checks that they are those of a tensor of `count` elements.
    fn check(&self, count: usize) -> Result<()> {
        match self {
            Self::F32 { m, v } => {
                check_len("moments.m", count, "elements", m.len())?;
                check_len("moments.v", count, "elements", v.len())
            }
            Self::Blockwise { m, m_absmax, v, v_absmax } => {
                let blocks = block_count(count, MOMENT_BLOCKSIZE);
                check_len("moments.m", count, "elements", m.len())?;
                check_len("moments.m_absmax", blocks, "blocks", m_absmax.len())?;
                check_len("moments.v", count, "elements", v.len())?;
                check_len("moments.v_absmax", blocks, "blocks", v_absmax.len())
            }
        }
    }
}
