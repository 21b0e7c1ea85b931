/* A CUDA driver without a GPU: what Triton calls of libcuda, for tests/test_launch_path.py.

   It stands in for one chip, which stub_chip() describes. It reads from each module, a cubin, what the driver
   would know of the kernel in it, refuses a launch that the driver would refuse, and writes every other launch
   down, with the values of the kernel's parameters, in stub_launches. Nothing runs. Host addresses pass for
   the device's. */

#include <elf.h>
#include <string.h>

#include "cuda.h"

#define MOST_KERNELS 1024
#define MOST_LAUNCHES 1024
#define MOST_PARAMETERS 512
#define MOST_REGISTERS 65536 /* of one multiprocessor, and of one block */
#define MOST_THREADS 1024    /* of one block */
#define WITHOUT_ASKING 49152 /* bytes of shared memory that a block may use without cuFuncSetAttribute */

typedef struct {
    char name[256];
    int registers; /* of a thread */
    int parameters;
    int sizes[MOST_PARAMETERS]; /* bytes of each parameter */
    int shared_memory;          /* bytes that a launch may ask for */
} Kernel;

/* tests/launch_path.py has the same structure for ctypes. */
typedef struct {
    char name[256];
    unsigned grid[3], block[3], shared_memory;
    int cooperative, dependent; /* the launch's attributes; dependent: programmatic stream serialization */
    int other_attributes;       /* how many the launch has that are neither */
    int parameters;
    unsigned long long values[MOST_PARAMETERS]; /* of parameters up to 8 bytes, 0 for larger ones */
} Launch;

static struct {
    int arch, multiprocessors, shared_memory;
} chip;
static Kernel kernels[MOST_KERNELS];
static int number_of_kernels;
static int refusal;        /* the error with which every launch is refused, or 0 */
static int module_refusal; /* likewise every module */

Launch stub_launches[MOST_LAUNCHES];
int stub_number_of_launches;

void stub_chip(int arch, int multiprocessors, int shared_memory) {
    chip.arch = arch;
    chip.multiprocessors = multiprocessors;
    chip.shared_memory = shared_memory;
}

void stub_refuse(int error) { refusal = error; }

void stub_refuse_modules(int error) { module_refusal = error; }

