// A merged weight, in f32, to 4-bit codes again without losing what was merged into it. `wanted` are its elements before they are stored
// (nf4_merge_f32 writes them), `before` is the weight that the adapters went into. What is done is defined by src/cpu/nf4_requantize.rs.
//
// nf4_requantize_scale searches each block's scale: a warp for a block, of which lane l tries elements l, l + 32, ...
// nf4_requantize_codes takes the nearest value, or one of the two nearest at random: a thread for eight elements.
// nf4_requantize_gain takes the nearest value, and then steps along the delta until a panel retains it: a block of threads for a panel,
// three times over it. Gains are integers, so that it does not matter in which order they are added.
#include "encode.cuh"
#include "nf4.cuh"

struct Params {
    Nf4Weight before;     // [numel]
    const float* wanted;  // [numel], 16-byte aligned
    Absmax absmax;        // the scales to encode by; not of _scale
    float* scales;        // [blocks], of _scale
    uint8_t* packed;      // [ceil(numel / 2)], 16-byte aligned; not of _scale
    Encoder encoder;
    float value[16];  // by rank: ascending
    float share[12];  // of the largest magnitude: scales to try
    uint64_t numel;
    uint64_t seed;
    uint64_t panel;  // elements that are rounded together: whole blocks
    uint32_t stochastic;
    uint32_t gain_bits;  // of a gain as an integer: as many as leave room for a panel's sum
};
static_assert(sizeof(Params) == 416, "the Rust twin has this size");

constexpr uint32_t kWarpMask = 0xffffffffu, kThreads = 256, kGainThreads = 512, kBins = 4096;

// How many thresholds a number lies above that was divided by its block's scale.
__device__ __forceinline__ uint32_t rank_of(const Encoder& encoder, float x) {
    uint32_t rank = 0;
#pragma unroll
    for (int t = 0; t < 15; ++t) rank += x > encoder.threshold[t];
    return rank;
}

__device__ __forceinline__ double across_lanes(double sum) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum = __dadd_rn(sum, __shfl_xor_sync(kWarpMask, sum, step));
    return sum;
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_requantize_scale(const __grid_constant__ Params p) {
    const uint32_t lane = threadIdx.x % 32;
    const uint64_t block = uint64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, first = block << p.before.block_shift;
    if (first >= p.numel) return;
    const uint32_t count = uint32_t(min(uint64_t(1) << p.before.block_shift, p.numel - first));
    const float* wanted = p.wanted + first;
    const float mine = p.value[lane % 16];
    const float infinity = __int_as_float(0x7f800000);

    float largest = 0.0f;
#pragma unroll 1
    for (uint32_t i = lane; i < count; i += 32) largest = max_nan(largest, fabsf(wanted[i]));
    largest = stored_absmax(largest_of_lanes(largest, 32));
    const uint64_t number[1] = {block};
    float before[1];
    p.before.absmax.load(number, before);

    float best = before[0], refined = before[0];
    double best_error = __longlong_as_double(0x7ff0000000000000);
#pragma unroll 1
    for (uint32_t attempt = 0; attempt < 16; ++attempt) {
        const float absmax = attempt == 0 ? before[0] : attempt <= 12 ? __fmul_rn(p.share[attempt - 1], largest) : refined;
        if (!(absmax > 0.0f && absmax < infinity)) continue;  // the same in all lanes
        const float lift = absmax < 1.17549435e-38f ? 18446744073709551616.0f : 1.0f;
        const float inverse = __frcp_rn(__fmul_rn(absmax, lift));
        double error = 0.0, product = 0.0, norm = 0.0;
#pragma unroll 1
        for (uint32_t i = lane; i < (count + 31) / 32 * 32; i += 32) {
            const float x = i < count ? wanted[i] : 0.0f;
            const uint32_t rank = rank_of(p.encoder, __fmul_rn(__fmul_rn(x, lift), inverse));
            const float value = __shfl_sync(kWarpMask, mine, int(rank), 16);
            if (i >= count) continue;
            const double missed = __fsub_rn(x, __fmul_rn(value, absmax)), wide = value;
            // f64 holds these products: it makes no difference that they are fused with the sums.
            error = __fma_rn(missed, missed, error);
            product = __fma_rn(double(x), wide, product);
            norm = __fma_rn(wide, wide, norm);
        }
        error = across_lanes(error), product = across_lanes(product), norm = across_lanes(norm);
        if (error < best_error) best = absmax, best_error = error, refined = __double2float_rn(__ddiv_rn(product, norm));
    }
    if (lane == 0) p.scales[block] = best_error < __longlong_as_double(0x7ff0000000000000) ? best : largest;
}

// Tables in shared memory.
struct Values {
    float by_rank[16], by_code[16];

    // All threads of the block must come here.
    __device__ __forceinline__ void fill(const Params& p) {
        if (threadIdx.x < 16) by_rank[threadIdx.x] = p.value[threadIdx.x], by_code[threadIdx.x] = p.before.codebook.value[threadIdx.x];
        __syncthreads();
    }

