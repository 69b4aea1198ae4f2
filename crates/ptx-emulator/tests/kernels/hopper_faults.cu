// One kernel per mistake with what is special to sm_90a. Each does the right thing with `broken` = 0 and makes its mistake
// with `broken` = 1.
#include "hopper.cuh"

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(256) name(float* x, float* y, int n, int broken)
#define CLUSTER(name) extern "C" __global__ void __cluster_dims__(2, 1, 1) name(float* x, float* y, int n, int broken)
#define TID (int)(blockIdx.x * blockDim.x + threadIdx.x)

CLUSTER(neighbour_before_its_start) {
    __shared__ float s[32];
    if (!broken) cluster_sync();
    store_cluster(map_rank(shared_address(&s[threadIdx.x]), cluster_rank() ^ 1), 1.0f);
    cluster_sync();
    y[TID] = s[threadIdx.x];
}

CLUSTER(neighbour_after_its_end) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;
    cluster_sync();
    y[TID] = load_cluster(map_rank(shared_address(&s[threadIdx.x]), cluster_rank() ^ 1));
    if (!broken) cluster_sync();
}

CLUSTER(neighbour_may_have_ended) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;
    cluster_sync();
    if (cluster_rank() == 0) y[TID] = load_cluster(map_rank(shared_address(&s[threadIdx.x]), 1));
    if (!broken) cluster_sync();
}

CLUSTER(neighbour_may_still_arrive) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) { barrier_init(&b, 1); fence_init(); }
    cluster_sync();
    if (cluster_rank() == 0 && threadIdx.x == 0) barrier_arrive_remote(map_rank(shared_address(&b), 1));
    if (cluster_rank() == 1 && !broken) barrier_wait(&b, 0);
}

CLUSTER(neighbour_may_still_store) {
    __shared__ float s[32];
    __shared__ uint64_t b;
    if (threadIdx.x == 0) { barrier_init(&b, 1); fence_init(); }
    cluster_sync();
    if (cluster_rank() == 0) {
        if (!broken) store_cluster(map_rank(shared_address(&s[threadIdx.x]), 1), 1.0f);
        __syncwarp();
        if (threadIdx.x == 0) barrier_arrive_remote(map_rank(shared_address(&b), 1));
        if (broken) store_cluster(map_rank(shared_address(&s[threadIdx.x]), 1), 1.0f);
    } else {
        barrier_wait(&b, 0);
    }
}

CLUSTER(neighbour_not_published) {
    __shared__ float s[32];
    cluster_sync();
    s[threadIdx.x] = 1.0f;
    if (broken) cluster_arrive_relaxed();
    else cluster_arrive();
    cluster_wait();
    y[TID] = load_cluster(map_rank(shared_address(&s[threadIdx.x]), cluster_rank() ^ 1));
    cluster_sync();
}

CLUSTER(neighbour_overwritten) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;
    cluster_sync();
    y[TID] = load_cluster(map_rank(shared_address(&s[threadIdx.x]), cluster_rank() ^ 1));
    if (!broken) cluster_sync();
    s[threadIdx.x] = 2.0f;
    cluster_sync();
}

CLUSTER(neighbour_in_the_own_window) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;
    cluster_sync();
    uint32_t a = shared_address(&s[threadIdx.x]);
    float v;
    asm volatile("ld.shared::cta.f32 %0, [%1];" : "=f"(v) : "r"(broken ? map_rank(a, cluster_rank() ^ 1) : a) : "memory");
    y[TID] = v;
    cluster_sync();
}

CLUSTER(rank_outside) {
    __shared__ float s[32];
    s[threadIdx.x] = 1.0f;
    cluster_sync();
    y[TID] = load_cluster(map_rank(shared_address(&s[threadIdx.x]), broken ? 2 : 1));
    cluster_sync();
}

CLUSTER(wait_without_arrival) {
    if (!broken) cluster_arrive();
    cluster_wait();
}

CLUSTER(two_arrivals) {
    cluster_arrive();
    if (!broken) cluster_wait();
    cluster_arrive();
    cluster_wait();
}

CLUSTER(cluster_deadlock) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) { barrier_init(&b, 1); fence_init(); }
    cluster_sync();
    if (threadIdx.x == 0) barrier_arrive_remote(map_rank(shared_address(&b), broken ? 0 : cluster_rank() ^ 1));
    if (!broken || cluster_rank() == 1) barrier_wait(&b, 0);
    cluster_sync();
}

