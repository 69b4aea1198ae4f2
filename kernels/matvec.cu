// y = row_scale * (x w^T + v b^T) + bias for a few tokens, any type and any shape: f32 weights, products and sums.
//
// A block takes 32 rows of w, four per warp, and `Tokens` tokens. It walks along k in steps of 1024. The step's x lies in
// shared memory as f32; of each of its rows a lane takes 16 bytes at a time, decodes them and multiplies. The lanes' sums
// are added by a fixed tree at the end: the order of a sum depends on k and the number of splits alone, so a token's result
// does not depend on the tokens beside it.
//
// Ragged rows (k not a multiple of the elements in 16 bytes) begin anywhere in the 16-byte pieces of the flat weight.
// The pieces stay at multiples of 16 bytes, which for codes also keeps each inside one block, and what belongs to the rows
// beside is left out.

#include "product.cuh"
#include "ptx.cuh"
#include "vector.cuh"

constexpr uint32_t kThreads = 256, kWarps = kThreads / 32, kStep = 1024;
constexpr uint32_t kRows = 4, kBlockRows = kRows * kWarps;  // of a warp, of a block

// 4-bit codes, 32 in 16 bytes.
struct Codes {
    static constexpr uint32_t kElements = 32;
    WarpDecoder decoder;

    __device__ __forceinline__ explicit Codes(const Weight& w) : decoder(w.codebook) {}
    static __device__ __forceinline__ uint64_t offset(uint64_t flat) { return flat / 2; }
    static __device__ __forceinline__ uint64_t bytes(uint64_t numel) { return (numel + 1) / 2; }

    using Scales = PendingAbsmax<kRows>;  // of a piece of each row
    static __device__ __forceinline__ void request(const Weight& w, const uint64_t (&flat)[kRows], Scales& scales) {
        uint64_t block[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) block[r] = flat[r] >> w.block_shift;
        scales.request(w.absmax, block);
    }
    static __device__ __forceinline__ void get(const Weight& w, const Scales& pending, float (&scales)[kRows]) {
        pending.get(w.absmax, scales);
    }

    // Elements 4 group ... 4 group + 3 of a piece.
    __device__ __forceinline__ void decode(const uint4& piece, float scale, int group, float (&w)[4]) const {
        decoder.decode(word(piece, group / 2) >> (group % 2 * 16), scale, w);
    }
};

// Elements of 16 or 32 bits.
template <typename T>
struct Elements {
    static constexpr uint32_t kElements = 16 / sizeof(T);

    __device__ __forceinline__ explicit Elements(const Weight&) {}
    static __device__ __forceinline__ uint64_t offset(uint64_t flat) { return flat * sizeof(T); }
    static __device__ __forceinline__ uint64_t bytes(uint64_t numel) { return numel * sizeof(T); }
    struct Scales {};
    static __device__ __forceinline__ void request(const Weight&, const uint64_t (&)[kRows], Scales&) {}
    static __device__ __forceinline__ void get(const Weight&, const Scales&, float (&)[kRows]) {}

    __device__ __forceinline__ void decode(const uint4& piece, float, int group, float (&w)[4]) const {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i) w[i] = __uint_as_float(word(piece, i));
        } else {
            Pair<T>::unpack(word(piece, 2 * group), w[0], w[1]);
            Pair<T>::unpack(word(piece, 2 * group + 1), w[2], w[3]);
        }
    }
};

// The rows of w that a warp multiplies with, piece by piece.
template <typename Format, bool Ragged>
struct Rows {
    const Weight& weight;
    uint64_t numel, first[kRows];  // flat: the row's first piece begins here
    uint32_t lead[kRows];          // elements of the first piece that belong to the row before; 0 unless Ragged
    uint32_t end[kRows];           // elements from `first` on, 0 for a row past the end

    __device__ __forceinline__ Rows(const Params& p, uint32_t row) : weight(p.weight), numel(uint64_t(p.n) * p.k) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const uint64_t flat = uint64_t(row + r) * p.k;
            lead[r] = Ragged ? uint32_t(flat % Format::kElements) : 0;
            first[r] = flat - lead[r];
            end[r] = row + r < p.n ? lead[r] + p.k : 0;
        }
    }

    // The pieces that begin `at` elements from the row's first.
    __device__ __forceinline__ void load(uint32_t at, uint4 (&pieces)[kRows], typename Format::Scales& scales) const {
        const uint8_t* bytes = static_cast<const uint8_t*>(weight.data);
        uint64_t flat[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const bool inside = at < end[r];
            flat[r] = inside ? first[r] + at : 0;
            pieces[r] = make_uint4(0, 0, 0, 0);
            if (!inside) continue;
            if constexpr (Ragged) {
                pieces[r] = load_piece(bytes, Format::offset(flat[r]), Format::bytes(numel));
            } else {
                pieces[r] = ptx::load_stream16(bytes + Format::offset(flat[r]));
            }
        }
        if (numel > 0) Format::request(weight, flat, scales);
    }
};

