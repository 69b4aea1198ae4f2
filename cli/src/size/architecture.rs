//! What the modules of a model are, from its `config.json` alone: a table of architectures.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// One parameter of the base model.
pub struct Parameter {
    /// `model.layers.0.self_attn.q_proj`.
    pub module: String,
    /// `[out, in]` of a linear layer, `[rows, width]` of a table, `[n]` of a norm or a bias.
    pub shape: Vec<usize>,
    /// What module it is of. A bias is a [`Kind::Other`].
    pub kind: Kind,
}

/// Kinds of modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A linear layer within the blocks: it can have an adapter, and is quantised.
    Linear,
    /// The output layer: it can have an adapter; transformers leaves it dense, and PEFT's all-linear leaves it out.
    Head,
    /// Tables, norms, biases.
    Other,
}

/// A model, unfolded.
pub struct Model {
    /// `model_type`.
    pub name: String,
    /// Blocks.
    pub layers: usize,
    /// The modules that PEFT adapts when none are named; empty when it has to be told.
    pub default_targets: &'static [&'static str],
    /// All parameters.
    pub parameters: Vec<Parameter>,
}

/// A size that the configuration gives.
#[derive(Clone, Copy)]
enum Size {
    Hidden,
    /// Heads times their width, of queries.
    Query,
    /// The same of keys or of values, which several heads may share.
    Shared,
    /// Query, key and value in one.
    Packed,
    Inner,
    /// Gate and up in one.
    GateUp,
    Vocabulary,
    Positions,
    /// The width of a head.
    Head,
}

/// When a layer has a bias.
#[derive(Clone, Copy)]
enum Bias {
    Never,
    Always,
    /// When this field says so.
    If(&'static str),
}

/// An architecture. `linear` and `norms` are within each block.
struct Architecture {
    model_types: &'static [&'static str],
    /// A field that only this one has, among those of the same `model_type`.
    mark: Option<&'static str>,
    blocks: &'static str,
    linear: &'static [(&'static str, Size, Size, Bias)],
    norms: &'static [(&'static str, Size)],
    last_norm: &'static str,
    norm_bias: Bias,
    tables: &'static [(&'static str, Size)],
    /// The output layer, unless it shares the first table.
    head: &'static str,
    /// What `tie_word_embeddings` is when it is not said.
    tied: bool,
    default_targets: &'static [&'static str],
}

use Bias::{Always, If, Never};
use Size::{GateUp, Head, Hidden, Inner, Packed, Positions, Query, Shared, Vocabulary};

const TWO_NORMS: &[(&str, Size)] = &[("input_layernorm", Hidden), ("post_attention_layernorm", Hidden)];

/// The family that began with Llama.
const LLAMA: Architecture = Architecture {
    model_types: &["llama"],
    mark: None,
    blocks: "model.layers",
    linear: &[
        ("self_attn.q_proj", Query, Hidden, If("attention_bias")),
        ("self_attn.k_proj", Shared, Hidden, If("attention_bias")),
        ("self_attn.v_proj", Shared, Hidden, If("attention_bias")),
        ("self_attn.o_proj", Hidden, Query, If("attention_bias")),
        ("mlp.gate_proj", Inner, Hidden, If("mlp_bias")),
        ("mlp.up_proj", Inner, Hidden, If("mlp_bias")),
        ("mlp.down_proj", Hidden, Inner, If("mlp_bias")),
    ],
    norms: TWO_NORMS,
    last_norm: "model.norm",
    norm_bias: Never,
    tables: &[("model.embed_tokens", Vocabulary)],
    head: "lm_head",
    tied: false,
    default_targets: &["q_proj", "v_proj"],
};

