// y = row_scale * (x w^T + v b^T) + bias for 4-bit w and at most 16 tokens of 16 bits: what decoding a token waits for.
// The bytes of w bound it, so weights must not cost more than about three instructions each.
//
// A byte of codes becomes two elements by one load from a table of 256 pairs, which lies in shared memory once per bank;
// the elements are rounded to x's type there. Tensor cores multiply them, and the absmax, in f32, scales the sums of each 64
// elements (blocks are 64 or longer, and rows are multiples of 64, so one absmax covers those). See tile.cuh for which lane
// holds what.
//
// A block takes 32 rows of w. Its eight warps take every eighth slice of 64 along k, each with a pipeline of its own, so
// that no barrier holds them up; their sums are added in the order of the warps at the end. The order of a sum depends on k
// and the number of splits alone: a token's result does not depend on the tokens beside it, nor on how many there are.

#include "product.cuh"
#include "tile.cuh"

constexpr uint32_t kWarps = 8, kThreads = kWarps * 32, kRows = kWarpRows, kStages = 6;
static_assert(kThreads == PairTable<f16, 128>::kBuilders, "all of them build the table");
constexpr uint32_t kWarpBytes = kRows * kSlice / 2, kStageBytes = kWarps * kWarpBytes;

template <typename T>
using Pairs = PairTable<T, 128>;

struct Memory {
    alignas(16) uint8_t pairs[Pairs<f16>::kBytes];
    alignas(16) uint8_t codes[kStages][kWarps][kWarpBytes];
};
static_assert(sizeof(Memory) == 81920, "src/cuda/matmul.rs asks for this");

// A warp's way along k.
template <typename T, int Groups>
struct Walk {
    const Params& p;
    uint32_t shared, lane;     // address of the warp's codes of stage 0
    const uint8_t* codes[2];   // the lane's chunk of slice 0 in rows l / 2 and 16 + l / 2
    const T* inputs[Groups];   // the lane's x of slice 0, tokens g, g + 8
    bool has_input[Groups];
    RowBlocks blocks;          // from row g on
    uint4 x[Groups][2], next_x[Groups][2];
    PendingAbsmax<4> absmax, next_absmax;

    // Rows past the end repeat the last one: nobody looks at what is made of them.
    template <typename Share>
    __device__ __forceinline__ Walk(const Params& p, uint32_t shared, const Share& share, uint32_t lane)
        : p(p), shared(shared), lane(lane), blocks(p, share.first_row + lane / 4, share.above) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint64_t row = share.above + min(share.first_row + i * 16 + lane / 2, p.n - 1);
            codes[i] = static_cast<const uint8_t*>(p.weight.data) + row * (p.k / 2) + lane % 2 * 16;
        }
#pragma unroll
        for (int m = 0; m < Groups; ++m) {
            const uint32_t token = share.first_token + m * 8 + lane / 4;
            has_input[m] = token < share.end(p.tokens);
            inputs[m] = static_cast<const T*>(p.x) + (has_input[m] ? size_t(share.input(token)) * p.k : 0) + lane % 4 * 16;
        }
    }

    // Brings the codes of a slice to a stage; nothing from `end` on, but the group counts.
    __device__ __forceinline__ void copy(uint32_t slice, uint32_t end, uint32_t stage) const {
        if (slice < end) {
#pragma unroll
            for (int i = 0; i < 2; ++i) ptx::copy_async16(shared + stage + i * 512 + lane * 16, codes[i] + slice * (kSlice / 2));
        }
        ptx::commit_copies();
    }

    // Requests x and the absmax of a slice.
    __device__ __forceinline__ void fetch(uint32_t slice, uint32_t end) {
        if (slice >= end) return;
        const uint32_t k = slice * kSlice;
#pragma unroll
        for (int m = 0; m < Groups; ++m) {
            const uint4* from = reinterpret_cast<const uint4*>(inputs[m] + k);
#pragma unroll
            for (int half = 0; half < 2; ++half) next_x[m][half] = has_input[m] ? from[half] : make_uint4(0, 0, 0, 0);
        }
        uint64_t block[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) block[i] = blocks.find(p, i * 8, k);
        next_absmax.request(p.weight.absmax, block);
    }

    // The products of a slice, of which everything has come.
    __device__ __forceinline__ void multiply(const uint8_t* pairs, uint32_t stage, float (&sums)[2][Groups][4]) const {
        uint2 row[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) row[i] = ptx::load_shared8(shared + stage + i * 256 + lane * 8);
        float slice[2][Groups][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Operands w;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32_t elements[4];
#pragma unroll
                for (int b = 0; b < 4; ++b) elements[b] = Pairs<T>::look_up(pairs, lane * 4, half == 0 ? row[i].x : row[i].y, b);
                w.set(i / 2, i % 2, elements);
            }
#pragma unroll
            for (int m = 0; m < Groups; ++m) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    mma(T{}, slice[i][m], w.a[i][0], x[m][half].x, x[m][half].y);
                    mma(T{}, slice[i][m], w.a[i][1], x[m][half].z, x[m][half].w);
                }
            }
        }
        float scales[4];
        absmax.get(p.weight.absmax, scales);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int m = 0; m < Groups; ++m) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[i][m][e] = fmaf(scales[i * 2 + e / 2], slice[i][m][e], sums[i][m][e]);
            }
        }
    }
};

