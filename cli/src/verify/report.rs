//! What a run found: a row per case, the names of what was skipped, and the totals.

use std::fmt;
use std::time::Duration;

use lora_kernels::Error;

use crate::table::Table;

/// One comparison inside a case.
#[derive(Debug)]
pub struct Check {
    /// What was compared: a tensor, or bytes.
    pub what: String,
    /// The error at the place where it comes closest to its bound; for bytes, how many elements differ.
    pub error: f64,
    /// The bound at that place; 0 where bits are defined.
    pub bound: f64,
    /// Whether bits are defined and were compared.
    bits: bool,
    /// Where, and which values, when it failed.
    pub detail: String,
}

impl Check {
    /// Whether the error is within its bound. A NaN never is.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }

    /// The tensor's name alone.
    fn tensor(&self) -> &str {
        self.what.split(" (").next().unwrap_or(&self.what)
    }

    fn share(&self) -> f64 {
        share(self.error, self.bound)
    }
}

/// The share of its bound that an error uses up; infinite where it is not within it.
fn share(error: f64, bound: f64) -> f64 {
    match (error <= bound, error == 0.0) {
        (false, _) => f64::INFINITY,
        (true, true) => 0.0,
        (true, false) => error / bound,
    }
}

/// What became of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Everything was compared, and agrees.
    Passed,
    /// Something does not agree, or could not be read.
    Failed,
    /// What was compared agrees, but the device lacks an operation for the rest.
    Skipped,
}

/// A kind of comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Outputs of a layer in f32.
    Forward,
    /// Outputs of a layer in bf16.
    Forward16,
    /// A merged weight, and outputs through it.
    Merged,
    /// A weight that an adapter was taken out of again.
    Unmerged,
    /// Bits that must be equal.
    Bits,
}

/// The comparisons of one case of one file.
#[derive(Debug)]
pub struct Case {
    file: String,
    name: String,
    checks: Vec<Check>,
    broken: Option<String>,
    lacking: Vec<String>,
    elapsed: Duration,
}