    // The next rank whose value lies in a direction, and how far it is: 0 if there is none.
    __device__ __forceinline__ float step(uint32_t rank, float direction, float absmax, uint32_t& to) const {
        const float from = by_rank[rank];
        to = rank;
        if (direction > 0.0f) {
#pragma unroll 1
            while (to < 15 && by_rank[to] == from) ++to;
        } else if (direction < 0.0f) {
#pragma unroll 1
            while (to > 0 && by_rank[to] == from) --to;
        }
        return __fmul_rn(fabsf(__fsub_rn(by_rank[to], from)), absmax);
    }
};

// Eight elements of one block, and the ranks of their nearest values. Those that do not exist have that of zero.
struct Piece {
    uint64_t first;
    int count;
    float x[8], absmax;
    uint32_t rank[8];

    __device__ __forceinline__ Piece(const Params& p, uint64_t first, uint64_t end) : first(first) {
        count = first < end ? int(min(end - first, uint64_t(8))) : 0;
        Eight<float> eight;
        if (count == 8)
            eight.load(p.wanted + first);
        else
            eight.load_part(p.wanted + first, count);
        eight.widen(x);
        const uint64_t block[1] = {count ? first >> p.before.block_shift : 0};
        float scale[1];
        p.absmax.load(block, scale);
        absmax = scale[0];
        float normal[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) normal[j] = x[j];
        const bool positive = absmax > 0.0f;
        if (positive) normalize(absmax, normal);
#pragma unroll
        for (int j = 0; j < 8; ++j) rank[j] = rank_of(p.encoder, positive && j < count ? normal[j] : 0.0f);
    }

    // The weight before the merge, at these places.
    __device__ __forceinline__ void before(const Params& p, const Values& values, float (&w)[8]) const {
        const uint64_t block[1] = {count ? first >> p.before.block_shift : 0};
        float scale[1];
        p.before.absmax.load(block, scale);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const uint32_t byte = j / 2 * 2 < count ? p.before.packed[first / 2 + j / 2] : 0;
            w[j] = __fmul_rn(values.by_code[byte >> (j % 2 ? 0 : 4) & 15], scale[0]);
        }
        round_to(p.before.dtype, w);
    }

    __device__ __forceinline__ void store(const Params& p) const {
        uint32_t codes = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) codes |= (uint32_t(p.encoder.codes >> (4 * rank[j])) & 15) << (4 * (j ^ 1));
        if (count == 8) {
            __stcs(reinterpret_cast<uint32_t*>(p.packed + first / 2), codes);
            return;
        }
#pragma unroll 1
        for (int i = 0; i < (count + 1) / 2; ++i) p.packed[first / 2 + i] = uint8_t(codes >> (8 * i));
    }
};

// A number of [0, 1) that depends on its arguments alone (SplitMix64, Steele et al. 2014).
__device__ __forceinline__ float uniform(uint64_t seed, uint64_t index) {
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return __fmul_rn(float(uint32_t((z ^ z >> 31) >> 40)), 5.9604644775390625e-8f);
}

extern "C" __global__ void __launch_bounds__(kThreads) nf4_requantize_codes(const __grid_constant__ Params p) {
    __shared__ Values values;
    values.fill(p);
    Piece piece(p, (uint64_t(blockIdx.x) * kThreads + threadIdx.x) * 8, p.numel);
    if (piece.count == 0) return;
    if (p.stochastic) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float missed = __fsub_rn(piece.x[j], __fmul_rn(values.by_rank[piece.rank[j]], piece.absmax));
            uint32_t to;
            const float step = values.step(piece.rank[j], missed, piece.absmax, to);
            const bool moves = step > 0.0f && __fmul_rn(uniform(p.seed, piece.first + j), step) < fabsf(missed);
            if (moves && j < piece.count) piece.rank[j] = to;
        }
    }
    piece.store(p);
}

// What a step of an element along its delta gains, and where it leads.
struct Step {
    double missing;  // of the delta, before
    double gain;     // 0: there is no step
    uint32_t to;
    uint32_t bin;  // of the price: error per gain

    __device__ __forceinline__ Step(const Piece& piece, const Values& values, int j, float w) {
        const float x = piece.x[j], d = __fsub_rn(x, w), stored = __fmul_rn(values.by_rank[piece.rank[j]], piece.absmax);
        missing = double(d) * double(__fsub_rn(d, __fsub_rn(stored, w)));
        const float step = values.step(piece.rank[j], d, piece.absmax, to);
        gain = 0.0, bin = kBins;
        if (j >= piece.count) missing = 0.0;
        if (j >= piece.count || !(step > 0.0f)) return;
        const float along = __fmul_rn(2.0f, __fsub_rn(x, stored));
        const float price = __fdiv_rn(__fsub_rn(step, d > 0.0f ? along : -along), fabsf(d));
        gain = double(step) * double(fabsf(d));
        bin = price > 0.0f ? __float_as_uint(price) >> 19 : 0;
    }
};

