//! `unmerge`: merged adapters out of a model's folder again.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Result, bail};
use lora_kernels::adapter::{Adapter, Base, Requantize, Stack};
use lora_kernels::formats::bitsandbytes::{Parameter, QuantState};

use crate::model::{Adapters, Change, Fate, Output, Restore, Rows, Slab, Source, Summary, rewrite};
use crate::quantize::{Out, write_config};

const EXAMPLES: &str = "\
Examples:
  lora-kernels unmerge Llama-3-8B-merged my-adapter --out Llama-3-8B-again --undo my-adapter.undo
  lora-kernels unmerge Llama-3-8B-merged my-adapter --out Llama-3-8B-nearly
  lora-kernels unmerge both style facts --weight 0.7 --weight 1 --out Llama-3-8B-again

Adapters and weights are those of the merge, in the same order. With the file that `merge --undo` wrote every bit comes back. Without
it the deltas are subtracted in f32: what the merge has rounded away does not come back, and the command says of how many elements
that may be; DoRA and replaced tensors cannot be taken out then.";

/// Arguments of `lora-kernels unmerge`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// The merged model's folder.
    model: PathBuf,
    /// Folders of the PEFT adapters, in the order of the merge.
    #[arg(required = true)]
    adapters: Vec<PathBuf>,
    #[command(flatten)]
    out: Out,
    /// What each adapter's delta was multiplied with [default: 1].
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    weight: Vec<f64>,
    /// The file that `merge --undo` wrote.
    #[arg(long, value_name = "FILE")]
    undo: Option<PathBuf>,
    /// Leave out adapted modules that the model does not have.
    #[arg(long)]
    allow_missing: bool,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<bool> {
    let mut summary = Summary::start();
    let source = Source::open(&arguments.model)?;
    let adapters = Adapters::open(&source, &arguments.adapters, &arguments.weight, arguments.allow_missing)?;
    if let Some(undo) = &arguments.undo {
        let restore = Restore::open(undo, &adapters)?;
        let output = arguments.output(&source)?;
        let bytes = rewrite(&source, &output, &restore, &mut summary)?;
        write_config(&output, restore.config()?)?;
        output.commit()?;
        summary.say(format!("{} weights restored, bit for bit", adapters.len()));
        summary.field("restored", adapters.len());
        summary.finish("unmerged", bytes, arguments.out.json);
        return Ok(true);
    }
    if let Some(weight) = adapters.with_dora() {
        bail!(
            "{weight}: a DoRA cannot be taken out of a merged weight: the norms that it was merged with are gone (--undo has them)"
        );
    }
    let replaced: Vec<&String> = adapters.replaced().collect();
    if !replaced.is_empty() {
        bail!(
            "the adapters replaced whole tensors, and what was there is gone (--undo has it): {}",
            replaced[..].iter().map(|s| s.as_str()).collect::<Vec<_>>().join(", ")
        );
    }
    let output = arguments.output(&source)?;
    let unmerge =
        Unmerge { adapters: &adapters, elements: AtomicU64::new(0), undetermined: AtomicU64::new(0) };
    let bytes = rewrite(&source, &output, &unmerge, &mut summary)?;
    write_config(&output, source.config().clone())?;
    output.commit()?;
    let [elements, undetermined] = [unmerge.elements, unmerge.undetermined].map(AtomicU64::into_inner);
    let share = 100.0 * undetermined as f64 / elements.max(1) as f64;
    summary.say(format!(
        "of {elements} elements {undetermined} ({share:.1} %) may not be what they were before the merge: that is not in the merged weights"
    ));
    summary.field("elements", elements);
    summary.field("undetermined", undetermined);
    summary.finish("unmerged", bytes, arguments.out.json);
    Ok(true)
}

impl Arguments {
    fn output(&self, source: &Source) -> Result<Output> {
        let inputs: Vec<&Path> =
            [source.folder()].into_iter().chain(self.adapters.iter().map(PathBuf::as_path)).collect();
        Output::create(&self.out.out, &inputs, self.out.force)
    }
}

/// Subtracts adapters.
struct Unmerge<'a> {
    adapters: &'a Adapters,
    elements: AtomicU64,
    undetermined: AtomicU64,
}

impl Unmerge<'_> {
    fn count(&self, elements: usize, undetermined: u64) {
        self.elements.fetch_add(elements as u64, Ordering::Relaxed);
        self.undetermined.fetch_add(undetermined, Ordering::Relaxed);
    }
}

impl Change for Unmerge<'_> {
    fn fate(&self, name: &str, parameter: &Parameter) -> Result<Fate> {
        let adapted = !self.adapters.on(name).is_empty();
        Ok(match parameter {
            Parameter::Nf4 { state, storage } if adapted => {
                let state = QuantState { shape: state.shape.clone(), ..*state };
                Fate::Change(Parameter::Nf4 { state, storage: *storage }, Slab::Whole)
            }
            Parameter::Dense { .. } if self.adapters.has_bias(name) => {
                Fate::Change(parameter.clone(), Slab::Whole)
            }
            Parameter::Dense { .. } if adapted => Fate::Change(parameter.clone(), Slab::Any),
            _ => Fate::Keep,
        })
    }

    fn rows(&self, source: &Source, name: &str, rows: Range<usize>) -> Result<Rows> {
        let reader = source.reader();
        let adapters = self.adapters.rows(name, rows.clone())?;
        let stack = |base: Base<'_>| Stack::new(&adapters.iter().collect::<Vec<&Adapter>>(), base);
        if let Parameter::Nf4 { .. } = &reader.parameters()[name] {
            let merged = reader.nf4(name)?;
            let unmerged = stack((&merged).into())?.unmerge(&merged, Requantize::default().forced())?;
            self.count(merged.numel(), unmerged.undetermined);
            return Ok(Rows::Nf4(unmerged.weight.into()));
        }
        let merged = reader.dense_rows(name, rows)?;
        if self.adapters.has_bias(name) {
            let unmerged = self.adapters.bias_stack(name)?.unmerge_bias(Some(&merged), merged.dtype())?;
            return Ok(Rows::Dense(unmerged.expect("there is a bias")));
        }
        let unmerged = stack((&merged).into())?.unmerge(&merged, merged.dtype())?;
        self.count(merged.numel(), unmerged.undetermined);
        Ok(Rows::Dense(unmerged.weight))
    }
}
