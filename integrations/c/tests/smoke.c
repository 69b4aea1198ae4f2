/* Every call of the interface, from C and from C++. */

#include "lora_kernels.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "line %d: %s\nlast error: %s\n", __LINE__, #condition, lk_last_error());         \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)
#define OK(call) CHECK((call) == LK_STATUS_OK)
/* The call has to fail, with exactly this message. */
#define REFUSED(call, message)                                                                               \
    do {                                                                                                     \
        CHECK((call) == LK_STATUS_ARGUMENT);                                                                 \
        if (strcmp(lk_last_error(), message) != 0) {                                                         \
            fprintf(stderr, "line %d: wanted %s\ngot    %s\n", __LINE__, message, lk_last_error());          \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

enum { N = 6, K = 64, RANK = 3, TOKENS = 4 };

/* Numbers that are the same every time. */
static float number(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (float)(1 << 23) - 1.0f;
}

static void fill(float *values, size_t count) {
    for (size_t i = 0; i < count; i++) values[i] = number();
}

/* sum of w x, and scaling (x A^T) B^T; `size` gets the sum of magnitudes. */
static double product(const float *x, const float *w, const LkAdapter *adapter, size_t row, double *size) {
    double sum = 0;
    *size = 0;
    for (size_t k = 0; k < K; k++) sum += (double)x[k] * w[row * K + k], *size += fabs((double)x[k] * w[row * K + k]);
    if (adapter == NULL) return sum;
    const float *a = (const float *)adapter->lora_a, *b = (const float *)adapter->lora_b;
    for (size_t r = 0; r < adapter->rank; r++) {
        double v = 0, magnitude = 0;
        for (size_t k = 0; k < K; k++) v += (double)x[k] * a[r * K + k], magnitude += fabs((double)x[k] * a[r * K + k]);
        sum += adapter->scaling * v * b[row * adapter->rank + r];
        *size += fabs(adapter->scaling * magnitude * b[row * adapter->rank + r]);
    }
    return sum;
}

/* A sum of `terms` products in f32 is off by at most this share of the sum of magnitudes. */
static double bound(size_t terms, double size) { return (double)terms / (1 << 24) * size + 1e-30; }

int main(void) {
    CHECK(lk_abi_version() == LK_ABI_VERSION);
    CHECK(strlen(lk_version()) >= 5);
    CHECK(strcmp(lk_last_error(), "") == 0);

    static float w[N * K], x[TOKENS * K], a[2][RANK * K], b[2][N * RANK], bias[N], y[TOKENS * N];
    fill(w, N * K), fill(x, TOKENS * K), fill(bias, N);
    for (int i = 0; i < 2; i++) fill(a[i], RANK * K), fill(b[i], N * RANK);
    LkAdapter adapters[2] = {{a[0], b[0], NULL, RANK, 0.5}, {a[1], b[1], NULL, RANK, -2.0}};

    /* Codes: two ways to the same matrix, and back. */
    LkNf4 *nf4 = NULL, *copy = NULL;
    OK(lk_nf4_quantize(w, LK_F32, N, K, 64, true, &nf4));
    LkNf4Parts parts;
    OK(lk_nf4_parts(nf4, &parts));
    CHECK(parts.rows == N && parts.columns == K && parts.blocksize == 64 && parts.dtype == LK_F32);
    CHECK(parts.absmax == NULL && parts.nested_blocksize == 256);
    OK(lk_nf4_new(&parts, &copy));
    static float decoded[N * K], again[N * K];
    OK(lk_nf4_dequantize(nf4, LK_F32, decoded, N * K));
    OK(lk_nf4_dequantize(copy, LK_F32, again, N * K));
    CHECK(memcmp(decoded, again, sizeof decoded) == 0);
    for (size_t i = 0; i < N * K; i++) CHECK(fabsf(decoded[i] - w[i]) < 0.2f);
    lk_nf4_free(copy);
    OK(lk_nf4_quantize(w, LK_F32, N, K, 64, false, &copy));
    OK(lk_nf4_parts(copy, &parts));
    CHECK(parts.absmax != NULL && parts.nested_q == NULL && parts.codebook[15] == 1.0f);
    lk_nf4_free(copy);

    /* The product, with an adapter per token. */
    const int32_t index[TOKENS] = {1, -1, 0, 1};
    LkMatmul operands;
    memset(&operands, 0, sizeof operands);
    operands.tokens = TOKENS, operands.dtype = operands.adapter_dtype = LK_F32;
    operands.weight.n = N, operands.weight.k = K, operands.weight.nf4 = nf4;
    operands.x = x, operands.bias = bias, operands.y = y;
    operands.adapters = adapters, operands.adapter_count = 2, operands.adapter_index = index;
    OK(lk_matmul(&operands));
    for (size_t i = 0; i < TOKENS; i++) {
        for (size_t n = 0; n < N; n++) {
            double size, want = product(x + i * K, decoded, index[i] < 0 ? NULL : &adapters[index[i]], n, &size);
            want += bias[n], size += fabs(bias[n]);
            CHECK(fabs(y[i * N + n] - want) <= bound(K + RANK + 4, size));
        }
    }

    /* Merges: the merged weight gives what weight and adapter give together. */
    static float merged[N * K], unmerged[N * K];
    LkWeight dense = {N, K, w, NULL};
    LkMergeReport report;
    OK(lk_merge(&dense, LK_F32, adapters, 1, LK_F32, LK_F32, merged, &report));
    CHECK(report.retained_gain > 0.999 && report.relative_error < 1e-5 && report.changed_share > 0.99);
    for (size_t n = 0; n < N; n++) {
        double size, want = product(x, w, &adapters[0], n, &size), got = product(x, merged, NULL, n, &size);
        CHECK(fabs(got - want) <= 4 * bound(RANK + 4, size + fabs(want) + K));
    }
    LkWeight merged_weight = {N, K, merged, NULL};
    OK(lk_unmerge(&merged_weight, LK_F32, adapters, 1, LK_F32, LK_F32, unmerged));
    for (size_t i = 0; i < N * K; i++) CHECK(fabsf(unmerged[i] - w[i]) <= (RANK + 4) * 0x1p-24f * 8);
    /* The same in place, with a report and without. */
    static float place[N * K];
    LkWeight in_place = {N, K, place, NULL};
    for (int with_report = 0; with_report < 2; with_report++) {
        LkMergeReport same;
        memcpy(place, w, sizeof w);
        OK(lk_merge(&in_place, LK_F32, adapters, 1, LK_F32, LK_F32, place, with_report ? &same : NULL));
        CHECK(memcmp(place, merged, sizeof merged) == 0);
        CHECK(!with_report || memcmp(&same, &report, sizeof report) == 0);
    }
    OK(lk_unmerge(&in_place, LK_F32, adapters, 1, LK_F32, LK_F32, place));
    CHECK(memcmp(place, unmerged, sizeof unmerged) == 0);
    LkNf4 *merged_nf4 = NULL;
    OK(lk_nf4_merge(nf4, adapters, 1, LK_F32, 0.0, &merged_nf4, &report));
    CHECK(report.changed_share > 0.1);
    OK(lk_nf4_parts(merged_nf4, &parts));
    CHECK(parts.rows == N && parts.columns == K && parts.absmax == NULL);
    lk_nf4_free(merged_nf4);

    /* DoRA's scale brings every row of W + delta to its magnitude. */
    static float magnitude[N], scale[N];
    for (size_t n = 0; n < N; n++) magnitude[n] = 1.0f + (float)n;
    LkAdapter dora = adapters[0];
    dora.magnitude = magnitude;
    OK(lk_dora_scale(&dense, LK_F32, &dora, LK_F32, scale));
    for (size_t n = 0; n < N; n++) {
        double norm = 0;
        for (size_t k = 0; k < K; k++) norm += (double)merged[n * K + k] * merged[n * K + k];
        CHECK(fabs(scale[n] * sqrt(norm) / magnitude[n] - 1.0) < 1e-5);
    }

    /* What does not fit is refused, by name. */
    REFUSED(lk_nf4_quantize(w, 7, N, K, 64, true, &copy), "dtype: wanted LK_F32, LK_F16 or LK_BF16, got 7");
    REFUSED(lk_nf4_quantize(NULL, LK_F32, N, K, 64, true, &copy), "data: wanted a pointer, got NULL");
    REFUSED(lk_nf4_quantize(w, LK_F32, N, K, 48, true, &copy), "blocksize: wanted a power of two from 32 to 4096, got 48");
    REFUSED(lk_nf4_quantize(w, LK_F32, N, K, 64, true, NULL), "nf4: wanted a pointer, got NULL");
    CHECK(lk_nf4_quantize(w, LK_F32, SIZE_MAX, 2, 64, true, &copy) == LK_STATUS_ARGUMENT);
    CHECK(strncmp(lk_last_error(), "rows * columns: wanted a size that fits in memory", 48) == 0);
    REFUSED(lk_nf4_dequantize(nf4, LK_F32, decoded, N), "len: wanted 384, got 6");
    REFUSED(lk_nf4_dequantize(NULL, LK_F32, decoded, N * K), "nf4: wanted a pointer, got NULL");
    REFUSED(lk_matmul(NULL), "operands: wanted a pointer, got NULL");
    LkMatmul wrong = operands;
    wrong.x = NULL;
    REFUSED(lk_matmul(&wrong), "x: wanted a pointer, got NULL");
    wrong = operands, wrong.x = (const char *)x + 1;
    CHECK(lk_matmul(&wrong) == LK_STATUS_ARGUMENT);
    CHECK(strncmp(lk_last_error(), "x: wanted alignment to 4 bytes", 30) == 0);
    wrong = operands, wrong.adapter_count = 1;
    REFUSED(lk_matmul(&wrong), "adapter_index[0]: wanted -1, or an index of 1 adapters, got 1");
    wrong = operands, wrong.weight.k = K - 1;
    REFUSED(lk_matmul(&wrong), "weight.nf4: wanted shape [6, 63], got [6, 64]");
    wrong = operands, wrong.weight.dense = w;
    REFUSED(lk_matmul(&wrong), "weight.dense: wanted NULL beside weight.nf4, got a pointer");
    wrong = operands, wrong.adapter_dtype = LK_BF16;
    REFUSED(lk_matmul(&wrong), "adapter_dtype: wanted f32 or f32, got bf16");
    wrong = operands, wrong.adapters = &dora, wrong.adapter_count = 1, wrong.adapter_index = NULL;
    REFUSED(lk_matmul(&wrong), "adapters[0].magnitude: wanted NULL (row_scale is for DoRA), got a pointer");
    REFUSED(lk_merge(&dense, LK_F32, NULL, 0, LK_F32, LK_F32, merged, NULL), "adapters: wanted at least one, got none");
    REFUSED(lk_merge(&in_place, LK_F32, adapters, 1, LK_F32, LK_F32, place + 1, NULL),
            "merged: wanted memory of its own, or that of a weight of its type, got a part of the weight's");
    REFUSED(lk_merge(&in_place, LK_F32, adapters, 1, LK_F32, LK_BF16, place, NULL),
            "merged: wanted memory of its own, or that of a weight of its type, got a part of the weight's");
    REFUSED(lk_merge(&in_place, LK_F32, adapters, 1, LK_F32, LK_F32, NULL, NULL), "merged: wanted a pointer, got NULL");
    place[N * K - 1] = INFINITY;
    memcpy(again, place, sizeof place);
    REFUSED(lk_merge(&in_place, LK_F32, adapters, 1, LK_F32, LK_F32, place, NULL),
            "weight[5, 63], adapted: wanted a finite f32, got inf");
    CHECK(memcmp(again, place, sizeof place) == 0);
    REFUSED(lk_unmerge(&dense, LK_F32, &dora, 1, LK_F32, LK_F32, unmerged),
            "adapters[0].magnitude: wanted NULL: DoRA cannot be unmerged here, got a pointer");
    REFUSED(lk_dora_scale(&dense, LK_F32, &adapters[0], LK_F32, scale), "adapter.magnitude: wanted a pointer, got NULL");
    lk_nf4_free(nf4);
    lk_nf4_free(NULL);

    /* A GPU, or a message that says why there is none. */
    LkQueue *queue = NULL;
    LkStatus status = lk_queue_new(0, NULL, &queue);
    CHECK((status == LK_STATUS_OK && queue != NULL) || (status == LK_STATUS_NO_DEVICE && queue == NULL));
    if (status != LK_STATUS_OK) CHECK(strncmp(lk_last_error(), "no usable CUDA device: ", 23) == 0);
    lk_queue_free(queue);
    LkCudaMatmul launch;
    memset(&launch, 0, sizeof launch);
    size_t bytes;
    REFUSED(lk_cuda_matmul(NULL, &launch), "queue: wanted a pointer, got NULL");
    REFUSED(lk_cuda_matmul_scratch(NULL, &launch, &bytes), "queue: wanted a pointer, got NULL");
    REFUSED(lk_cuda_nf4_quantize(NULL, 0, LK_F32, 0, 64, 0, 0), "queue: wanted a pointer, got NULL");
    LkCudaExpertMatmul mixture;
    memset(&mixture, 0, sizeof mixture);
    REFUSED(lk_cuda_expert_groups_bytes(NULL, 4, 2, &bytes), "queue: wanted a pointer, got NULL");
    REFUSED(lk_cuda_expert_groups(NULL, 4, 2, 0, 0), "queue: wanted a pointer, got NULL");
    REFUSED(lk_cuda_expert_index(NULL, 2, 2, 1, 2, 0, 0, 0), "queue: wanted a pointer, got NULL");
    REFUSED(lk_cuda_expert_matmul(NULL, &mixture), "queue: wanted a pointer, got NULL");
    REFUSED(lk_cuda_expert_matmul_scratch(NULL, &mixture, &bytes), "queue: wanted a pointer, got NULL");
    CHECK(lk_cuda_adapters_bytes(3) == 3 * lk_cuda_adapters_bytes(1));
    lk_cuda_adapters_free(NULL);

    printf("all checks passed\n");
    return 0;
}
