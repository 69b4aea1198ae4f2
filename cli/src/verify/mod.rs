//! `verify`: a folder of reference data, checked family by family.
//!
//! A family is a folder with a known name. Its files and cases are found by what is there: every safetensors file has a
//! JSON sidecar of the same name that lists its cases, and tensors are named after them. What is missing, unreadable or not
//! listed is a failed case.

mod adalora_trace;
mod blocks;
mod bounds;
mod cpu;
mod device;
mod engine;
mod layer;
mod model;
mod multi_adapter;
mod multi_merge;
mod nf4_blockwise;
mod nf4_checkpoint;
mod outputs;
mod peft;
mod qlora;
mod real_minilm;
mod report;
mod svd;
mod timed;
mod train_step;
mod truth;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use lora_kernels::DType;

use crate::tensors::{Sidecar, TensorFile};
use timed::Timed;

pub use engine::{Choice, Engine, open, open_best};
pub use report::{Case, Report, Stage, Verdict};

/// Arguments of `lora-kernels verify`.
#[derive(clap::Args)]
pub struct Arguments {
    /// The folder, with `nf4_blockwise`, `peft` and so on inside it.
    dir: PathBuf,
    /// Where the operations run.
    #[arg(long, value_enum, default_value_t)]
    device: Choice,
    /// Check these families only.
    #[arg(long, value_delimiter = ',')]
    family: Vec<String>,
}

type CheckFamily = fn(&mut Family);

/// The families, and what checks each of them.
const FAMILIES: [(&str, CheckFamily); 8] = [
    ("nf4_blockwise", nf4_blockwise::check),
    ("nf4_checkpoint", nf4_checkpoint::check),
    ("peft", peft::check),
    ("qlora", qlora::check),
    ("multi_adapter", multi_adapter::check),
    ("svd", svd::check),
    ("real_minilm", real_minilm::check),
    ("train_step", train_step::check),
];

/// Runs the command. Whether something passed and nothing failed.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let known = FAMILIES.map(|(name, _)| name);
    for name in &arguments.family {
        ensure!(known.contains(&name.as_str()), "--family: wanted one of {}, got {name}", known.join(", "));
    }
    let engine = open(arguments.device)?;
    println!("{} on {}\n", arguments.dir.display(), engine.name());
    let report = check(&arguments.dir, &arguments.family, None, &*engine)?;
    print!("{report}");
    Ok(report.is_good())
}

/// Checks the families of `root` that `only` names, or all of them; of these, the files below the label `within`.
pub fn check(root: &Path, only: &[String], within: Option<&str>, engine: &dyn Engine) -> Result<Report> {
    let mut report = Report::default();
    let bar = ProgressBar::new_spinner(); // only on a terminal
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    let folders = entries(root)?.into_iter().filter(|e| root.join(e).is_dir());
    let found: Vec<_> = folders.collect();
    for (name, check) in FAMILIES.iter().filter(|(name, _)| wanted(name) && found.iter().any(|f| f == name)) {
        let mut family =
            Family { root, path: PathBuf::from(name), within, engine, report: &mut report, bar: &bar };
        check(&mut family);
    }
    let unknown = found.iter().filter(|f| only.is_empty() && !FAMILIES.iter().any(|(name, _)| name == f));
    unknown.for_each(|f| report.skip(f, "not a family that is known here"));
    for name in only.iter().filter(|o| !found.contains(o)) {
        report.case(name, "", |_| anyhow::bail!("{}: no such folder", root.join(name).display()));
    }
    if within.is_none() {
        missing(root, &wanted, &mut report);
    }
    bar.finish_and_clear();
    Ok(report)
}

/// Fails for every file that the set's `index.json` lists, where there is one, and that is not there.
fn missing(root: &Path, wanted: &dyn Fn(&str) -> bool, report: &mut Report) {
    if !root.join("index.json").exists() {
        return;
    }
    let listed = || -> Result<Vec<String>> {
        let files = Sidecar::open(&root.join("index.json"))?.list("files")?;
        files.iter().map(|f| Ok(f.text("path")?.to_owned())).collect()
    };
    match listed() {
        Err(error) => report.case("index.json", "", |_| Err(error)),
        Ok(files) => {
            let gone =
                files.iter().filter(|f| wanted(f.split('/').next().unwrap_or(f)) && !root.join(f).exists());
            gone.for_each(|f| report.case("index.json", f, |_| anyhow::bail!("the file is not there")));
        }
    }
}

