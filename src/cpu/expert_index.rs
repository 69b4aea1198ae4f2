use crate::nf4::check_len;
use crate::{Error, Result};

/// Which adapter of a stack of experts every row has: `index[i] = adapter[i / choices] * experts + expert[i]`, for a table that
/// [`Lora::of_experts`](crate::adapter::Lora::of_experts) describes.
///
/// `adapter` `[tokens]` is the adapter of each token, `expert` and `index` are `[tokens * choices]`: what the router chose. Where one
/// of the two is -1 the row has no adapter, -1. Where one of them is wrong (not below `adapters` or `experts`) it gets -2,
/// which no table has, so that its outputs become NaN.
///
/// # Errors
/// [`Error::Argument`] when a length does not fit, or `adapters * experts` does not fit in 31 bits. `index` is not written then.
pub fn expert_index(
    adapter: &[i32],
    expert: &[i32],
    [choices, adapters, experts]: [usize; 3],
    index: &mut [i32],
) -> Result<()> {
    check_experts(adapters, experts)?;
    check_len("expert", adapter.len() * choices, "rows", expert.len())?;
    check_len("index", expert.len(), "rows", index.len())?;
    let below = |value: i32, count: usize| usize::try_from(value).is_ok_and(|value| value < count);
    for (i, (index, &expert)) in index.iter_mut().zip(expert).enumerate() {
        *index = match adapter[i / choices] {
            -1 => -1,
            _ if expert == -1 => -1,
            adapter if below(adapter, adapters) && below(expert, experts) => {
                adapter * experts as i32 + expert
            }
            _ => -2,
        };
    }
    Ok(())
}

/// Checks that every adapter of every stack has a number.
pub(crate) fn check_experts(adapters: usize, experts: usize) -> Result<()> {
    match adapters.checked_mul(experts).is_some_and(|count| i32::try_from(count).is_ok()) {
        true => Ok(()),
        false => {
            let wanted = format!("adapters * experts of at most {}", i32::MAX);
            Err(Error::argument("experts", wanted, format!("{adapters} * {experts}")))
        }
    }
}