const ARCHITECTURES: &[Architecture] = &[
    LLAMA,
    Architecture { model_types: &["mistral"], ..LLAMA },
    Architecture { model_types: &["gemma"], tied: true, ..LLAMA },
    Architecture {
        model_types: &["gemma2"],
        norms: &[
            ("input_layernorm", Hidden),
            ("post_attention_layernorm", Hidden),
            ("pre_feedforward_layernorm", Hidden),
            ("post_feedforward_layernorm", Hidden),
        ],
        tied: true,
        ..LLAMA
    },
    Architecture {
        model_types: &["qwen2"],
        linear: &[
            ("self_attn.q_proj", Query, Hidden, Always),
            ("self_attn.k_proj", Shared, Hidden, Always),
            ("self_attn.v_proj", Shared, Hidden, Always),
            ("self_attn.o_proj", Hidden, Query, Never),
            ("mlp.gate_proj", Inner, Hidden, Never),
            ("mlp.up_proj", Inner, Hidden, Never),
            ("mlp.down_proj", Hidden, Inner, Never),
        ],
        ..LLAMA
    },
    Architecture {
        model_types: &["qwen3"],
        norms: &[
            ("input_layernorm", Hidden),
            ("post_attention_layernorm", Hidden),
            ("self_attn.q_norm", Head),
            ("self_attn.k_norm", Head),
        ],
        ..LLAMA
    },
    Architecture {
        model_types: &["phi3"],
        linear: &[
            ("self_attn.qkv_proj", Packed, Hidden, Never),
            ("self_attn.o_proj", Hidden, Query, Never),
            ("mlp.gate_up_proj", GateUp, Hidden, Never),
            ("mlp.down_proj", Hidden, Inner, Never),
        ],
        default_targets: &[],
        ..LLAMA
    },
    Architecture {
        model_types: &["gpt2"],
        mark: None,
        blocks: "transformer.h",
        linear: &[
            ("attn.c_attn", Packed, Hidden, Always),
            ("attn.c_proj", Hidden, Hidden, Always),
            ("mlp.c_fc", Inner, Hidden, Always),
            ("mlp.c_proj", Hidden, Inner, Always),
        ],
        norms: &[("ln_1", Hidden), ("ln_2", Hidden)],
        last_norm: "transformer.ln_f",
        norm_bias: Always,
        tables: &[("transformer.wte", Vocabulary), ("transformer.wpe", Positions)],
        head: "lm_head",
        tied: true,
        default_targets: &["c_attn"],
    },
    // ChatGLM2-6B and ChatGLM3-6B.
    Architecture {
        model_types: &["chatglm"],
        mark: Some("ffn_hidden_size"),
        blocks: "transformer.encoder.layers",
        linear: &[
            ("self_attention.query_key_value", Packed, Hidden, If("add_qkv_bias")),
            ("self_attention.dense", Hidden, Query, If("add_bias_linear")),
            ("mlp.dense_h_to_4h", GateUp, Hidden, If("add_bias_linear")),
            ("mlp.dense_4h_to_h", Hidden, Inner, If("add_bias_linear")),
        ],
        norms: TWO_NORMS,
        last_norm: "transformer.encoder.final_layernorm",
        norm_bias: Never,
        tables: &[("transformer.embedding.word_embeddings", Vocabulary)],
        head: "transformer.output_layer",
        tied: false,
        default_targets: &["query_key_value"],
    },
    // ChatGLM-6B.
    Architecture {
        model_types: &["chatglm"],
        mark: None,
        blocks: "transformer.layers",
        linear: &[
            ("attention.query_key_value", Packed, Hidden, Always),
            ("attention.dense", Hidden, Query, Always),
            ("mlp.dense_h_to_4h", Inner, Hidden, Always),
            ("mlp.dense_4h_to_h", Hidden, Inner, Always),
        ],
        norms: TWO_NORMS,
        last_norm: "transformer.final_layernorm",
        norm_bias: Always,
        tables: &[("transformer.word_embeddings", Vocabulary)],
        head: "lm_head",
        tied: false,
        default_targets: &["query_key_value"],
    },
];

/// What architectures call a size, the first that is there counts.
const HIDDEN: &[&str] = &["hidden_size", "n_embd"];
const LAYERS: &[&str] = &["num_hidden_layers", "n_layer", "num_layers"];
const HEADS: &[&str] = &["num_attention_heads", "n_head"];
const SHARED_HEADS: &[&str] = &["num_key_value_heads", "multi_query_group_num"];
const HEAD: &[&str] = &["head_dim", "kv_channels"];
const INNER: &[&str] = &["intermediate_size", "ffn_hidden_size", "inner_hidden_size", "n_inner"];
const VOCABULARY: &[&str] = &["padded_vocab_size", "vocab_size"];
const POSITIONS: &[&str] = &["n_positions", "max_position_embeddings"];

