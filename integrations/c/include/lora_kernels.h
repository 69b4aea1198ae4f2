/* lora-kernels: products, merges and 4-bit formats of low-rank adapters. Made by cbindgen from integrations/c; do not edit. */

#ifndef LORA_KERNELS_H
#define LORA_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/**
 * The version of this interface.
 */
#define LK_ABI_VERSION 1

/**
 * What became of a call.
 */
typedef enum LkStatus {
  /**
   * It did what it says.
   */
  LK_STATUS_OK = 0,
  /**
   * An argument does not fit the others, or the operation.
   */
  LK_STATUS_ARGUMENT = 1,
  /**
   * There is no GPU, no driver, or one that is too old.
   */
  LK_STATUS_NO_DEVICE = 2,
  /**
   * The driver refused or failed an operation.
   */
  LK_STATUS_DEVICE = 3,
  /**
   * Any other failure; the message says which.
   */
  LK_STATUS_FAILED = 4,
  /**
   * A mistake in the library itself. Please report it.
   */
  LK_STATUS_PANIC = 5,
} LkStatus;

/**
 * Adapters of one module on a device, as the kernels read them. Opaque.
 */
typedef struct LkCudaAdapters LkCudaAdapters;

/**
 * A 4-bit matrix in host memory. Opaque.
 */
typedef struct LkNf4 LkNf4;

/**
 * A CUDA stream with the kernels. Opaque.
 */
typedef struct LkQueue LkQueue;

/**
 * A type of elements: `LK_F32`, `LK_F16` or `LK_BF16`.
 */
typedef uint32_t LkDType;

/**
 * The parts of a 4-bit matrix, as bitsandbytes stores them.
 */
typedef struct LkNf4Parts {
  /**
   * Rows of the matrix: outputs.
   */
  size_t rows;
  /**
   * Columns of the matrix: inputs.
   */
  size_t columns;
  /**
   * Elements per scale: a power of two from 32 to 4096.
   */
  size_t blocksize;
  /**
   * What the matrix was quantised from, and what merges decode it to.
   */
  LkDType dtype;
  /**
   * `ceil(rows * columns / 2)` bytes: two codes each, the first in the high four bits.
   */
  const uint8_t *packed;
  /**
   * `[16]`: what the codes stand for; NULL for the values of NF4.
   */
  const float *codebook;
  /**
   * `[blocks]`, `blocks = ceil(rows * columns / blocksize)`: the scales. NULL where they are quantised themselves.
   */
  const float *absmax;
  /**
   * `[blocks]`: the quantised scales, and what follows, where `absmax` is NULL.
   */
  const uint8_t *nested_q;
  /**
   * `[ceil(blocks / nested_blocksize)]`: the scales of the scales.
   */
  const float *nested_absmax;
  /**
   * `[256]`: what the quantised scales stand for.
   */
  const float *nested_map;
  /**
   * What is added to every scale.
   */
  float nested_offset;
  /**
   * Scales that share a scale: 256 in every known file.
   */
  size_t nested_blocksize;
} LkNf4Parts;

/**
 * The weight of a linear layer, `[n, k]`: `dense` or `nf4`, the other is NULL.
 */
typedef struct LkWeight {
  /**
   * Outputs.
   */
  size_t n;
  /**
   * Inputs.
   */
  size_t k;
  /**
   * Elements of the call's `dtype`.
   */
  const void *dense;
  /**
   * 4-bit blocks.
   */
  const struct LkNf4 *nf4;
} LkWeight;

/**
 * `delta = scaling * lora_b @ lora_a`, on the host.
 */
typedef struct LkAdapter {
  /**
   * `[rank, k]`.
   */
  const void *lora_a;
  /**
   * `[n, rank]`.
   */
  const void *lora_b;
  /**
   * `[n]`: DoRA's magnitude, of the factors' type, for merges and `lk_dora_scale`. NULL for LoRA.
   */
  const void *magnitude;
  /**
   * Rows of `lora_a`; may be 0.
   */
  size_t rank;
  /**
   * The factor of the product.
   */
  double scaling;
} LkAdapter;

/**
 * The operands of `lk_matmul`.
 */