impl Case {
    /// A case without comparisons yet.
    pub fn new(file: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            file: file.into(),
            name: name.into(),
            checks: Vec::new(),
            broken: None,
            lacking: Vec::new(),
            elapsed: Duration::ZERO,
        }
    }

    /// What an operation gave, or nothing when this device lacks it: then the case says so under `skipped`.
    pub fn offered<T>(&mut self, result: lora_kernels::Result<T>) -> anyhow::Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Error::Unsupported { place, what }) => {
                let lacking = format!("{place}: {what}");
                if !self.lacking.contains(&lacking) {
                    self.lacking.push(lacking);
                }
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Elements of `width` bytes agree bit for bit, except where `ignore` says so.
    pub fn bits_except(
        &mut self,
        what: &str,
        width: usize,
        got: &[u8],
        want: &[u8],
        ignore: impl Fn(usize) -> bool,
    ) {
        let length = (got.len() != want.len()).then(|| format!("{} bytes, wanted {}", got.len(), want.len()));
        let pairs = got.chunks(width).zip(want.chunks(width)).enumerate();
        let differ: Vec<_> = pairs.filter(|(i, (g, w))| g != w && !ignore(*i)).collect();
        let detail = length.clone().or_else(|| {
            differ.first().map(|(i, (g, w))| format!("element {i}: got bytes {g:02x?}, wanted {w:02x?}"))
        });
        let error = if length.is_some() { f64::INFINITY } else { differ.len() as f64 };
        let detail = detail.unwrap_or_default();
        self.checks.push(Check { what: what.to_owned(), error, bound: 0.0, bits: true, detail });
    }

    /// Elements of `width` bytes agree bit for bit.
    pub fn bits(&mut self, what: &str, width: usize, got: &[u8], want: &[u8]) {
        self.bits_except(what, width, got, want, |_| false);
    }

    /// `|got - want| <= bound` for every element.
    pub fn close(&mut self, what: &str, got: &[f64], want: &[f64], bound: impl Fn(usize) -> f64) {
        if got.len() != want.len() {
            let detail = format!("{} elements, wanted {}", got.len(), want.len());
            return self.push(what, f64::INFINITY, 0.0, detail);
        }
        let error = |i: usize| if got[i] == want[i] { 0.0 } else { (got[i] - want[i]).abs() };
        self.within(
            what,
            got.len(),
            |i| (error(i), bound(i)),
            |i| format!("got {:e}, wanted {:e}", got[i], want[i]),
        );
    }

    /// For each of `len` elements an error and its bound; keeps the one that comes closest, with what `describe` says of it.
    pub fn within(
        &mut self,
        what: &str,
        len: usize,
        error_and_bound: impl Fn(usize) -> (f64, f64),
        describe: impl Fn(usize) -> String,
    ) {
        let share = |i: &usize| {
            let (error, bound) = error_and_bound(*i);
            share(error, bound)
        };
        let worst = (0..len).max_by(|a, b| share(a).total_cmp(&share(b)));
        let (error, bound) = worst.map_or((0.0, 0.0), &error_and_bound);
        self.push(
            what,
            error,
            bound,
            worst.map_or(String::new(), |i| format!("element {i}: {}", describe(i))),
        );
    }

    /// `value <= bound`.
    pub fn at_most(&mut self, what: &str, value: f64, bound: f64) {
        self.push(what, value, bound, format!("got {value:e}, wanted at most {bound:e}"));
    }

    /// `got == want`.
    pub fn equal<T: PartialEq + fmt::Debug>(&mut self, what: &str, got: T, want: T) {
        let error = if got == want { 0.0 } else { f64::INFINITY };
        self.push(what, error, 0.0, format!("got {got:?}, wanted {want:?}"));
    }

    fn push(&mut self, what: &str, error: f64, bound: f64, detail: String) {
        self.checks.push(Check { what: what.to_owned(), error, bound, bits: false, detail });
    }

    /// Says how long the device has worked on this case.
    pub fn set_elapsed(&mut self, elapsed: Duration) {
        self.elapsed = elapsed;
    }

    /// How long the device has worked on this case.
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// What became of it. A case that compares nothing has failed.
    pub fn verdict(&self) -> Verdict {
        let empty = self.checks.is_empty() && self.lacking.is_empty();
        if self.broken.is_some() || empty || !self.checks.iter().all(Check::passed) {
            return Verdict::Failed;
        }
        if self.lacking.is_empty() { Verdict::Passed } else { Verdict::Skipped }
    }

    /// The name, after the part of the file's that `label` does not say.
    pub fn title(&self, label: &str) -> String {
        let inner = self.file.strip_prefix(label).unwrap_or(&self.file).trim_start_matches('/');
        format!("{inner} {}", self.name).trim().to_owned()
    }

    /// The device's error that comes closest to its bound among the comparisons of a stage, and that bound.
    pub fn worst(&self, stage: Stage) -> Option<String> {
        let checks = self.checks.iter().filter(|c| self.stage(c) == Some(stage));
        let worst = checks.max_by(|a, b| a.share().total_cmp(&b.share()))?;
        Some(match (stage, worst.passed()) {
            (Stage::Bits, true) => "equal".to_owned(),
            (Stage::Bits, false) => format!("{} differ", worst.error),
            _ => format!("{:.1e} / {:.1e}", worst.error, worst.bound),
        })
    }

    /// The stage of a comparison of something that the device made.
    fn stage(&self, check: &Check) -> Option<Stage> {
        let (tensor, what) = (check.tensor(), check.tensor().rsplit('.').next()?);
        match (what, self.name.as_str()) {
            _ if check.what.contains("(stored") || check.what.contains("(formula)") => None,
            ("merged" | "merged_safe" | "merged_bias" | "y_merged", _) | ("packed", "merged") => {
                Some(Stage::Merged)
            }
            ("unmerged", _) | ("packed", "unmerged") => Some(Stage::Unmerged),
            _ if what.starts_with("y_") && tensor.contains("bf16") => Some(Stage::Forward16),
            _ if what.starts_with("y_") => Some(Stage::Forward),
            _ if check.bits => Some(Stage::Bits),
            _ => None,
        }
    }

    fn failures(&self) -> impl Iterator<Item = String> {
        let failed =
            |c: &Check| format!("{}: {} (error {:.3e}, bound {:.3e})", c.what, c.detail, c.error, c.bound);
        let checks = self.checks.iter().filter(|c| !c.passed()).map(failed);
        let nothing =
            (self.broken.is_none() && self.checks.is_empty()).then(|| "nothing was compared".to_owned());
        checks.chain(self.broken.clone()).chain(nothing)
    }

    fn row(&self) -> Vec<String> {
        let mut compared: Vec<&str> = Vec::new();
        for tensor in self.checks.iter().map(Check::tensor) {
            if !compared.contains(&tensor) {
                compared.push(tensor);
            }
        }
        let worst = self.checks.iter().max_by(|a, b| a.share().total_cmp(&b.share()));
        let (error, bound) = match worst {
            Some(c) if c.bound > 0.0 || c.error > 0.0 => {
                (format!("{} {:.2e}", c.what, c.error), format!("{:.2e}", c.bound))
            }
            Some(_) => ("0".into(), "0".into()),
            None => ("-".into(), "-".into()),
        };
        vec![
            self.verdict().to_string(),
            self.file.clone(),
            self.name.clone(),
            error,
            bound,
            compared.join(" "),
        ]
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verdict::Passed => "ok",
            Verdict::Failed => "FAILED",
            Verdict::Skipped => "skipped",
        })
    }
}

/// Everything that a run found.
#[derive(Debug, Default)]
pub struct Report {
    cases: Vec<Case>,
    skipped: Vec<(String, String)>,
}

impl Report {
    /// Runs the comparisons of one case. An error is a failure of the case.
    pub fn case(
        &mut self,
        file: impl Into<String>,
        name: impl Into<String>,
        run: impl FnOnce(&mut Case) -> anyhow::Result<()>,
    ) {
        let mut case = Case::new(file, name);
        if let Err(error) = run(&mut case) {
            case.broken = Some(crate::text(&error));
        }
        self.cases.push(case);
    }