// x of a step, for `Tokens` tokens. Its layout lets lanes that read neighbouring pieces read different banks.
template <typename T, typename Format, int Tokens, bool Ragged>
struct Inputs;

// Even rows: groups of four elements; group g of a lane's piece u is row u * (groups of a piece) + g, column lane.
template <typename T, typename Format, int Tokens>
struct Inputs<T, Format, Tokens, false> {
    static constexpr uint32_t kGroups = Format::kElements / 4, kPitch = 32 * 4 + 32 / kGroups;
    alignas(16) float values[Tokens][kStep / 128 * kPitch];

    __device__ __forceinline__ void load(const Params& p, uint32_t first_token, uint32_t step) {
        const uint32_t group = threadIdx.x, k = step * kStep + group * 4;
        const uint32_t piece = group / kGroups, row = piece / 32 * kGroups + group % kGroups;
#pragma unroll
        for (int m = 0; m < Tokens; ++m) {
            float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (k < p.k && first_token + m < p.tokens) {
                load_vector(static_cast<const T*>(p.x) + size_t(first_token + m) * p.k + k, x);
            }
            ptx::store_shared16(ptx::shared_address(&values[m][row * kPitch + piece % 32 * 4]),
                                make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])));
        }
    }

    __device__ __forceinline__ float4 get(int m, uint32_t piece, uint32_t group, uint32_t lane) const {
        return *reinterpret_cast<const float4*>(&values[m][(piece * kGroups + group) * kPitch + lane * 4]);
    }
};

// Ragged rows: one element after the other, from 32 before the step on, with a gap after every 32.
template <typename T, typename Format, int Tokens>
struct Inputs<T, Format, Tokens, true> {
    static constexpr uint32_t kBefore = 32, kLength = kBefore + kStep;
    float values[Tokens][kLength + kLength / 32];

    __device__ __forceinline__ void load(const Params& p, uint32_t first_token, uint32_t step) {
        for (uint32_t i = threadIdx.x; i < kLength; i += kThreads) {
            const uint32_t k = step * kStep + i - kBefore;  // wraps below 0, and then is not below k
#pragma unroll
            for (int m = 0; m < Tokens; ++m) {
                const bool inside = k < p.k && first_token + m < p.tokens;
                const T* x = static_cast<const T*>(p.x) + size_t(first_token + m) * p.k;
                values[m][i + i / 32] = inside ? to_f32(x[k]) : 0.0f;
            }
        }
    }

    __device__ __forceinline__ float get(int m, uint32_t i) const { return values[m][i + i / 32]; }
};

