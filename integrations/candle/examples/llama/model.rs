//! The Llama of `candle-transformers`, but for where its layers come from: there `Linear` is a type, here [`Layers`] makes them.
//! Flash attention is left out, and logits are given for every position.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Embedding, Module, VarBuilder, embedding, rms_norm};
use candle_transformers::models::llama::Config;
use candle_transformers::utils::{build_causal_mask, repeat_kv};

/// A layer of any kind.
pub type Layer = Box<dyn Module + Send + Sync>;

/// Makes the layers of a model.
pub trait Layers {
    /// A linear layer without bias.
    fn linear(&self, in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Layer>;

    /// A norm.
    fn norm(&self, size: usize, eps: f64, vb: VarBuilder) -> Result<Layer> {
        Ok(Box::new(rms_norm(size, eps, vb)?))
    }
}

/// Keys and values of the tokens so far, and the rotations of all positions.
pub struct Cache {
    kvs: Vec<Option<(Tensor, Tensor)>>,
    cos: Tensor,
    sin: Tensor,
}

impl Cache {
    pub fn new(dtype: DType, cfg: &Config, device: &Device) -> Result<Self> {
        let head_dim = cfg.hidden_size / cfg.num_attention_heads;
        let theta: Vec<f64> = (0..head_dim)
            .step_by(2)
            .map(|i| 1.0 / f64::from(cfg.rope_theta).powf(i as f64 / head_dim as f64))
            .collect();
        let theta = Tensor::new(theta, &Device::Cpu)?.unsqueeze(0)?;
        let positions = Tensor::arange(0, cfg.max_position_embeddings as u32, &Device::Cpu)?;
        let angles = positions.to_dtype(DType::F64)?.unsqueeze(1)?.matmul(&theta)?;
        Ok(Self {
            kvs: vec![None; cfg.num_hidden_layers],
            cos: angles.cos()?.to_dtype(dtype)?.to_device(device)?,
            sin: angles.sin()?.to_dtype(dtype)?.to_device(device)?,
        })
    }
}

struct CausalSelfAttention {
    q_proj: Layer,
    k_proj: Layer,
    v_proj: Layer,
    o_proj: Layer,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
}

impl CausalSelfAttention {
    fn load(vb: VarBuilder, cfg: &Config, layers: &dyn Layers) -> Result<Self> {
        let head_dim = cfg.hidden_size / cfg.num_attention_heads;
        let size_q = head_dim * cfg.num_attention_heads;
        let size_kv = head_dim * cfg.num_key_value_heads;
        Ok(Self {
            q_proj: layers.linear(cfg.hidden_size, size_q, vb.pp("q_proj"))?,
            k_proj: layers.linear(cfg.hidden_size, size_kv, vb.pp("k_proj"))?,
            v_proj: layers.linear(cfg.hidden_size, size_kv, vb.pp("v_proj"))?,
            o_proj: layers.linear(size_q, cfg.hidden_size, vb.pp("o_proj"))?,
            num_attention_heads: cfg.num_attention_heads,
            num_key_value_heads: cfg.num_key_value_heads,
            head_dim,
        })
    }

