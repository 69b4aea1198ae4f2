//! Which tensors of a file belong together.

use std::collections::BTreeMap;

use super::quant_state::QUANT_TYPES;
use crate::nf4::QuantType;
use crate::{Error, Result};

/// Before the quantisation type, in the name of the JSON text.
pub(super) const QUANT_STATE: &str = ".quant_state.bitsandbytes__";
/// Ends of the names of a weight's other tensors.
pub(super) const ABSMAX: &str = ".absmax";
pub(super) const QUANT_MAP: &str = ".quant_map";
pub(super) const NESTED_ABSMAX: &str = ".nested_absmax";
pub(super) const NESTED_QUANT_MAP: &str = ".nested_quant_map";
const COMPANIONS: [&str; 4] = [ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP];

/// Whether a weight's name and `end` are the name of one of its other tensors.
pub(super) fn is_companion(end: &str) -> bool {
    COMPANIONS.contains(&end) || end.starts_with(QUANT_STATE)
}

/// A tensor that is not part of another, or the name of the JSON text that makes it a 4-bit weight.
pub(super) type Layout = BTreeMap<String, Option<(String, QuantType)>>;

/// Sorts names. `place` gives a name's place in errors.
///
/// # Errors
/// [`Error::Format`] for a tensor that belongs to a 4-bit weight which is not there.
pub(super) fn layout<'a>(
    names: impl IntoIterator<Item = &'a String> + Clone,
    place: impl Fn(&str) -> String,
) -> Result<Layout> {
    let mut weights = Layout::new();
    for key in names.clone() {
        let Some((weight, quant_type)) = key.split_once(QUANT_STATE) else {
            if key.contains(".quant_state") {
                return Err(Error::format(place(key), format!("a name with {QUANT_STATE}nf4 or fp4"), key));
            }
            continue;
        };
        let known = QUANT_TYPES.iter().find(|(name, _)| *name == quant_type);
        let (_, quant_type) =
            known.ok_or_else(|| Error::format(place(key), "quant_type nf4 or fp4", quant_type))?;
        if let Some(Some((other, _))) = weights.insert(weight.to_owned(), Some((key.clone(), *quant_type))) {
            return Err(Error::format(place(key), "one quant_state per weight", format!("also {other}")));
        }
    }
    let mut layout = weights.clone();
    for name in names {
        let companion = COMPANIONS.iter().find_map(|suffix| name.strip_suffix(suffix));
        match companion {
            Some(weight) if weights.contains_key(weight) => {}
            Some(weight) => {
                return Err(Error::format(
                    place(name),
                    format!("{weight}{QUANT_STATE}nf4 beside it"),
                    "none",
                ));
            }
            None if name.contains(QUANT_STATE) => {}
            None if name.ends_with(".SCB") => {
                return Err(Error::unsupported(place(name), "LLM.int8 (an 8-bit weight)"));
            }
            None => {
                layout.entry(name.clone()).or_default();
            }
        }
    }
    Ok(layout)
}
