// y = row_scale * (x w^T + v b^T) + bias for 4-bit w and at most 16 tokens of 16 bits, on Hopper: what decoding a token waits
// for. The bytes of w bound it.
//
// A block stays on its multiprocessor and goes from tile to tile of 16 rows of w. Four warps bring w to shared memory, some
// stages ahead: a stage is the codes and the absmax of 16 rows by a piece of k, 32 slices of 64 elements or twice that. Eight
// warps multiply, four slices of each 32, with x in registers as long as the piece stays the same: four tiles take turns with
// each. A byte of codes becomes two elements, rounded to x's type, by one load from a table of 256 pairs that
// lies in shared memory once per bank; tensor cores multiply them, and absmax, in f32, scales the sums of each slice (blocks
// are 64 or longer, and rows are multiples of 64, so one absmax covers it). The warps' sums are added in their order: the
// order of a sum depends on k and the number of splits alone, so a token's result does not depend on the tokens beside it.
//
// Where there are too few rows for that (`..._split`), a tile is shared by the blocks of a cluster, which lie side by side in y:
// each takes a range of k, in pieces of which every warp has two slices at a time, and sends its sums to the first block's
// shared memory, where they are added in the order of the blocks.
//
// Products with adapters leave their sums to `decode_finish`, which adds the low-rank branch.
//
// `skinny` serves devices that are not Hopper; for them the first kernel exists without a body, and no plan names it.

#include "hopper.cuh"
#include "overlap.cuh"
#include "product.cuh"
#include "tile.cuh"

constexpr uint32_t kConsumers = 8, kProducers = 4, kConsumerThreads = kConsumers * 32, kThreads = (kConsumers + kProducers) * 32;
constexpr uint32_t kRows = 16, kSliceBytes = kSlice / 2;  // of a tile; of a row
constexpr uint32_t kMostBlocks = 8;                       // of a cluster, on any device

static_assert(kConsumerThreads == PairTable<f16, 128>::kBuilders, "all of them build the table");

// Where things are in shared memory. Rows of codes and of absmax are padded so that the eight rows that a warp reads together
// lie in different banks.
template <int Groups, int Slices, bool Split>
struct Layout {
    static constexpr bool kSplit = Split;
    static constexpr uint32_t kTokens = 8 * Groups, kStages = Slices == 8 ? 3 : 6;
    static constexpr uint32_t kTiles = Split ? 1 : 4;  // that take turns with a piece
    // Slices that a warp takes at a time, and those that all take: a part of a piece.
    static constexpr uint32_t kAtOnce = Split ? 2 : 4, kPart = kConsumers * kAtOnce, kPartBytes = kPart * kSliceBytes;
    static constexpr uint32_t kParts = Slices / kAtOnce, kPieceSlices = kParts * kPart, kPiece = kPieceSlices * kSlice, kPieceBytes = kPiece / 2;
    static constexpr uint32_t kCodeRow = kPieceBytes + 32, kScaleRow = kPieceSlices * 4 + 16;
    static constexpr uint32_t kScales = kRows * kCodeRow, kStage = kScales + kRows * kScaleRow;
    static constexpr uint32_t kTable = PairTable<f16, 128>::kBytes;
    static constexpr uint32_t kTileSums = kTokens * kRows * 4, kWarpSums = kTiles * kTileSums, kSums = kConsumers * kWarpSums;
    // Sums for two turns, or those of this block and the others of its cluster.
    static constexpr uint32_t kAllSums = Split ? kSums + (kMostBlocks - 1) * kTileSums : 2 * kSums;
    static_assert(kPartBytes % 128 == 0, "so that padding by 32 bytes keeps rows in different banks");
    uint32_t table, stages, sums, received, full, empty, others;  // addresses; the table comes first

    __device__ __forceinline__ explicit Layout(uint32_t base) {
        table = base;
        stages = table + kTable;
        sums = stages + kStages * kStage;
        received = sums + kSums;
        full = sums + kAllSums;
        empty = full + kStages * 8;
        others = empty + kStages * 8;
    }

    // The place of a warp's sum: two tokens share 32 banks, and pairs are turned against each other, so that lanes that hold
    // neighbouring pairs write to different ones.
    static __device__ __forceinline__ uint32_t place(uint32_t tile, uint32_t token, uint32_t row) {
        const uint32_t pair = token / 2;
        return ((tile * kTokens / 2 + pair) * 32 + (token % 2 * 16 + row + 8 * pair) % 32) * 4;
    }
};

