/* A CUDA driver that only says what there is, for the detection of devices.  It says what the
 * environment says at the time of the call:
 *
 *     CUDA_ON_CPU_INIT_RESULT  what cuInit returns (CUresult)      0
 *     CUDA_ON_CPU_DRIVER       newest version of CUDA              13000
 *     CUDA_ON_CPU_DEVICES      number of devices                   1
 *     CUDA_ON_CPU_CAPABILITY   compute capability                  80
 *     CUDA_ON_CPU_MEMORY_MIB   memory of a device                  1024
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    SYSTEM_DRIVER_MISMATCH = 803,
};

enum { /* CUdevice_attribute */
    WARP_SIZE = 10,
    MULTIPROCESSOR_COUNT = 16,
    COMPUTE_CAPABILITY_MAJOR = 75,
    COMPUTE_CAPABILITY_MINOR = 76,
};

static int is_initialized = 0;

static int setting(const char *name, int otherwise)
{
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags)
{
    (void)flags;
    int result = setting("CUDA_ON_CPU_INIT_RESULT", SUCCESS);
    if (result == SUCCESS && setting("CUDA_ON_CPU_DEVICES", 1) == 0)
        result = NO_DEVICE; /* as the driver does */
    is_initialized = result == SUCCESS;
    return result;
}

int cuDriverGetVersion(int *version)
{
    *version = setting("CUDA_ON_CPU_DRIVER", 13000);
    return SUCCESS;
}

int cuDeviceGetCount(int *count)
{
    *count = setting("CUDA_ON_CPU_DEVICES", 1);
    return is_initialized ? SUCCESS : NOT_INITIALIZED;
}

int cuDeviceGet(int *device, int ordinal)
{
    if (!is_initialized)
        return NOT_INITIALIZED;
    if (ordinal < 0 || ordinal >= setting("CUDA_ON_CPU_DEVICES", 1))
        return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int size, int device)
{
    (void)device;
    snprintf(name, (size_t)size, "Emulated");
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    (void)device;
    *bytes = (size_t)setting("CUDA_ON_CPU_MEMORY_MIB", 1024) << 20;
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    int capability = setting("CUDA_ON_CPU_CAPABILITY", 80);
    switch (attribute) {
    case WARP_SIZE: *value = 32; return SUCCESS;
    case MULTIPROCESSOR_COUNT: *value = 4; return SUCCESS;
    case COMPUTE_CAPABILITY_MAJOR: *value = capability / 10; return SUCCESS;
    case COMPUTE_CAPABILITY_MINOR: *value = capability % 10; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

int cuGetErrorString(int error, const char **text)
{
    switch (error) {
    case NO_DEVICE: *text = "no CUDA-capable device is detected"; return SUCCESS;
    case INVALID_DEVICE: *text = "invalid device ordinal"; return SUCCESS;
    case SYSTEM_DRIVER_MISMATCH:
        *text = "system has unsupported display driver / cuda driver combination";
        return SUCCESS;
    default: *text = NULL; return INVALID_VALUE;
    }
}
