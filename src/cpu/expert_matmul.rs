use super::matmul::{Accumulate, MatmulExtras, Shape, Weight, check_adapters, checked, product};
use crate::nf4::check_len;
use crate::{Element, Error, Result};

/// The products of a mixture of experts: row i of `y` `[tokens * choices, n]` is that of [`matmul`](super::matmul) for row
/// `i / choices` of `x` `[tokens, k]` and the weight of expert `expert[i]`.
///
/// `weight` is the stack of the experts' weights, a matrix `[experts * n, k]`; 4-bit blocks may begin in one expert's and end in the
/// next one's, and a 4-bit stack may have the shape `[experts, n, k]`. In `extras`, `bias` and `row_scale` are `[experts, n]`, the
/// adapter index has a number for each row of y, and there is no dropout. A row without an expert (-1) becomes zeros, without bias.
///
/// # Errors
/// [`Error::Argument`] when a length does not fit, or a row's expert or adapter does not exist. `y` is not written then.
pub fn expert_matmul<T: Element, A: Element>(
    x: &[T],
    [tokens, choices, experts]: [usize; 3],
    weight: &Weight<'_, T>,
    expert: &[i32],
    extras: &MatmulExtras<'_, T, A>,
    accumulate: Accumulate,
    y: &mut [T],
) -> Result<()> {
    let (n, k) = shape_of(weight, experts)?;
    let rows = checked("expert", tokens, choices)?;
    check_len("x", checked("x", tokens, k)?, "elements", x.len())?;
    check_len("expert", rows, "rows", expert.len())?;
    check_len("y", checked("y", rows, n)?, "elements", y.len())?;
    if let Some(bias) = extras.bias {
        check_len("bias", experts * n, "elements", bias.len())?;
    }
    if let Some(row_scale) = extras.row_scale {
        check_len("row_scale", experts * n, "elements", row_scale.len())?;
    }
    if extras.dropout.is_some() {
        return Err(Error::argument("dropout", "none", "some"));
    }
    check_adapters(extras, rows, n, k)?;
    let exists = |&e: &i32| e == -1 || usize::try_from(e).is_ok_and(|e| e < experts);
    if let Some(i) = expert.iter().position(|e| !exists(e)) {
        let wanted = format!("-1, or one of {experts} experts");
        return Err(Error::argument(format!("expert[{i}]"), wanted, expert[i]));
    }

    y.fill(T::from_f32(0.0));
    for e in 0..experts {
        let own: Vec<usize> = (0..rows).filter(|&i| expert[i] == e as i32).collect();
        let inputs: Vec<T> =
            own.iter().flat_map(|i| &x[i / choices * k..(i / choices + 1) * k]).copied().collect();
        let index: Option<Vec<i32>> =
            extras.adapter_index.map(|index| own.iter().map(|&i| index[i]).collect());
        let part = e * n..(e + 1) * n;
        let extras = MatmulExtras {
            bias: extras.bias.map(|bias| &bias[part.clone()]),
            row_scale: extras.row_scale.map(|scale| &scale[part]),
            adapter_index: index.as_deref(),
            ..*extras
        };
        let shape = Shape { m: own.len(), n, k, y_len: own.len() * n };
        let row = |i: usize, row: &mut [T]| weight.row(e * n + i, k, row);
        let at = |i: usize| own[i / n] * n + i % n;
        match accumulate {
            Accumulate::F32 => product::<T, A, f32>(
                &inputs,
                row,
                &extras,
                shape,
                |v| v,
                |i, sum| y[at(i)] = T::from_f32(sum),
            ),
            Accumulate::F64 => product::<T, A, f64>(
                &inputs,
                row,
                &extras,
                shape,
                |v| v,
                |i, sum| y[at(i)] = T::from_f64(sum),
            ),
        }
    }
    Ok(())
}

/// `(n, k)` of an expert's weight.
fn shape_of<T: Element>(weight: &Weight<'_, T>, experts: usize) -> Result<(usize, usize)> {
    let (rows, k) = match weight {
        Weight::Nf4(nf4) if nf4.shape().len() == 3 => {
            let &[count, n, k] = nf4.shape() else { unreachable!("three sizes") };
            if count != experts {
                return Err(Error::argument(
                    "weight.shape",
                    format!("[{experts}, n, k]"),
                    format!("{:?}", nf4.shape()),
                ));
            }
            (checked("weight", count, n)?, k)
        }
        _ => weight.shape()?,
    };
    match rows.checked_rem(experts) {
        Some(0) => Ok((rows / experts, k)),
        None if rows == 0 => Ok((0, k)),
        _ => Err(Error::argument("weight", format!("the rows of {experts} experts"), rows)),
    }
}