/// The names in a folder, sorted.
fn entries(path: &Path) -> Result<Vec<String>> {
    let read = fs::read_dir(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    let mut names = Vec::new();
    for entry in read {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// One family of a set, while it is being checked.
pub struct Family<'a> {
    root: &'a Path,
    path: PathBuf,
    within: Option<&'a str>,
    engine: &'a dyn Engine,
    report: &'a mut Report,
    bar: &'a ProgressBar,
}

/// A safetensors file and its sidecar; `label` is their common path inside the set, without the endings.
pub struct Pair {
    label: String,
    sidecar: Sidecar,
    tensors: TensorFile,
}

impl Family<'_> {
    /// A path inside the set, for people.
    fn label(&self, inside: &str) -> String {
        self.path.join(inside).display().to_string()
    }

    /// Where a path inside the family is.
    fn at(&self, inside: &str) -> PathBuf {
        self.root.join(&self.path).join(inside)
    }

    /// Runs one case.
    fn case(&mut self, file: &str, name: &str, run: impl FnOnce(&mut Case, &dyn Engine) -> Result<()>) {
        if self.within.is_some_and(|label| !Path::new(file).starts_with(label)) {
            return;
        }
        self.bar.set_message(format!("{file} {name}"));
        self.bar.tick();
        let engine = Timed::new(self.engine);
        self.report.case(file, name, |case| {
            let result = run(case, &engine);
            case.set_elapsed(engine.elapsed());
            result
        });
    }

    /// What `result` holds; an error becomes a failed case.
    fn need<T>(&mut self, file: &str, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.case(file, "", |_, _| Err(error))).ok()
    }

    /// The names in the folder `inside`, sorted.
    fn names(&mut self, inside: &str) -> Vec<String> {
        let (label, names) = (self.label(inside), entries(&self.at(inside)));
        self.need(&label, names).unwrap_or_default()
    }

    /// The folders in the folder `inside`.
    fn folders(&mut self, inside: &str) -> Vec<String> {
        let path = self.at(inside);
        self.names(inside).into_iter().filter(|name| path.join(name).is_dir()).collect()
    }

    /// Opens `inside`.safetensors and `inside`.json.
    fn pair(&mut self, inside: &str) -> Option<Pair> {
        let (label, path) = (self.label(inside), |ending: &str| self.at(&format!("{inside}.{ending}")));
        let sidecar = Sidecar::open(&path("json"));
        let tensors = TensorFile::open(&path("safetensors"));
        let pair = sidecar.and_then(|sidecar| Ok(Pair { label: label.clone(), sidecar, tensors: tensors? }));
        self.need(&label, pair)
    }

    /// Every safetensors file and sidecar of the folder `inside` whose name without endings passes `filter`. One without
    /// the other is a failed case.
    fn pairs(&mut self, inside: &str, filter: impl Fn(&str) -> bool) -> Vec<Pair> {
        let names = self.names(inside);
        let stem = |n: &String| Some(n.strip_suffix(".safetensors").or(n.strip_suffix(".json"))?.to_owned());
        let stems: BTreeSet<String> = names.iter().filter_map(stem).filter(|s| filter(s)).collect();
        let prefix = if inside.is_empty() { String::new() } else { format!("{inside}/") };
        stems.into_iter().filter_map(|stem| self.pair(&format!("{prefix}{stem}"))).collect()
    }

    /// The entries under `key` of a sidecar, with the names that `name` gives them. Tensors that end in `marker` without
    /// such an entry are failed cases.
    fn cases(&mut self, pair: &Pair, key: &str, name: &str, marker: &str) -> Vec<(String, Sidecar)> {
        let named = |s: Sidecar| Ok((s.text(name)?.to_owned(), s));
        let entries =
            pair.sidecar.list(key).and_then(|list| list.into_iter().map(named).collect::<Result<Vec<_>>>());
        let entries = self.need(&pair.label, entries).unwrap_or_default();
        let listed = |case: &str| entries.iter().any(|(name, _)| name == case);
        let orphans = pair.tensors.names().filter_map(|t| t.strip_suffix(marker)).filter(|c| !listed(c));
        for orphan in orphans {
            self.case(&pair.label, orphan, |_, _| anyhow::bail!("the sidecar lists no such case"));
        }
        entries
    }

    /// Names every safetensors file of the family under `skipped`.
    fn skip_all(&mut self, reason: &str) {
        let path = self.label("");
        let names = entries(&self.at("")).unwrap_or_default();
        for name in names.iter().filter_map(|n| n.strip_suffix(".safetensors")) {
            self.report.skip(format!("{path}{name}"), reason);
        }
    }
}

/// `f32`, `torch.bfloat16` and so on.
fn dtype(name: &str) -> Result<DType> {
    match name.strip_prefix("torch.").unwrap_or(name) {
        "f32" | "float32" => Ok(DType::F32),
        "f16" | "float16" => Ok(DType::F16),
        "bf16" | "bfloat16" => Ok(DType::BF16),
        _ => anyhow::bail!("wanted f32, f16 or bf16, got {name}"),
    }
}