CLUSTER(initialised_for_the_neighbour) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) {
        barrier_init(&b, 1);
        if (!broken) fence_init();
    }
    cluster_arrive_relaxed();
    cluster_wait();
    if (threadIdx.x == 0) barrier_arrive_remote(map_rank(shared_address(&b), cluster_rank() ^ 1));
    barrier_wait(&b, 0);
    cluster_sync();
}

CLUSTER(remote_store_not_waited) {
    __shared__ float s[32];
    __shared__ uint64_t b;
    if (threadIdx.x == 0) { barrier_init(&b, 1); fence_init(); barrier_expect(&b, 128); }
    cluster_sync();
    uint32_t other = cluster_rank() ^ 1;
    store_async(map_rank(shared_address(&s[threadIdx.x]), other), 1.0f, map_rank(shared_address(&b), other));
    if (!broken) barrier_wait(&b, 0);
    else cluster_sync();
    y[TID] = s[threadIdx.x];
    if (broken) barrier_wait(&b, 0);
    cluster_sync();
}

KERNEL(no_barrier_there) {
    __shared__ uint64_t b[2];
    if (threadIdx.x == 0) barrier_init(&b[0], 64);
    __syncthreads();
    barrier_arrive(&b[broken]);
    barrier_wait(&b[broken], 0);
}

KERNEL(initialised_without_a_barrier) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) barrier_init(&b, 64);
    if (!broken) __syncthreads();
    barrier_arrive(&b);
    barrier_wait(&b, 0);
}

KERNEL(initialised_twice) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) {
        barrier_init(&b, 64);
        if (!broken) barrier_inval(&b);
        barrier_init(&b, 64);
    }
    __syncthreads();
    barrier_arrive(&b);
    barrier_wait(&b, 0);
}

KERNEL(barrier_read_as_data) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) barrier_init(&b, 64);
    __syncthreads();
    if (broken) y[TID] = *(volatile float*)&b;
    barrier_arrive(&b);
    barrier_wait(&b, 0);
}

KERNEL(too_many_arrivals) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) barrier_init(&b, broken ? 63 : 64);
    __syncthreads();
    barrier_arrive(&b);
    barrier_wait(&b, 0);
    if (broken) barrier_wait(&b, 1);
}

KERNEL(too_few_arrivals) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) barrier_init(&b, broken ? 65 : 64);
    __syncthreads();
    barrier_arrive(&b);
    barrier_wait(&b, 0);
}

KERNEL(data_behind_an_mbarrier) {
    // The second warp waits for what the first one writes; broken waits for the phase before.
    __shared__ float s[64];
    __shared__ uint64_t b;
    if (threadIdx.x == 0) barrier_init(&b, 32);
    s[threadIdx.x] = 0.0f;
    __syncthreads();
    if (threadIdx.x < 32) {
        s[threadIdx.x] = 1.0f;
        barrier_arrive(&b);
    } else {
        barrier_wait(&b, broken);
        y[TID] = s[threadIdx.x - 32];
    }
}

KERNEL(one_lane_tells_for_its_warp) {
    // The first lane tells the second warp of what all lanes have written; broken without having met them.
    __shared__ float s[64];
    __shared__ uint64_t b;
    if (threadIdx.x == 0) barrier_init(&b, 1);
    s[threadIdx.x] = 0.0f;
    __syncthreads();
    if (threadIdx.x < 32) {
        s[threadIdx.x] = 1.0f;
        if (!broken) __syncwarp();
        if (threadIdx.x == 0) { s[32] = 2.0f; barrier_arrive(&b); }
    } else {
        barrier_wait(&b, 0);
        y[TID] = s[threadIdx.x - 32] + s[32];
    }
}

KERNEL(one_lane_gives_back_for_its_warp) {
    // The first lane lets the second warp overwrite what all lanes have read.
    __shared__ float s[64];
    __shared__ uint64_t b;
    if (threadIdx.x == 0) barrier_init(&b, 1);
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    if (threadIdx.x < 32) {
        y[TID] = s[31 - threadIdx.x];
        if (!broken) __syncwarp();
        if (threadIdx.x == 0) { y[TID] += s[40]; barrier_arrive(&b); }
    } else {
        barrier_wait(&b, 0);
        s[threadIdx.x - 32] = 2.0f;
        if (threadIdx.x == 32) s[40] = 3.0f;
    }
}

