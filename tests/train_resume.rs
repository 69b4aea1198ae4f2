//! The optimiser and what it leaves on disk: a run that stops and goes on is the run that never stopped, to the bit; bad gradients,
//! other shapes, damaged files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lora_kernels::adapter::{AdaLora, Adapter, Dora, Lora};
use lora_kernels::cpu::{AdamW, Dropout};
use lora_kernels::formats::peft::{AdapterFile, Config};
use lora_kernels::formats::safetensors::File;
use lora_kernels::nf4::{Codebook, Nesting, Nf4Matrix};
use lora_kernels::train::{
    Gradient, Layer, MomentType, NotFinite, Optimizer, RankAllocator, RankSchedule, STATE, TrainingState,
    orthogonality, parameters,
};
use lora_kernels::{DType, Error, Tensor};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::from_f32(shape, &values(shape.iter().product(), seed), DType::F32).unwrap()
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Lora,
    Dora,
    AdaLora,
}

const SHAPES: [(&str, [usize; 2]); 2] = [("layers.0.q_proj", [24, 32]), ("layers.1.q_proj", [16, 24])];
const TOKENS: usize = 10;

/// Two layers, one after the other, and a state of training.
struct Run {
    weights: Vec<Nf4Matrix>,
    file: AdapterFile,
    state: TrainingState,
}

impl Run {
    fn new(kind: Kind, moments: MomentType) -> Self {
        let weight = |(i, (_, [n, k])): (usize, &(&str, [usize; 2]))| {
            let dense = tensor(&[*n, *k], 50 + i as u64);
            Nf4Matrix::quantize_tensor(&dense, 64, &Codebook::nf4(), Nesting::Nested).unwrap()
        };
        let adapter = |seed: u64, [n, k]: [usize; 2]| -> Adapter {
            let (a, b) = (tensor(&[4, k], seed), tensor(&[n, 4], seed + 1));
            match kind {
                Kind::Lora => Lora::new(a, b, 2.0).unwrap().into(),
                Kind::Dora => {
                    Dora::new(Lora::new(a, b, 2.0).unwrap(), tensor(&[n], seed + 2)).unwrap().into()
                }
                Kind::AdaLora => AdaLora::new(a, tensor(&[4, 1], seed + 3), b, 8.0, 4).unwrap().into(),
            }
        };
        let adapters: BTreeMap<String, Adapter> = SHAPES
            .iter()
            .zip(1..)
            .map(|((name, shape), i)| (name.to_string(), adapter(10 * i, *shape)))
            .collect();
        let mut config = Config::lora(4, 8.0, &["q_proj"]).unwrap();
        config.use_dora = kind == Kind::Dora;
        let mut allocator = None;
        if kind == Kind::AdaLora {
            let json = r#"{"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_r": 2,
                "tinit": 1, "tfinal": 3, "deltaT": 2, "total_step": 10, "beta1": 0.85, "beta2": 0.85}"#;
            config = Config::parse(json.as_bytes()).unwrap();
            let schedule = RankSchedule::from_config(&config).unwrap();
            allocator = Some(RankAllocator::new(schedule, &adapters).unwrap());
        }
        let optimizer = Optimizer::new(AdamW::default(), moments);
        Self {
            weights: SHAPES.iter().enumerate().map(weight).collect(),
            file: AdapterFile { config, adapters, base_tensors: BTreeMap::new() },
            state: TrainingState { step: 0, seed: 77, offset: 0, optimizer, allocator },
        }
    }

    /// Gradients of a squared error in one step, with dropout.
    fn gradients(&mut self) -> BTreeMap<String, Gradient> {
        let layers: Vec<Layer<'_>> =
            self.weights.iter().map(|weight| Layer::new(weight, None).unwrap()).collect();
        let mut inputs = vec![values(TOKENS * 32, 1000 + self.state.step)];
        let mut passes = Vec::new();
        for (layer, (name, _)) in layers.iter().zip(SHAPES) {
            let dropout = Dropout::new(0.1, self.state.seed, self.state.offset).unwrap();
            self.state.offset += 1;
            let pass = layer
                .forward(&self.file.adapters[name], inputs.last().unwrap(), TOKENS, Some(dropout))
                .unwrap();
            inputs.push(pass.y.clone());
            passes.push(pass);
        }
        let mut dy = inputs.pop().unwrap();
        let mut gradients = BTreeMap::new();
        for (i, (name, _)) in SHAPES.iter().enumerate().rev() {
            let adapter = &self.file.adapters[*name];
            let mut gradient = Gradient::zeros(adapter);
            let mut dx = vec![0.0; inputs[i].len()];
            layers[i].backward(adapter, [&inputs[i], &dy], &passes[i], &mut gradient, Some(&mut dx)).unwrap();
            gradients.insert(name.to_string(), gradient);
            dy = dx;
        }
        if self.state.allocator.is_some() {
            orthogonality(&self.file.adapters, &mut gradients, 0.5).unwrap();
        }
        gradients
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            let gradients = self.gradients();
            let list = parameters(&mut self.file.adapters, &gradients).unwrap();
            self.state.optimizer.step(list, 1e-2, Some(1.0), NotFinite::Refuse).unwrap();
            if let Some(allocator) = &mut self.state.allocator {
                allocator.step(self.state.step, &mut self.file.adapters, &gradients).unwrap();
            }
            self.state.step += 1;
        }
    }
}

