//! What a merged weight has of the adapters that went into it.

use crate::Result;
use crate::adapter::MergeReport;
use crate::nf4::check_len;

/// The sums of a report in f64, element by element: of a `weight` as it decodes, the `sum` of it and its adapters in f32 before it was
/// stored ([`merge`](super::merge()) or [`nf4_merge_dense`](super::nf4_merge_dense) into f32), and the `merged` weight as it decodes. The wanted
/// change is `sum - weight`.
///
/// What is stored is not seen here: counts of changes, and of bytes, are 0.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when the lengths differ.
pub fn merge_report(weight: &[f32], sum: &[f32], merged: &[f32]) -> Result<MergeReport> {
    check_len("sum", weight.len(), "elements", sum.len())?;
    check_len("merged", weight.len(), "elements", merged.len())?;
    let mut report = MergeReport { elements: weight.len() as u64, ..MergeReport::default() };
    for ((&weight, &sum), &merged) in weight.iter().zip(sum).zip(merged) {
        let [weight, sum, merged] = [weight, sum, merged].map(f64::from);
        let wanted = sum - weight;
        report.weight += weight * weight;
        report.wanted += wanted * wanted;
        report.kept += (merged - weight) * wanted;
        report.error += (merged - sum) * (merged - sum);
    }
    Ok(report)
}