KERNEL(state_of_long_ago) {
    __shared__ uint64_t b;
    if (threadIdx.x == 0) barrier_init(&b, 64);
    __syncthreads();
    uint64_t first = barrier_arrive_state(&b);
    barrier_wait(&b, 0);
    uint64_t second = barrier_arrive_state(&b);
    barrier_wait(&b, 1);
    while (!barrier_test(&b, broken ? first : second)) { }
}

// The common part of what follows: `full` for one arrival, handed over.
#define FULL(count)                                     \
    __shared__ __align__(128) float s[64];              \
    __shared__ uint64_t full;                           \
    if (threadIdx.x == 0) { barrier_init(&full, count); fence_init(); } \
    __syncthreads();

KERNEL(loaded_without_handing_over) {
    __shared__ __align__(128) float s[64];
    __shared__ uint64_t full;
    if (threadIdx.x == 0) {
        barrier_init(&full, 1);
        if (!broken) fence_init();
        barrier_expect(&full, 256);
        bulk_load(s, x, 256, &full);
    }
    __syncthreads();
    barrier_wait(&full, 0);
    y[TID] = s[threadIdx.x];
}

KERNEL(load_not_waited) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, 256); bulk_load(s, x, 256, &full); }
    if (!broken) barrier_wait(&full, 0);
    else __syncthreads();
    y[TID] = s[threadIdx.x];
    barrier_wait(&full, 0);
}

KERNEL(load_waited_by_another_warp) {
    FULL(1)
    __shared__ uint64_t told;
    if (threadIdx.x == 0) { barrier_init(&told, 32); barrier_expect(&full, 256); bulk_load(s, x, 256, &full); }
    __syncthreads();
    if (threadIdx.x < 32) {
        barrier_wait(&full, 0);
        // Tells the other warp, but publishes nothing.
        if (broken) asm volatile("mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(&told)) : "memory");
        else barrier_arrive(&told);
    } else {
        barrier_wait(&told, 0);
        y[TID] = s[threadIdx.x];
    }
}

KERNEL(load_tried_once) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, 256); bulk_load(s, x, 256, &full); }
    if (!broken) while (!barrier_try(&full, 0)) { }
    else barrier_try(&full, 0);
    y[TID] = s[threadIdx.x];
    barrier_wait(&full, 0);
}

KERNEL(fewer_bytes_expected) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, broken ? 0 : 256); bulk_load(s, x, 256, &full); }
    barrier_wait(&full, 0);
    y[TID] = s[threadIdx.x];
}

KERNEL(more_bytes_expected) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, broken ? 272 : 256); bulk_load(s, x, 256, &full); }
    barrier_wait(&full, 0);
    y[TID] = s[threadIdx.x];
}

KERNEL(load_never_waited) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, 256); bulk_load(s, x, 256, &full); }
    if (!broken) barrier_wait(&full, 0);
}

KERNEL(load_misaligned) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, 240); bulk_load(s, x + broken, 240, &full); }
    barrier_wait(&full, 0);
}

KERNEL(load_outside) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, 128); bulk_load(s + (broken ? 36 : 32), x, 128, &full); }
    barrier_wait(&full, 0);
}

KERNEL(load_source_changes) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, 256); bulk_load(s, x, 256, &full); }
    if (broken) x[TID] = -1.0f;
    barrier_wait(&full, 0);
}

KERNEL(load_over_data_in_use) {
    FULL(1)
    if (threadIdx.x == 0) { barrier_expect(&full, 256); bulk_load(s, x, 256, &full); }
    barrier_wait(&full, 0);
    float v = s[threadIdx.x];
    if (!broken) __syncthreads();
    if (threadIdx.x == 32) { barrier_expect(&full, 256); bulk_load(s, x, 256, &full); }
    barrier_wait(&full, 1);
    y[TID] = v + s[threadIdx.x];
}

KERNEL(load_over_ordinary_writes) {
    FULL(1)
    s[threadIdx.x] = 1.0f;
    if (!broken) fence_async();
    __syncthreads();
    if (threadIdx.x == 0) { barrier_expect(&full, 256); bulk_load(s, x, 256, &full); }
    barrier_wait(&full, 0);
    y[TID] = s[threadIdx.x];
}

KERNEL(stored_without_handing_over) {
    __shared__ __align__(128) float s[64];
    s[threadIdx.x] = 1.0f;
    if (!broken) fence_async();
    __syncthreads();
    if (threadIdx.x == 0) { bulk_store(y, s, 256); bulk_commit(); bulk_wait_read<0>(); }
}

