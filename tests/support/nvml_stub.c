/* A stub of NVIDIA's libnvidia-ml.so.1 for tests, at the C boundary: the real pynvml loads it through LD_LIBRARY_PATH.
 *
 * JF_STUB_GPUS lists the GPUs as NAME:MEMORY_MIB:COMPUTE, separated by commas; unset or empty: no GPU.
 * JF_STUB_CONTROL names a file that is read at every call, so that a test makes GPUs fail while a process runs. One line
 * each: `lost N` (every call for GPU number N says that it fell off the bus), `unknown N` ("Unknown Error"), `vanish N`
 * (it is not listed any more, from the next init on), `hang` (no call returns while the line is there).
 * Signatures, structures and codes as in NVIDIA's nvml.h. Functions that are not here are reported by pynvml as
 * "function not found", as with an old driver.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { GPU_IS_LOST = 15, UNKNOWN = 999 };
enum { MAX_GPUS = 16, MIB = 1024 * 1024 };

typedef struct { char name[96]; char uuid[96]; unsigned long long memory; int major, minor, number; } gpu_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2_t;

static gpu_t gpus[MAX_GPUS];
static unsigned int count;
static int initialised;

/* Whether the control file has the line `mode number`, or `mode` alone for a negative number. */
static int told(const char *mode, int number) {
    const char *path = getenv("JF_STUB_CONTROL");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[64], wanted[64];
    int found = 0;
    if (!file) return 0;
    snprintf(wanted, sizeof wanted, number < 0 ? "%s\n" : "%s %d\n", mode, number);
    while (!found && fgets(line, sizeof line, file)) found = strcmp(line, wanted) == 0;
    fclose(file);
    return found;
}

static void hang(void) { while (told("hang", -1)) usleep(10 * 1000); }

static void read_gpus(void) {
    const char *listed = getenv("JF_STUB_GPUS");
    char *copy = strdup(listed ? listed : ""), *rest = NULL;
    int number = 0;
    count = 0;
    for (char *item = strtok_r(copy, ",", &rest); item && count < MAX_GPUS; item = strtok_r(NULL, ",", &rest)) {
        gpu_t *gpu = &gpus[count];
        unsigned long long mib;
        if (sscanf(item, "%95[^:]:%llu:%d.%d", gpu->name, &mib, &gpu->major, &gpu->minor) != 4) {
            fprintf(stderr, "nvml stub: cannot read JF_STUB_GPUS item '%s'\n", item);
            abort();
        }
        gpu->memory = mib * MIB;
        gpu->number = number++;
        snprintf(gpu->uuid, sizeof gpu->uuid, "GPU-00000000-0000-4000-8000-%012d", gpu->number);
        if (!told("vanish", gpu->number)) count++;
    }
    free(copy);
}

static int copy_text(char *out, unsigned int size, const char *text) {
    if (strlen(text) >= size) return INSUFFICIENT_SIZE;
    strcpy(out, text);
    return SUCCESS;
}

/* What every call begins with. */
static int ready(void) {
    hang();
    return initialised ? SUCCESS : UNINITIALIZED;
}

/* The same for a call about one GPU. A handle is a pointer into gpus[]; anything else is not ours. */
static int ready_for(const gpu_t *gpu) {
    int code = ready();
    if (code != SUCCESS) return code;
    if (gpu < gpus || gpu >= gpus + count) return INVALID_ARGUMENT;
    if (told("lost", gpu->number)) return GPU_IS_LOST;
    return told("unknown", gpu->number) ? UNKNOWN : SUCCESS;
}

int nvmlInitWithFlags(unsigned int flags) { (void)flags; hang(); read_gpus(); initialised = 1; return SUCCESS; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    int code = ready();
    initialised = 0;
    return code;
}

const char *nvmlErrorString(int code) {
    switch (code) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case GPU_IS_LOST: return "GPU is lost";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *out, unsigned int size) {
    int code = ready();
    return code == SUCCESS ? copy_text(out, size, "535.183.01") : code;
}

int nvmlDeviceGetCount_v2(unsigned int *out) {
    int code = ready();
    if (code == SUCCESS) *out = count;
    return code;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, gpu_t **out) {
    int code = ready_for(index < count ? &gpus[index] : NULL);
    if (code == SUCCESS) *out = &gpus[index];
    return code;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, gpu_t **out) {
    int code = ready();
    if (code != SUCCESS) return code;
    for (unsigned int i = 0; i < count; i++)
        if (strcmp(gpus[i].uuid, uuid) == 0) {
            *out = &gpus[i];
            return ready_for(&gpus[i]);
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(gpu_t *gpu, char *out, unsigned int size) {
    int code = ready_for(gpu);
    return code == SUCCESS ? copy_text(out, size, gpu->uuid) : code;
}

int nvmlDeviceGetName(gpu_t *gpu, char *out, unsigned int size) {
    int code = ready_for(gpu);
    return code == SUCCESS ? copy_text(out, size, gpu->name) : code;
}

int nvmlDeviceGetMemoryInfo(gpu_t *gpu, memory_t *out) {
    int code = ready_for(gpu);
    if (code == SUCCESS) *out = (memory_t){.total = gpu->memory, .free = gpu->memory, .used = 0};
    return code;
}

int nvmlDeviceGetMemoryInfo_v2(gpu_t *gpu, memory_v2_t *out) {
    int code = ready_for(gpu);
    if (code == SUCCESS)
        *out = (memory_v2_t){.version = out->version, .total = gpu->memory, .reserved = 0, .free = gpu->memory, .used = 0};
    return code;
}

int nvmlDeviceGetCudaComputeCapability(gpu_t *gpu, int *major, int *minor) {
    int code = ready_for(gpu);
    if (code == SUCCESS) {
        *major = gpu->major;
        *minor = gpu->minor;
    }
    return code;
}

/* None of the stub's GPUs can be partitioned. */
int nvmlDeviceGetMigMode(gpu_t *gpu, unsigned int *current, unsigned int *pending) {
    int code = ready_for(gpu);
    (void)current; (void)pending;
    return code == SUCCESS ? NOT_SUPPORTED : code;
}