/// A folder of this test alone.
fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("lora-kernels-train-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    folder
}

#[test]
fn a_resumed_run_is_the_run() {
    for kind in [Kind::Lora, Kind::Dora, Kind::AdaLora] {
        for moments in [MomentType::F32, MomentType::Blockwise] {
            let folder = folder(&format!("{kind:?}-{moments:?}"));
            let mut whole = Run::new(kind, moments);
            let start = whole.file.adapters.clone();
            let mut parts = Run::new(kind, moments);
            for stop in [1, 4, 8, 11] {
                let count = stop - parts.state.step as usize;
                whole.steps(count);
                parts.steps(count);
                parts.state.save(&folder, &parts.file).unwrap();
                // Nothing but the files is left.
                let (file, state) = TrainingState::load(&folder).unwrap();
                assert_eq!((&file, &state), (&parts.file, &parts.state));
                parts = Run { file, state, ..Run::new(kind, moments) };
            }
            assert_eq!(parts.state, whole.state);
            assert_eq!(parts.file, whole.file);
            assert_ne!(whole.file.adapters, start);
            if let Some(allocator) = &whole.state.allocator {
                assert_eq!(allocator.kept().values().flatten().filter(|kept| **kept).count(), 4);
                allocator.prune(&mut whole.file).unwrap();
                whole.file.save(&folder).unwrap();
            }
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }
}

/// A gradient that is not finite is named, or its step is left out; either way nothing changes.
#[test]
fn gradients_that_are_not_finite() {
    for moments in [MomentType::F32, MomentType::Blockwise] {
        let mut run = Run::new(Kind::Lora, moments);
        run.steps(2);
        let mut gradients = run.gradients();
        let good = gradients.clone();
        gradients.get_mut(SHAPES[1].0).unwrap().get_mut("lora_B").unwrap()[17] = f32::NAN;
        let before = (run.file.clone(), run.state.optimizer.clone());
        let mut step = |gradients: &BTreeMap<String, Gradient>, policy| {
            let list = parameters(&mut run.file.adapters, gradients).unwrap();
            run.state.optimizer.step(list, 1e-2, Some(1.0), policy)
        };
        let error = step(&gradients, NotFinite::Refuse).unwrap_err();
        assert_eq!(
            error.to_string(),
            "gradient of layers.1.q_proj.lora_B: wanted finite numbers, got NaN at 17"
        );
        let report = step(&gradients, NotFinite::Skip).unwrap();
        assert_eq!(report.skipped.as_deref(), Some("layers.1.q_proj.lora_B"));
        assert_eq!((&run.file, &run.state.optimizer), (&before.0, &before.1));

        // The step that comes after is the one that would have come.
        let mut other = before;
        let list = parameters(&mut other.0.adapters, &good).unwrap();
        other.1.step(list, 1e-2, Some(1.0), NotFinite::Refuse).unwrap();
        let list = parameters(&mut run.file.adapters, &good).unwrap();
        let report = run.state.optimizer.step(list, 1e-2, Some(1.0), NotFinite::Skip).unwrap();
        assert_eq!((&run.file, &run.state.optimizer), (&other.0, &other.1));
        assert!(
            report.skipped.is_none() && report.norm > 1.0 && (report.norm * report.scale - 1.0).abs() < 1e-4
        );
    }
}

/// Tensors that are not in the list keep their moments and counts: one adapter trained, then both.
#[test]
fn each_tensor_counts_its_own_steps() {
    let mut run = Run::new(Kind::Lora, MomentType::F32);
    let mut first = run.gradients();
    first.retain(|name, _| name == SHAPES[0].0);
    let untouched = run.file.adapters[SHAPES[1].0].clone();
    for _ in 0..3 {
        let list = parameters(&mut run.file.adapters, &first).unwrap();
        run.state.optimizer.step(list, 1e-2, None, NotFinite::Refuse).unwrap();
    }
    assert_eq!(run.file.adapters[SHAPES[1].0], untouched);
    run.steps(1);
    let steps = |name: &str| run.state.optimizer.steps(&format!("{name}.lora_A"));
    assert_eq!((steps(SHAPES[0].0), steps(SHAPES[1].0), steps("nobody")), (4, 1, 0));
}

#[test]
fn parameters_that_do_not_fit() {
    fn refused<R: std::fmt::Debug>(argument: &str, result: Result<R, Error>) {
        let Err(Error::Argument { argument: got, .. }) = result else { panic!("{argument}: {result:?}") };
        assert_eq!(got, argument);
    }
    let mut run = Run::new(Kind::Lora, MomentType::F32);
    run.steps(1);
    let gradients = run.gradients();
    let (name, module) = (format!("{}.lora_A", SHAPES[0].0), SHAPES[0].0);
    let optimizer = &mut run.state.optimizer;
    let before = optimizer.clone();

    // An adapter of another rank under the name of the old one.
    let thin = Adapter::from(Lora::new(tensor(&[2, 32], 1), tensor(&[24, 2], 2), 2.0).unwrap());
    let mut other = BTreeMap::from([(module.to_owned(), thin)]);
    let its = BTreeMap::from([(module.to_owned(), Gradient::zeros(&other[module]))]);
    let list = parameters(&mut other, &its).unwrap();
    refused(&name, optimizer.step(list, 1e-2, None, NotFinite::Refuse));
    let only = |gradients: &BTreeMap<String, Gradient>| -> BTreeMap<String, Gradient> {
        gradients.iter().filter(|(name, _)| *name == module).map(|(n, g)| (n.clone(), g.clone())).collect()
    };
    refused(&format!("{module}.gradient"), parameters(&mut other, &only(&gradients)));
    refused(&format!("gradients[{:?}]", SHAPES[1].0), parameters(&mut other, &gradients));

    let mut twice = run.file.adapters.clone();
    let mut list = parameters(&mut run.file.adapters, &gradients).unwrap();
    list.extend(parameters(&mut twice, &gradients).unwrap());
    refused(&name, optimizer.step(list, 1e-2, None, NotFinite::Refuse));
    let mut list = parameters(&mut twice, &gradients).unwrap();
    list[0].gradient = &list[0].gradient[1..];
    refused(&format!("gradient of {name}"), optimizer.step(list, 1e-2, None, NotFinite::Refuse));
    let mut list = parameters(&mut twice, &gradients).unwrap();
    list[0].shape = vec![usize::MAX, 2];
    refused(&name, optimizer.step(list, 1e-2, None, NotFinite::Refuse));
    for (argument, lr, max_norm) in
        [("learning_rate", f64::NAN, None), ("max_norm", 1e-2, Some(0.0)), ("max_norm", 1e-2, Some(f32::NAN))]
    {
        let list = parameters(&mut twice, &gradients).unwrap();
        refused(argument, optimizer.step(list, lr, max_norm, NotFinite::Skip));
    }
    assert_eq!(*optimizer, before);
}

type Tensors = BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>;

/// Rewrites the state's file with some tensors changed.
fn rewrite(path: &Path, change: impl Fn(&mut Tensors)) {
    let mut tensors: Tensors = {
        let file = File::open(path).unwrap();
        let names: Vec<String> = file.entries().keys().cloned().collect();
        names
            .into_iter()
            .map(|name| {
                let raw = file.raw(&name).unwrap();
                (name, (raw.dtype, raw.shape, raw.bytes))
            })
            .collect()
    };
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

#[test]
fn states_that_are_not_of_this_adapter() {
    let folder = folder("damage");
    let mut run = Run::new(Kind::AdaLora, MomentType::Blockwise);
    run.steps(5);
    let path = folder.join(STATE);
    let name = |part: &str| format!("{}.{part}", SHAPES[0].0);
    let refused = |place: &str, change: &dyn Fn(&mut Tensors)| {
        run.state.save(&folder, &run.file).unwrap();
        TrainingState::load(&folder).unwrap();
        rewrite(&path, change);
        let error = TrainingState::load(&folder).unwrap_err();
        let Error::Format { place: got, wanted, .. } = &error else { panic!("{place}: {error:?}") };
        assert!(got.ends_with(place) || wanted.ends_with(place), "{place}: {error}");
    };
    for key in ["adapter", "counters", "adamw", "moment_bits", "allocator.betas"] {
        refused(key, &|tensors| drop(tensors.remove(key)));
        refused(key, &|tensors| tensors.get_mut(key).unwrap().1.push(1));
    }
    refused("adapter", &|tensors| tensors.get_mut("adapter").unwrap().2[3] ^= 1);
    refused("moment_bits", &|tensors| tensors.get_mut("moment_bits").unwrap().2[0] = 16);
    refused("allocator.schedule", &|tensors| tensors.get_mut("allocator.schedule").unwrap().2[0] = 3);
    refused("somebody", &|tensors| {
        let count = tensors["adapter"].clone();
        tensors.insert("somebody".into(), count);
    });
    for part in ["m", "v", "m_absmax", "v_absmax"] {
        let key = format!("optimizer.{}.{part}", name("lora_A"));
        refused(&key, &|tensors| drop(tensors.remove(&key)));
        refused(&key, &|tensors| tensors.get_mut(&key).unwrap().1.insert(0, 1));
    }
    for part in ["lora_A.sensitivity", "lora_E.uncertainty", "lora_B.sensitivity"] {
        let key = format!("allocator.{}", name(part));
        refused(&key, &|tensors| drop(tensors.remove(&key)));
    }
    let kept = format!("allocator.{}", name("kept"));
    refused(&kept, &|tensors| tensors.get_mut(&kept).unwrap().1.push(1));
    refused("allocations of 2 modules", &|tensors| drop(tensors.remove(&kept)));
    std::fs::remove_dir_all(&folder).unwrap();
}

/// The state of one adapter beside another one; no state at all; a file that ends early.
#[test]
fn files_that_do_not_belong_together() {
    let folder = folder("files");
    let mut run = Run::new(Kind::Lora, MomentType::F32);
    run.steps(2);
    run.state.save(&folder, &run.file).unwrap();
    run.steps(1);
    run.file.save(&folder).unwrap();
    let error = TrainingState::load(&folder).unwrap_err().to_string();
    assert!(error.contains("adapter: wanted the fingerprint of adapter_model.safetensors"), "{error}");
    run.state.save(&folder, &run.file).unwrap();
    let bytes = std::fs::read(folder.join(STATE)).unwrap();
    for end in [0, 7, 100, bytes.len() - 1] {
        std::fs::write(folder.join(STATE), &bytes[..end]).unwrap();
        assert!(matches!(TrainingState::load(&folder), Err(Error::Format { .. })), "{end}");
    }
    std::fs::remove_file(folder.join(STATE)).unwrap();
    assert!(matches!(TrainingState::load(&folder), Err(Error::Io { .. })));
    std::fs::remove_dir_all(&folder).unwrap();
}