KERNEL(stored_without_a_barrier) {
    __shared__ __align__(128) float s[64];
    s[threadIdx.x] = 1.0f;
    fence_async();
    if (!broken) __syncthreads();
    if (threadIdx.x == 32) { bulk_store(y, s, 256); bulk_commit(); bulk_wait_read<0>(); }
}

KERNEL(store_source_overwritten) {
    __shared__ __align__(128) float s[64];
    s[threadIdx.x] = 1.0f;
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) { bulk_store(y, s, 256); bulk_commit(); if (!broken) bulk_wait_read<0>(); else bulk_wait_read<1>(); }
    __syncthreads();
    s[threadIdx.x] = 2.0f;
    if (threadIdx.x == 0) bulk_wait<0>();
}

KERNEL(store_not_waited) {
    __shared__ __align__(128) float s[64];
    s[threadIdx.x] = 1.0f;
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) { bulk_store(y, s, 256); bulk_commit(); if (!broken) bulk_wait_read<0>(); }
}

KERNEL(store_not_committed) {
    __shared__ __align__(128) float s[64];
    s[threadIdx.x] = 1.0f;
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) { bulk_store(y, s, 256); if (!broken) bulk_commit(); bulk_wait_read<0>(); }
}

KERNEL(stored_data_read_back_early) {
    __shared__ __align__(128) float s[64];
    s[threadIdx.x] = 1.0f;
    fence_async();
    __syncthreads();
    if (threadIdx.x == 0) {
        bulk_store(y, s, 256);
        bulk_commit();
        if (broken) bulk_wait_read<0>();
        else bulk_wait<0>();
        x[0] = y[1];
    }
}

KERNEL(no_tensor_map) {
    FULL(1)
    if (threadIdx.x == 0) {
        barrier_expect(&full, 256);
        if (broken) tensor_load(s, (const Map*)x, 0, 0, &full);
        else bulk_load(s, x, 256, &full);
    }
    barrier_wait(&full, 0);
}

KERNEL(counted_copies_not_waited) {
    FULL(64)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(s + threadIdx.x)), "l"(x + TID));
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&full)) : "memory");
    barrier_wait(&full, broken);
    y[TID] = s[broken ? threadIdx.x : 63 - threadIdx.x];
    barrier_wait(&full, 0);
}

extern "C" __global__ void __launch_bounds__(384, 1) registers_that_nobody_gives(float* x, float* y, int n, int broken) {
    if (threadIdx.x >= 128) {
        if (!broken) asm volatile("setmaxnreg.dec.sync.aligned.u32 128;");
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    }
}

// Two 64 x 16 operands without swizzle, as the threads write them; 128 threads.
#define OPERANDS                                                             \
    __shared__ __align__(1024) uint32_t a[512], b[128];                      \
    float d[8];                                                              \
    for (int i = 0; i < 8; i++) { d[i] = 0.0f; pin(d[i]); }                  \
    for (int i = threadIdx.x; i < 512; i += 128) a[i] = 0x3f803f80;          \
    b[threadIdx.x] = 0x3f803f80;                                             \
    uint64_t da = matrix(shared_address(a), 128, 256, 0), db = matrix(shared_address(b), 128, 256, 0);
#define RESULT                                                               \
    for (int i = 0; i < 8; i++) pin(d[i]);                                   \
    float sum = 0.0f;                                                        \
    for (int i = 0; i < 8; i++) sum += d[i];                                 \
    y[TID] = sum;

KERNEL(product_of_what_was_not_handed_over) {
    OPERANDS
    if (!broken) fence_async();
    __syncthreads();
    wgmma_fence();
    product<false, false>(d, da, db, 1);
    wgmma_commit();
    wgmma_wait<0>();
    RESULT
}

KERNEL(product_without_a_barrier) {
    OPERANDS
    fence_async();
    if (!broken) __syncthreads();
    wgmma_fence();
    product<false, false>(d, da, db, 1);
    wgmma_commit();
    wgmma_wait<0>();
    RESULT
}

KERNEL(product_without_a_fence) {
    OPERANDS
    fence_async();
    __syncthreads();
    if (!broken) wgmma_fence();
    product<false, false>(d, da, db, 1);
    wgmma_commit();
    wgmma_wait<0>();
    RESULT
}

