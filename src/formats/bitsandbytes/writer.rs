//! Writing.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::layout::{ABSMAX, NESTED_ABSMAX, NESTED_QUANT_MAP, QUANT_MAP, QUANT_STATE, layout};
use super::quant_state::{QUANT_TYPES, QuantState, name};
use super::{CONFIG, Checkpoint, INDEX, MODEL, Storage};
use crate::formats::safetensors::{Dtype, Item, Raw, replace, write};
use crate::nf4::{Absmax, Codebook, Nf4Matrix, QuantType, block_count, packed_len};
use crate::{Error, Result};

/// How [`Checkpoint::save`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SaveOptions {
    /// The type that the codes are stored as; `None` for [`Checkpoint::storage`].
    pub storage: Option<Storage>,
    /// The size above which the model is split over several files. A parameter that is larger has a file of its own.
    pub max_shard_bytes: Option<u64>,
}

/// The tensors of one file, or of all.
type Items<'a> = BTreeMap<String, Item<'a>>;

impl Checkpoint {
    /// The whole checkpoint as one `.safetensors` file, its codes stored as [`Checkpoint::storage`].
    ///
    /// # Errors
    /// As [`Checkpoint::save`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        write(&mut bytes, &self.items(self.storage)?.into_iter().flatten().collect())
            .expect("a vector takes all bytes");
        Ok(bytes)
    }

    /// Writes the whole checkpoint into one `.safetensors` file, its codes stored as [`Checkpoint::storage`]. A
    /// `config.json` is not written.
    ///
    /// # Errors
    /// As [`Checkpoint::save`].
    pub fn save_file(&self, path: impl AsRef<Path>) -> Result<()> {
        let items = self.items(self.storage)?.into_iter().flatten().collect();
        replace(path.as_ref(), |to| write(to, &items))
    }

    /// Writes a model's folder, which is made if need be: `model.safetensors`, or shards and their index, and
    /// [`Checkpoint::config`] with a fitting `quantization_config`. bitsandbytes and transformers read it.
    ///
    /// # Errors
    /// [`Error::Argument`] when two tensors would have one name, a scale is not finite (the weight was not, then), the codes
    /// do not fill the last element of the storage type, or the folder has the files of a model in the other form.
    /// [`Error::Unsupported`] when a codebook is neither NF4 nor FP4: bitsandbytes decodes by its own tables. [`Error::Io`].
    pub fn save(&self, folder: impl AsRef<Path>, options: &SaveOptions) -> Result<()> {
        let folder = folder.as_ref();
        let storage = options.storage.unwrap_or(self.storage);
        let config = self.config_text(storage)?;
        let shards = shards(self.items(storage)?, options.max_shard_bytes.unwrap_or(u64::MAX));
        let other = folder.join(if shards.len() == 1 { INDEX } else { MODEL });
        if other.exists() {
            return Err(Error::argument("folder", "no other form of the model", other.display()));
        }
        std::fs::create_dir_all(folder).map_err(|source| Error::Io { path: folder.to_owned(), source })?;
        if let [all] = &shards[..] {
            replace(&folder.join(MODEL), |to| write(to, all))?;
        } else {
            save_shards(folder, &shards)?;
        }
        config.map_or(Ok(()), |text| replace(&folder.join(CONFIG), |to| to.write_all(text.as_bytes())))
    }

    /// The tensors of every parameter, in the order of their names.
    fn items(&self, storage: Storage) -> Result<Vec<Items<'_>>> {
        let nf4 = self.nf4.iter().map(|(name, matrix)| Ok((name, weight_items(name, matrix, storage)?)));
        let dense = self.dense.iter().map(|(name, tensor)| Ok((name, one(name, tensor.into()))));
        let raw = self.raw.iter().map(|(name, raw)| Ok((name, one(name, raw.into()))));
        let mut parameters = nf4.chain(dense).chain(raw).collect::<Result<Vec<(&String, Items)>>>()?;
        parameters.sort_by_key(|(name, _)| *name);
        let mut names = BTreeMap::new();
        for (parameter, items) in &parameters {
            for name in items.keys() {
                if let Some(other) = names.insert(name.clone(), *parameter) {
                    return Err(Error::argument(
                        "checkpoint",
                        format!("one tensor {name}"),
                        format!("also that of {other}"),
                    ));
                }
            }
        }
        // Names that the reader would take for parts of another weight.
        let read_as = layout(names.keys(), |name| format!("checkpoint: {name}"))?;
        match read_as.iter().find(|(name, state)| state.is_some() != self.nf4.contains_key(*name)) {
            Some((name, _)) => {
                Err(Error::argument("checkpoint", "names that read back as what they are", name))
            }
            None => Ok(parameters.into_iter().map(|(_, items)| items).collect()),
        }
    }
}

fn one<'a>(name: &str, item: Item<'a>) -> Items<'a> {
    BTreeMap::from([(name.to_owned(), item)])
}

/// The tensors of a 4-bit weight.
fn weight_items<'a>(weight: &str, matrix: &'a Nf4Matrix, storage: Storage) -> Result<Items<'a>> {
    let place = || format!("checkpoint.nf4[{weight:?}]");
    let packed = matrix.packed();
    check(&QuantState::of(matrix), storage).map_err(|error| error.within(place()))?;
    let companions = companions(weight, &QuantState::of(matrix), matrix.codebook(), matrix.absmax())
        .map_err(|error| error.within(place()))?;
    let mut items: Items = companions.into_iter().map(|(name, raw)| (name, raw.into())).collect();
    items.insert(weight.to_owned(), Item::new(storage.dtype(), [packed.len() / storage.size(), 1], packed));
    Ok(items)
}