    fn forward(&self, x: &Tensor, index_pos: usize, block: usize, cache: &mut Cache) -> Result<Tensor> {
        let (b_sz, seq_len, hidden_size) = x.dims3()?;
        let heads = |x: Tensor, heads: usize| {
            x.reshape((b_sz, seq_len, heads, self.head_dim))?.transpose(1, 2)?.contiguous()
        };
        let q = heads(self.q_proj.forward(x)?, self.num_attention_heads)?;
        let k = heads(self.k_proj.forward(x)?, self.num_key_value_heads)?;
        let mut v = heads(self.v_proj.forward(x)?, self.num_key_value_heads)?;
        let (cos, sin) = (cache.cos.narrow(0, index_pos, seq_len)?, cache.sin.narrow(0, index_pos, seq_len)?);
        let q = candle_nn::rotary_emb::rope(&q, &cos, &sin)?;
        let mut k = candle_nn::rotary_emb::rope(&k, &cos, &sin)?;
        if let Some((cache_k, cache_v)) = &cache.kvs[block] {
            k = Tensor::cat(&[cache_k, &k], 2)?.contiguous()?;
            v = Tensor::cat(&[cache_v, &v], 2)?.contiguous()?;
        }
        cache.kvs[block] = Some((k.clone(), v.clone()));

        let groups = self.num_attention_heads / self.num_key_value_heads;
        let (k, v) = (repeat_kv(k, groups)?, repeat_kv(v, groups)?);
        // In f32, or in more.
        let dtype = q.dtype();
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let [q, k, v] = [q.to_dtype(wide)?, k.to_dtype(wide)?, v.to_dtype(wide)?];
        let mut att = (q.matmul(&k.t()?)? / (self.head_dim as f64).sqrt())?;
        if seq_len > 1 {
            let mask = build_causal_mask(seq_len, index_pos, att.device())?.broadcast_as(att.shape())?;
            let never =
                Tensor::new(f32::NEG_INFINITY, att.device())?.to_dtype(wide)?.broadcast_as(att.shape())?;
            att = mask.where_cond(&never, &att)?;
        }
        let att = candle_nn::ops::softmax(&att, D::Minus1)?;
        let y = att.matmul(&v.contiguous()?)?.to_dtype(dtype)?;
        self.o_proj.forward(&y.transpose(1, 2)?.reshape((b_sz, seq_len, hidden_size))?)
    }
}

struct Mlp {
    gate_proj: Layer,
    up_proj: Layer,
    down_proj: Layer,
}

impl Mlp {
    fn load(vb: VarBuilder, cfg: &Config, layers: &dyn Layers) -> Result<Self> {
        let (h_size, i_size) = (cfg.hidden_size, cfg.intermediate_size);
        Ok(Self {
            gate_proj: layers.linear(h_size, i_size, vb.pp("gate_proj"))?,
            up_proj: layers.linear(h_size, i_size, vb.pp("up_proj"))?,
            down_proj: layers.linear(i_size, h_size, vb.pp("down_proj"))?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.down_proj.forward(&(self.gate_proj.forward(x)?.silu()? * self.up_proj.forward(x)?)?)
    }
}

struct Block {
    rms_1: Layer,
    attn: CausalSelfAttention,
    rms_2: Layer,
    mlp: Mlp,
}

impl Block {
    fn load(vb: VarBuilder, cfg: &Config, layers: &dyn Layers) -> Result<Self> {
        let norm = |name: &str| layers.norm(cfg.hidden_size, cfg.rms_norm_eps, vb.pp(name));
        Ok(Self {
            rms_1: norm("input_layernorm")?,
            attn: CausalSelfAttention::load(vb.pp("self_attn"), cfg, layers)?,
            rms_2: norm("post_attention_layernorm")?,
            mlp: Mlp::load(vb.pp("mlp"), cfg, layers)?,
        })
    }

    fn forward(&self, x: &Tensor, index_pos: usize, block: usize, cache: &mut Cache) -> Result<Tensor> {
        let x = (self.attn.forward(&self.rms_1.forward(x)?, index_pos, block, cache)? + x)?;
        self.mlp.forward(&self.rms_2.forward(&x)?)? + x
    }
}

/// The model.
pub struct Llama {
    wte: Embedding,
    blocks: Vec<Block>,
    ln_f: Layer,
    lm_head: Layer,
}

impl Llama {
    pub fn load(vb: VarBuilder, cfg: &Config, layers: &dyn Layers) -> Result<Self> {
        if cfg.tie_word_embeddings {
            candle_core::bail!("tie_word_embeddings is not part of this example");
        }
        let blocks = (0..cfg.num_hidden_layers)
            .map(|i| Block::load(vb.pp(format!("model.layers.{i}")), cfg, layers))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            wte: embedding(cfg.vocab_size, cfg.hidden_size, vb.pp("model.embed_tokens"))?,
            blocks,
            ln_f: layers.norm(cfg.hidden_size, cfg.rms_norm_eps, vb.pp("model.norm"))?,
            lm_head: layers.linear(cfg.hidden_size, cfg.vocab_size, vb.pp("lm_head"))?,
        })
    }

    /// Logits `[batch, tokens, vocabulary]` of `tokens` `[batch, tokens]`, which follow the `index_pos` tokens in the cache.
    pub fn forward(&self, tokens: &Tensor, index_pos: usize, cache: &mut Cache) -> Result<Tensor> {
        let mut x = self.wte.forward(tokens)?;
        for (i, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, index_pos, i, cache)?;
        }
        self.lm_head.forward(&self.ln_f.forward(&x)?)
    }
}