typedef struct LkMatmul {
  /**
   * Rows of x and y.
   */
  size_t tokens;
  /**
   * The type of x, y, the bias and a dense weight.
   */
  LkDType dtype;
  /**
   * The type of the factors: that of x, or `LK_F32`.
   */
  LkDType adapter_dtype;
  /**
   * `[n, k]`.
   */
  struct LkWeight weight;
  /**
   * `[tokens, k]`.
   */
  const void *x;
  /**
   * `[n]`, or NULL.
   */
  const void *bias;
  /**
   * `[n]`: DoRA's `magnitude / norm` (`lk_dora_scale`), or NULL.
   */
  const float *row_scale;
  /**
   * The adapters to choose from; their magnitudes have to be NULL.
   */
  const struct LkAdapter *adapters;
  /**
   * How many there are.
   */
  size_t adapter_count;
  /**
   * `[tokens]`: every token's adapter, -1 for none. With NULL all tokens use the first, if there is one.
   */
  const int32_t *adapter_index;
  /**
   * `[tokens, n]`, written.
   */
  void *y;
} LkMatmul;

/**
 * What a merge has kept of its adapters.
 */
typedef struct LkMergeReport {
  /**
   * `<R, D> / <D, D>` of the wanted change D and the realised change R: 1 is all.
   */
  double retained_gain;
  /**
   * `|R - D| / |D|`: 0 is best, and 1 is what leaving the adapters out would give.
   */
  double relative_error;
  /**
   * The share of elements (of a 4-bit weight: codes) that the adapters have changed.
   */
  double changed_share;
} LkMergeReport;

/**
 * `delta = scaling * lora_b @ lora_a`, on a device.
 */
typedef struct LkCudaAdapter {
  /**
   * `[rank, k]`, aligned to 16 bytes.
   */
  uint64_t lora_a;
  /**
   * `[n, rank]`, aligned to 16 bytes.
   */
  uint64_t lora_b;
  /**
   * At most 256; 0 is an adapter that does nothing.
   */
  size_t rank;
  /**
   * The factor of the product.
   */
  float scaling;
} LkCudaAdapter;

/**
 * A 4-bit matrix on a device; addresses of absent parts are 0.
 */
typedef struct LkCudaNf4 {
  /**
   * `[ceil(numel / 2)]`, u8, aligned to 16 bytes.
   */
  uint64_t packed;
  /**
   * `[blocks]`, f32; 0 where the scales are quantised themselves.
   */
  uint64_t absmax;
  /**
   * `[blocks]`, u8: the quantised scales, and what follows, where `absmax` is 0.
   */
  uint64_t nested_q;
  /**
   * `[ceil(blocks / nested_blocksize)]`, f32.
   */
  uint64_t nested_absmax;
  /**
   * `[256]`, f32.
   */
  uint64_t nested_map;
  /**
   * `[1]`, f32.
   */
  uint64_t nested_offset;
  /**
   * Scales that share a scale: 256 in every known file.
   */
  size_t nested_blocksize;
  /**
   * Elements per scale: a power of two from 32 to 4096.
   */
  size_t blocksize;
  /**
   * `[16]`, on the HOST: what the codes stand for; NULL for the values of NF4.
   */
  const float *codebook;
} LkCudaNf4;

/**
 * The operands of `lk_cuda_matmul`. Addresses are of the queue's device, those of absent operands 0.
 */
typedef struct LkCudaMatmul {
  /**
   * Rows of x and y.
   */
  size_t tokens;
  /**
   * Outputs.
   */
  size_t n;
  /**
   * Inputs.
   */
  size_t k;
  /**
   * The type of x, y, the bias and a dense weight.
   */
  LkDType dtype;
  /**
   * `[tokens, k]`, aligned to 16 bytes.
   */
  uint64_t x;
  /**
   * `[n, k]`, aligned to 16 bytes; 0 with `nf4`.
   */
  uint64_t dense;
  /**
   * The weight in 4 bits, or NULL.
   */
  const struct LkCudaNf4 *nf4;
  /**
   * `[n]`, or 0.
   */
  uint64_t bias;
  /**
   * `[n]`, f32: DoRA's `magnitude / norm`, or 0.
   */
  uint64_t row_scale;
  /**
   * The adapters to choose from, or NULL.
   */
  const struct LkCudaAdapters *adapters;
  /**
   * `[tokens]`, i32: every token's adapter, -1 for none; with 0 all tokens use the first.
   */
  uint64_t adapter_index;
  /**
   * `[tokens, n]`, aligned to 16 bytes, written.
   */
  uint64_t y;
  /**
   * As many bytes as `lk_cuda_matmul_scratch` says, aligned to 16.
   */
  uint64_t scratch;
} LkCudaMatmul;

/**
 * The operands of `lk_cuda_expert_matmul`. Addresses are of the queue's device, those of absent operands 0.
 */
