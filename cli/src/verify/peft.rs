//! `peft/`: adapters that PEFT wrote, over dense models: forward, merge and unmerge of every module.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, bail, ensure};
use lora_kernels::adapter::Adapter;
use lora_kernels::formats::peft::{self, AdapterFile};
use lora_kernels::{DType, Tensor};

use super::bounds::Factors;
use super::engine::{Direction, Engine};
use super::layer::{Frozen, Layer, cast, from_f64, transposed};
use super::model::{How, Model};
use super::report::Case;
use super::truth::{self, Merged, transpose};
use super::{Family, adalora_trace, bounds, multi_merge, outputs};
use crate::tensors::{Sidecar, Stored, TensorFile};

/// Checks the family.
pub fn check(family: &mut Family) {
    for pair in family.pairs("", |_| true) {
        multi_merge::check(family, &pair);
    }
    for model in family.folders("") {
        for pair in family.pairs(&model, |_| true) {
            adalora_trace::check(family, &pair);
        }
        let base = TensorFile::open(&family.at(&format!("{model}/base/model.safetensors")));
        let Some(base) = family.need(&family.label(&format!("{model}/base")), base) else { continue };
        for adapter in family.folders(&model).into_iter().filter(|name| name != "base") {
            check_adapter(family, &model, &adapter, &base);
        }
    }
}

/// One adapter's folder.
fn check_adapter(family: &mut Family, model: &str, adapter: &str, base: &TensorFile) {
    let folder = format!("{model}/{adapter}");
    let label = family.label(&folder);
    let file = peft::load(family.at(&folder)).map_err(anyhow::Error::from);
    let (Some(file), Some(pair)) = (family.need(&label, file), family.pair(&format!("{folder}/io"))) else {
        return;
    };
    family.case(&label, "modules", |case, _| check_modules(case, &file, &pair.sidecar, base));
    for (name, sidecar) in family.cases(&pair, "modules", "module", ".x") {
        family.case(&label, &name, |case, engine| {
            let module = Module::open(&name, &sidecar, &pair.tensors, &file, base)?;
            match module.adapter {
                Adapter::Embedding(_) => module.check_embedding(case, engine),
                _ => module.check_linear(case, engine),
            }
        });
    }
    if pair.tensors.has("input_ids") {
        let config = Sidecar::open(&family.at(&format!("{model}/base/config.json")));
        let Some(config) = family.need(&label, config) else { return };
        let model = Model { config: &config, base, adapter: &file };
        if let Err(reason) = model.check_architecture() {
            return family.report.skip(format!("{label}: whole model"), reason.to_string());
        }
        family.case(&label, "whole model", |case, engine| check_model(case, engine, &model, &pair.tensors));
    }
}

/// The logits of the whole model.
fn check_model(case: &mut Case, engine: &dyn Engine, model: &Model, stored: &TensorFile) -> Result<()> {
    let tokens = stored.get("input_ids")?.integers()?;
    let kinds = [
        ("logits_base", How::Disabled),
        ("logits_adapted", How::Beside),
        ("logits_live", How::Beside),
        ("logits_reloaded", How::Beside),
        ("logits_merged", How::Merged),
    ];
    for (name, how) in kinds {
        if let Some(logits) = stored.find(name)? {
            model.check(case, engine, &tokens, how, name, &logits.f64s()?)?;
        }
    }
    Ok(())
}

/// The adapted modules are those that the sidecar lists, with their ranks, and each of them fits the base model.
fn check_modules(case: &mut Case, file: &AdapterFile, sidecar: &Sidecar, base: &TensorFile) -> Result<()> {
    let ours: BTreeSet<String> = file.adapters.keys().cloned().collect();
    if sidecar.has("adapted_modules") {
        case.equal("adapted_modules", ours, sidecar.texts("adapted_modules")?.into_iter().collect());
    }
    let ranks: BTreeMap<String, usize> = file.adapters.iter().map(|(m, a)| (m.clone(), a.rank())).collect();
    if sidecar.has("reloaded_modules") {
        let reloaded = sidecar.list("reloaded_modules")?;
        let listed = reloaded.iter().map(|m| Ok((m.text("module")?.to_owned(), m.size("r")?)));
        case.equal("ranks", ranks, listed.collect::<Result<_>>()?);
    }
    for (module, adapter) in &file.adapters {
        let weight = base_tensor(base, module, "weight")?
            .with_context(|| format!("the base has no `{module}.weight`"))?;
        case.equal("shape", weight.shape(), &adapter.weight_shape()[..]);
    }
    Ok(())
}

