// What is special to sm_90a, in kernels that do something with it.
#include "hopper.cuh"

#define TID (int)(blockIdx.x * blockDim.x + threadIdx.x)

// A tile product of matrices whose images come from the host: y[64][16] = 0.5 * sum of two products.
struct Tile { const uint8_t* a; const uint8_t* b; float* y; int a_bytes, b_bytes; int a_leading, a_stride, a_layout, b_leading, b_stride, b_layout; int a_start, b_start; };

__device__ __forceinline__ void fetch_tile(const Tile& p, uint8_t* a, uint8_t* b, uint64_t* full) {
    if (threadIdx.x == 0) {
        barrier_init(full, 1);
        fence_init();
        barrier_expect(full, p.a_bytes + p.b_bytes);
        bulk_load(a, p.a, p.a_bytes, full);
        bulk_load(b, p.b, p.b_bytes, full);
    }
    __syncthreads();
    barrier_wait(full, 0);
}
__device__ __forceinline__ void store_tile(const Tile& p, const float (&d)[8]) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 8; i++) p.y[(16 * warp + lane / 4 + i / 2 % 2 * 8) * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2] = 0.5f * d[i];
}
template <bool TA, bool TB> __device__ __forceinline__ void tile(const Tile& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full;
    uint8_t *a = memory, *b = memory + 16384;
    fetch_tile(p, a, b, &full);
    float d[8];
    uint64_t da = matrix(shared_address(a) + p.a_start, p.a_leading, p.a_stride, p.a_layout);
    uint64_t db = matrix(shared_address(b) + p.b_start, p.b_leading, p.b_stride, p.b_layout);
    wgmma_fence();
    product<TA, TB>(d, da, db, 0);
    product<TA, TB>(d, da, db, 1);
    wgmma_commit();
    wgmma_wait<0>();
    store_tile(p, d);
}
extern "C" __global__ void __launch_bounds__(128) tile_nn(const __grid_constant__ Tile p) { tile<false, false>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_nt(const __grid_constant__ Tile p) { tile<false, true>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_tn(const __grid_constant__ Tile p) { tile<true, false>(p); }
extern "C" __global__ void __launch_bounds__(128) tile_tt(const __grid_constant__ Tile p) { tile<true, true>(p); }

// The same with A in registers; its image is plain, 64 rows of 16.
extern "C" __global__ void __launch_bounds__(128) tile_registers(const __grid_constant__ Tile p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full;
    uint8_t *image = memory, *b = memory + 16384;
    fetch_tile(p, image, b, &full);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t a[4];
    for (int i = 0; i < 4; i++) {
        a[i] = *(const uint32_t*)(image + (16 * warp + lane / 4 + i % 2 * 8) * 32 + (lane % 4 * 2 + i / 2 * 8) * 2);
        pin(a[i]);
    }
    float d[8];
    for (int i = 0; i < 8; i++) { d[i] = 0.0f; pin(d[i]); }
    uint64_t db = matrix(shared_address(b) + p.b_start, p.b_leading, p.b_stride, p.b_layout);
    for (int i = 0; i < 2; i++) {
        wgmma_fence();
        product<false>(d, a, db, 1);
        wgmma_commit();
        wgmma_wait<0>();
        for (int j = 0; j < 8; j++) pin(d[j]);
    }
    store_tile(p, d);
}

// D += -A B with f16 sums: m64n8k16, A and B as they come from the host without swizzle.
extern "C" __global__ void __launch_bounds__(128) tile_f16(const __grid_constant__ Tile p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full;
    uint8_t *a = memory, *b = memory + 16384;
    fetch_tile(p, a, b, &full);
    uint32_t d[2] = {0x3c003c00, 0x3c003c00};
    pin(d[0]); pin(d[1]);
    wgmma_fence();
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%0, %1}, %2, %3, 1, -1, 1, 0, 0;" : "+r"(d[0]), "+r"(d[1])
                 : "l"(matrix(shared_address(a), p.a_leading, p.a_stride, 0)), "l"(matrix(shared_address(b), p.b_leading, p.b_stride, 0)));
    wgmma_commit();
    wgmma_wait<0>();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 2; i++) ((uint32_t*)p.y)[(16 * warp + lane / 4 + i * 8) * 4 + lane % 4] = d[i];
}

