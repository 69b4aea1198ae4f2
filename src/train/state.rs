use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;

use super::allocator::{ModuleImportance, PARTS, RankAllocator, RankSchedule, Smoothed};
use super::optimizer::{MomentType, Moments, Optimizer, Slot};
use crate::cpu::{AdamW, MOMENT_BLOCKSIZE};
use crate::formats::peft::{self, AdapterFile};
use crate::formats::safetensors::{self as container, File, Item};
use crate::nf4::block_count;
use crate::{Error, Result};

/// The name of the file in an adapter's folder.
pub const STATE: &str = "training_state.safetensors";

/// All that a run needs to go on as if it had not stopped, besides its adapter and its data.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingState {
    /// Steps that were made.
    pub step: u64,
    /// The key of [`Dropout`](crate::cpu::Dropout).
    pub seed: u64,
    /// Its offset that comes next.
    pub offset: u64,
    /// Moments and counts.
    pub optimizer: Optimizer,
    /// Of AdaLoRA, while ranks are allocated.
    pub allocator: Option<RankAllocator>,
}

impl TrainingState {
    /// Writes the adapter as PEFT's files, and beside them [`STATE`]: safetensors, with these tensors.
    ///
    /// | tensor | dtype, shape | |
    /// |---|---|---|
    /// | `adapter` | u64 `[1]` | FNV-1a of the bytes of `adapter_model.safetensors`, which this is the state of |
    /// | `counters` | u64 `[3]` | step, seed, offset |
    /// | `adamw` | f64 `[4]` | beta1, beta2, epsilon, weight_decay |
    /// | `moment_bits` | u8 `[1]` | of new moments: 32 or 8 |
    /// | `optimizer.NAME.step` | u64 `[1]` | steps of the parameter NAME (`module.lora_A`) |
    /// | `optimizer.NAME.m`, `.v` | f32 or u8, the parameter's shape | its moments |
    /// | `optimizer.NAME.m_absmax`, `.v_absmax` | f32 `[blocks]` | of 8-bit moments ([`MomentsMut`](crate::cpu::MomentsMut)) |
    /// | `allocator.schedule` | u64 `[6]` | init_r, target_r, tinit, tfinal, delta_t, total_step |
    /// | `allocator.betas` | f64 `[2]` | beta1, beta2 |
    /// | `allocator.NAME.sensitivity`, `.uncertainty` | f32, the parameter's shape | smoothed importance |
    /// | `allocator.MODULE.kept` | u8 `[init_r]` | the last allocation |
    ///
    /// Each file is replaced as a whole, the adapter first.
    ///
    /// # Errors
    /// As [`AdapterFile::save`].
    pub fn save(&self, folder: impl AsRef<Path>, adapter: &AdapterFile) -> Result<()> {
        let folder = folder.as_ref();
        let (_, model) = adapter.to_bytes()?;
        adapter.save(folder)?;
        let mut items = BTreeMap::new();
        let mut put = |name: String, dtype, shape: &[usize], bytes: Vec<u8>| {
            items.insert(name, Item::new(dtype, shape, bytes));
        };
        let u64s = |values: &[u64]| bytemuck::cast_slice(values).to_vec();
        let f64s = |values: &[f64]| bytemuck::cast_slice(values).to_vec();
        let f32s = |values: &[f32]| bytemuck::cast_slice(values).to_vec();
        put("adapter".into(), Dtype::U64, &[1], u64s(&[fnv1a(&model)]));
        put("counters".into(), Dtype::U64, &[3], u64s(&[self.step, self.seed, self.offset]));
        let AdamW { beta1, beta2, epsilon, weight_decay } = self.optimizer.adamw;
        put("adamw".into(), Dtype::F64, &[4], f64s(&[beta1, beta2, epsilon, weight_decay]));
        let bits = if self.optimizer.moment_type == MomentType::F32 { 32 } else { 8 };
        put("moment_bits".into(), Dtype::U8, &[1], vec![bits]);
        for (name, slot) in &self.optimizer.slots {
            let key = |part: &str| format!("optimizer.{name}.{part}");
            put(key("step"), Dtype::U64, &[1], u64s(&[slot.steps]));
            match &slot.moments {
                Moments::F32 { m, v } => {
                    put(key("m"), Dtype::F32, &slot.shape, f32s(m));
                    put(key("v"), Dtype::F32, &slot.shape, f32s(v));
                }
                Moments::Blockwise { m, m_absmax, v, v_absmax } => {
                    put(key("m"), Dtype::U8, &slot.shape, m.clone());
                    put(key("v"), Dtype::U8, &slot.shape, v.clone());
                    put(key("m_absmax"), Dtype::F32, &[m_absmax.len()], f32s(m_absmax));
                    put(key("v_absmax"), Dtype::F32, &[v_absmax.len()], f32s(v_absmax));
                }
            }
        }
        if let Some(RankAllocator { schedule, modules, kept }) = &self.allocator {
            let s = schedule;
            let whole = [s.init_r as u64, s.target_r as u64, s.tinit, s.tfinal, s.delta_t, s.total_step];
            put("allocator.schedule".into(), Dtype::U64, &[6], u64s(&whole));
            put("allocator.betas".into(), Dtype::F64, &[2], f64s(&[s.beta1, s.beta2]));
            for (name, module) in modules {
                for ((part, smoothed), shape) in
                    PARTS.iter().zip(&module.parts).zip(part_shapes(module.shape))
                {
                    let key = |what: &str| format!("allocator.{name}.{part}.{what}");
                    put(key("sensitivity"), Dtype::F32, &shape, f32s(&smoothed.sensitivity));
                    put(key("uncertainty"), Dtype::F32, &shape, f32s(&smoothed.uncertainty));
                }
            }
            for (name, kept) in kept {
                let flags = kept.iter().map(|kept| u8::from(*kept)).collect();
                put(format!("allocator.{name}.kept"), Dtype::U8, &[kept.len()], flags);
            }
        }
        container::replace(&folder.join(STATE), |to| container::write(to, &items))
    }

