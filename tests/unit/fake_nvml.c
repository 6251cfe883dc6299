// A libnvidia-ml.so.1 without a GPU: it answers what the file $FAKE_NVML says.
//
// For fake_nvml.py, which compiles it. nvidia-ml-py itself loads and calls it. A line of the file is
// `name value`, where name is a function's with the number of the GPU behind it: "Name.0" is asked
// before "Name". A value `error 3` is returned as NVML's error 3; a function without a line is not
// supported. The layouts of the structs are those of nvml.h.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7,
       DRIVER_NOT_LOADED = 9 };
// Handles: GPU i is i + 1, and the MIG instance j of GPU i is 100 * (i + 1) + j.
#define INDEX(handle) ((long)(handle) >= 100 ? (long)(handle) / 100 - 1 : (long)(handle) - 1)

static int line(const char* name, char* value) {
    const char* path = getenv("FAKE_NVML");
    FILE* file = path ? fopen(path, "r") : NULL;
    if (!file) return 0;
    char buffer[512];
    int is_there = 0;
    size_t length = strlen(name);
    while (!is_there && fgets(buffer, sizeof buffer, file)) {
        buffer[strcspn(buffer, "\n")] = 0;
        if (!strncmp(buffer, name, length) && buffer[length] == ' ') {
            strcpy(value, buffer + length + 1);
            is_there = 1;
        }
    }
    fclose(file);
    return is_there;
}

// The answer to a call: a return code, and the words of the value.
static int ask(const char* name, long number, char* value) {
    char specific[128];
    snprintf(specific, sizeof specific, "%s.%ld", name, number);
    int error = 0;
    if (!(number >= 0 && line(specific, value)) && !line(name, value)) return NOT_SUPPORTED;
    return sscanf(value, "error %d", &error) == 1 ? error : SUCCESS;
}

#define ASK(name, number) \
    char value[512];      \
    int code = ask(name, number, value); \
    if (code != SUCCESS) return code

int nvmlInitWithFlags(unsigned flags) {
    char value[512];
    if (!getenv("FAKE_NVML")) return DRIVER_NOT_LOADED;
    int code = ask("Init", -1, value);
    return code == NOT_SUPPORTED ? SUCCESS : code;
}
int nvmlShutdown(void) { return SUCCESS; }
const char* nvmlErrorString(int code) {
    return code == 15 ? "GPU is lost" : code == 999 ? "Unknown Error" : "an error of the stand-in";
}

static int text(const char* name, long number, char* out, unsigned size) {
    ASK(name, number);
    snprintf(out, size, "%s", value);
    return SUCCESS;
}
int nvmlSystemGetDriverVersion(char* out, unsigned size) { return text("Driver", -1, out, size); }
int nvmlSystemGetCudaDriverVersion_v2(int* version) {
    ASK("Cuda", -1);
    *version = atoi(value);
    return SUCCESS;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
    ASK("Count", -1);
    *count = atoi(value);
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** handle) {
    char value[512];
    int code = ask("Handle", index, value);
    *handle = (void*)(long)(index + 1);
    return code == NOT_SUPPORTED ? SUCCESS : code;
}
static int uuid_of(void* handle, char* out, unsigned size) {
    char name[32];
    snprintf(name, sizeof name, (long)handle >= 100 ? "MigUuid%ld" : "Uuid", (long)handle % 100);
    return text(name, INDEX(handle), out, size);
}
int nvmlDeviceGetUUID(void* handle, char* out, unsigned size) { return uuid_of(handle, out, size); }
int nvmlDeviceGetHandleByUUID(const char* uuid, void** handle) {
    char own[96];
    for (long gpu = 0; gpu < 16; ++gpu) {
        for (long mig = -1; mig < 4; ++mig) {
            *handle = (void*)(mig < 0 ? gpu + 1 : 100 * (gpu + 1) + mig);
            if (uuid_of(*handle, own, sizeof own) == SUCCESS && !strcmp(own, uuid)) return SUCCESS;
        }
    }
    return NOT_FOUND;
}
int nvmlDeviceGetName(void* handle, char* out, unsigned size) {
    return text("Name", INDEX(handle), out, size);
}

typedef struct {
    char legacy[16];
    unsigned domain, bus, device, pci_device, pci_subsystem;
    char bus_id[32];
} PciInfo;
int nvmlDeviceGetPciInfo_v3(void* handle, PciInfo* info) {
    return text("Pci", INDEX(handle), info->bus_id, sizeof info->bus_id);
}

typedef struct { u64 total, free, used; } Memory;
typedef struct { unsigned version; u64 total, reserved, free, used; } MemoryV2;
static int memory(void* handle, u64* total, u64* used) {
    char name[32] = "Memory";
    if ((long)handle >= 100) snprintf(name, sizeof name, "MigMemory%ld", (long)handle % 100);
    ASK(name, INDEX(handle));
    return sscanf(value, "%llu %llu", total, used) == 2 ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetMemoryInfo(void* handle, Memory* out) {
    int code = memory(handle, &out->total, &out->used);
    out->free = out->total - out->used;
    return code;
}
#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(void* handle, MemoryV2* out) {
    if (out->version != (sizeof *out | 2u << 24)) return INVALID_ARGUMENT;
    int code = memory(handle, &out->total, &out->used);
    out->reserved = 500 << 20;
    out->free = out->total - out->used - out->reserved;
    return code;
}
#endif