/// The fields of a configuration.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn find(&self, names: &[&str]) -> Result<Option<usize>> {
        let Some((name, value)) =
            names.iter().find_map(|name| Some((name, self.0.get(*name).filter(|v| !v.is_null())?)))
        else {
            return Ok(None);
        };
        // Beyond this no product of two sizes is counted right.
        let size = value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| (1..1 << 28).contains(n));
        size.map(Some).with_context(|| format!("config.json: {name}: wanted a size from 1 on, got {value}"))
    }

    fn get(&self, names: &[&str]) -> Result<usize> {
        self.find(names)?
            .with_context(|| format!("config.json: wanted the key {}, got none", names.join(" or ")))
    }

    fn flag(&self, name: &str, otherwise: bool) -> Result<bool> {
        match self.0.get(name).filter(|v| !v.is_null()) {
            None => Ok(otherwise),
            Some(value) => value
                .as_bool()
                .with_context(|| format!("config.json: {name}: wanted true or false, got {value}")),
        }
    }

    fn bias(&self, bias: Bias) -> Result<bool> {
        match bias {
            Never => Ok(false),
            Always => Ok(true),
            If(name) => self.flag(name, false),
        }
    }

    fn size(&self, size: Size) -> Result<usize> {
        let (hidden, heads) = (self.get(HIDDEN)?, self.get(HEADS)?);
        let head = match self.find(HEAD)? {
            Some(head) => head,
            None => {
                ensure!(
                    hidden.is_multiple_of(heads),
                    "config.json: hidden_size: wanted a multiple of {heads} heads, got {hidden}"
                );
                hidden / heads
            }
        };
        let shared = || Ok::<_, anyhow::Error>(head * self.find(SHARED_HEADS)?.unwrap_or(heads));
        Ok(match size {
            Hidden => hidden,
            Head => head,
            Query => head * heads,
            Shared => shared()?,
            Packed => head * heads + 2 * shared()?,
            Inner => match self.find(INNER)? {
                Some(inner) => inner,
                None if self.0.get("model_type").is_some_and(|t| t == "gpt2") => 4 * hidden,
                None => self.get(INNER)?,
            },
            GateUp => 2 * self.size(Inner)?,
            Vocabulary => self.get(VOCABULARY)?,
            Positions => self.get(POSITIONS)?,
        })
    }
}

/// Unfolds a configuration.
pub fn unfold(config: &Map<String, Value>) -> Result<Model> {
    let fields = Fields(config);
    let name = config.get("model_type").and_then(Value::as_str);
    let name = name.context("config.json: wanted a text at the key model_type, got none")?;
    let fits = |a: &&Architecture| {
        a.model_types.contains(&name) && a.mark.is_none_or(|mark| config.contains_key(mark))
    };
    let Some(architecture) = ARCHITECTURES.iter().find(fits) else {
        let mut known: Vec<&str> = ARCHITECTURES.iter().flat_map(|a| a.model_types.iter().copied()).collect();
        known.dedup();
        bail!("config.json: model_type: wanted {}, got {name}", known.join(", "))
    };
    let layers = fields.get(LAYERS)?;
    ensure!(layers <= 10_000, "config.json: wanted at most 10000 layers, got {layers}");
    let mut parameters = Vec::new();
    let mut push = |module: String, shape: Vec<usize>, kind: Kind, bias: bool| {
        let bias =
            bias.then(|| Parameter { module: module.clone(), shape: vec![shape[0]], kind: Kind::Other });
        parameters.push(Parameter { module, shape, kind });
        parameters.extend(bias);
    };
    let norm_bias = fields.bias(architecture.norm_bias)?;
    for (table, rows) in architecture.tables {
        push((*table).into(), vec![fields.size(*rows)?, fields.size(Hidden)?], Kind::Other, false);
    }
    for layer in 0..layers {
        let within = |module: &str| format!("{}.{layer}.{module}", architecture.blocks);
        for (module, out, inputs, bias) in architecture.linear {
            let shape = vec![fields.size(*out)?, fields.size(*inputs)?];
            push(within(module), shape, Kind::Linear, fields.bias(*bias)?);
        }
        for (module, size) in architecture.norms {
            push(within(module), vec![fields.size(*size)?], Kind::Other, norm_bias);
        }
    }
    push(architecture.last_norm.into(), vec![fields.size(Hidden)?], Kind::Other, norm_bias);
    if !fields.flag("tie_word_embeddings", architecture.tied)? {
        push(
            architecture.head.into(),
            vec![fields.size(Vocabulary)?, fields.size(Hidden)?],
            Kind::Head,
            false,
        );
    }
    Ok(Model { name: name.to_owned(), layers, default_targets: architecture.default_targets, parameters })
}

/// Sizes of well-known models, as their published `config.json` has them.
pub const PRESETS: &[(&str, &str)] = &[
    (
        "chatglm-6b",
        r#"{"model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_attention_heads": 32,
            "num_layers": 28, "vocab_size": 130528, "torch_dtype": "float16"}"#,
    ),
    (
        "llama-2-7b",
        r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32000, "torch_dtype": "float16"}"#,
    ),
    (
        "llama-3-8b",
        r#"{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16"}"#,
    ),
    (
        "qwen2.5-7b",
        r#"{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064, "torch_dtype": "bfloat16"}"#,
    ),
];
