//! The adapters of a merge, by the tensors of the model that they change.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use lora_kernels::adapter::{AdaLora, Adapter, EmbeddingLora, Lora, Stack};
use lora_kernels::formats::bitsandbytes::Parameter;
use lora_kernels::formats::peft::{self, AdapterFile};
use lora_kernels::tensor::Data;
use lora_kernels::{DType, Tensor};
use serde_json::Value;

use super::Source;

/// Mismatches that an error lists.
const LISTED: usize = 8;

/// What all adapters do to a model.
#[derive(Default)]
pub struct Adapters {
    /// By weight, in the order of the command line.
    weights: BTreeMap<String, Vec<Adapter>>,
    /// Those with a bias of `lora_b`, by the model's bias.
    biases: BTreeMap<String, Vec<Lora>>,
    /// Tensors that take the place of the model's (modules_to_save, trained biases), by name.
    replaced: BTreeMap<String, Tensor>,
    /// Modules that the model does not have, where they were to be left out.
    missing: Vec<String>,
}

impl Adapters {
    /// Reads adapters and finds their modules in the model. `scales` multiply what each one does; there are none, or one for each.
    ///
    /// An adapter whose modules are not all there with the right shapes is refused, and the error lists them; with `allow_missing`
    /// those that are not there are left out.
    pub fn open(source: &Source, folders: &[PathBuf], scales: &[f64], allow_missing: bool) -> Result<Self> {
        ensure!(
            scales.is_empty() || scales.len() == folders.len(),
            "--weight: wanted one for each of {} adapters, got {}",
            folders.len(),
            scales.len()
        );
        let mut adapters = Self::default();
        for (i, folder) in folders.iter().enumerate() {
            let file = peft::load(folder).with_context(|| folder.display().to_string())?;
            let scale = scales.get(i).copied().unwrap_or(1.0);
            ensure!(scale.is_finite(), "--weight: wanted a finite number, got {scale}");
            adapters.add(source, folder, file, scale, allow_missing)?;
        }
        ensure!(
            !adapters.weights.is_empty() || !adapters.replaced.is_empty(),
            "the adapters have no module that the model has"
        );
        Ok(adapters)
    }

    fn add(
        &mut self,
        source: &Source,
        folder: &Path,
        file: AdapterFile,
        scale: f64,
        allow_missing: bool,
    ) -> Result<()> {
        let names = Names::new(source, &file);
        let (mut wrong, mut missing) = (Vec::new(), Vec::new());
        let saved: BTreeSet<String> = file.base_tensors.keys().map(|name| names.of(name)).collect();
        let parameters = source.reader().parameters().keys();
        let lost: Vec<&str> = parameters
            .filter(|name| file.config.saves(name) && !saved.contains(*name))
            .map(String::as_str)
            .collect();
        ensure!(
            lost.is_empty(),
            "{}: its modules_to_save {:?} are not all there: no {}",
            folder.display(),
            file.config.modules_to_save,
            lost.join(", no ")
        );
        for (module, adapter) in file.adapters {
            let weight = format!("{}.weight", names.of(&module));
            let wanted = adapter.weight_shape();
            match source.reader().parameters().get(&weight) {
                None => missing.push(format!("{module} {wanted:?}")),
                Some(parameter) if parameter.shape() != wanted => {
                    wrong.push(format!("{module} {wanted:?} (it is {:?})", parameter.shape()));
                }
                Some(_) => {
                    let place = || format!("{}: {module}", folder.display());
                    check_tied(source, &weight).with_context(place)?;
                    self.insert(source, weight, weighted(adapter, scale).with_context(place)?)
                        .with_context(place)?;
                }
            }
        }
        for (name, tensor) in file.base_tensors {
            let place = || format!("{}: {name}", folder.display());
            let name = names.of(&name);
            match source.reader().parameters().get(&name) {
                None => missing.push(format!("{name} {:?}", tensor.shape())),
                Some(parameter) if parameter.shape() != tensor.shape() => {
                    wrong.push(format!("{name} {:?} (it is {:?})", tensor.shape(), parameter.shape()));
                }
                Some(Parameter::Nf4 { .. }) => {
                    bail!("{}: replaces a 4-bit weight, which is not supported", place())
                }
                Some(_) => {
                    check_tied(source, &name).with_context(place)?;
                    ensure!(
                        self.replaced.insert(name.clone(), tensor).is_none(),
                        "{}: is replaced by two adapters",
                        place()
                    );
                }
            }
        }
        if !wrong.is_empty() || !allow_missing && !missing.is_empty() {
            missing.iter_mut().for_each(|name| name.push_str(" (not there)"));
            wrong.append(&mut missing);
            let more = wrong.len().saturating_sub(LISTED);
            wrong.truncate(LISTED);
            let more = if more > 0 { format!(", and {more} more") } else { String::new() };
            bail!(
                "{}: is for another model than {}: no {}{more}",
                folder.display(),
                source.folder().display(),
                wrong.join(", no ")
            );
        }
        self.missing.append(&mut missing);
        Ok(())
    }