/* Devices, contexts and memory: there is one of everything. */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_INVALID_VALUE                  ? "invalid argument"
            : error == CUDA_ERROR_OUT_OF_MEMORY                ? "out of memory"
            : error == CUDA_ERROR_INVALID_IMAGE                ? "device kernel image is invalid"
            : error == CUDA_ERROR_NOT_FOUND                    ? "named symbol not found"
            : error == CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES      ? "too many resources requested for launch"
            : error == CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE ? "too many blocks in cooperative launch"
            : error == CUDA_ERROR_LAUNCH_FAILED                ? "unspecified launch failure"
            : error == CUDA_ERROR_NOT_SUPPORTED                ? "operation not supported"
                                                               : "an error of the stub";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = chip.arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = chip.arch % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = chip.multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = chip.shared_memory; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = chip.shared_memory + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = MOST_REGISTERS; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
    *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
    /* What the driver's documentation demands. The innermost dimension comes first and has no stride. */
    if (rank < 1 || rank > 5 || (size_t)address % 16) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i < rank; i++)
        if (sizes[i] < 1 || box[i] < 1 || box[i] > 256 || steps[i] < 1 || steps[i] > 8)
            return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i + 1 < rank; i++)
        if (strides[i] % 16 || strides[i] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

/* Modules and kernels: one kernel a module. */

/* The attributes in a section .nv.info. Each is a format, a number and, in two bytes, a value or the length
   of what follows. */
static void read_attributes(Kernel *kernel, const unsigned char *at, const unsigned char *end) {
    enum { FOLLOWS = 4, PARAMETER = 0x17, REGISTERS = 0x2f };
    while (at + 4 <= end) {
        unsigned short length, ordinal;
        unsigned word;
        memcpy(&length, at + 2, 2);
        if (at[0] == FOLLOWS && at[1] == PARAMETER && length == 12) {
            memcpy(&ordinal, at + 8, 2);
            memcpy(&word, at + 12, 4);
            if (ordinal < MOST_PARAMETERS) kernel->sizes[ordinal] = word >> 18;
            if (ordinal >= kernel->parameters) kernel->parameters = ordinal + 1;
        }
        if (at[0] == FOLLOWS && at[1] == REGISTERS && length == 8) {
            memcpy(&word, at + 8, 4);
            if ((int)word > kernel->registers) kernel->registers = word;
        }
        at += 4 + (at[0] == FOLLOWS ? length : 0);
    }
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    const char *file = image;
    const Elf64_Ehdr *header = image;
    if (memcmp(file, ELFMAG, SELFMAG) || header->e_machine != EM_CUDA) return CUDA_ERROR_INVALID_IMAGE;
    if (module_refusal) return module_refusal;
    if (number_of_kernels == MOST_KERNELS) return CUDA_ERROR_OUT_OF_MEMORY;
    Kernel *kernel = &kernels[number_of_kernels++];
    memset(kernel, 0, sizeof *kernel);
    const Elf64_Shdr *sections = (const Elf64_Shdr *)(file + header->e_shoff);
    const char *names = file + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++) {
        const char *name = names + sections[i].sh_name;
        const unsigned char *start = (const unsigned char *)file + sections[i].sh_offset;
        if (!strncmp(name, ".nv.info", 8)) read_attributes(kernel, start, start + sections[i].sh_size);
        if (!strncmp(name, ".nv.info.", 9)) strncpy(kernel->name, name + 9, sizeof kernel->name - 1);
    }
    kernel->shared_memory = WITHOUT_ASKING;
    *module = (CUmodule)kernel;
    return kernel->parameters > MOST_PARAMETERS ? CUDA_ERROR_INVALID_IMAGE : CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    *function = (CUfunction)module;
    return strcmp(((Kernel *)module)->name, name) ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

/* Registers are given to a warp in units of 256, 8 for each of its threads. */
static int most_threads(const Kernel *kernel) {
    int each = (kernel->registers + 7) / 8 * 8;
    int fit = each ? MOST_REGISTERS / each / 32 * 32 : MOST_THREADS;
    return fit < MOST_THREADS ? fit : MOST_THREADS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    Kernel *kernel = (Kernel *)function;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = most_threads(kernel); break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    if (value < 0 || value > chip.shared_memory) return CUDA_ERROR_INVALID_VALUE;
    ((Kernel *)function)->shared_memory = value;
    return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    return CUDA_ERROR_NOT_SUPPORTED;
}

/* How many blocks of a kernel one multiprocessor holds at a time. */
static unsigned resident(const Kernel *kernel, unsigned threads, unsigned shared_memory) {
    unsigned of_multiprocessor = chip.arch == 80 || chip.arch == 90 || chip.arch == 100 ? 2048 : 1536;
    unsigned by_threads = of_multiprocessor / threads;
    unsigned by_registers = MOST_REGISTERS / ((kernel->registers + 7) / 8 * 8 * threads);
    unsigned by_memory = (chip.shared_memory + 1024) / (shared_memory + 1024);
    unsigned least = by_threads < by_registers ? by_threads : by_registers;
    return least < by_memory ? least : by_memory;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
    Kernel *kernel = (Kernel *)function;
    Launch launch = {
        .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
        .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
        .shared_memory = config->sharedMemBytes,
        .parameters = kernel->parameters,
    };
    strcpy(launch.name, kernel->name);
    for (unsigned i = 0; i < config->numAttrs; i++) {
        const CUlaunchAttribute *attribute = &config->attrs[i];
        if (attribute->id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
            launch.cooperative = attribute->value.cooperative;
        else if (attribute->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            launch.dependent = attribute->value.programmaticStreamSerializationAllowed;
        else
            launch.other_attributes++;
    }
    unsigned long long threads = 1;
    for (int i = 0; i < 3; i++) {
        threads *= launch.block[i];
        if (launch.grid[i] < 1 || launch.grid[i] > (i ? 65535u : 2147483647u)) return CUDA_ERROR_INVALID_VALUE;
    }
    if (threads < 1 || threads > MOST_THREADS) return CUDA_ERROR_INVALID_VALUE;
    if (launch.shared_memory > (unsigned)kernel->shared_memory) return CUDA_ERROR_INVALID_VALUE;
    if ((int)threads > most_threads(kernel)) return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
    if (launch.dependent && chip.arch < 90) return CUDA_ERROR_NOT_SUPPORTED;
    if (launch.cooperative) {
        unsigned long long blocks = (unsigned long long)launch.grid[0] * launch.grid[1] * launch.grid[2];
        if (blocks > (unsigned long long)chip.multiprocessors * resident(kernel, threads, launch.shared_memory))
            return CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE;
    }
    if (refusal) return refusal;
    for (int i = 0; i < kernel->parameters; i++)
        if (kernel->sizes[i] <= 8) memcpy(&launch.values[i], parameters[i], kernel->sizes[i]);
    if (stub_number_of_launches == MOST_LAUNCHES) return CUDA_ERROR_OUT_OF_MEMORY;
    stub_launches[stub_number_of_launches++] = launch;
    return CUDA_SUCCESS;
}
