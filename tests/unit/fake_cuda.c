// A libcuda.so.1 that launches nothing: it prints what it is told to load and to launch.
//
// For test_cuda_driver.py, which runs the product's launch path through cuda.bindings on a machine
// without a GPU. FAKE_CUDA_REFUSES=1: it refuses each image, as a driver does that is older than
// the compiler.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { SUCCESS = 0, NO_BINARY_FOR_GPU = 209, NOT_FOUND = 500 };

__attribute__((constructor)) static void write_at_once(void) { setvbuf(stdout, NULL, _IONBF, 0); }

int cuInit(unsigned flags) { return SUCCESS; }
int cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
int cuDeviceGet(int* device, int index) { *device = index; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = (void*)(intptr_t)(0x1000 + device);
    return SUCCESS;
}
int cuCtxSetCurrent(void* context) {
    printf("context %p\n", context);
    return SUCCESS;
}
int cuModuleLoadData(void** module, const unsigned char* image) {
    if (getenv("FAKE_CUDA_REFUSES")) return NO_BINARY_FOR_GPU;
    printf("module %.3s\n", image + 1);
    *module = (void*)0x2000;
    return SUCCESS;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
    printf("function %s\n", name);
    *function = (void*)0x3000;
    return SUCCESS;
}
int cuGetErrorString(int error, const char** words) {
    *words = "no kernel image is available";
    return SUCCESS;
}
// The arguments are those of ADAMS_PARAMETERS: p a pointer, i an int, f a float.
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                   unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                   void* stream, void** arguments, void** extra) {
    printf("launch %u %u %u %u %u %u %u %p", grid_x, grid_y, grid_z, block_x, block_y, block_z,
           shared, stream);
    for (const char* type = getenv("FAKE_CUDA_TYPES"); *type; ++type, ++arguments) {
        if (*type == 'p') printf(" %llu", *(unsigned long long*)*arguments);
        if (*type == 'i') printf(" %d", *(int*)*arguments);
        if (*type == 'f') printf(" %a", *(float*)*arguments);
    }
    printf("\n");
    return SUCCESS;
}
int cuGetProcAddress_v2(const char* name, void** function, int version, uint64_t flags,
                        int* found) {
    *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD), name);
    if (found) *found = *function ? 0 : 1;
    return *function ? SUCCESS : NOT_FOUND;
}
int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
