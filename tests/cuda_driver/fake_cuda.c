/* A libcuda that runs nothing: it writes down the calls it gets, so that tests without a GPU see exactly what would reach
 * a driver. Prototypes are those of cuda.h, with its handles as plain pointers. */

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, STUB = 34, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_PTX = 218 };

struct Settings {
    int init_code, version, major, minor, refuse_ptx;
};
static struct Settings settings;
static const struct Settings DEFAULTS = {SUCCESS, 12000, 9, 0, 0};

static char calls[1 << 16];
static size_t used;
static int capturing;
static _Thread_local void *current;
static char context[1], modules[512][256];
static int module_count, handle_count;

/* For the tests. */

void fake_reset(void) {
    settings = DEFAULTS;
    used = 0;
    capturing = module_count = handle_count = 0;
}

struct Settings *fake_settings(void) { return &settings; }

/* The calls since the last time, one per line. */
const char *fake_calls(void) {
    if (used == 0) return "";
    used = 0;
    return calls;
}

static void note(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    used += vsnprintf(calls + used, sizeof calls - used, format, arguments);
    va_end(arguments);
    used += snprintf(calls + used, sizeof calls - used, "\n");
}

static void *handle(void) { return (void *)(long)(0x1000 + 16 * ++handle_count); }

/* Devices and contexts. */

Result cuInit(unsigned flags) { return settings.init_code; }
Result cuDriverGetVersion(int *version) { return *version = settings.version, SUCCESS; }
Result cuGetErrorName(Result code, const char **name) { return *name = "CUDA_ERROR_FAKE", SUCCESS; }
Result cuGetErrorString(Result code, const char **text) { return *text = "the fake driver says no", SUCCESS; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal == 0 ? SUCCESS : INVALID_DEVICE; }
Result cuDevicePrimaryCtxRetain(void **ctx, int device) { return *ctx = context, SUCCESS; }
Result cuDevicePrimaryCtxRelease_v2(int device) { return SUCCESS; }
Result cuCtxGetCurrent(void **ctx) { return *ctx = current, SUCCESS; }
Result cuCtxSynchronize(void) { return note("cuCtxSynchronize"), SUCCESS; }

Result cuCtxSetCurrent(void *ctx) {
    note("cuCtxSetCurrent");
    current = ctx;
    return SUCCESS;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
        case 16: *value = 132; break;         /* multiprocessors */
        case 75: *value = settings.major; break;
        case 76: *value = settings.minor; break;
        case 97: *value = 232448; break;      /* shared memory with opt-in */
        case 115: *value = 1; break;          /* memory pools */
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}

/* Streams, events, memory, graphs. */

Result cuStreamCreate(void **stream, unsigned flags) { return *stream = handle(), SUCCESS; }
Result cuStreamDestroy_v2(void *stream) { return SUCCESS; }
Result cuStreamSynchronize(void *stream) { return note("cuStreamSynchronize"), SUCCESS; }
Result cuStreamIsCapturing(void *stream, int *status) { return *status = capturing, SUCCESS; }
Result cuStreamBeginCapture_v2(void *stream, int mode) { return capturing = 1, SUCCESS; }
Result cuStreamEndCapture(void *stream, void **graph) { return capturing = 0, *graph = NULL, SUCCESS; }
Result cuEventCreate(void **event, unsigned flags) { return *event = handle(), SUCCESS; }
Result cuEventDestroy_v2(void *event) { return SUCCESS; }
Result cuEventRecord(void *event, void *stream) { return note("cuEventRecord %p on %p", event, stream), SUCCESS; }
Result cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return note("cuStreamWaitEvent %p on %p", event, stream), SUCCESS; }
Result cuMemAllocAsync(unsigned long long *address, size_t bytes, void *stream) { return note("cuMemAllocAsync"), *address = 0x7000000000, SUCCESS; }
Result cuMemFreeAsync(unsigned long long address, void *stream) { return note("cuMemFreeAsync"), SUCCESS; }

Result cuMemcpyHtoDAsync_v2(unsigned long long address, const void *host, size_t bytes, void *stream) {
    note("cuMemcpyHtoDAsync %zu bytes to %llx on %p", bytes, address, stream);
    return current ? SUCCESS : INVALID_CONTEXT;
}

/* Modules and launches. A module's handle is its place in `modules`, a function's the name it was asked for. */

Result cuModuleLoadDataEx(void **module, const void *ptx, unsigned count, const int *options, void **values) {
    const char *target = strstr(ptx, ".target ");
    note("cuModuleLoadDataEx %.*s", target ? (int)strcspn(target, "\n") : 0, target);
    if (!current) return INVALID_CONTEXT;
    if (settings.refuse_ptx) {
        char *log = NULL;
        size_t size = 0;
        for (unsigned i = 0; i < count; i++) {
            if (options[i] == 5) log = values[i];         /* CU_JIT_ERROR_LOG_BUFFER */
            if (options[i] == 6) size = (size_t)values[i]; /* CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES */
        }
        snprintf(log, size, "ptxas fatal : unresolved extern function 'f'");
        return INVALID_PTX;
    }
    *module = modules[module_count++];
    return SUCCESS;
}

static char functions[4096][128];
static int function_count;

Result cuModuleGetFunction(void **function, void *module, const char *name) {
    strncpy(functions[function_count], name, 127);
    *function = functions[function_count++ % 4095];
    return current ? SUCCESS : INVALID_CONTEXT;
}

Result cuFuncGetAttribute(int *value, int attribute, void *function) { return *value = 1024, SUCCESS; }

Result cuFuncSetAttribute(void *function, int attribute, int value) {
    /* 8 is the dynamic shared memory. */
    return attribute == 8 && value == 232448 - 1024 ? SUCCESS : INVALID_VALUE;
}

Result cuLaunchKernel(const char *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                      unsigned shared, void *stream, void **params, void **extra) {
    note("cuLaunchKernel %s (%u %u %u) (%u %u %u) %u on %p with %llx", function, gx, gy, gz, bx, by, bz, shared, stream,
         *(unsigned long long *)params[0]);
    if (!current) return INVALID_CONTEXT;
    return gx && gy && gz ? SUCCESS : INVALID_VALUE;
}

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    struct {
        int id, pad, value[16];
    } *attributes;
    unsigned count;
} Config;

Result cuLaunchKernelEx(const Config *c, const char *function, void **params, void **extra) {
    char attributes[200] = "";
    for (unsigned i = 0; i < c->count; ++i) {
        const int *value = c->attributes[i].value;
        snprintf(attributes + strlen(attributes), 60, ", attribute %d is %d %d %d", c->attributes[i].id, value[0], value[1], value[2]);
    }
    note("cuLaunchKernelEx %s (%u %u %u) (%u %u %u) %u on %p with %llx%s", function, c->grid[0], c->grid[1], c->grid[2], c->block[0],
         c->block[1], c->block[2], c->shared, c->stream, *(unsigned long long *)params[0], attributes);
    return current ? SUCCESS : INVALID_CONTEXT;
}