// C[m][n] = A[m][k] B[n][k]: a producer warp with tensor maps, a consumer warpgroup, four stages; the third warpgroup only
// gives its registers away.
struct Product { Map a, b; float* c; int n, k; };
extern "C" __global__ void __launch_bounds__(384, 1) product_pipeline(const __grid_constant__ Product p) {
    constexpr int STAGES = 4;
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full[STAGES], empty[STAGES];
    if (threadIdx.x == 0) {
        for (int s = 0; s < STAGES; s++) { barrier_init(&full[s], 1); barrier_init(&empty[s], 128); }
        fence_init();
        asm volatile("prefetch.tensormap [%0];" ::"l"(&p.a) : "memory");
    }
    __syncthreads();
    int steps = (p.k + 63) / 64;
    auto a = [&](int s) { return memory + s * 16384; };
    auto b = [&](int s) { return memory + s * 16384 + 8192; };
    if (threadIdx.x >= 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x / 32 == 4) {
            uint32_t elected;
            asm volatile("{ .reg .pred p; elect.sync _|p, -1; selp.u32 %0, 1, 0, p; }" : "=r"(elected));
            if (elected)
                for (int i = 0; i < steps; i++) {
                    int s = i % STAGES;
                    barrier_wait(&empty[s], (i / STAGES & 1) ^ 1);
                    barrier_expect(&full[s], 16384 - (64 - 16) * 128);
                    tensor_load(a(s), &p.a, i * 64, blockIdx.y * 64, &full[s]);
                    tensor_load(b(s), &p.b, i * 64, blockIdx.x * 16, &full[s]);
                }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    float d[8];
    for (int i = 0; i < 8; i++) d[i] = 0.0f;
    for (int i = 0; i < steps; i++) {
        int s = i % STAGES;
        barrier_wait(&full[s], i / STAGES & 1);
        for (int j = 0; j < 8; j++) pin(d[j]);
        wgmma_fence();
        for (int j = 0; j < 4; j++)
            product<false, false>(d, matrix(shared_address(a(s)) + 32 * j, 16, 1024, 1), matrix(shared_address(b(s)) + 32 * j, 16, 1024, 1), i | j);
        wgmma_commit();
        wgmma_wait<0>();
        barrier_arrive(&empty[s]);
    }
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 8; i++) {
        int row = blockIdx.y * 64 + 16 * warp + lane / 4 + i / 2 % 2 * 8, column = blockIdx.x * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (column < p.n) p.c[row * p.n + column] = d[i];
    }
}

// A box of a tensor as it lies in shared memory; and, after doubling, stored through another map.
struct Box { Map from, to; uint8_t* y; int bytes; int x, y0, z; };
template <int D> __device__ __forceinline__ void box(const Box& p) {
    extern __shared__ __align__(1024) uint8_t memory[];
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1);
        fence_init();
        barrier_expect(&full, p.bytes);
        uint32_t to = shared_address(memory), b = shared_address(&full);
        if (D == 1) asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2}], [%3];" ::"r"(to), "l"(&p.from), "r"(p.x), "r"(b) : "memory");
        if (D == 2) asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&p.from), "r"(p.x), "r"(p.y0), "r"(b) : "memory");
        if (D == 3) asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to), "l"(&p.from), "r"(p.x), "r"(p.y0), "r"(p.z), "r"(b) : "memory");
    }
    __syncthreads();
    barrier_wait(&full, 0);
    for (int i = threadIdx.x; i < p.bytes; i += blockDim.x) p.y[i] = memory[i];
    __syncthreads();
    uint16_t* elements = (uint16_t*)memory;
    for (int i = threadIdx.x; i < p.bytes / 2; i += blockDim.x) elements[i] *= 2;
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t from = shared_address(memory);
        if (D == 1) asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%0, {%1}], [%2];" ::"l"(&p.to), "r"(p.x), "r"(from) : "memory");
        if (D == 2) asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&p.to), "r"(p.x), "r"(p.y0), "r"(from) : "memory");
        if (D == 3) asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&p.to), "r"(p.x), "r"(p.y0), "r"(p.z), "r"(from) : "memory");
        bulk_commit();
        bulk_wait_read<0>();
    }
}
extern "C" __global__ void box1(const __grid_constant__ Box p) { box<1>(p); }
extern "C" __global__ void box2(const __grid_constant__ Box p) { box<2>(p); }
extern "C" __global__ void box3(const __grid_constant__ Box p) { box<3>(p); }