template <typename T, int Groups, typename P>
__device__ __forceinline__ void skinny(const P& p) {
    constexpr uint32_t kTokens = 8 * Groups, kPitch = kRows + 4;
    extern __shared__ __align__(128) uint8_t bytes[];
    Memory& memory = *reinterpret_cast<Memory*>(bytes);
    __shared__ float delta[kTokens][kRows];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, split = blockIdx.y;
    const auto share = share_of<kRows, kTokens>(p);
    if (share.template ends<T>(p)) return;
    const uint32_t slices = p.k / kSlice;
    const Range range((slices + kWarps - 1) / kWarps, split, p.splits);
    const uint32_t end = min(range.end * kWarps, slices);

    Walk<T, Groups> walk(p, ptx::shared_address(memory.codes[0][warp]), share, lane);
    uint32_t slice = range.begin * kWarps + warp;
#pragma unroll
    for (uint32_t i = 0; i < kStages - 1; ++i) walk.copy(slice + i * kWarps, end, i * kStageBytes);
    walk.fetch(slice, end);
    Pairs<T>::build(p.weight.codebook, ptx::shared_address(memory.pairs), threadIdx.x);
    __syncthreads();

    float sums[2][Groups][4] = {};
    uint32_t stage = 0;  // its offset
#pragma unroll 1
    for (; slice < end; slice += kWarps) {
        ptx::wait_copies<kStages - 2>();
        __syncwarp();
        walk.copy(slice + (kStages - 1) * kWarps, end, (stage == 0 ? kStages * kStageBytes : stage) - kStageBytes);
#pragma unroll
        for (int m = 0; m < Groups; ++m) walk.x[m][0] = walk.next_x[m][0], walk.x[m][1] = walk.next_x[m][1];
        walk.absmax = walk.next_absmax;
        walk.fetch(slice + kWarps, end);
        walk.multiply(memory.pairs, stage, sums);
        stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
    }
    ptx::wait_copies<0>();
    __syncthreads();

    // The codes' place is taken by the warps' sums.
    float(&staging)[kWarps][kTokens][kPitch] = *reinterpret_cast<float(*)[kWarps][kTokens][kPitch]>(memory.codes);
    static_assert(sizeof(staging) <= sizeof(memory.codes), "the sums fit");
#pragma unroll
    for (int m = 0; m < Groups; ++m) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            staging[warp][m * 8 + lane % 4 * 2 + e % 2][e / 2 * 8 + lane / 4] = sums[e / 4][m][e % 4];
        }
    }
    const bool has_branch = p.branch.adapters.entries != nullptr && split == 0;
    if (has_branch) low_rank<T>(p.branch, share.first_token, p.tokens, share.first_row, p.n, delta, share);
    __syncthreads();
    if (share.first_row + lane >= p.n) return;
    const Column<T> column(p.output, p.n, share.first_row + lane, share.above);
    for (uint32_t m = warp; m < kTokens && share.first_token + m < share.end(p.tokens); m += kWarps) {
        float sum = staging[0][m][lane];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) sum += staging[w][m][lane];
        column.store(share.row(share.first_token + m), has_branch ? sum + delta[m][lane] : sum, split, p.tokens);
    }
}

#define ENTRY(NAME, P, T, TOKENS)                                                                        \
    extern "C" __global__ void __launch_bounds__(kThreads, 2) NAME(const __grid_constant__ P p) {        \
        skinny<T, TOKENS / 8>(p);                                                                        \
    }
#define ENTRIES(T, TOKENS)                                \
    ENTRY(skinny_nf4_##T##_t##TOKENS, Params, T, TOKENS)  \
    ENTRY(skinny_nf4_##T##_t##TOKENS##_experts, ExpertParams, T, TOKENS)

ENTRIES(f16, 8)
ENTRIES(f16, 16)
ENTRIES(bf16, 8)
ENTRIES(bf16, 16)
