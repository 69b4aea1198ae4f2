//! `svd/`: the best low-rank approximation of a change of weights.

use super::Family;

/// Checks the family.
pub fn check(family: &mut Family) {
    family.skip_all("extracting adapters is not part of this version");
}
