// One kernel per mistake. Each does the right thing with `broken` = 0 and makes its mistake with `broken` = 1.
#include <cstdint>

#define KERNEL(name) extern "C" __global__ void name(float* x, float* y, int n, int broken)
#define TID (int)(blockIdx.x * blockDim.x + threadIdx.x)

__device__ inline uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

KERNEL(read_behind_the_end) { y[TID] = x[TID + (broken && TID == n - 1)]; }
KERNEL(write_before_the_start) { y[TID - (broken && TID == 0)] = 1.0f; }
KERNEL(read_freed) { y[TID] = broken ? x[TID] : 0.0f; }
KERNEL(misaligned) { y[TID] = *(const float*)((const char*)x + (broken ? 2 : 0)); }
KERNEL(uninitialised_global) { if (!broken) y[TID] = 1.0f; x[TID] = y[TID]; }
KERNEL(write_constant_data) { float* p = y; if (broken) asm volatile("{ .reg .u64 t; mov.u64 %0, table; }" : "=l"(p)); *p = 1.0f; }
__constant__ float table[4] = {1, 2, 3, 4};
KERNEL(read_constant_data) { y[TID] = table[TID & 3]; }

KERNEL(uninitialised_shared) {
    __shared__ float s[64];
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    y[TID] = s[threadIdx.x + (broken ? 32 : 0)];
}

KERNEL(shared_outside) {
    __shared__ float s[32];
    __shared__ float other[32];
    s[threadIdx.x] = 1.0f;
    other[threadIdx.x] = 2.0f;
    __syncthreads();
    y[TID] = s[(threadIdx.x + 1) % 32 + (broken ? 31 : 0)] + other[threadIdx.x ^ 1];
}

KERNEL(dynamic_shared_outside) {
    extern __shared__ float d[];
    d[threadIdx.x + (broken ? 1 : 0)] = 1.0f;
    __syncthreads();
    y[TID] = d[threadIdx.x ^ 1];
}

KERNEL(uninitialised_register_stored) {
    uint32_t v;
    asm volatile("{ .reg .b32 t; .reg .pred p; setp.eq.s32 p, %1, 0; @p mov.b32 t, 7; add.u32 %0, t, 1; }" : "=r"(v) : "r"(broken));
    if (threadIdx.x == 0) y[0] = (float)v;
}

KERNEL(uninitialised_register_unused) {
    uint32_t v;
    // Moving and adding such a value is fine as long as it decides nothing.
    asm volatile("{ .reg .b32 t; .reg .pred p; setp.eq.s32 p, %1, 5; @p mov.b32 t, 7; add.u32 t, t, 1; setp.eq.s32 p, %1, %1; selp.b32 %0, 9, t, p; }" : "=r"(v) : "r"(broken));
    y[TID] = (float)v;
}

KERNEL(branch_on_uninitialised) {
    asm volatile("{ .reg .pred p, q; setp.eq.s32 p, %0, 0; @p setp.eq.s32 q, %0, 0; @q bra DONE; st.global.f32 [%1], 0f00000000; DONE: }" ::"r"(broken), "l"(y));
}

KERNEL(race_read_after_write) {
    __shared__ volatile float s0[64];
    float* s = (float*)s0;
    s0[threadIdx.x] = 0.0f;
    __syncthreads();
    s[threadIdx.x] = (float)threadIdx.x;
    if (!broken) __syncthreads();
    y[TID] = s[63 - threadIdx.x];
}