    fn insert(&mut self, source: &Source, weight: String, adapter: Adapter) -> Result<()> {
        if let Adapter::Lora(lora) = &adapter
            && lora.lora_bias().is_some()
        {
            let bias =
                weight.strip_suffix("weight").map(|module| format!("{module}bias")).unwrap_or_default();
            ensure!(
                source.reader().parameters().contains_key(&bias),
                "lora_bias: the model has no {bias} to add it to"
            );
            self.biases.entry(bias).or_default().push(lora.clone());
        }
        self.weights.entry(weight).or_default().push(adapter);
        Ok(())
    }

    /// How many weights have adapters.
    pub fn len(&self) -> usize {
        self.weights.len()
    }

    /// Modules that the model does not have.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// The names of tensors that are replaced.
    pub fn replaced(&self) -> impl Iterator<Item = &String> {
        self.replaced.keys()
    }

    /// The tensor in place of the model's.
    pub fn replacement(&self, name: &str) -> Option<&Tensor> {
        self.replaced.get(name)
    }

    /// The adapters on a weight; none for most.
    pub fn on(&self, weight: &str) -> &[Adapter] {
        self.weights.get(weight).map_or(&[], Vec::as_slice)
    }

    /// Whether a bias gains those of adapters.
    pub fn has_bias(&self, bias: &str) -> bool {
        self.biases.contains_key(bias)
    }

    /// The adapters on some rows of a weight.
    pub fn rows(&self, weight: &str, rows: Range<usize>) -> Result<Vec<Adapter>> {
        Ok(self.on(weight).iter().map(|adapter| adapter.rows(rows.clone())).collect::<Result<_, _>>()?)
    }

    /// A stack that has nothing but the biases of the adapters on this one.
    pub fn bias_stack(&self, bias: &str) -> Result<Stack> {
        let empty = |shape: [usize; 2]| Tensor::new(shape, Data::F32(Vec::new()));
        let of = |lora: &Lora| {
            let outputs = lora.lora_b().shape()[0];
            let bare = Lora::new(empty([0, 0])?, empty([outputs, 0])?, lora.scaling())?;
            bare.with_lora_bias(lora.lora_bias().expect("it has one").clone()).map(Adapter::from)
        };
        let adapters = self.biases[bias].iter().map(of).collect::<Result<Vec<_>, _>>()?;
        let outputs = adapters[0].out_features();
        Ok(Stack::new(&adapters.iter().collect::<Vec<_>>(), &empty([outputs, 0])?)?)
    }

    /// Whether the norms of an adapter run over all rows of the weight.
    pub fn need_whole(&self, weight: &str) -> bool {
        self.on(weight).iter().any(|adapter| matches!(adapter, Adapter::Dora(_)) && adapter.fan_in_fan_out())
    }

    /// A weight whose adapters include DoRA.
    pub fn with_dora(&self) -> Option<&String> {
        let has =
            |adapters: &Vec<Adapter>| adapters.iter().any(|adapter| matches!(adapter, Adapter::Dora(_)));
        self.weights.iter().find(|(_, adapters)| has(adapters)).map(|(name, _)| name)
    }
}