typedef struct LkCudaExpertMatmul {
  /**
   * Rows of x.
   */
  size_t tokens;
  /**
   * Rows of y for each row of x: experts that the router chooses, or 1.
   */
  size_t choices;
  /**
   * Experts of the stack.
   */
  size_t experts;
  /**
   * Outputs of an expert.
   */
  size_t n;
  /**
   * Inputs.
   */
  size_t k;
  /**
   * The type of x, y, the bias and a dense weight: `LK_F16` or `LK_BF16`.
   */
  LkDType dtype;
  /**
   * `[tokens, k]`, aligned to 16 bytes.
   */
  uint64_t x;
  /**
   * `[experts, n, k]`, aligned to 16 bytes; 0 with `nf4`.
   */
  uint64_t dense;
  /**
   * The stack in 4 bits, as one matrix `[experts * n, k]`, or NULL.
   */
  const struct LkCudaNf4 *nf4;
  /**
   * What `lk_cuda_expert_groups` made of the experts of `tokens * choices` rows.
   */
  uint64_t groups;
  /**
   * `[experts, n]`, or 0.
   */
  uint64_t bias;
  /**
   * `[experts, n]`, f32, or 0.
   */
  uint64_t row_scale;
  /**
   * The adapters to choose from, those of a stack one behind the other, or NULL.
   */
  const struct LkCudaAdapters *adapters;
  /**
   * `[tokens * choices]`, i32: every row's adapter, -1 for none, as `lk_cuda_expert_index` makes them; with 0 all rows use the first.
   */
  uint64_t adapter_index;
  /**
   * `[tokens * choices, n]`, aligned to 16 bytes, written. A token's rows are one behind the other; those without an expert become 0.
   */
  uint64_t y;
  /**
   * As many bytes as `lk_cuda_expert_matmul_scratch` says, aligned to 16.
   */
  uint64_t scratch;
} LkCudaExpertMatmul;

/**
 * IEEE binary32.
 */
#define LK_F32 0

/**
 * IEEE binary16.
 */
#define LK_F16 1

/**
 * bfloat16.
 */
#define LK_BF16 2

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The `LK_ABI_VERSION` of the library, to be compared with that of the header.
 */
uint32_t lk_abi_version(void);

/**
 * The version of the library, as text; it lives for ever.
 */
const char *lk_version(void);

/**
 * The message of the last call on this thread that failed, in UTF-8; empty before any did. It lives until the next call on
 * this thread fails.
 */
const char *lk_last_error(void);

/**
 * Quantises `[rows, columns]` elements to NF4, as bitsandbytes does; with `nested` its scales too (double quantisation).
 *
 * # Safety
 * `data` has `rows * columns` elements of type `dtype`, and `nf4` takes a pointer.
 */
enum LkStatus lk_nf4_quantize(const void *data,
                              LkDType dtype,
                              size_t rows,
                              size_t columns,
                              size_t blocksize,
                              bool nested,
                              struct LkNf4 **nf4);

/**
 * Takes a copy of the parts of a matrix.
 *
 * # Safety
 * `parts` and what it points to are as `LkNf4Parts` says, and `nf4` takes a pointer.
 */
enum LkStatus lk_nf4_new(const struct LkNf4Parts *parts, struct LkNf4 **nf4);

/**
 * The parts of a matrix. The pointers lead into it, and are good until it is freed.
 *
 * # Safety
 * `nf4` is a handle, and `parts` takes an `LkNf4Parts`.
 */
enum LkStatus lk_nf4_parts(const struct LkNf4 *nf4, struct LkNf4Parts *parts);

/**
 * Decodes a matrix into `len` elements of type `dtype`: as many as it has.
 *
 * # Safety
 * `nf4` is a handle, and `data` takes `len` elements.
 */
enum LkStatus lk_nf4_dequantize(const struct LkNf4 *nf4, LkDType dtype, void *data, size_t len);

/**
 * Frees a matrix; NULL does nothing.
 *
 * # Safety
 * `nf4` is a handle that nobody uses any more, or NULL.
 */
void lk_nf4_free(struct LkNf4 *nf4);

/**
 * `y = row_scale * (x W^T + scaling (x A^T) B^T) + bias`, with every token's own adapter. Sums are f32, in an order that does not
 * depend on the other tokens, with one rounding at the end.
 *
 * # Safety
 * `operands` and what it points to are as `LkMatmul` says; `y` overlaps nothing else.
 */
enum LkStatus lk_matmul(const struct LkMatmul *operands);

/**
 * DoRA's `magnitude / ||W + delta||` of each output, from the weight without the adapter: the `row_scale` of `lk_matmul`. A dense
 * weight is of type `dtype`.
 *
 * # Safety
 * `weight`, `adapter` and what they point to are as their types say, and `row_scale` takes `[n]` elements.
 */