// The way of a block: `kTiles` tiles of rows at a time, and for those one piece of k after the other.
template <typename L>
struct Way {
    uint32_t tiles, pieces;  // of the block
    uint32_t begin, end;     // of its part of k

    __device__ __forceinline__ explicit Way(const Params& p) {
        if constexpr (L::kSplit) {
            constexpr uint32_t kStep = L::kPart * kSlice;
            const Range range((p.k + kStep - 1) / kStep, blockIdx.y, p.splits);
            tiles = 1, begin = min(range.begin * kStep, p.k), end = min(range.end * kStep, p.k);
        } else {
            const uint32_t all = (p.n - 1) / kRows + 1;
            tiles = blockIdx.x < all ? (all - blockIdx.x - 1) / gridDim.x + 1 : 0, begin = 0, end = p.k;
        }
        pieces = (end - begin + L::kPiece - 1) / L::kPiece;
    }

    __device__ __forceinline__ uint32_t first_row(uint32_t tile) const { return (blockIdx.x + tile * gridDim.x) * kRows; }

    // Where a piece begins, how long it is, and the parts of it that are there.
    __device__ __forceinline__ uint32_t at(uint32_t piece) const { return begin + piece * L::kPiece; }
    __device__ __forceinline__ uint32_t length(uint32_t piece) const { return min(L::kPiece, end - at(piece)); }
    __device__ __forceinline__ uint32_t parts(uint32_t piece) const { return (length(piece) + L::kPart * kSlice - 1) / (L::kPart * kSlice); }

    // Calls visit(tile, piece), in order.
    template <typename Visit>
    __device__ __forceinline__ void walk(Visit visit) const {
#pragma unroll 1
        for (uint32_t group = 0; group < tiles; group += L::kTiles) {
            const uint32_t count = min(L::kTiles, tiles - group);
#pragma unroll 1
            for (uint32_t piece = 0; piece < pieces; ++piece) {
#pragma unroll 1
                for (uint32_t j = 0; j < count; ++j) visit(group + j, piece);
            }
        }
    }
};

// A place in the ring of stages; `parity` is that of the phase in which it is filled.
template <typename L>
struct Stage {
    uint32_t index = 0, parity = 0;

    __device__ __forceinline__ void next() {
        if (++index == L::kStages) index = 0, parity ^= 1;
    }
};

// What one of the four warps does that fill the stages: four rows each. Rows past the end repeat the last one, and absmax is
// zero past the end of k.
template <typename L>
__device__ __forceinline__ void produce(const Params& p, const L& layout, const Way<L>& way, uint32_t warp, uint32_t lane) {
    constexpr uint32_t kOwn = kRows / kProducers, kPerRow = L::kPieceSlices / 32, kPerLane = kOwn * kPerRow;
    const uint32_t row_bytes = p.k / 2, end_slice = way.end / kSlice;
    Stage<L> stage;
    way.walk([&](uint32_t tile, uint32_t piece) {
        const uint32_t full = layout.full + stage.index * 8, at = layout.stages + stage.index * L::kStage;
        const uint32_t first = way.at(piece), bytes = way.length(piece) / 2;
        const auto row_of = [&](uint32_t own) { return min(way.first_row(tile) + warp * kOwn + own, p.n - 1); };
        hopper::wait(layout.empty + stage.index * 8, stage.parity ^ 1);

        // Lane l has slices l, l + 32 ... of the rows, in turn.
        uint64_t block[kPerLane];
#pragma unroll
        for (uint32_t i = 0; i < kPerLane; ++i) {
            const uint32_t slice = min(first / kSlice + i % kPerRow * 32 + lane, end_slice - 1);
            block[i] = (uint64_t(row_of(i / kPerRow)) * p.k + uint64_t(slice) * kSlice) >> p.weight.block_shift;
        }
        PendingAbsmax<kPerLane> pending;
        pending.request(p.weight.absmax, block);

        if (lane == 0) hopper::expect(full, kOwn * bytes);
        __syncwarp();
        if (lane < kOwn) {
            const uint8_t* from = static_cast<const uint8_t*>(p.weight.data) + uint64_t(row_of(lane)) * row_bytes + first / 2;
            hopper::copy_bytes(at + (warp * kOwn + lane) * L::kCodeRow, from, bytes, full);
        }
        // What is multiplied beyond the end of k: any codes will do, as x is zero there.
        const uint32_t end = way.parts(piece) * L::kPartBytes;
        if (bytes < end) {
            for (uint32_t i = lane; i < kOwn * (end - bytes) / 16; i += 32) {
                const uint32_t own = i % kOwn, chunk = i / kOwn;
                ptx::store_shared16(at + (warp * kOwn + own) * L::kCodeRow + bytes + chunk * 16, make_uint4(0, 0, 0, 0));
            }
            hopper::fence_copies();
        }
        float scales[kPerLane];
        pending.get(p.weight.absmax, scales);
#pragma unroll
        for (uint32_t i = 0; i < kPerLane; ++i) {
            const uint32_t slice = i % kPerRow * 32 + lane;
            const bool inside = first / kSlice + slice < end_slice;
            ptx::store_shared4(at + L::kScales + (warp * kOwn + i / kPerRow) * L::kScaleRow + slice * 4, inside ? scales[i] : 0.0f);
        }
        __syncwarp();
        if (lane == 0) hopper::arrive(full);
        stage.next();
    });
}

