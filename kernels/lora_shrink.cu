// v[part, m, r] = scaling * (a part of x[m] . a[r]) in f32, with the adapter of token m; zeros from its rank on.
//
// A block takes a group of up to eight tokens that share an adapter, 16 rows of a, and one part of k. Tensor cores multiply:
// a is the left operand and comes from memory straight to registers, once for all tokens of the group.
//
// The sum over k is a binary tree over 64 leaves, whatever the number of parts: a warp adds the leaves of its share of k,
// the block those of its warps, and who reads v the parts. Products are exact. So a token's sum has the same bits whatever
// is beside it, and however many blocks share it.

#include <type_traits>

#include "adapter.cuh"
#include "pieces.cuh"

struct Params {
    const void* x;      // [tokens, k]
    float* v;           // [parts, tokens, slices, pitch]
    Adapters adapters;
    uint32_t tokens;
    uint32_t k;
    uint32_t slots;     // blocks that share the groups of 32 tokens
    uint32_t vectors;   // k is a multiple of 8: rows of x and a are read in pieces of 16 bytes
};
static_assert(sizeof(Params) == 56, "the Rust twin has this size");

constexpr uint32_t kWarps = 8, kThreads = kWarps * 32, kRanks = 16, kLeaves = 64;
constexpr uint32_t kChunk = 32;  // elements of k that a warp multiplies at a time: eight per lane and row

// Eight neighbouring elements as stored.
template <typename T>
struct Eight8 {
    static constexpr int kWords = 2 * sizeof(T);
    uint32_t words[kWords];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = 0;
    }

    // Elements first ... first + 7 of `row`, zero from `length` on. What is read once need not stay in L1.
    template <bool Vectors, bool Once>
    __device__ __forceinline__ void load(const T* row, uint32_t first, uint32_t length) {
        clear();
        if (first >= length) return;
        if constexpr (Vectors) {
            const uint4* from = reinterpret_cast<const uint4*>(row + first);
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) {
                const uint4 v = Once ? ptx::load_stream16(from + i) : from[i];
                words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (first + i >= length) continue;
                if constexpr (sizeof(T) == 4) {
                    words[i] = __float_as_uint(row[first + i]);
                } else {
                    words[i / 2] |= uint32_t(row[first + i].bits) << (i % 2 * 16);
                }
            }
        }
    }
};

// A chunk of the lane's rows g and g + 8 of a, and of its token's x.
template <typename T, typename A>
struct Chunk {
    Eight8<A> a[2];
    Eight8<T> x;

    // sums[row][token] += a x^T, products of 32 elements.
    __device__ __forceinline__ void multiply(float (&sums)[4]) const {
        using M = typename std::conditional<std::is_same<T, f16>::value && std::is_same<A, f16>::value, f16, bf16>::type;
        using PiecesA = Pieces<A, M>;
        using PiecesX = Pieces<T, M>;
        uint32_t rows[2][PiecesA::kCount][4], token[PiecesX::kCount][4];
        PiecesA::make(a[0].words, rows[0]);
        PiecesA::make(a[1].words, rows[1]);
        PiecesX::make(x.words, token);
        // The smallest pieces come first.
#pragma unroll
        for (int i = PiecesA::kCount - 1; i >= 0; --i) {
#pragma unroll
            for (int j = PiecesX::kCount - 1; j >= 0; --j) {
#pragma unroll
                for (int half = 0; half < 4; half += 2) {
                    const uint32_t left[4] = {rows[0][i][half], rows[1][i][half], rows[0][i][half + 1], rows[1][i][half + 1]};
                    mma(M{}, sums, left, token[j][half], token[j][half + 1]);
                }
            }
        }
    }
};

// The sums of finished leaves that wait for their neighbours. Adds leaf `j` of a share (a power of two of leaves) to them;
// after the last one, `sums` is the total.
struct Tree {
    float level[3][4];

    __device__ __forceinline__ void add(uint32_t j, float (&sums)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float one = (j & 1) ? level[0][i] + sums[i] : sums[i];
            const float two = (j & 3) == 3 ? level[1][i] + one : one;
            const float four = (j & 7) == 7 ? level[2][i] + two : two;
            level[0][i] = (j & 1) ? level[0][i] : sums[i];
            level[1][i] = (j & 3) == 1 ? one : level[1][i];
            level[2][i] = (j & 7) == 3 ? two : level[2][i];
            sums[i] = four;
        }
    }
};

// The share of k that a warp sums: `leaves` leaves of `leaf` elements each, from `begin` on.
struct Share {
    uint32_t begin, leaves, leaf;
};