/// A tensor of the base model. A model saved without its head has names without the first part.
pub fn base_tensor(base: &TensorFile, module: &str, what: &str) -> Result<Option<Stored>> {
    let inner = module.split_once('.').map_or(module, |(_, inner)| inner);
    match base.find(&format!("{module}.{what}"))? {
        None => base.find(&format!("{inner}.{what}")),
        found => Ok(found),
    }
}

/// One adapted module.
struct Module<'a> {
    name: &'a str,
    sidecar: &'a Sidecar,
    tensors: &'a TensorFile,
    adapter: &'a Adapter,
    /// As the base stores it, `[in, out]` where the adapter says so.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl<'a> Module<'a> {
    fn open(
        name: &'a str,
        sidecar: &'a Sidecar,
        tensors: &'a TensorFile,
        file: &'a AdapterFile,
        base: &TensorFile,
    ) -> Result<Self> {
        let adapter = file.adapters.get(name).context("the adapter does not adapt this module")?;
        let weight = base_tensor(base, name, "weight")?.context("the base has no weight for this module")?;
        let weight = weight.shaped(&sidecar.sizes("base_weight_shape")?)?.tensor()?;
        ensure!(
            weight.shape() == adapter.weight_shape(),
            "the adapter is made for {:?}",
            adapter.weight_shape()
        );
        // With a bias setting other than none the adapter carries the base's bias, trained.
        let trained = file.base_tensors.get(&format!("{name}.bias")).cloned();
        let bias = match trained {
            None => base_tensor(base, name, "bias")?.map(|b| b.tensor()).transpose()?,
            trained => trained,
        };
        Ok(Self { name, sidecar, tensors, adapter, weight, bias })
    }

    fn get(&self, what: &str) -> Result<Stored> {
        self.tensors.of(self.name, what)
    }

    fn has(&self, what: &str) -> bool {
        self.tensors.has(&format!("{}.{what}", self.name))
    }

    fn fan_in_fan_out(&self) -> bool {
        self.adapter.fan_in_fan_out()
    }

    /// `values` of the base's layout as `[n, k]`.
    fn rows<T: Copy>(&self, values: Vec<T>) -> Vec<T> {
        match self.fan_in_fan_out() {
            true => transpose(&values, self.weight.shape()[0], self.weight.shape()[1]),
            false => values,
        }
    }

    /// A stored weight as `[n, k]`, in f64.
    fn stored_rows(&self, what: &str) -> Result<Vec<f64>> {
        Ok(self.rows(self.get(what)?.shaped(self.weight.shape())?.f64s()?))
    }

    /// The base in one dtype, the adapter in another.
    fn layer(&self, base: DType, adapter: DType) -> Result<Layer> {
        let weight = if self.fan_in_fan_out() { transposed(&self.weight)? } else { self.weight.clone() };
        Layer::new(Frozen::Dense(weight), self.bias.clone())
            .in_dtype(base)?
            .with_adapter(self.adapter, adapter)
    }

    fn check_linear(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let layer = self.layer(DType::F32, DType::F32)?;
        self.check_scaling(case)?;
        self.check_delta(case, engine, &layer)?;
        let x = self.get("x")?.tensor()?;
        outputs::check(case, engine, &layer.without_adapter(), &x, &self.get("y_base")?, None)?;
        let truth = self.tensors.find_of(self.name, "y_adapted_f64")?;
        outputs::check(case, engine, &layer, &x, &self.get("y_adapted")?, truth.as_ref())?;
        self.check_merged(case, engine, &layer, "merged")?;
        self.check_unmerged(case, engine, &layer, "")?;
        self.check_forward_merged(case, engine, &layer, &x)?;
        self.check_merged_bias(case, &layer)?;
        self.check_bf16(case, engine, &x)
    }

    fn check_scaling(&self, case: &mut Case) -> Result<()> {
        case.equal("rank", self.adapter.rank(), self.sidecar.size("r")?);
        let scaling = match self.adapter {
            // PEFT keeps alpha there, and divides by the rank that training began with, plus 1e-5.
            Adapter::AdaLora(adalora) => {
                case.equal("init_r", adalora.init_r() as f64, self.sidecar.number("ranknum")?);
                adalora.alpha()
            }
            other => other.scaling(),
        };
        case.close("scaling", &[scaling], &[self.sidecar.number("scaling")?], |_| 1e-15 * scaling.abs());
        Ok(())
    }

    fn check_delta(&self, case: &mut Case, engine: &dyn Engine, layer: &Layer) -> Result<()> {
        let (n, k) = layer.shape();
        let exact = truth::delta(layer.factor(), n, k);
        let formula: Vec<f64> = exact.iter().map(|d| d.0).collect();
        // Of AdaLoRA, A is a product already, and what divides alpha is a sum.
        let more = if matches!(self.adapter, Adapter::AdaLora(_)) { 2 } else { 0 };
        let bound = |i: usize| bounds::delta(layer.factor().rank + more, exact[i].1);
        let stored = self.stored_rows("delta")?;
        case.close("delta (formula)", &stored, &formula, bound);
        let zero = Tensor::from_f32(self.weight.shape(), &vec![0.0; n * k], DType::F32)?;
        let ours = engine.merge(Direction::Merge, &zero, layer.low_rank(), None, self.fan_in_fan_out());
        if let Some(ours) = case.offered(ours)? {
            case.close("delta", &self.rows(ours.to_f64()), &stored, |i| 2.0 * bound(i));
        }
        Ok(())
    }

    /// The engine's merge (or unmerge) of `weight`, as `[n, k]`.
    fn merge(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        layer: &Layer,
        direction: Direction,
        weight: &Tensor,
    ) -> Result<Option<Vec<f64>>> {
        let Some(scale) = layer.row_scale(case, engine)? else { return Ok(None) };
        let merged =
            engine.merge(direction, weight, layer.low_rank(), scale.as_deref(), self.fan_in_fan_out());
        Ok(case.offered(merged)?.map(|w| self.rows(w.to_f64())))
    }

    /// The engine's result and the stored one against the formula, and against each other.
    fn compare(
        case: &mut Case,
        what: &str,
        exact: &[Merged],
        ours: Option<&[f64]>,
        stored: &[f64],
        bound: impl Fn(&Merged) -> (f64, f64),
    ) {
        let formula: Vec<f64> = exact.iter().map(|t| t.w).collect();
        case.close(&format!("{what} (formula)"), stored, &formula, |i| bound(&exact[i]).1);
        if let Some(ours) = ours {
            case.close(what, ours, stored, |i| bound(&exact[i]).0 + bound(&exact[i]).1);
        }
    }

    fn check_merged(&self, case: &mut Case, engine: &dyn Engine, layer: &Layer, what: &str) -> Result<()> {
        let stored = self.get(what)?;
        let dtype = stored.tensor()?.dtype();
        let weight = cast(&self.weight, dtype)?;
        let ours = self.merge(case, engine, layer, Direction::Merge, &weight)?;
        let bound = |t: &Merged| {
            let packages = match (what, self.adapter) {
                // f32 factors: one rounding, of the sum.
                ("merged" | "bf16.merged", _) => bounds::merge(dtype, t),
                ("bf16all.merged", Adapter::AdaLora(_)) => {
                    bounds::merge_packages(dtype, Factors::StoredDiagonal, t)
                }
                // Factors in bf16, and safe_merge, which rounds delta before it is added.
                _ => bounds::merge_packages(dtype, Factors::Stored, t),
            };
            (bounds::merge(dtype, t), packages)
        };
        Self::compare(case, what, &layer.merged(dtype), ours.as_deref(), &self.stored_rows(what)?, bound);
        Ok(())
    }

    /// Unmerging the stored merged weight. `prefix` is empty or `bf16.`.
    fn check_unmerged(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        layer: &Layer,
        prefix: &str,
    ) -> Result<()> {
        let (what, merged) = (format!("{prefix}unmerged"), self.get(&format!("{prefix}merged"))?.tensor()?);
        let ours = self.merge(case, engine, layer, Direction::Unmerge, &merged)?;
        let exact = layer.unmerged(&self.rows(merged.to_f64()));
        let bound = |t: &Merged| {
            (bounds::merge(merged.dtype(), t), bounds::merge_packages(merged.dtype(), Factors::Stored, t))
        };
        Self::compare(case, &what, &exact, ours.as_deref(), &self.stored_rows(&what)?, bound);
        Ok(())
    }

    /// Outputs of the layer whose weight has been merged.
    fn check_forward_merged(
        &self,
        case: &mut Case,
        engine: &dyn Engine,
        layer: &Layer,
        x: &Tensor,
    ) -> Result<()> {
        let (n, k) = layer.shape();
        let merged = layer.merged(DType::F32);
        let values: Vec<f64> = merged.iter().map(|t| t.w).collect();
        let error: Vec<f64> = merged.iter().map(|t| bounds::merge(DType::F32, t)).collect();
        let bias = layer.merged_bias().map(|b| from_f64(&[n], &b)).transpose()?.or(self.bias.clone());
        let over = |weight: Tensor| Layer::new(Frozen::Dense(weight), bias.clone());
        let stored = self.get("y_merged")?.f64s()?;
        let exact = over(from_f64(&[n, k], &values)?).truth(x);
        let inputs = x.to_f64();
        let bound = |i: usize| {
            let (token, row) = (i / n * k, i % n * k);
            let weight = bounds::through_weight(&inputs[token..token + k], &error[row..row + k]);
            bounds::forward_packages(DType::F32, Factors::F32, &exact[i]) + 2.0 * weight
        };
        let formula: Vec<f64> = exact.iter().map(|t| t.y).collect();
        case.close("y_merged (formula)", &stored, &formula, bound);
        let Some(ours) = self.merge(case, engine, layer, Direction::Merge, &self.weight)? else {
            return Ok(());
        };
        if let Some(y) = over(from_f64(&[n, k], &ours)?).forward(case, engine, x)? {
            case.close("y_merged", &y, &stored, |i| 2.0 * bound(i));
        }
        Ok(())
    }

    fn check_merged_bias(&self, case: &mut Case, layer: &Layer) -> Result<()> {
        match (layer.merged_bias(), self.has("merged_bias")) {
            (Some(ours), _) => {
                let bound = |i: usize| {
                    3.0 * bounds::single(
                        ours[i].abs() + self.bias.as_ref().map_or(0.0, |b| b.to_f64()[i].abs()),
                    )
                };
                case.close("merged_bias", &ours, &self.get("merged_bias")?.f64s()?, bound);
            }
            (None, true) => bail!("{}.merged_bias: the adapter has no bias", self.name),
            (None, false) => {}
        }
        Ok(())
    }

    /// A bf16 base with an f32 adapter (`bf16.`), and all in bf16 (`bf16all.`), where the file has them.
    fn check_bf16(&self, case: &mut Case, engine: &dyn Engine, x: &Tensor) -> Result<()> {
        let x = cast(x, DType::BF16)?;
        for (prefix, adapter) in [("bf16", DType::F32), ("bf16all", DType::BF16)] {
            let has = |what: &str| self.has(&format!("{prefix}.{what}"));
            let any = ["y_adapted", "merged", "merged_safe", "unmerged"].into_iter().any(has);
            if !any {
                continue;
            }
            let layer = self.layer(DType::BF16, adapter)?;
            outputs::check(case, engine, &layer, &x, &self.get(&format!("{prefix}.y_adapted"))?, None)?;
            self.check_merged(case, engine, &layer, &format!("{prefix}.merged"))?;
            if has("merged_safe") {
                self.check_merged(case, engine, &layer, &format!("{prefix}.merged_safe"))?;
            }
            if has("unmerged") {
                self.check_unmerged(case, engine, &layer, &format!("{prefix}."))?;
            }
        }
        Ok(())
    }

    /// An embedding table `[vocab, dim]`: a product with one-hot rows, so that its outputs are rows of the merged table.
    fn check_embedding(&self, case: &mut Case, engine: &dyn Engine) -> Result<()> {
        let layer = self.layer(DType::F32, DType::F32)?;
        self.check_scaling(case)?;
        self.check_delta(case, engine, &layer)?;
        self.check_merged(case, engine, &layer, "merged")?;
        self.check_unmerged(case, engine, &layer, "")?;
        let dim = self.weight.shape()[1];
        let tokens = self.get("x")?.integers()?;
        let merged = self.merge(case, engine, &layer, Direction::Merge, &self.weight)?;
        let table = |rows: &[f64]| transpose(rows, dim, self.weight.shape()[0]);
        let exact = table(&layer.merged(DType::F32).iter().map(|t| t.w).collect::<Vec<_>>());
        let error =
            table(&layer.merged(DType::F32).iter().map(|t| bounds::merge(DType::F32, t)).collect::<Vec<_>>());
        let base = self.weight.to_f64();
        let look_up = |table: &[f64]| -> Result<Vec<f64>> {
            let row = |&token: &i64| {
                let start = usize::try_from(token).context("x: a token below 0")? * dim;
                table.get(start..start + dim).with_context(|| format!("x: token {token} is not in the table"))
            };
            Ok(tokens.iter().map(row).collect::<Result<Vec<_>>>()?.concat())
        };
        let error = look_up(&error)?;
        let none = vec![0.0; error.len()];
        case.close("y_base", &look_up(&base)?, &self.get("y_base")?.f64s()?, |i| none[i]);
        for what in ["y_adapted", "y_merged"] {
            let stored = self.get(what)?.f64s()?;
            case.close(&format!("{what} (formula)"), &stored, &look_up(&exact)?, |i| error[i]);
            if let Some(merged) = &merged {
                case.close(what, &look_up(&table(merged))?, &stored, |i| 2.0 * error[i]);
            }
        }
        Ok(())
    }
}