// What the eight warps do that multiply. Lane (g, t) = (lane / 4, lane % 4) has the 16 elements from 16 t on of each slice, of
// rows g and g + 8 and of tokens g and g + 8; see tile.cuh.
template <typename T, int Groups, int Slices, bool Split>
struct Consumer {
    using L = Layout<Groups, Slices, Split>;
    using Pairs = PairTable<T, 128>;
    const Params& p;
    const L& layout;
    const Way<L>& way;
    const uint8_t* table;
    uint32_t column, codes, scales;  // the lane's: offset in the table; addresses of its first bytes in stage 0
    uint4 x[Slices][Groups][2];
    float sums[L::kTiles][Groups][4];
    Stage<L> stage;

    __device__ __forceinline__ Consumer(const Params& p, const uint8_t* memory, const L& layout, const Way<L>& way)
        : p(p), layout(layout), way(way), table(memory) {}

    // The scales of slices that follow each other.
    static __device__ __forceinline__ void load(uint32_t at, float (&scales)[4]) {
        const uint4 v = ptx::load_shared16(at);
        scales[0] = __uint_as_float(v.x), scales[1] = __uint_as_float(v.y), scales[2] = __uint_as_float(v.z), scales[3] = __uint_as_float(v.w);
    }
    static __device__ __forceinline__ void load(uint32_t at, float (&scales)[2]) {
        const uint2 v = ptx::load_shared8(at);
        scales[0] = __uint_as_float(v.x), scales[1] = __uint_as_float(v.y);
    }