// sums[row][token] = a x^T over the warp's share, for rows r + g and r + 8 + g of a and the token of x.
template <typename T, typename A, bool Vectors>
__device__ __forceinline__ void add_products(const Share& share, const A* a, const T* x, const uint32_t (&ends)[3], size_t k,
                                             float (&sums)[4]) {
    constexpr uint32_t kAhead = !Vectors || sizeof(T) + sizeof(A) == 8 ? 1 : sizeof(T) + sizeof(A) == 6 ? 2 : 4;  // chunks on their way
    const uint32_t length = share.leaves * share.leaf;
    Chunk<T, A> chunks[kAhead];
    const auto load = [&](uint32_t at, Chunk<T, A>& chunk) {
        const bool inside = at < length;
        chunk.a[0].template load<Vectors, true>(a, at, inside ? ends[0] : 0);
        chunk.a[1].template load<Vectors, true>(a + 8 * k, at, inside ? ends[1] : 0);
        chunk.x.template load<Vectors, false>(x, at, inside ? ends[2] : 0);
    };
#pragma unroll
    for (uint32_t j = 0; j < kAhead; ++j) load(j * kChunk, chunks[j]);
    Tree tree;
    uint32_t left = share.leaf, leaf = 0;
#pragma unroll 1
    for (uint32_t at = 0; at < length; at += kAhead * kChunk) {
#pragma unroll
        for (uint32_t j = 0; j < kAhead; ++j) {
            if (at + j * kChunk < length) {
                if (left == share.leaf) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sums[e] = 0.0f;
                }
                chunks[j].multiply(sums);
                left -= kChunk;
                if (left == 0) {
                    tree.add(leaf++, sums);
                    left = share.leaf;
                }
            }
            load(at + (kAhead + j) * kChunk, chunks[j]);
        }
    }
}

template <typename T, typename A>
__device__ __forceinline__ void lora_shrink(const Params& p) {
    constexpr uint32_t kPitch = kRanks + 4;
    __shared__ float partial[kWarps][kGroup * kPitch];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const uint32_t slot = blockIdx.x % p.slots, first = blockIdx.x / p.slots * 32;
    const uint32_t tiles = (p.adapters.pitch + kRanks - 1) / kRanks;
    const uint32_t slice = blockIdx.y / tiles, r = blockIdx.y % tiles * kRanks;
    const uint32_t part = blockIdx.z, parts = gridDim.z;
    const uint32_t row_pitch = p.adapters.pitch * p.adapters.slices;
    float* v = p.v + (size_t(part) * p.tokens + first) * row_pitch + slice * p.adapters.pitch + r;

    ptx::wait_for_launch_before();
    ptx::let_next_launch_start();
    const Window window(p.adapters, first, p.tokens, lane);
    if (slot == 0) {
        // Tokens that are in no group.
#pragma unroll
        for (uint32_t i = threadIdx.x; i < 32 * kRanks; i += kThreads) {
            const uint32_t j = i / kRanks, column = i % kRanks;
            const int32_t own = __shfl_sync(kAllLanes, window.adapter, j);
            if (first + j >= p.tokens || r + column >= p.adapters.pitch || p.adapters.exists(own)) continue;
            v[size_t(j) * row_pitch + column] = own == -1 ? 0.0f : nan_value();
        }
    }

    Share share;
    share.leaves = kLeaves / kWarps / parts;
    share.leaf = ((p.k + kChunk - 1) / kChunk + kLeaves - 1) / kLeaves * kChunk;
    share.begin = (part * kWarps + warp) * share.leaves * share.leaf;
#pragma unroll 1
    for (uint32_t i = slot; i < window.groups(); i += p.slots) {
        const Group group = window.group(i, lane);
        const Adapter adapter = p.adapters.entries[size_t(group.adapter) * p.adapters.slices + slice];
        const uint32_t token = group.token(g);
        float sums[4] = {};
        if (r < adapter.rank) {
            // Of the lane's pieces; what is not there is zero.
            const uint32_t at = min(share.begin + 8 * t, p.k), left = p.k - at;
            const uint32_t ends[3] = {r + g < adapter.rank ? left : 0, r + g + 8 < adapter.rank ? left : 0, token < 32 ? left : 0};
            const A* a = static_cast<const A*>(adapter.a) + size_t(r + g) * p.k + at;
            const T* x = static_cast<const T*>(p.x) + size_t(first + min(token, 31u)) * p.k + at;
            if (p.vectors) {
                add_products<T, A, true>(share, a, x, ends, p.k, sums);
            } else {
                add_products<T, A, false>(share, a, x, ends, p.k, sums);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) partial[warp][(2 * t + e % 2) * kPitch + e / 2 * 8 + g] = sums[e];
        __syncthreads();

        // A thread owns an element of v. The adapter's scale is put in where the sums are eighths of the whole.
        // Half a warp reads one token's, the other half that of the fourth after it, in the other banks.
        const uint32_t j = warp + lane / kRanks * (kGroup / 2), column = lane % kRanks;
        const uint32_t own = group.token(j % kGroup);
        if (warp < kGroup / 2 && own < 32 && r + column < p.adapters.pitch) {
            const float* sum = &partial[0][j * kPitch + column];
            const auto scaled = [&](float sum, uint32_t warps) { return parts == warps ? __fmul_rn(sum, adapter.scaling) : sum; };
            const auto one = [&](int w) { return scaled(sum[w * kGroup * kPitch], 1); };
            const auto two = [&](int w) { return scaled(__fadd_rn(one(w), one(w + 1)), 2); };
            const auto four = [&](int w) { return scaled(__fadd_rn(two(w), two(w + 2)), 4); };
            const float total = scaled(__fadd_rn(four(0), four(4)), 8);
            v[size_t(own) * row_pitch + column] = r + column < adapter.rank ? total : 0.0f;
        }
        __syncthreads();
    }
}

#define ENTRY(T, A)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) lora_shrink_##T##_##A(const __grid_constant__ Params p) { \
        lora_shrink<T, A>(p);                                                                                         \
    }

typedef float f32;
ENTRY(f32, f32)
ENTRY(f16, f16)
ENTRY(f16, f32)
ENTRY(bf16, bf16)
ENTRY(bf16, f32)