// What all threads of a block make of their numbers.
struct Team {
    int64_t of_warp[kGainThreads / 32];

    __device__ __forceinline__ uint64_t largest(uint64_t x) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) x = max(x, uint64_t(__shfl_xor_sync(kWarpMask, x, step)));
        share(int64_t(x));
#pragma unroll 1
        for (uint32_t warp = 0; warp < kGainThreads / 32; ++warp) x = max(x, uint64_t(of_warp[warp]));
        __syncthreads();
        return x;
    }

    // The sum of the threads below, and of all.
    __device__ __forceinline__ int64_t below(int64_t x, int64_t& all) {
        int64_t sum = x;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int64_t other = __shfl_up_sync(kWarpMask, sum, step);
            if (threadIdx.x % 32 >= step) sum += other;
        }
        const int64_t of_mine = __shfl_sync(kWarpMask, sum, 31);
        share(of_mine);
        int64_t before = 0;
        all = 0;
#pragma unroll 1
        for (uint32_t warp = 0; warp < kGainThreads / 32; ++warp) {
            if (warp < threadIdx.x / 32) before += of_warp[warp];
            all += of_warp[warp];
        }
        __syncthreads();
        return before + sum - x;
    }

  private:
    __device__ __forceinline__ void share(int64_t x) {
        if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
        __syncthreads();
    }
};

extern "C" __global__ void __launch_bounds__(kGainThreads, 1) nf4_requantize_gain(const __grid_constant__ Params p) {
    __shared__ unsigned long long gains[kBins];
    __shared__ Values values;
    __shared__ Team team;
    __shared__ int64_t found_below;
    __shared__ uint32_t found;
    const uint64_t begin = blockIdx.x * p.panel, end = min(begin + p.panel, p.numel);
    for (uint32_t bin = threadIdx.x; bin < kBins; bin += kGainThreads) gains[bin] = 0;
    if (threadIdx.x == 0) found = kBins, found_below = 0;
    values.fill(p);

    // Once for the largest number, from which follows what the integers are multiples of.
    uint64_t top = 0;
#pragma unroll 1
    for (uint64_t first = begin + threadIdx.x * 8; first < end; first += kGainThreads * 8) {
        const Piece piece(p, first, end);
        float w[8];
        piece.before(p, values, w);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const Step step(piece, values, j, w[j]);
            top = max(top, uint64_t(__double_as_longlong(fabs(step.missing))));
            top = max(top, uint64_t(__double_as_longlong(step.gain)));
        }
    }
    top = team.largest(top);
    const double unit = top == 0 ? 1.0 : __longlong_as_double(int64_t((2045 + p.gain_bits - (top >> 52)) << 52));

    // Once for what is missing, and for the gains by price.
    int64_t mine = 0;
#pragma unroll 1
    for (uint64_t first = begin + threadIdx.x * 8; first < end; first += kGainThreads * 8) {
        const Piece piece(p, first, end);
        float w[8];
        piece.before(p, values, w);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const Step step(piece, values, j, w[j]);
            mine += __double2ll_rn(step.missing * unit);
            if (step.bin < kBins) atomicAdd(&gains[step.bin], (unsigned long long)__double2ll_rn(step.gain * unit));
        }
    }
    int64_t missing, all;
    team.below(mine, missing);  // its barriers also part the sums from what reads them

    // The price up to which steps are taken: of that price only the first.
    constexpr uint32_t kOwn = kBins / kGainThreads;
    int64_t sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kOwn; ++i) sum += int64_t(gains[threadIdx.x * kOwn + i]);
    sum = team.below(sum, all);
#pragma unroll
    for (uint32_t i = 0; i < kOwn; ++i) {
        const int64_t next = sum + int64_t(gains[threadIdx.x * kOwn + i]);
        if (sum < missing && missing <= next) found = threadIdx.x * kOwn + i, found_below = sum;
        sum = next;
    }
    if (threadIdx.x == 0 && missing <= 0) found = 0;
    __syncthreads();
    const uint32_t last = found;
    int64_t rest = missing - found_below;  // what the steps of the last price have to gain

    // Once to take them.
#pragma unroll 1
    for (uint64_t chunk = begin; chunk < end; chunk += kGainThreads * 8) {
        Piece piece(p, chunk + threadIdx.x * 8, end);
        float w[8];
        piece.before(p, values, w);
        int64_t gain[8], own = 0;
        uint32_t to[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const Step step(piece, values, j, w[j]);
            to[j] = step.bin < last ? step.to : piece.rank[j];
            gain[j] = step.bin == last && step.bin < kBins ? __double2ll_rn(step.gain * unit) : 0;
            if (gain[j]) to[j] = step.to;
            own += gain[j];
        }
        int64_t left = rest - team.below(own, all);
        rest -= all;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (gain[j] == 0 || 2 * left > gain[j]) piece.rank[j] = to[j];
            left -= gain[j];
        }
        if (piece.count) piece.store(p);
    }
}