enum LkStatus lk_dora_scale(const struct LkWeight *weight,
                            LkDType dtype,
                            const struct LkAdapter *adapter,
                            LkDType adapter_dtype,
                            float *row_scale);

/**
 * Merges adapters, all at once and in their order, into a dense weight `[n, k]` of type `out_dtype`. A 4-bit weight is decoded to its
 * own type first.
 *
 * In place where `merged` is `weight->dense`, which is possible where `out_dtype` is `dtype`. A report costs time; with NULL
 * none is made.
 *
 * # Safety
 * The arguments and what they point to are as their types say. A dense weight is of type `dtype`; `merged` takes
 * `weight.n * weight.k` elements, and overlaps nothing else but that it may be the weight; `report` takes an `LkMergeReport`, or is
 * NULL.
 */
enum LkStatus lk_merge(const struct LkWeight *weight,
                       LkDType dtype,
                       const struct LkAdapter *adapters,
                       size_t adapter_count,
                       LkDType adapter_dtype,
                       LkDType out_dtype,
                       void *merged,
                       struct LkMergeReport *report);

/**
 * Takes adapters out of a dense weight of type `dtype`, up to what rounding lost: the inverse of `lk_merge`, for adapters without
 * a magnitude. In place where `weight` is `merged->dense`, as there.
 *
 * # Safety
 * As `lk_merge`, without a report.
 */
enum LkStatus lk_unmerge(const struct LkWeight *merged,
                         LkDType dtype,
                         const struct LkAdapter *adapters,
                         size_t adapter_count,
                         LkDType adapter_dtype,
                         LkDType out_dtype,
                         void *weight);

/**
 * Merges adapters into a 4-bit matrix, which stays 4-bit: a new one, with the same block size and table. 4 bits lose much of an
 * adapter; the call fails when less is left than `min_gain` (as `retained_gain`; 0 takes anything).
 *
 * # Safety
 * As `lk_merge`; `merged` takes a pointer.
 */
enum LkStatus lk_nf4_merge(const struct LkNf4 *nf4,
                           const struct LkAdapter *adapters,
                           size_t adapter_count,
                           LkDType adapter_dtype,
                           double min_gain,
                           struct LkNf4 **merged,
                           struct LkMergeReport *report);

/**
 * The queue of a CUDA stream (a `CUstream` or `cudaStream_t`; NULL is the default stream) in the primary context of a device.
 * Gives `LK_STATUS_NO_DEVICE` where there is no GPU or no driver.
 *
 * # Safety
 * The stream outlives the queue, and `queue` takes a pointer.
 */
enum LkStatus lk_queue_new(size_t device,
                           void *stream,
                           struct LkQueue **queue);

/**
 * Frees a queue; NULL does nothing. The stream stays.
 *
 * # Safety
 * `queue` is a handle that nobody uses any more, or NULL.
 */
void lk_queue_free(struct LkQueue *queue);

/**
 * The bytes of the device buffer that `lk_cuda_adapters_new` wants for `count` adapters and slices.
 */
size_t lk_cuda_adapters_bytes(size_t count);

/**
 * Uploads what the kernels need to know of the adapters of a module with `k` inputs, whose outputs are `slices`, one behind the
 * other (query, key and value of a packed module; a single slice otherwise). Adapter i has `adapters[i * slice_count + s]` for
 * slice s. Once, not per token.
 *
 * # Safety
 * The arguments and what they point to are as their types say. Factors and `buffer` (`lk_cuda_adapters_bytes`, aligned to 16) are
 * memory of the queue's device, and stay until the stream has done all work with the result.
 */
enum LkStatus lk_cuda_adapters_new(const struct LkQueue *queue,
                                   const struct LkCudaAdapter *adapters,
                                   size_t adapter_count,
                                   LkDType adapter_dtype,
                                   size_t k,
                                   const size_t *slices,
                                   size_t slice_count,
                                   uint64_t buffer,
                                   struct LkCudaAdapters **result);

/**
 * Frees the handle, not the memory of the device; NULL does nothing.
 *
 * # Safety
 * `adapters` is a handle that nobody uses any more, or NULL.
 */
void lk_cuda_adapters_free(struct LkCudaAdapters *adapters);

/**
 * How many bytes `lk_cuda_matmul` wants as scratch for these operands; `scratch` and addresses do not matter yet.
 *
 * # Safety
 * As `lk_cuda_matmul`; `bytes` takes a number.
 */
enum LkStatus lk_cuda_matmul_scratch(const struct LkQueue *queue, const struct LkCudaMatmul *operands, size_t *bytes);