KERNEL(race_write_after_read) {
    __shared__ float s[64];
    s[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    float v = s[63 - threadIdx.x];
    if (!broken) __syncthreads();
    s[threadIdx.x] = v;
    __syncthreads();
    y[TID] = s[63 - threadIdx.x];
}

KERNEL(race_write_write) {
    __shared__ float s[64];
    s[broken ? threadIdx.x % 32 : threadIdx.x] = 1.0f;
    __syncthreads();
    y[TID] = s[threadIdx.x % 32];
}

KERNEL(race_of_bytes_is_none) {
    __shared__ uint8_t s[64];
    s[threadIdx.x] = (uint8_t)threadIdx.x;
    __syncthreads();
    y[TID] = s[63 - threadIdx.x];
}

KERNEL(race_inside_a_warp) {
    __shared__ volatile float s0[32];
    float* s = (float*)s0;
    s0[threadIdx.x] = 0.0f;
    __syncwarp();
    s[threadIdx.x] = (float)threadIdx.x;
    if (!broken) __syncwarp();
    y[TID] = s[31 - threadIdx.x];
}

KERNEL(race_inside_a_warp_over_data_in_use) {
    __shared__ volatile float s0[32];
    float* s = (float*)s0;
    s[threadIdx.x] = (float)threadIdx.x;
    __syncwarp();
    float v = s[31 - threadIdx.x];
    if (!broken) __syncwarp();
    s[threadIdx.x] = v;
    __syncwarp();
    y[TID] = s[31 - threadIdx.x];
}

KERNEL(race_named_barriers) {
    // Two pairs of warps, each with a barrier of its own; broken lets one pair read what the other writes.
    __shared__ volatile float s0[128];
    float* s = (float*)s0;
    s0[threadIdx.x] = 0.0f;
    __syncthreads();
    int pair = threadIdx.x / 64;
    s[threadIdx.x] = 1.0f;
    asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory");
    y[TID] = s[(threadIdx.x ^ 63) ^ (broken ? 64 : 0)];
}

KERNEL(race_of_blocks) { y[broken ? threadIdx.x : TID] = 1.0f; }
KERNEL(race_of_blocks_bytes_is_none) { ((uint8_t*)y)[blockIdx.x * 33 + threadIdx.x] = 1; }

KERNEL(divergent_barrier) {
    if (!broken || threadIdx.x % 32 < 16) asm volatile("bar.sync 0;");
    y[TID] = 1.0f;
}

KERNEL(exited_threads_do_not_count) {
    if ((int)threadIdx.x >= n) return;
    __syncthreads();
    y[TID] = 1.0f;
}

KERNEL(deadlock_between_barriers) {
    if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");
    else asm volatile("bar.sync %0, 64;" ::"r"(broken ? 2 : 1));
}

KERNEL(deadlock_of_lanes) {
    if (threadIdx.x < 16) __syncwarp(broken ? 0xffffffffu : 0xffffu);
    y[TID] = 1.0f;
}

KERNEL(named_barrier_counts) { asm volatile("bar.sync 3, %0;" ::"r"(broken ? (int)(64 + (threadIdx.x / 32) * 32) : 64)); }

KERNEL(copy_read_before_wait) {
    __shared__ float s[32];
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(s + threadIdx.x)), "l"(x + TID));
    asm volatile("cp.async.commit_group;");
    if (!broken) asm volatile("cp.async.wait_group 0;" ::: "memory");
    else asm volatile("cp.async.wait_group 1;" ::: "memory");
    y[TID] = s[threadIdx.x];
}

KERNEL(copy_without_commit) {
    __shared__ float s[32];
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(s + threadIdx.x)), "l"(x + TID));
    if (!broken) asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    y[TID] = s[threadIdx.x];
}

KERNEL(copy_read_by_another_thread) {
    __shared__ volatile float s0[64];
    float* s = (float*)s0;
    s0[threadIdx.x] = 0.0f;
    __syncthreads();
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(s + threadIdx.x)), "l"(x + TID));
    asm volatile("cp.async.wait_all;" ::: "memory");
    if (!broken) __syncthreads();
    y[TID] = s[63 - threadIdx.x];
}

KERNEL(copy_source_changes) {
    __shared__ float s[32];
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(s + threadIdx.x)), "l"(x + TID));
    if (broken) x[TID] = -1.0f;
    asm volatile("cp.async.wait_all;" ::: "memory");
    y[TID] = s[threadIdx.x];
}

KERNEL(copy_over_data_in_use) {
    __shared__ float s[64];
    s[threadIdx.x] = 1.0f;
    __syncthreads();
    float v = s[63 - threadIdx.x];
    if (!broken) __syncthreads();
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(s + threadIdx.x)), "l"(x + TID));
    asm volatile("cp.async.wait_all;" ::: "memory");
    y[TID] = v + s[threadIdx.x];
}

KERNEL(shuffle_from_a_missing_lane) {
    int v = threadIdx.x;
    if (threadIdx.x < 16) asm volatile("shfl.sync.bfly.b32 %0, %0, %1, 31, 0xffff;" : "+r"(v) : "r"(broken ? 16 : 8));
    y[TID] = (float)v;
}

KERNEL(shuffle_outside_of_its_mask) {
    int v = threadIdx.x;
    if (threadIdx.x < 16) asm volatile("shfl.sync.idx.b32 %0, %0, 0, 31, %1;" : "+r"(v) : "r"(broken ? 0xff : 0xffff));
    y[TID] = (float)v;
}

KERNEL(half_a_warp_multiplies) {
    uint32_t z = 0;
    float d[4] = {0, 0, 0, 0};
    if (!broken || threadIdx.x < 16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(z));
    y[TID] = d[0] + d[1] + d[2] + d[3];
}

KERNEL(trap_instruction) { if (broken && TID == 3) asm volatile("trap;"); }
KERNEL(endless_loop) { volatile float* p = x; while (broken && *p == *p) { } }

KERNEL(local_outside) {
    float a[8];
    for (int i = 0; i < 8; i++) a[i] = x[i];
    int i = (int)x[0] & 7;
    y[TID] = a[i + (broken ? 8 : 0)];
}