// sums[r][m] += piece r . x[m], the products of one piece of each row, which is used up. The loop over halves of a piece of
// codes stays a loop: unrolled, it takes twice the registers.
template <typename T, typename Format, int Tokens, bool Ragged>
__device__ __forceinline__ void multiply(const Params& p, const Format& format, const Rows<Format, Ragged>& rows,
                                         const Inputs<T, Format, Tokens, Ragged>& inputs, uint4 (&pieces)[kRows],
                                         const float (&scales)[kRows], uint32_t step, uint32_t piece, uint32_t lane,
                                         float (&sums)[kRows * Tokens]) {
    constexpr uint32_t kGroups = Format::kElements / 4, kAtOnce = kGroups < 4 ? kGroups : 4;
#pragma unroll 1
    for (uint32_t first = 0; first < kGroups; first += kAtOnce) {
#pragma unroll
        for (int group = 0; group < kAtOnce; ++group) {
            float x[Tokens][4];
            if constexpr (!Ragged) {
#pragma unroll
                for (int m = 0; m < Tokens; ++m) {
                    const float4 four = inputs.get(m, piece, first + group, lane);
                    x[m][0] = four.x, x[m][1] = four.y, x[m][2] = four.z, x[m][3] = four.w;
                }
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float w[4];
                format.decode(pieces[r], scales[r], group, w);
                if constexpr (Ragged) {
                    const uint32_t at = (piece * 32 + lane) * Format::kElements + (first + group) * 4 + inputs.kBefore - rows.lead[r];
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const uint32_t k = step * kStep + at + e - inputs.kBefore;
                        w[e] = k < p.k ? w[e] : 0.0f;
#pragma unroll
                        for (int m = 0; m < Tokens; ++m) x[m][e] = inputs.get(m, at + e);
                    }
                }
#pragma unroll
                for (int m = 0; m < Tokens; ++m) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[r * Tokens + m] = fmaf(x[m][e], w[e], sums[r * Tokens + m]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) pieces[r].x = pieces[r].z, pieces[r].y = pieces[r].w;
    }
}

template <typename T, typename Format, int Tokens, bool Ragged>
__device__ __forceinline__ void matvec(const Params& p) {
    constexpr uint32_t kPieces = kStep / (32 * Format::kElements);  // of a lane, in a step
    __shared__ Inputs<T, Format, Tokens, Ragged> inputs;
    __shared__ float total[Tokens][kBlockRows], delta[Tokens][kBlockRows];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.y;
    const uint32_t row_tiles = (p.n - 1) / kBlockRows + 1;
    const uint32_t first_row = blockIdx.x % row_tiles * kBlockRows, first_token = blockIdx.x / row_tiles * Tokens;

    const Format format(p.weight);
    const Rows<Format, Ragged> rows(p, first_row + warp * kRows);
    const uint32_t length = p.k + (Ragged && p.k > 0 ? Format::kElements - 1 : 0);
    const Range range((length + kStep - 1) / kStep, split, p.splits);
    const auto at = [&](uint32_t piece) { return (piece * 32 + lane) * Format::kElements; };

    float sums[kRows * Tokens] = {};
    uint4 pieces[kRows], next[kRows];
    float scales[kRows];
    typename Format::Scales next_scales;
    rows.load(at(range.begin * kPieces), next, next_scales);
    for (uint32_t step = range.begin; step < range.end; ++step) {
        __syncthreads();
        inputs.load(p, first_token, step);
        __syncthreads();
#pragma unroll 1
        for (uint32_t piece = 0; piece < kPieces; ++piece) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) pieces[r] = next[r];
            Format::get(p.weight, next_scales, scales);
            if (!Ragged && at(step * kPieces + piece) >= p.k) {
#pragma unroll
                for (int r = 0; r < kRows; ++r) scales[r] = 0.0f;  // what was read may be NaN
            }
            rows.load(at(step * kPieces + piece + 1), next, next_scales);
            multiply(p, format, rows, inputs, pieces, scales, step, piece, lane, sums);
        }
    }

    constexpr uint32_t kSharers = 32 / (kRows * Tokens);  // lanes that get the same total
    const float sum = warp_sums(sums, lane);
    const uint32_t owned = lane / kSharers;
    if (lane % kSharers == 0) total[owned % Tokens][warp * kRows + owned / Tokens] = sum;
    const bool has_branch = p.branch.adapters.entries != nullptr && split == 0;
    if (has_branch) low_rank<T>(p.branch, first_token, p.tokens, first_row, p.n, delta);
    __syncthreads();
    const uint32_t row = threadIdx.x % kBlockRows;
    if (first_row + row >= p.n) return;
    const Column<T> column(p.output, p.n, first_row + row);
    for (uint32_t m = threadIdx.x / kBlockRows; m < Tokens && first_token + m < p.tokens; m += kThreads / kBlockRows) {
        const float sum = has_branch ? total[m][row] + delta[m][row] : total[m][row];
        column.store(first_token + m, sum, split, p.tokens);
    }
}

#define ENTRY(NAME, BLOCKS, ...)                                                                             \
    extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) NAME(const __grid_constant__ Params p) { \
        matvec<__VA_ARGS__>(p);                                                                             \
    }
#define TILES(KIND, T, FORMAT)                                     \
    ENTRY(matvec_##KIND##_##T##_t1, 3, T, FORMAT, 1, false)        \
    ENTRY(matvec_##KIND##_##T##_t4, 2, T, FORMAT, 4, false)        \
    ENTRY(matvec_##KIND##_##T##_t8, 1, T, FORMAT, 8, false)        \
    ENTRY(matvec_##KIND##_##T##_t1_ragged, 1, T, FORMAT, 1, true)  \
    ENTRY(matvec_##KIND##_##T##_t4_ragged, 1, T, FORMAT, 4, true)

typedef float f32;
TILES(nf4, f32, Codes)
TILES(nf4, f16, Codes)
TILES(nf4, bf16, Codes)
TILES(dense, f32, Elements<f32>)
TILES(dense, f16, Elements<f16>)
TILES(dense, bf16, Elements<bf16>)