/// How the names of an adapter's modules become those of the model. A checkpoint may have been saved from the headless model,
/// without the `transformer.` that PEFT saw, or the other way round.
struct Names {
    strip: Option<String>,
    add: String,
}

impl Names {
    fn new(source: &Source, file: &AdapterFile) -> Self {
        let parameters = source.reader().parameters();
        let first = |name: &str| name.split_once('.').map(|(first, _)| format!("{first}."));
        let strips = file.adapters.keys().filter_map(|module| first(module));
        let adds = parameters.keys().filter_map(|name| first(name));
        let mut candidates = vec![Self { strip: None, add: String::new() }];
        for strip in strips.collect::<std::collections::BTreeSet<_>>() {
            candidates.push(Self { strip: Some(strip), add: String::new() });
        }
        for add in adds.collect::<std::collections::BTreeSet<_>>() {
            candidates.push(Self { strip: None, add });
        }
        let hits = |names: &Self| {
            file.adapters
                .keys()
                .filter(|m| parameters.contains_key(&format!("{}.weight", names.of(m))))
                .count()
        };
        // The first of the best.
        candidates.into_iter().rev().max_by_key(hits).expect("there is one")
    }

    fn of(&self, name: &str) -> String {
        let bare = self.strip.as_deref().and_then(|strip| name.strip_prefix(strip)).unwrap_or(name);
        format!("{}{bare}", self.add)
    }
}

/// Refuses a table of embeddings that serves as output layer too: merging would change both, where the adapter changes one.
fn check_tied(source: &Source, name: &str) -> Result<()> {
    const TABLES: [&str; 4] =
        ["embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"];
    const HEADS: [&str; 2] = ["lm_head.weight", "embed_out.weight"];
    let is =
        |name: &str, ends: &[&str]| ends.iter().any(|end| name == *end || name.ends_with(&format!(".{end}")));
    let architectures = source.config().get("architectures").and_then(Value::as_array);
    let causal = architectures.is_some_and(|list| {
        list.iter().any(|name| {
            name.as_str().is_some_and(|name| name.ends_with("LMHeadModel") || name.ends_with("ForCausalLM"))
        })
    });
    let tied =
        causal && is(name, &TABLES) && !source.reader().parameters().keys().any(|name| is(name, &HEADS));
    ensure!(
        !tied,
        "the model's output layer is tied to this table, and would change with it: untie them first"
    );
    Ok(())
}

/// The adapter with its delta multiplied.
fn weighted(adapter: Adapter, scale: f64) -> Result<Adapter> {
    if scale == 1.0 {
        return Ok(adapter);
    }
    Ok(match adapter {
        Adapter::Lora(lora) => {
            let weighted = Lora::new(lora.lora_a().clone(), lora.lora_b().clone(), scale * lora.scaling())?
                .with_fan_in_fan_out(lora.fan_in_fan_out());
            match lora.lora_bias() {
                Some(bias) => weighted.with_lora_bias(bias.clone())?.into(),
                None => weighted.into(),
            }
        }
        Adapter::AdaLora(ada) => {
            let (a, e, b) = (ada.lora_a().clone(), ada.lora_e().clone(), ada.lora_b().clone());
            let weighted = AdaLora::new(a, e, b, scale * ada.alpha(), ada.init_r())?;
            weighted.with_fan_in_fan_out(ada.fan_in_fan_out()).into()
        }
        Adapter::Embedding(table) => {
            EmbeddingLora::new(table.lora_a().clone(), table.lora_b().clone(), scale * table.scaling())?
                .into()
        }
        Adapter::Dora(_) => {
            bail!("--weight: a DoRA has no weight but 1: its norms belong to the whole delta")
        }
    })
}

/// A tensor in another type.
pub fn cast(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype {
        return Ok(tensor.clone());
    }
    let cast = Tensor::from_f32(tensor.shape(), &tensor.to_f32(), dtype)?;
    ensure!(cast.to_f32().iter().all(|v| v.is_finite()), "does not fit into {dtype}");
    Ok(cast)
}