KERNEL(sums_read_early) {
    OPERANDS
    fence_async();
    __syncthreads();
    wgmma_fence();
    product<false, false>(d, da, db, 1);
    wgmma_commit();
    if (!broken) wgmma_wait<0>();
    else wgmma_wait<1>();
    RESULT
    wgmma_wait<0>();
}

KERNEL(product_not_committed) {
    OPERANDS
    fence_async();
    __syncthreads();
    wgmma_fence();
    product<false, false>(d, da, db, 1);
    if (!broken) wgmma_commit();
    wgmma_wait<0>();
    RESULT
    wgmma_commit();
    wgmma_wait<0>();
}

KERNEL(operand_overwritten) {
    OPERANDS
    fence_async();
    __syncthreads();
    wgmma_fence();
    product<false, false>(d, da, db, 1);
    wgmma_commit();
    if (!broken) wgmma_wait<0>();
    if (!broken) __syncthreads();
    b[threadIdx.x] = 0;
    wgmma_wait<0>();
    RESULT
}

KERNEL(operand_released_early) {
    // The second warpgroup overwrites what the first one has multiplied, once it is told that it may.
    __shared__ uint64_t empty;
    __shared__ __align__(1024) uint32_t a[512], b[128];
    if (threadIdx.x == 0) barrier_init(&empty, 128);
    for (int i = threadIdx.x; i < 512; i += 256) a[i] = 0x3f803f80;
    if (threadIdx.x < 128) b[threadIdx.x] = 0x3f803f80;
    fence_async();
    __syncthreads();
    if (threadIdx.x < 128) {
        uint64_t da = matrix(shared_address(a), 128, 256, 0), db = matrix(shared_address(b), 128, 256, 0);
        float d[8];
        wgmma_fence();
        product<false, false>(d, da, db, 0);
        wgmma_commit();
        if (broken) barrier_arrive(&empty);
        wgmma_wait<0>();
        if (!broken) barrier_arrive(&empty);
        RESULT
    } else {
        barrier_wait(&empty, 0);
        b[threadIdx.x - 128] = 0;
    }
}

KERNEL(fragment_changed) {
    OPERANDS
    fence_async();
    __syncthreads();
    uint32_t f[4] = {1, 2, 3, 4};
    for (int i = 0; i < 4; i++) pin(f[i]);
    wgmma_fence();
    product<false>(d, f, db, 1);
    wgmma_commit();
    if (!broken) wgmma_wait<0>();
    for (int i = 0; i < 4; i++) pin(f[i]);
    asm volatile("add.u32 %0, %0, 1;" : "+r"(f[2]));
    wgmma_wait<0>();
    RESULT
    y[TID] += f[2];
}

KERNEL(product_never_waited) {
    OPERANDS
    fence_async();
    __syncthreads();
    wgmma_fence();
    product<false, false>(d, da, db, 1);
    wgmma_commit();
    if (!broken) wgmma_wait<0>();
}

KERNEL(three_warps_multiply) {
    OPERANDS
    fence_async();
    __syncthreads();
    if (!broken || threadIdx.x < 96) {
        wgmma_fence();
        product<false, false>(d, da, db, 1);
        wgmma_commit();
        wgmma_wait<0>();
    }
    RESULT
}

KERNEL(warps_multiply_different_things) {
    OPERANDS
    fence_async();
    __syncthreads();
    wgmma_fence();
    product<false, false>(d, da + (broken && threadIdx.x < 64 ? 8 : 0), db, 1);
    wgmma_commit();
    wgmma_wait<0>();
    RESULT
}

KERNEL(pattern_not_aligned) {
    __shared__ __align__(1024) uint32_t a[64 * 32 + 32], b[16 * 32];
    float d[8];
    for (int i = threadIdx.x; i < 64 * 32 + 32; i += 128) a[i] = 0;
    for (int i = threadIdx.x; i < 16 * 32; i += 128) b[i] = 0;
    fence_async();
    __syncthreads();
    wgmma_fence();
    product<false, false>(d, matrix(shared_address(a) + (broken ? 128 : 0), 16, 1024, 1), matrix(shared_address(b), 16, 1024, 1), 0);
    wgmma_commit();
    wgmma_wait<0>();
    RESULT
}

KERNEL(operand_outside) {
    OPERANDS
    fence_async();
    __syncthreads();
    wgmma_fence();
    product<false, false>(d, da, matrix(shared_address(b) + (broken ? 256 : 0), 128, 256, 0), 1);
    wgmma_commit();
    wgmma_wait<0>();
    RESULT
}