    __device__ __forceinline__ void load_x(uint32_t piece) {
        const uint32_t thread = ptx::thread_now(), lane = thread % 32, warp = thread / 32;
#pragma unroll
        for (int c = 0; c < Slices; ++c) {
#pragma unroll
            for (int m = 0; m < Groups; ++m) {
                const uint32_t token = m * 8 + lane / 4, slice = c / L::kAtOnce * L::kPart + warp * L::kAtOnce + c % L::kAtOnce;
                const uint32_t k = way.at(piece) + slice * kSlice + lane % 4 * 16;
                x[c][m][0] = x[c][m][1] = make_uint4(0, 0, 0, 0);
                if (token < p.tokens && k < way.end) {
                    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + size_t(token) * p.k + k);
                    x[c][m][0] = from[0], x[c][m][1] = from[1];
                }
            }
        }
    }

    // The products of the warp's slices of a stage, of which so many parts are there.
    __device__ __forceinline__ void multiply(float (&sum)[Groups][4], uint32_t parts) {
        const uint32_t stage_codes = codes + stage.index * L::kStage, stage_scales = scales + stage.index * L::kStage;
#pragma unroll
        for (int part = 0; part < L::kParts; ++part) {
            if (part >= parts) break;
            float scale[2][L::kAtOnce];
#pragma unroll
            for (int i = 0; i < 2; ++i) load(stage_scales + i * 8 * L::kScaleRow + part * L::kPart * 4, scale[i]);
#pragma unroll
            for (int c = 0; c < L::kAtOnce; ++c) {
                const uint32_t at = stage_codes + part * L::kPartBytes + c * kSliceBytes;
                const uint2 w[2] = {ptx::load_shared8(at), ptx::load_shared8(at + 8 * L::kCodeRow)};
                const uint4(&inputs)[Groups][2] = x[part * L::kAtOnce + c];
                float slice[Groups][4] = {};
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    uint32_t a[2][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const uint32_t word = j == 0 ? w[i].x : w[i].y;
                        a[0][i] = Pairs::look_up(table, column, word, 0), a[0][2 + i] = Pairs::look_up(table, column, word, 1);
                        a[1][i] = Pairs::look_up(table, column, word, 2), a[1][2 + i] = Pairs::look_up(table, column, word, 3);
                    }
#pragma unroll
                    for (int m = 0; m < Groups; ++m) {
                        mma(T{}, slice[m], a[0], inputs[m][j].x, inputs[m][j].y);
                        mma(T{}, slice[m], a[1], inputs[m][j].z, inputs[m][j].w);
                    }
                }
#pragma unroll
                for (int m = 0; m < Groups; ++m) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[m][e] = fmaf(scale[e / 2][c], slice[m][e], sum[m][e]);
                }
            }
        }
    }

    // Leaves the warp's sums of a group of tiles for `sum_of`, and waits for the others'.
    __device__ __forceinline__ void exchange(uint32_t base) {
        const uint32_t thread = ptx::thread_now(), lane = thread % 32, warp = thread / 32;
#pragma unroll
        for (int j = 0; j < L::kTiles; ++j) {
#pragma unroll
            for (int m = 0; m < Groups; ++m) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const uint32_t token = m * 8 + lane % 4 * 2 + e % 2, row = e / 2 * 8 + lane / 4;
                    ptx::store_shared4(base + warp * L::kWarpSums + L::place(j, token, row), sums[j][m][e]);
                    sums[j][m][e] = 0.0f;
                }
            }
        }
        hopper::sync_some<kConsumerThreads>(1);
    }

    // The sum of the eight warps.
    __device__ __forceinline__ float sum_of(uint32_t base, uint32_t tile, uint32_t token, uint32_t row) const {
        const uint32_t at = base + L::place(tile, token, row);
        float sum = ptx::load_shared4(at);
#pragma unroll
        for (uint32_t w = 1; w < kConsumers; ++w) sum += ptx::load_shared4(at + w * L::kWarpSums);
        return sum;
    }

    __device__ __forceinline__ void store(uint32_t tile, uint32_t token, uint32_t row, float sum) const {
        const uint32_t n = way.first_row(tile) + row;
        if (token < p.tokens && n < p.n) Column<T>(p.output, p.n, n).store(token, sum, 0, p.tokens);
    }

    // Adds the eight warps' sums of `count` tiles, and stores them.
    __device__ __forceinline__ void finish(uint32_t group, uint32_t count, uint32_t parity) {
        const uint32_t base = layout.sums + parity * L::kSums;
        // Its barrier, once for two groups, is enough: whoever comes here again has read what was left here last time.
        exchange(base);
        for (uint32_t i = ptx::thread_now(); i < count * L::kTokens * kRows; i += kConsumerThreads) {
            const uint32_t j = i / (L::kTokens * kRows), token = i / kRows % L::kTokens, row = i % kRows;
            if (token >= p.tokens) continue;
            store(group + j, token, row, sum_of(base, j, token, row));
        }
        __syncwarp();
    }

    // The same for the only tile, whose sum the blocks of the cluster share: the first adds all, in the order of the blocks.
    __device__ __forceinline__ void finish_split() {
        const uint32_t thread = ptx::thread_now(), token = thread / kRows, row = thread % kRows;
        exchange(layout.sums);
        hopper::wait_for_blocks();
        if (token >= L::kTokens) return;
        float sum = sum_of(layout.sums, 0, token, row);
        const uint32_t received = layout.received + thread * 4 - L::kTileSums;  // from block 1 on
        if (blockIdx.y > 0) {
            hopper::store_at(hopper::address_in(0, received + blockIdx.y * L::kTileSums), sum);
            __syncwarp();
            if (thread % 32 == 0) hopper::arrive_at(hopper::address_in(0, layout.others));
            return;
        }
        hopper::wait_for_others(layout.others, 0);
        for (uint32_t block = 1; block < p.splits; ++block) sum += ptx::load_shared4(received + block * L::kTileSums);
        store(0, token, row, sum);
    }

    __device__ __forceinline__ void run() {
        Pairs::build(p.weight.codebook, layout.table, threadIdx.x);
        // Codes and absmax are nobody's output; x may be the output of the launch before.
        ptx::wait_for_launch_before();
        ptx::let_next_launch_start();
        load_x(0);
        hopper::sync_some<kConsumerThreads>(1);
        const uint32_t thread = ptx::thread_now(), lane = thread % 32, warp = thread / 32;
        column = lane * 4;
        codes = layout.stages + lane / 4 * L::kCodeRow + warp * (L::kAtOnce * kSliceBytes) + lane % 4 * 8;
        scales = layout.stages + L::kScales + lane / 4 * L::kScaleRow + warp * (L::kAtOnce * 4);
#pragma unroll
        for (int j = 0; j < L::kTiles; ++j) {
#pragma unroll
            for (int m = 0; m < Groups; ++m) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sums[j][m][e] = 0.0f;
            }
        }
        uint32_t loaded = 0;