/**
 * `y = row_scale * (x W^T + scaling (x A^T) B^T) + bias`, enqueued.
 *
 * # Safety
 * `operands` and what it points to are as `LkCudaMatmul` says, and the memory of the device stays until the stream has done the
 * work; y and scratch overlap nothing else.
 */
enum LkStatus lk_cuda_matmul(const struct LkQueue *queue,
                             const struct LkCudaMatmul *operands);

/**
 * The bytes of the device buffer that `lk_cuda_expert_groups` fills for so many rows and experts.
 *
 * # Safety
 * `queue` is a handle, and `bytes` takes a number.
 */
enum LkStatus lk_cuda_expert_groups_bytes(const struct LkQueue *queue, size_t rows, size_t experts, size_t *bytes);

/**
 * Sorts the rows of a mixture of experts by expert, enqueued: once for all products that share the choices. `expert` is `[rows]`, i32: the
 * expert of every row, -1 for none; any other number that is none makes its row NaN. `groups` is aligned to 4 bytes.
 *
 * # Safety
 * The addresses are memory of the queue's device that stays until the stream has done the work.
 */
enum LkStatus lk_cuda_expert_groups(const struct LkQueue *queue,
                                    size_t rows,
                                    size_t experts,
                                    uint64_t expert,
                                    uint64_t groups);

/**
 * The adapter of every row of a mixture of experts, enqueued: `index[i] = adapter[i / choices] * experts + expert[i]`, -1 where either is -1.
 * `adapter` is `[tokens]`, `expert` and `index` are `[tokens * choices]`, all i32; there are `adapters` stacks of adapters.
 *
 * # Safety
 * As `lk_cuda_expert_groups`.
 */
enum LkStatus lk_cuda_expert_index(const struct LkQueue *queue,
                                   size_t tokens,
                                   size_t choices,
                                   size_t adapters,
                                   size_t experts,
                                   uint64_t adapter,
                                   uint64_t expert,
                                   uint64_t index);

/**
 * How many bytes `lk_cuda_expert_matmul` wants as scratch for these operands; `scratch` and addresses do not matter yet.
 *
 * # Safety
 * As `lk_cuda_expert_matmul`; `bytes` takes a number.
 */
enum LkStatus lk_cuda_expert_matmul_scratch(const struct LkQueue *queue,
                                            const struct LkCudaExpertMatmul *operands,
                                            size_t *bytes);

/**
 * `y[i] = row_scale[e] * (x[i / choices] W[e]^T + scaling (x A^T) B^T) + bias[e]`, with e the expert of row i, enqueued.
 *
 * # Safety
 * `operands` and what it points to are as `LkCudaExpertMatmul` says, and the memory of the device stays until the stream has done
 * the work; y and scratch overlap nothing else.
 */
enum LkStatus lk_cuda_expert_matmul(const struct LkQueue *queue,
                                    const struct LkCudaExpertMatmul *operands);

/**
 * Encodes `numel` elements to NF4, enqueued: codes to `packed` (`ceil(numel / 2)` bytes, aligned to 16), scales to `absmax`
 * (`ceil(numel / blocksize)` f32).
 *
 * # Safety
 * The addresses are memory of the queue's device that stays until the stream has done the work.
 */
enum LkStatus lk_cuda_nf4_quantize(const struct LkQueue *queue,
                                   uint64_t data,
                                   LkDType dtype,
                                   size_t numel,
                                   size_t blocksize,
                                   uint64_t packed,
                                   uint64_t absmax);

/**
 * Decodes a matrix of `numel` elements to `data`, of type `dtype`, enqueued.
 *
 * # Safety
 * As `lk_cuda_nf4_quantize`; `nf4` and what it points to are as its type says.
 */
enum LkStatus lk_cuda_nf4_dequantize(const struct LkQueue *queue,
                                     const struct LkCudaNf4 *nf4,
                                     size_t numel,
                                     LkDType dtype,
                                     uint64_t data);

/**
 * Merges up to 8 adapters into a dense weight `[n, k]` of type `dtype`, or with `unmerge` takes them out, enqueued. `merged` may be
 * `weight`; both are aligned to 16 bytes. `row_scale` is `[n]` f32 (DoRA's `magnitude / norm`), or 0.
 *
 * # Safety
 * As `lk_cuda_nf4_quantize`; `adapters` has `adapter_count` elements.
 */
enum LkStatus lk_cuda_merge(const struct LkQueue *queue,
                            size_t n,
                            size_t k,
                            LkDType dtype,
                            uint64_t weight,
                            const struct LkCudaAdapter *adapters,
                            size_t adapter_count,
                            LkDType adapter_dtype,
                            uint64_t row_scale,
                            bool unmerge,
                            uint64_t merged);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LORA_KERNELS_H */