int nvmlDeviceGetCudaComputeCapability(void* handle, int* major, int* minor) {
    ASK("Capability", INDEX(handle));
    sscanf(value, "%d.%d", major, minor);
    return SUCCESS;
}
static int number(const char* name, void* handle, unsigned* out) {
    ASK(name, INDEX(handle));
    *out = strtoul(value, NULL, 0);
    return SUCCESS;
}
int nvmlDeviceGetClockInfo(void* handle, unsigned kind, unsigned* mhz) {
    return number(kind == 1 ? "SmClock" : "MemoryClock", handle, mhz);
}
int nvmlDeviceGetMaxClockInfo(void* handle, unsigned kind, unsigned* mhz) {
    return number(kind == 1 ? "MaxSmClock" : "MaxMemoryClock", handle, mhz);
}
int nvmlDeviceGetTemperature(void* handle, unsigned sensor, unsigned* celsius) {
    return number("Temperature", handle, celsius);
}
static int reasons(void* handle, u64* bits) {
    ASK("Reasons", INDEX(handle));
    *bits = strtoull(value, NULL, 0);
    return SUCCESS;
}
#ifndef OLD_DRIVER
int nvmlDeviceGetCurrentClocksEventReasons(void* handle, u64* bits) {
    return reasons(handle, bits);
}
#endif
int nvmlDeviceGetCurrentClocksThrottleReasons(void* handle, u64* bits) {
    return reasons(handle, bits);
}
int nvmlDeviceGetEccMode(void* handle, unsigned* now, unsigned* pending) {
    *pending = 1;
    return number("EccMode", handle, now);
}
int nvmlDeviceGetTotalEccErrors(void* handle, unsigned kind, unsigned counter, u64* count) {
    if (kind != 1) return INVALID_ARGUMENT;
    ASK(counter ? "EccLifetime" : "EccSinceLoad", INDEX(handle));
    *count = strtoull(value, NULL, 0);
    return SUCCESS;
}
int nvmlDeviceGetRemappedRows(void* handle, unsigned* corrected, unsigned* uncorrected,
                              unsigned* pending, unsigned* failed) {
    ASK("Remapped", INDEX(handle));
    sscanf(value, "%u %u %u %u", corrected, uncorrected, pending, failed);
    return SUCCESS;
}
int nvmlDeviceGetRetiredPagesPendingStatus(void* handle, unsigned* pending) {
    return number("RetiredPending", handle, pending);
}
int nvmlDeviceGetNvLinkState(void* handle, unsigned link, unsigned* is_active) {
    ASK("NvLinks", INDEX(handle));  // a digit a link
    if (link >= strlen(value)) return INVALID_ARGUMENT;
    *is_active = value[link] == '1';
    return SUCCESS;
}
int nvmlDeviceGetComputeMode(void* handle, unsigned* mode) {
    return number("ComputeMode", handle, mode);
}
int nvmlDeviceGetMigMode(void* handle, unsigned* now, unsigned* pending) {
    *pending = 0;
    return number("MigMode", handle, now);
}
int nvmlDeviceGetMaxMigDeviceCount(void* handle, unsigned* count) {
    *count = 7;
    return SUCCESS;
}
int nvmlDeviceGetMigDeviceHandleByIndex(void* handle, unsigned index, void** instance) {
    char own[96];
    *instance = (void*)(100 * (long)handle + index);
    return uuid_of(*instance, own, sizeof own) == SUCCESS ? SUCCESS : NOT_FOUND;
}

typedef struct { unsigned pid; u64 used; unsigned gpu_instance, compute_instance; } Process;
int nvmlDeviceGetComputeRunningProcesses_v3(void* handle, unsigned* count, Process* processes) {
    ASK("Processes", INDEX(handle));  // "pid:bytes pid:bytes", or "none"
    unsigned room = *count, pid;
    u64 used;
    *count = 0;
    for (char* word = strtok(value, " "); word; word = strtok(NULL, " ")) {
        if (sscanf(word, "%u:%llu", &pid, &used) != 2) continue;
        if (*count < room) processes[*count] = (Process){pid, used, 0, 0};
        ++*count;
    }
    return *count > room ? TOO_SMALL : SUCCESS;
}

typedef struct {
    unsigned version;
    unsigned char cluster[16];
    unsigned status, clique;
    unsigned char state;
    unsigned health;
} Fabric;
int nvmlDeviceGetGpuFabricInfoV(void* handle, Fabric* info) {
    if (info->version != (sizeof *info | 2u << 24)) return INVALID_ARGUMENT;
    ASK("Fabric", INDEX(handle));
    unsigned state = 0;
    sscanf(value, "%u %u", &state, &info->status);
    info->state = state;
    return SUCCESS;
}