#pragma unroll 1
        for (uint32_t group = 0; group < way.tiles; group += L::kTiles) {
            const uint32_t count = min(L::kTiles, way.tiles - group);
#pragma unroll 1
            for (uint32_t piece = 0; piece < way.pieces; ++piece) {
                if (piece != loaded) load_x(loaded = piece);
                const uint32_t parts = way.parts(piece);
#pragma unroll
                for (int j = 0; j < L::kTiles; ++j) {
                    if (j >= count) break;
                    hopper::wait(layout.full + stage.index * 8, stage.parity);
                    multiply(sums[j], parts);
                    __syncwarp();
                    if (ptx::thread_now() % 32 == 0) hopper::arrive(layout.empty + stage.index * 8);
                    stage.next();
                }
            }
            if constexpr (Split) {
                finish_split();
            } else {
                finish(group, count, group / L::kTiles % 2);
            }
        }
    }
};

template <typename T, int Groups, int Slices, bool Split = false>
__device__ __forceinline__ void decode(const Params& p) {
    using L = Layout<Groups, Slices, Split>;
    extern __shared__ __align__(128) uint8_t memory[];
    const L layout(ptx::shared_address(memory));
    const Way<L> way(p);
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
#pragma unroll
        for (uint32_t i = 0; i < L::kStages; ++i) {
            hopper::init_barrier(layout.full + i * 8, kProducers);
            hopper::init_barrier(layout.empty + i * 8, kConsumers);
        }
        // Every warp that has a sum for the first block of the cluster.
        if constexpr (Split) hopper::init_barrier(layout.others, (p.splits - 1) * L::kTokens * kRows / 32);
        hopper::fence_barrier_init();
    }
    if constexpr (Split) hopper::meet_blocks();
    __syncthreads();
    // The consumers get the registers that the producers can do without: 224 and 56 of the 168 that each has at first.
    if (warp < kConsumers) {
        hopper::take_registers<224>();
        Consumer<T, Groups, Slices, Split>(p, memory, layout, way).run();
    } else {
        hopper::give_registers<56>();
        produce(p, layout, way, warp - kConsumers, lane);
        if constexpr (Split) hopper::wait_for_blocks();
    }
}

// The end of products with adapters, whose sums were left in `partial`: adds the low-rank branch.
constexpr uint32_t kFinishThreads = 256, kFinishRows = 64;
template <typename T, int Tokens>
__device__ __forceinline__ void decode_finish(const Params& p) {
    __shared__ float delta[Tokens][kFinishRows];
    const uint32_t first_row = blockIdx.x * kFinishRows, row = first_row + threadIdx.x % kFinishRows;
    ptx::wait_for_launch_before();
    ptx::let_next_launch_start();
    low_rank<T>(p.branch, 0, p.tokens, first_row, p.n, delta);
    __syncthreads();
    if (row >= p.n) return;
    const Column<T> column(p.output, p.n, row);
    for (uint32_t token = threadIdx.x / kFinishRows; token < p.tokens; token += kFinishThreads / kFinishRows) {
        column.store(token, p.output.partial[uint64_t(token) * p.n + row] + delta[token][row - first_row]);
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define BODY(...) __VA_ARGS__(p)
#else
#define BODY(...)
#endif
#define ENTRY(NAME, ...)                                                                                  \
    extern "C" __global__ void __launch_bounds__(kThreads, 1) decode_nf4_##NAME(const __grid_constant__ Params p) { \
        BODY(decode<__VA_ARGS__>);                                                                        \
    }
#define FINISH(T, TOKENS)                                                                                                               \
    extern "C" __global__ void __launch_bounds__(kFinishThreads, 1) decode_finish_##T##_t##TOKENS(const __grid_constant__ Params p) { \
        decode_finish<T, TOKENS>(p);                                                                                                    \
    }
#define TILES(T, TOKENS, SLICES)                               \
    ENTRY(T##_t##TOKENS, T, TOKENS / 8, SLICES)                \
    ENTRY(T##_t##TOKENS##_split, T, TOKENS / 8, SLICES, true)  \
    FINISH(T, TOKENS)

TILES(f16, 8, 8)
TILES(f16, 16, 4)
TILES(bf16, 8, 8)
TILES(bf16, 16, 4)