/// The tensors that a weight of this state has in a file, in the order of the table [above](super): name, dtype, shape. The last
/// one is the JSON text, which is as long as `state` is when it is printed.
///
/// # Errors
/// [`Error::Argument`] when the shape is empty or has a 0, or the codes do not fill the last element of the storage type.
/// [`Error::Unsupported`] for a quantisation type other than NF4 and FP4.
pub fn tensors_of(
    weight: &str,
    state: &QuantState,
    storage: Storage,
) -> Result<Vec<(String, Dtype, Vec<usize>)>> {
    let bytes = check(state, storage)?;
    let blocks = block_count(state.numel(), state.blocksize);
    let absmax = if state.nested.is_some() { Dtype::U8 } else { Dtype::F32 };
    let mut tensors = vec![
        (String::new(), storage.dtype(), vec![bytes / storage.size(), 1]),
        (ABSMAX.into(), absmax, vec![blocks]),
        (QUANT_MAP.into(), Dtype::F32, vec![16]),
    ];
    if let Some(nested) = state.nested {
        tensors.push((NESTED_ABSMAX.into(), Dtype::F32, vec![block_count(blocks, nested.blocksize)]));
        tensors.push((NESTED_QUANT_MAP.into(), Dtype::F32, vec![256]));
    }
    let suffix = format!("{QUANT_STATE}{}", name(&QUANT_TYPES, state.quant_type));
    tensors.push((suffix, Dtype::U8, vec![state.to_string().len()]));
    tensors.iter_mut().for_each(|(name, ..)| name.insert_str(0, weight));
    Ok(tensors)
}

/// The contents of these tensors, but for the codes.
///
/// # Errors
/// [`Error::Argument`] when a scale is not finite: then the weight was not, and a reader would refuse it.
pub fn companions(
    weight: &str,
    state: &QuantState,
    codebook: &Codebook,
    absmax: &Absmax,
) -> Result<Vec<(String, Raw)>> {
    let u8s = |bytes: &[u8]| Raw { dtype: Dtype::U8, shape: vec![bytes.len()], bytes: bytes.to_vec() };
    let f32s = |values: &[f32]| match values.iter().position(|v| !v.is_finite()) {
        None => {
            let bytes = bytemuck::cast_slice(values).to_vec();
            Ok(Raw { dtype: Dtype::F32, shape: vec![values.len()], bytes })
        }
        Some(i) => Err(Error::argument("absmax", FINITE, format!("{} for block {i}", values[i]))),
    };
    let mut tensors = Vec::new();
    let mut put = |suffix: &str, raw: Raw| tensors.push((format!("{weight}{suffix}"), raw));
    put(QUANT_MAP, f32s(codebook.values())?);
    match absmax {
        Absmax::Plain(absmax) => put(ABSMAX, f32s(absmax)?),
        Absmax::Nested(nested) => {
            if !nested.offset().is_finite() {
                return Err(Error::argument("absmax.offset", FINITE, nested.offset()));
            }
            put(ABSMAX, u8s(nested.q()));
            put(NESTED_ABSMAX, f32s(nested.absmax())?);
            put(NESTED_QUANT_MAP, f32s(nested.map())?);
        }
    }
    let suffix = format!("{QUANT_STATE}{}", name(&QUANT_TYPES, state.quant_type));
    put(&suffix, u8s(state.to_string().as_bytes()));
    Ok(tensors)
}

const FINITE: &str = "finite scales, of a finite weight";

/// Checks that a weight can be stored, and counts the bytes of its codes.
fn check(state: &QuantState, storage: Storage) -> Result<usize> {
    if state.quant_type == QuantType::Custom {
        return Err(Error::unsupported("a 4-bit weight", "a codebook other than NF4 and FP4 in a file"));
    }
    if state.shape.is_empty() || state.shape.contains(&0) {
        return Err(Error::argument("shape", "a shape without zeros", format!("{:?}", state.shape)));
    }
    let bytes = packed_len(state.numel());
    if !bytes.is_multiple_of(storage.size()) {
        let wanted = format!("a multiple of {} bytes, to store it as {}", storage.size(), storage.name());
        return Err(Error::argument("packed", wanted, bytes));
    }
    Ok(bytes)
}

/// Fills files of at most `limit` bytes, in order. A parameter stays in one file, with all its tensors.
fn shards(parameters: Vec<Items>, limit: u64) -> Vec<Items> {
    let mut shards = vec![Items::new()];
    let mut filled = 0;
    for items in parameters {
        let size: u64 = items.values().map(|item| item.bytes.len() as u64).sum();
        if filled > 0 && filled + size > limit {
            shards.push(Items::new());
            filled = 0;
        }
        filled += size;
        shards.last_mut().expect("there is always one").extend(items);
    }
    shards
}

/// Writes numbered files, then the index that names them.
fn save_shards(folder: &Path, shards: &[Items]) -> Result<()> {
    let mut map = BTreeMap::new();
    let mut total = 0;
    for (i, items) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        replace(&folder.join(&name), |to| write(to, items))?;
        map.extend(items.keys().map(|tensor| (tensor, name.clone())));
        total += items.values().map(|item| item.bytes.len()).sum::<usize>();
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": map });
    replace(&folder.join(INDEX), |to| writeln!(to, "{index:#}"))
}