// Sums over a cluster of four: every way to reach the others' memory.
extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(64) cluster_sums(const float* x, float* y) {
    __shared__ float mine[64], pushed[4][64], sent[4][64];
    __shared__ __align__(16) float given[4][64];
    __shared__ uint64_t barrier;
    int rank = cluster_rank(), t = threadIdx.x;
    if (t == 0) {
        barrier_init(&barrier, 2 * 64 + 1);
        fence_init();
    }
    mine[t] = x[TID];
    __syncthreads();
    cluster_sync();
    float pulled = 0.0f;
    for (int r = 0; r < 4; r++) {
        pulled += load_cluster(map_rank(shared_address(&mine[t]), r));
        store_cluster(map_rank(shared_address(&pushed[rank][t]), r), mine[t]);
        store_async(map_rank(shared_address(&sent[rank][t]), r), mine[t], map_rank(shared_address(&barrier), r));
    }
    if (t == 0) {
        barrier_expect(&barrier, 4 * 64 * 4 + 4 * 256);
        fence_async();
        for (int r = 0; r < 4; r++)
            bulk_share(map_rank(shared_address(given[rank]), r), mine, 256, map_rank(shared_address(&barrier), r));
    }
    // Every thread of the neighbours to the left and right.
    barrier_arrive_remote(map_rank(shared_address(&barrier), (rank + 1) % 4));
    barrier_arrive_remote(map_rank(shared_address(&barrier), (rank + 3) % 4));
    barrier_wait(&barrier, 0);
    float arrived = 0.0f, lent = 0.0f;
    for (int r = 0; r < 4; r++) { arrived += sent[r][t]; lent += given[r][t]; }
    cluster_sync();
    float got = 0.0f;
    for (int r = 0; r < 4; r++) got += pushed[r][t];
    float* out = y + 5 * TID;
    out[0] = pulled; out[1] = got; out[2] = arrived; out[3] = lent;
    uint64_t generic;
    uint32_t of;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(generic) : "l"(&mine[t]), "r"(2));
    asm volatile("getctarank.u64 %0, %1;" : "=r"(of) : "l"(generic));
    out[4] = *(volatile float*)generic + 1000 * of;
    cluster_sync();
}

// Multicast: rank 0 sends to all.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32) multicast(const float* x, float* y) {
    __shared__ __align__(128) float data[32];
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1);
        fence_init();
        barrier_expect(&full, 128);
    }
    cluster_arrive_relaxed();
    cluster_wait();
    if (cluster_rank() == 0 && threadIdx.x == 0) bulk_load_multicast(data, x + 64 * blockIdx.x / 2, 128, &full, 3);
    barrier_wait(&full, 0);
    y[TID] = data[threadIdx.x];
    cluster_sync();
}

// cp.async whose arrival is counted, both ways; a state instead of a parity; a bulk store.
extern "C" __global__ void __launch_bounds__(64) arrivals(const float* x, float* y) {
    __shared__ float data[64];
    __shared__ __align__(16) float out[64];
    __shared__ uint64_t counted, more;
    int t = threadIdx.x;
    if (t == 0) { barrier_init(&counted, 128); barrier_init(&more, 64); }
    __syncthreads();
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(data + t)), "l"(x + TID));
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&counted)) : "memory");
    asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(shared_address(&more)) : "memory");
    uint64_t state = barrier_arrive_state(&more);
    barrier_arrive(&counted);
    while (!barrier_test(&more, state)) { }
    barrier_wait(&counted, 0);
    out[t] = 2 * data[63 - t];
    fence_async();
    __syncthreads();
    if (t == 0) {
        bulk_store(y + 64 * blockIdx.x, out, 256);
        bulk_commit();
        bulk_wait<0>();
        float v = y[64 * blockIdx.x + 5];
        if (v != out[5]) asm volatile("trap;");
    }
}

// One link of a chain of launches that overlap: y = x + w.
extern "C" __global__ void link(const float* x, const float* w, float* y, int waits) {
    float v = w[TID];
    if (waits) grid_wait();
    grid_launch();
    y[TID] = x[TID] + v;
}