    /// Reads an adapter and the state that was saved with it.
    ///
    /// # Errors
    /// As [`peft::load`]; [`Error::Io`] when there is no state; [`Error::Format`] when the state is that of another adapter, a
    /// tensor is missing, unknown, or of another shape or dtype than the adapter and [`TrainingState::save`] ask for.
    pub fn load(folder: impl AsRef<Path>) -> Result<(AdapterFile, Self)> {
        let folder = folder.as_ref();
        let adapter = peft::load(folder)?;
        let model = crate::formats::read(folder.join(peft::MODEL))?;
        let file = File::open(folder.join(STATE))?;
        let state = Reader { file: &file, adapter: &adapter }.read(fnv1a(&model))?;
        Ok((adapter, state))
    }
}

/// Reads and checks tensor by tensor.
struct Reader<'a> {
    file: &'a File<'a>,
    adapter: &'a AdapterFile,
}

impl Reader<'_> {
    fn read(&self, fingerprint: u64) -> Result<TrainingState> {
        let [found] = self.array::<u64, 1>("adapter", Dtype::U64)?;
        if found != fingerprint {
            let wanted = format!("the fingerprint of {} beside it, {fingerprint:016x}", peft::MODEL);
            return Err(Error::format(self.file.place("adapter"), wanted, format!("{found:016x}")));
        }
        let [step, seed, offset] = self.array::<u64, 3>("counters", Dtype::U64)?;
        let [beta1, beta2, epsilon, weight_decay] = self.array::<f64, 4>("adamw", Dtype::F64)?;
        let moment_type = match self.array::<u8, 1>("moment_bits", Dtype::U8)? {
            [32] => MomentType::F32,
            [8] => MomentType::Blockwise,
            [other] => return Err(Error::format(self.file.place("moment_bits"), "32 or 8", other)),
        };
        let parameters: BTreeMap<String, Vec<usize>> = self.parameters();
        let mut known: Vec<String> = ["adapter", "counters", "adamw", "moment_bits"].map(String::from).into();
        let mut slots = BTreeMap::new();
        for (name, shape) in &parameters {
            if self.file.entries().contains_key(&format!("optimizer.{name}.step")) {
                slots.insert(name.clone(), self.slot(name, shape, &mut known)?);
            }
        }
        let allocator = match self.file.entries().contains_key("allocator.schedule") {
            true => Some(self.allocator(&mut known)?),
            false => None,
        };
        if let Some(name) = self.file.entries().keys().find(|name| !known.contains(name)) {
            return Err(Error::format(self.file.place(name), "a tensor of this adapter's state", "it"));
        }
        let adamw = AdamW { beta1, beta2, epsilon, weight_decay };
        let optimizer = Optimizer { adamw, moment_type, slots };
        Ok(TrainingState { step, seed, offset, optimizer, allocator })
    }

    /// All parameters of the adapter with their shapes.
    fn parameters(&self) -> BTreeMap<String, Vec<usize>> {
        let modules = self.adapter.adapters.iter();
        modules
            .flat_map(|(module, adapter)| {
                let parameters = adapter.parameters().into_iter();
                parameters.map(move |(name, tensor)| (format!("{module}.{name}"), tensor.shape().to_vec()))
            })
            .collect()
    }

    fn slot(&self, name: &str, shape: &[usize], known: &mut Vec<String>) -> Result<Slot> {
        let key = |part: &str| format!("optimizer.{name}.{part}");
        known.extend(["step", "m", "v"].map(key));
        let [steps] = self.array::<u64, 1>(&key("step"), Dtype::U64)?;
        let moments = match self.file.entry(&key("m"))?.dtype {
            Dtype::U8 => {
                known.extend(["m_absmax", "v_absmax"].map(key));
                let blocks = [block_count(shape.iter().product(), MOMENT_BLOCKSIZE)];
                Moments::Blockwise {
                    m: self.tensor(&key("m"), Dtype::U8, shape)?,
                    m_absmax: self.tensor(&key("m_absmax"), Dtype::F32, &blocks)?,
                    v: self.tensor(&key("v"), Dtype::U8, shape)?,
                    v_absmax: self.tensor(&key("v_absmax"), Dtype::F32, &blocks)?,
                }
            }
            _ => Moments::F32 {
                m: self.tensor(&key("m"), Dtype::F32, shape)?,
                v: self.tensor(&key("v"), Dtype::F32, shape)?,
            },
        };
        Ok(Slot { shape: shape.to_vec(), steps, moments })
    }

    fn allocator(&self, known: &mut Vec<String>) -> Result<RankAllocator> {
        known.extend(["allocator.schedule", "allocator.betas"].map(String::from));
        let [init_r, target_r, tinit, tfinal, delta_t, total_step] =
            self.array::<u64, 6>("allocator.schedule", Dtype::U64)?;
        let [beta1, beta2] = self.array::<f64, 2>("allocator.betas", Dtype::F64)?;
        let (init_r, target_r) = (init_r as usize, target_r as usize);
        let schedule = RankSchedule { init_r, target_r, tinit, tfinal, delta_t, total_step, beta1, beta2 };
        let mut allocator = RankAllocator::new(schedule, &self.adapter.adapters).map_err(|error| {
            Error::format(self.file.place("allocator.schedule"), "one of this adapter", error)
        })?;
        for (name, module) in &mut allocator.modules {
            let ModuleImportance { shape, parts } = module;
            for ((part, smoothed), shape) in PARTS.iter().zip(parts).zip(part_shapes(*shape)) {
                let key = |what: &str| format!("allocator.{name}.{part}.{what}");
                known.extend(["sensitivity", "uncertainty"].map(key));
                *smoothed = Smoothed {
                    sensitivity: self.tensor(&key("sensitivity"), Dtype::F32, &shape)?,
                    uncertainty: self.tensor(&key("uncertainty"), Dtype::F32, &shape)?,
                };
            }
            let key = format!("allocator.{name}.kept");
            if self.file.entries().contains_key(&key) {
                let flags = self.tensor::<u8>(&key, Dtype::U8, &[init_r])?;
                allocator.kept.insert(name.clone(), flags.into_iter().map(|flag| flag != 0).collect());
                known.push(key);
            }
        }
        if !allocator.kept.is_empty() && allocator.kept.len() != allocator.modules.len() {
            let wanted = format!("allocations of {} modules", allocator.modules.len());
            return Err(Error::format(self.file.name(), wanted, allocator.kept.len()));
        }
        Ok(allocator)
    }

    /// A tensor of exactly this dtype and shape.
    fn tensor<T: bytemuck::Pod>(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Vec<T>> {
        let entry = self.file.entry(name)?;
        if (entry.dtype, &entry.shape[..]) != (dtype, shape) {
            let got = format!("{} {:?}", entry.dtype, entry.shape);
            return Err(Error::format(self.file.place(name), format!("{dtype} {shape:?}"), got));
        }
        Ok(bytemuck::pod_collect_to_vec(&self.file.raw(name)?.bytes))
    }

    fn array<T: bytemuck::Pod, const N: usize>(&self, name: &str, dtype: Dtype) -> Result<[T; N]> {
        let values = self.tensor::<T>(name, dtype, &[N])?;
        Ok(values.try_into().unwrap_or_else(|_| unreachable!("the shape was checked")))
    }
}

/// Shapes of `lora_A`, `lora_E` and `lora_B` of `[rank, n, k]`.
fn part_shapes([rank, n, k]: [usize; 3]) -> [[usize; 2]; 3] {
    [[rank, k], [rank, 1], [n, rank]]
}

/// Fowler, Noll and Vo's hash: tells files apart, not forgeries.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