    /// Names something that this run cannot check, and why.
    pub fn skip(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.skipped.push((name.into(), reason.into()));
    }

    /// The cases, in order.
    pub fn cases(&self) -> impl Iterator<Item = &Case> {
        self.cases.iter()
    }

    fn with(&self, verdict: Verdict) -> impl Iterator<Item = &Case> {
        self.cases.iter().filter(move |c| c.verdict() == verdict)
    }

    /// Whether something passed and nothing failed.
    pub fn is_good(&self) -> bool {
        self.with(Verdict::Passed).count() > 0 && self.with(Verdict::Failed).count() == 0
    }

    /// Where and how the failed cases failed; nothing when none has.
    pub fn failures(&self) -> String {
        let case = |case: &Case| {
            let lines = case.failures().map(|line| format!("\n    {line}"));
            format!("  {} {}{}\n", case.file, case.name, lines.collect::<String>())
        };
        let failures: String = self.with(Verdict::Failed).map(case).collect();
        if failures.is_empty() { failures } else { format!("failed\n{failures}\n") }
    }

    /// What was skipped, and why.
    fn skipped(&self) -> Vec<String> {
        let cases =
            self.with(Verdict::Skipped).map(|c| format!("{} {}: {}", c.file, c.name, c.lacking.join(", ")));
        cases.chain(self.skipped.iter().map(|(name, reason)| format!("{name}: {reason}"))).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut table =
            Table::new(&["", "file", "case", "worst error", "bound", "compared"], &["worst error", "bound"]);
        self.cases.iter().for_each(|case| table.push(case.row()));
        if !table.is_empty() {
            writeln!(f, "{table}")?;
        }
        f.write_str(&self.failures())?;
        let skipped = self.skipped();
        if !skipped.is_empty() {
            writeln!(f, "skipped\n  {}\n", skipped.join("\n  "))?;
        }
        let (passed, failed) = (self.with(Verdict::Passed).count(), self.with(Verdict::Failed).count());
        writeln!(f, "{passed} passed, {failed} failed, {} skipped", skipped.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(check: impl FnOnce(&mut Case)) -> Report {
        let mut report = Report::default();
        report.case("file", "case", |c| {
            check(c);
            Ok(())
        });
        report
    }

    #[test]
    fn an_error_at_the_bound_passes_and_one_above_fails() {
        assert!(run(|c| c.close("y", &[1.0, 2.5], &[1.0, 2.0], |_| 0.5)).is_good());
        assert!(!run(|c| c.close("y", &[1.0, 2.6], &[1.0, 2.0], |_| 0.5)).is_good());
    }

    #[test]
    fn nan_infinity_and_length_never_pass_as_close() {
        assert!(!run(|c| c.close("y", &[f64::NAN], &[1.0], |_| 1e9)).is_good());
        assert!(!run(|c| c.close("y", &[1.0], &[f64::NAN], |_| 1e9)).is_good());
        assert!(!run(|c| c.close("y", &[1.0, 2.0], &[1.0, 2.0], |i| [f64::NAN, 1.0][i])).is_good());
        assert!(!run(|c| c.close("y", &[1.0], &[1.0, 2.0], |_| 1e9)).is_good());
    }

    #[test]
    fn bits_are_compared_by_element() {
        assert!(run(|c| c.bits("q", 1, &[1, 2], &[1, 2])).is_good());
        assert!(!run(|c| c.bits("q", 1, &[1, 2], &[1, 3])).is_good());
        assert!(!run(|c| c.bits("q", 1, &[1, 2], &[1, 2, 3])).is_good());
        assert!(run(|c| c.bits_except("q", 2, &[1, 2, 3, 4], &[1, 2, 9, 9], |i| i == 1)).is_good());
    }

    #[test]
    fn a_case_that_compares_nothing_fails() {
        assert!(!run(|_| ()).is_good());
        assert!(!Report::default().is_good());
    }

    #[test]
    fn a_case_that_the_device_cannot_finish_is_skipped_unless_it_fails() {
        let lacks = |c: &mut Case| c.offered::<()>(Err(Error::unsupported("here", "that"))).unwrap();
        let report = run(|c| {
            c.equal("n", 1, 1);
            lacks(c);
        });
        assert!(!report.is_good());
        assert!(
            report
                .to_string()
                .ends_with("skipped\n  file case: here: that\n\n0 passed, 0 failed, 1 skipped\n")
        );
        let report = run(|c| {
            c.equal("n", 1, 2);
            lacks(c);
        });
        assert!(report.to_string().ends_with("0 passed, 1 failed, 0 skipped\n"));
    }

    #[test]
    fn the_totals_stand_alone_on_the_last_line() {
        let mut report = run(|c| c.equal("n", 1, 2));
        report.skip("train_step", "not in this version");
        assert_eq!(report.to_string().lines().last(), Some("0 passed, 1 failed, 1 skipped"));
    }
}
