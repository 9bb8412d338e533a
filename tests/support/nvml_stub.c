/* A stub of NVIDIA's libnvidia-ml.so.1 for tests, at the C boundary: the real pynvml loads it through LD_LIBRARY_PATH.
 *
 * JF_STUB_GPUS lists the GPUs as NAME:MEMORY_MIB:COMPUTE, separated by commas; unset or empty: no GPU.
 * Signatures, structures and codes as in NVIDIA's nvml.h. Functions that are not here are reported by pynvml as
 * "function not found", as with an old driver.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_GPUS = 16, MIB = 1024 * 1024 };

typedef struct { char name[96]; char uuid[96]; unsigned long long memory; int major, minor; } gpu_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2_t;

static gpu_t gpus[MAX_GPUS];
static unsigned int count;
static int initialised;

static void read_gpus(void) {
    const char *listed = getenv("JF_STUB_GPUS");
    char *copy = strdup(listed ? listed : ""), *rest = NULL;
    count = 0;
    for (char *item = strtok_r(copy, ",", &rest); item && count < MAX_GPUS; item = strtok_r(NULL, ",", &rest)) {
        gpu_t *gpu = &gpus[count];
        unsigned long long mib;
        if (sscanf(item, "%95[^:]:%llu:%d.%d", gpu->name, &mib, &gpu->major, &gpu->minor) != 4) {
            fprintf(stderr, "nvml stub: cannot read JF_STUB_GPUS item '%s'\n", item);
            abort();
        }
        gpu->memory = mib * MIB;
        snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-00000000-0000-4000-8000-%012u", count);
        count++;
    }
    free(copy);
}

static int copy_text(char *out, unsigned int size, const char *text) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

/* A handle is a pointer into gpus[]; anything else is not ours. */
static int valid(const gpu_t *gpu) { return gpu >= gpus && gpu < gpus + count; }

int nvmlInitWithFlags(unsigned int flags) { (void)flags; read_gpus(); initialised = 1; return SUCCESS; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    if (!initialised) return UNINITIALIZED;
    initialised = 0;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *out, unsigned int size) {
    return initialised ? copy_text(out, size, "535.183.01") : UNINITIALIZED;
}

int nvmlDeviceGetCount_v2(unsigned int *out) {
    if (!initialised) return UNINITIALIZED;
    *out = count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, gpu_t **out) {
    if (!initialised) return UNINITIALIZED;
    if (index >= count) return INVALID_ARGUMENT;
    *out = &gpus[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, gpu_t **out) {
    if (!initialised) return UNINITIALIZED;
    for (unsigned int i = 0; i < count; i++)
        if (strcmp(gpus[i].uuid, uuid) == 0) { *out = &gpus[i]; return SUCCESS; }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(gpu_t *gpu, char *out, unsigned int size) {
    if (!initialised) return UNINITIALIZED;
    return valid(gpu) ? copy_text(out, size, gpu->uuid) : INVALID_ARGUMENT;
}

int nvmlDeviceGetName(gpu_t *gpu, char *out, unsigned int size) {
    if (!initialised) return UNINITIALIZED;
    return valid(gpu) ? copy_text(out, size, gpu->name) : INVALID_ARGUMENT;
}

int nvmlDeviceGetMemoryInfo(gpu_t *gpu, memory_t *out) {
    if (!initialised) return UNINITIALIZED;
    if (!valid(gpu)) return INVALID_ARGUMENT;
    *out = (memory_t){.total = gpu->memory, .free = gpu->memory, .used = 0};
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(gpu_t *gpu, memory_v2_t *out) {
    if (!initialised) return UNINITIALIZED;
    if (!valid(gpu)) return INVALID_ARGUMENT;
    *out = (memory_v2_t){.version = out->version, .total = gpu->memory, .reserved = 0, .free = gpu->memory, .used = 0};
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(gpu_t *gpu, int *major, int *minor) {
    if (!initialised) return UNINITIALIZED;
    if (!valid(gpu)) return INVALID_ARGUMENT;
    *major = gpu->major;
    *minor = gpu->minor;
    return SUCCESS;
}

/* None of the stub's GPUs can be partitioned. */
int nvmlDeviceGetMigMode(gpu_t *gpu, unsigned int *current, unsigned int *pending) {
    (void)current; (void)pending;
    if (!initialised) return UNINITIALIZED;
    return valid(gpu) ? NOT_SUPPORTED : INVALID_ARGUMENT;
}
