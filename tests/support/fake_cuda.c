// A CUDA driver and an NVRTC without a GPU, for tests: the functions that ffi/cuda binds, over host memory.
//
// What is issued to a stream waits in one queue for all streams, and runs when somebody waits for it: so a copy reads
// its source late, as on a GPU. Memory of the device is mapped and protected like cuMemMap does, so that a wrong address
// is caught. Every call checks what a real driver checks: a current context, handles that are alive, whole mappings, no
// waiting for a stream that records. `fake_...` functions configure it and ask what it has seen.
//
// Linked with cuda_on_cpu.cpp it runs the kernels that it compiles. Else "kernels" are chosen by name: `fill(int *out, int value, int count)` and `fault()`, which loses the context; all
// others do nothing but record their launch.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t u64;
enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, NO_CONTEXT = 201, BAD_HANDLE = 400, NOT_FOUND = 500 };
enum { NOT_READY = 600, ILLEGAL_ADDRESS = 700, IN_CAPTURE = 900, INVALIDATED = 901 };
enum { GRANULARITY = 2 << 20, MOST = 4096, ARGUMENTS = 4096 };

// -- handles and counters ----------------------------------------------------------------------------------------

enum kind { FREE, STREAM, EVENT, MODULE, FUNCTION, GRAPH, EXECUTABLE, RESERVED, PHYSICAL, MAPPED, PINNED, KINDS };

struct launch {
  char name[64];
  uint32_t grid[3], block[3], shared, bytes;
  unsigned char arguments[ARGUMENTS];
  void *function;  // of cuda_on_cpu.cpp
};

struct operation {
  enum { COPY, SET8, SET32, KERNEL, MARK, CALL } type;
  u64 target, source, bytes, stream;
  uint32_t value;
  struct launch *launch;
  void (*call)(const void *data);  // CALL: a library's work, of `bytes` bytes of data
  void *data;
};

// What cuda_on_cpu.cpp has.
#define MAYBE __attribute__((weak))
MAYBE int cpu_compile(const char *text, const char *name, char **image, u64 *bytes, char **log);
MAYBE void *cpu_load(const void *image);
MAYBE void cpu_unload(void *module);
MAYBE void *cpu_function(void *module, const char *name);
MAYBE void cpu_forget(void *function);
MAYBE int cpu_shared(void *function);
MAYBE int cpu_argument_bytes(void *function);
MAYBE int cpu_launch(void *function, const uint32_t *grid, const uint32_t *block, uint32_t shared, unsigned char *arguments);

struct list {
  struct operation *items;
  size_t count, capacity;
};

struct object {
  enum kind kind;
  u64 address, bytes;  // RESERVED, MAPPED, PINNED; bytes of PHYSICAL
  u64 other;           // the MODULE of a FUNCTION, the PHYSICAL of a MAPPED
  int readable;        // MAPPED: access was set
  int released;        // PHYSICAL: the handle was given up
  int pending;         // EVENT: marks in the queue
  int recorded;        // EVENT
  int capture;         // STREAM: 0 no, 1 active, 2 invalid
  char name[64];       // FUNCTION
  int shared;          // FUNCTION: most dynamic shared memory
  void *loaded;        // MODULE, FUNCTION: of cuda_on_cpu.cpp
  struct list list;    // GRAPH, EXECUTABLE; what a STREAM records
};

static struct object objects[MOST];
static struct list queue;
static struct launch last;
static u64 total = 1u << 30, used;
static int devices = 1, launches, lost, contexts, patience, capability = 90;
static __thread int current;
static char failing[64];
static int failure, failAfter;

static u64 make(enum kind kind) {
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind != FREE) continue;
    memset(&objects[i], 0, sizeof objects[i]);
    objects[i].kind = kind;
    return (u64)i;
  }
  abort();
}
static struct object *find(u64 handle, enum kind kind) {
  return handle > 0 && handle < MOST && objects[handle].kind == kind ? &objects[handle] : NULL;
}

static void append(struct list *list, struct operation item) {
  if (list->count == list->capacity) {
    list->capacity = list->capacity ? 2 * list->capacity : 16;
    list->items = realloc(list->items, list->capacity * sizeof item);
  }
  list->items[list->count++] = item;
}

// The status that every call begins with.
int fake_enter(const char *name, int needsContext) {
  if (failure && strcmp(name, failing) == 0 && failAfter-- == 0) {
    int status = failure;
    failure = 0;
    return status;
  }
  if (needsContext && lost) return lost;
  return needsContext && !current ? NO_CONTEXT : OK;
}
#define ENTER(context) do { int s = fake_enter(__func__, context); if (s) return s; } while (0)
#define CHECK(condition, status) do { if (!(condition)) return status; } while (0)

// -- the queue ---------------------------------------------------------------------------------------------------

// Whether the device may touch these bytes.
static int accessible(u64 address, u64 bytes) {
  while (bytes > 0) {
    u64 covered = 0;
    for (int i = 1; i < MOST && !covered; i++) {
      struct object *o = &objects[i];
      if (!(o->kind == MAPPED && o->readable) && o->kind != PINNED) continue;
      if (address >= o->address && address < o->address + o->bytes) covered = o->address + o->bytes - address;
    }
    if (!covered) return 0;
    if (covered >= bytes) return 1;
    address += covered;
    bytes -= covered;
  }
  return 1;
}

static int runKernel(struct launch *launch) {
  if (launch->function) {
    int fault = cpu_launch(launch->function, launch->grid, launch->block, launch->shared, launch->arguments);
    if (fault) fprintf(stderr, "%s: fault %d\n", launch->name, fault);
    return fault ? ILLEGAL_ADDRESS : OK;
  }
  if (strcmp(launch->name, "fault") == 0) return ILLEGAL_ADDRESS;
  if (strcmp(launch->name, "fill") != 0) return OK;
  u64 out;
  int value, count;
  memcpy(&out, launch->arguments, 8);
  memcpy(&value, launch->arguments + 8, 4);
  memcpy(&count, launch->arguments + 12, 4);
  if (!accessible(out, 4 * (u64)count)) return ILLEGAL_ADDRESS;
  for (int i = 0; i < count; i++) ((int *)out)[i] = value;
  return OK;
}

// The profiler's side, fake_cupti.c.
u64 fake_clock(void);
void fake_activity(uint32_t kind, u64 stream, u64 start, u64 end, const char *name, const uint32_t *sizes, u64 bytes);

static void tellProfiler(const struct operation *o, u64 start) {
  if (o->type == MARK || o->type == CALL) return;
  uint32_t kind = o->type == KERNEL ? 10 : o->type == COPY ? 1 : 2;
  const struct launch *launch = o->type == KERNEL ? o->launch : NULL;
  // A launch begins with its name; the sizes follow one another behind it.
  fake_activity(kind, o->stream, start, fake_clock(), launch ? launch->name : NULL, launch ? launch->grid : NULL, o->bytes);
}

static int runNext(void) {
  struct operation o = queue.items[0];
  memmove(queue.items, queue.items + 1, --queue.count * sizeof o);
  int status = OK;
  u64 start = fake_clock();
  if (o.type == MARK) objects[o.target].pending--;
  else if (o.type == KERNEL) status = runKernel(o.launch);
  else if (o.type == CALL) o.call(o.data);
  else if (!accessible(o.target, o.bytes) || (o.type == COPY && !accessible(o.source, o.bytes))) status = ILLEGAL_ADDRESS;
  else if (o.type == COPY) memmove((void *)o.target, (void *)o.source, o.bytes);
  else if (o.type == SET8) memset((void *)o.target, (int)o.value, o.bytes);
  else for (u64 i = 0; i < o.bytes / 4; i++) ((uint32_t *)o.target)[i] = o.value;
  tellProfiler(&o, start);
  if (o.type == KERNEL) free(o.launch);
  if (o.type == CALL) free(o.data);
  if (status) lost = status;
  return status;
}
static int drain(void) {
  while (queue.count > 0 && !lost) runNext();
  return lost;
}

// Into the queue, or into what the stream records.
static int issue(u64 stream, struct operation operation) {
  struct object *s = find(stream, STREAM);
  CHECK(s, BAD_HANDLE);
  CHECK(s->capture != 2, INVALIDATED);
  operation.stream = stream;
  append(s->capture ? &s->list : &queue, operation);
  return OK;
}
// A library's work, in its turn: `call` gets a copy of the data.
int fake_call(u64 stream, void (*call)(const void *), const void *data, u64 bytes) {
  struct operation operation = {.type = CALL, .call = call, .data = malloc(bytes), .bytes = bytes};
  memcpy(operation.data, data, bytes);
  return issue(stream, operation);
}
// A wait is no part of a recording, and ends it.
static int refuseCapture(u64 stream) {
  struct object *s = find(stream, STREAM);
  CHECK(s, BAD_HANDLE);
  if (!s->capture) return OK;
  s->capture = 2;
  return IN_CAPTURE;
}

// -- driver and devices ------------------------------------------------------------------------------------------

int cuInit(unsigned flags) {
  ENTER(0);
  (void)flags;
  return devices == 0 ? NO_DEVICE : OK;
}
int cuDriverGetVersion(int *version) { ENTER(0); *version = 13000; return OK; }
int cuGetErrorName(int error, const char **text) {
  *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == NO_DEVICE ? "CUDA_ERROR_NO_DEVICE"
        : error == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS" : error == INVALID ? "CUDA_ERROR_INVALID_VALUE"
        : error == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : NULL;
  return *text ? OK : INVALID;
}
int cuGetErrorString(int error, const char **text) {
  *text = error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : NULL;
  return *text ? OK : INVALID;
}
int cuDeviceGetCount(int *count) { ENTER(0); *count = devices; return OK; }
int cuDeviceGet(int *device, int ordinal) {
  ENTER(0);
  CHECK(ordinal >= 0 && ordinal < devices, 101);
  *device = ordinal;
  return OK;
}
int cuDeviceGetName(char *name, int length, int device) {
  ENTER(0);
  snprintf(name, (size_t)length, "Fake GPU %d", device);
  return OK;
}
int cuDeviceGetPCIBusId(char *id, int length, int device) {
  ENTER(0);
  snprintf(id, (size_t)length, "0000:%02x:00.0", device);
  return OK;
}
int cuDeviceTotalMem_v2(u64 *bytes, int device) { ENTER(0); (void)device; *bytes = total; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  ENTER(0);
  (void)device;
  switch (attribute) {
    case 1: case 2: case 3: *value = 1024; return OK;
    case 4: *value = 64; return OK;
    case 5: *value = 0x7fffffff; return OK;
    case 6: case 7: *value = 65535; return OK;
    case 10: *value = 32; return OK;
    case 16: *value = 132; return OK;
    case 75: *value = capability / 10; return OK;
    case 76: *value = capability % 10; return OK;
    case 97: *value = 232448; return OK;
    case 102: *value = 1; return OK;
    default: return INVALID;
  }
}
int cuDevicePrimaryCtxRetain(u64 *context, int device) {
  ENTER(0);
  contexts++;
  *context = 0x1000 + (u64)device;
  return OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) { ENTER(0); (void)device; contexts--; return OK; }
int cuCtxSetCurrent(u64 context) { ENTER(0); current = (int)context; return OK; }

// -- streams and events ------------------------------------------------------------------------------------------

int cuStreamCreate(u64 *stream, unsigned flags) {
  ENTER(1);
  CHECK(flags == 1, INVALID);
  *stream = make(STREAM);
  return OK;
}
int cuStreamSynchronize(u64 stream) {
  ENTER(1);
  int status = refuseCapture(stream);
  return status ? status : drain();
}
int cuStreamQuery(u64 stream) {
  ENTER(1);
  int status = refuseCapture(stream);
  if (status) return status;
  if (patience > 0 && queue.count > 0) {
    patience--;
    return NOT_READY;
  }
  return drain();
}
int cuStreamWaitEvent(u64 stream, u64 event, unsigned flags) {
  ENTER(1);
  CHECK(find(stream, STREAM) && find(event, EVENT) && flags == 0, BAD_HANDLE);
  return OK;
}
int cuStreamDestroy_v2(u64 stream) {
  ENTER(1);
  CHECK(find(stream, STREAM), BAD_HANDLE);
  objects[stream].kind = FREE;
  return OK;
}
int cuEventCreate(u64 *event, unsigned flags) { ENTER(1); (void)flags; *event = make(EVENT); return OK; }
int cuEventRecord(u64 event, u64 stream) {
  ENTER(1);
  CHECK(find(event, EVENT), BAD_HANDLE);
  int status = issue(stream, (struct operation){.type = MARK, .target = event});
  if (status == OK) objects[event].pending++, objects[event].recorded = 1;
  return status;
}
int cuEventSynchronize(u64 event) {
  ENTER(1);
  CHECK(find(event, EVENT), BAD_HANDLE);
  while (objects[event].pending > 0 && !lost) runNext();
  return lost;
}
int cuEventQuery(u64 event) {
  ENTER(1);
  CHECK(find(event, EVENT), BAD_HANDLE);
  if (objects[event].pending > 0) runNext();
  return lost ? lost : objects[event].pending > 0 ? NOT_READY : OK;
}
int cuEventElapsedTime(float *milliseconds, u64 start, u64 end) {
  ENTER(1);
  CHECK(find(start, EVENT) && find(end, EVENT), BAD_HANDLE);
  CHECK(objects[start].recorded && objects[end].recorded, BAD_HANDLE);
  CHECK(!objects[start].pending && !objects[end].pending, NOT_READY);
  *milliseconds = 1.5f;
  return OK;
}
int cuEventDestroy_v2(u64 event) {
  ENTER(1);
  CHECK(find(event, EVENT), BAD_HANDLE);
  while (objects[event].pending > 0 && !lost) runNext();
  objects[event].kind = FREE;
  return OK;
}

// -- memory ------------------------------------------------------------------------------------------------------

int cuMemGetInfo_v2(u64 *free, u64 *all) { ENTER(1); *free = total - used; *all = total; return OK; }

int cuMemHostAlloc(u64 *address, u64 bytes, unsigned flags) {
  ENTER(1);
  (void)flags;
  *address = (u64)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  u64 handle = make(PINNED);
  objects[handle].address = *address;
  objects[handle].bytes = bytes;
  return OK;
}
int cuMemFreeHost(u64 address) {
  ENTER(1);
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind != PINNED || objects[i].address != address) continue;
    drain();
    munmap((void *)address, objects[i].bytes);
    objects[i].kind = FREE;
    return lost;
  }
  return INVALID;
}

// cuMemAlloc is a mapping of its own here.
int cuMemAlloc_v2(u64 *pointer, u64 bytes) {
  ENTER(1);
  if (used + bytes > total) return OUT_OF_MEMORY;
  used += bytes;
  u64 handle = make(MAPPED);
  objects[handle].address = *pointer =
    (u64)mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  objects[handle].bytes = bytes;
  objects[handle].readable = 1;
  return OK;
}
int cuMemFree_v2(u64 pointer) {
  ENTER(1);
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind != MAPPED || objects[i].address != pointer || objects[i].other) continue;
    drain();
    used -= objects[i].bytes;
    munmap((void *)pointer, objects[i].bytes);
    objects[i].kind = FREE;
    return lost;
  }
  return INVALID;
}

static int ordinaryMemory(const int *prop) { return prop[0] == 1 && prop[1] == 0 && prop[2] == 1; }
int cuMemGetAllocationGranularity(u64 *bytes, const int *prop, int option) {
  ENTER(1);
  CHECK(ordinaryMemory(prop) && option == 1, INVALID);
  *bytes = GRANULARITY;
  return OK;
}
int cuMemAddressReserve(u64 *pointer, u64 bytes, u64 alignment, u64 address, u64 flags) {
  ENTER(1);
  CHECK(bytes % GRANULARITY == 0 && alignment == 0 && address == 0 && flags == 0, INVALID);
  u64 handle = make(RESERVED);
  // One granule more than asked for, so that a range of whole granules lies in it.
  u64 raw = (u64)mmap(NULL, bytes + GRANULARITY, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *pointer = (raw + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
  objects[handle].address = *pointer;
  objects[handle].bytes = bytes;
  objects[handle].other = raw;
  return OK;
}
int cuMemAddressFree(u64 pointer, u64 bytes) {
  ENTER(1);
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind == MAPPED && objects[i].address >= pointer && objects[i].address < pointer + bytes) return INVALID;
  }
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind != RESERVED || objects[i].address != pointer || objects[i].bytes != bytes) continue;
    munmap((void *)objects[i].other, bytes + GRANULARITY);
    objects[i].kind = FREE;
    return OK;
  }
  return INVALID;
}
int cuMemCreate(u64 *handle, u64 bytes, const int *prop, u64 flags) {
  ENTER(1);
  CHECK(ordinaryMemory(prop) && flags == 0 && bytes > 0 && bytes % GRANULARITY == 0, INVALID);
  if (used + bytes > total) return OUT_OF_MEMORY;
  used += bytes;
  *handle = make(PHYSICAL);
  objects[*handle].bytes = bytes;
  return OK;
}
static void freeUnused(u64 physical) {
  if (!objects[physical].released) return;
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind == MAPPED && objects[i].other == physical) return;
  }
  used -= objects[physical].bytes;
  objects[physical].kind = FREE;
}
int cuMemRelease(u64 handle) {
  ENTER(1);
  CHECK(find(handle, PHYSICAL) && !objects[handle].released, BAD_HANDLE);
  objects[handle].released = 1;
  freeUnused(handle);
  return OK;
}
int cuMemMap(u64 pointer, u64 bytes, u64 offset, u64 handle, u64 flags) {
  ENTER(1);
  CHECK(find(handle, PHYSICAL) && objects[handle].bytes == bytes && offset == 0 && flags == 0, INVALID);
  int reserved = 0;
  for (int i = 1; i < MOST; i++) {
    struct object *o = &objects[i];
    if (o->kind == RESERVED && pointer >= o->address && pointer + bytes <= o->address + o->bytes) reserved = 1;
    if (o->kind == MAPPED && pointer < o->address + o->bytes && o->address < pointer + bytes) return INVALID;
  }
  CHECK(reserved, INVALID);
  u64 mapping = make(MAPPED);
  objects[mapping].address = pointer;
  objects[mapping].bytes = bytes;
  objects[mapping].other = handle;
  return OK;
}
int cuMemSetAccess(u64 pointer, u64 bytes, const int *access, u64 count) {
  ENTER(1);
  CHECK(count == 1 && access[0] == 1 && access[2] == 3, INVALID);
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind != MAPPED || objects[i].address != pointer || objects[i].bytes != bytes) continue;
    objects[i].readable = 1;
    return mprotect((void *)pointer, bytes, PROT_READ | PROT_WRITE) ? INVALID : OK;
  }
  return INVALID;
}
int cuMemUnmap(u64 pointer, u64 bytes) {
  ENTER(1);
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind != MAPPED || objects[i].address != pointer || objects[i].bytes != bytes) continue;
    // Mapped anew without access: what was there is gone.
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    mmap((void *)pointer, bytes, PROT_NONE, flags, -1, 0);
    objects[i].kind = FREE;
    freeUnused(objects[i].other);
    return OK;
  }
  return INVALID;
}

static int copy(u64 target, u64 source, u64 bytes, u64 stream) {
  return issue(stream, (struct operation){.type = COPY, .target = target, .source = source, .bytes = bytes});
}
int cuMemcpyHtoDAsync_v2(u64 target, u64 source, u64 bytes, u64 stream) {
  ENTER(1);
  return copy(target, source, bytes, stream);
}
int cuMemcpyDtoHAsync_v2(u64 target, u64 source, u64 bytes, u64 stream) {
  ENTER(1);
  return copy(target, source, bytes, stream);
}
int cuMemcpyDtoDAsync_v2(u64 target, u64 source, u64 bytes, u64 stream) {
  ENTER(1);
  return copy(target, source, bytes, stream);
}
int cuMemsetD8Async(u64 target, unsigned char value, u64 count, u64 stream) {
  ENTER(1);
  return issue(stream, (struct operation){.type = SET8, .target = target, .value = value, .bytes = count});
}
int cuMemsetD32Async(u64 target, uint32_t value, u64 count, u64 stream) {
  ENTER(1);
  return issue(stream, (struct operation){.type = SET32, .target = target, .value = value, .bytes = 4 * count});
}

// -- modules and launches ----------------------------------------------------------------------------------------

int cuModuleLoadData(u64 *module, const void *image) {
  ENTER(1);
  void *loaded = cpu_load ? cpu_load(image) : NULL;
  CHECK(loaded || !cpu_load, 200);
  *module = make(MODULE);
  objects[*module].loaded = loaded;
  return OK;
}
int cuModuleUnload(u64 module) {
  ENTER(1);
  CHECK(find(module, MODULE), BAD_HANDLE);
  for (int i = 1; i < MOST; i++) {
    if (objects[i].kind != FUNCTION || objects[i].other != module) continue;
    if (objects[i].loaded) cpu_forget(objects[i].loaded);
    objects[i].kind = FREE;
  }
  if (objects[module].loaded) cpu_unload(objects[module].loaded);
  objects[module].kind = FREE;
  return OK;
}
int cuModuleGetFunction(u64 *function, u64 module, const char *name) {
  ENTER(1);
  CHECK(find(module, MODULE), BAD_HANDLE);
  CHECK(strcmp(name, "missing") != 0, NOT_FOUND);
  void *loaded = objects[module].loaded ? cpu_function(objects[module].loaded, name) : NULL;
  CHECK(loaded || !objects[module].loaded, NOT_FOUND);
  *function = make(FUNCTION);
  objects[*function].loaded = loaded;
  objects[*function].other = module;
  objects[*function].shared = 49152 - 1024;
  snprintf(objects[*function].name, sizeof objects[0].name, "%s", name);
  return OK;
}
int cuFuncGetAttribute(int *value, int attribute, u64 function) {
  ENTER(1);
  CHECK(find(function, FUNCTION), BAD_HANDLE);
  CHECK(attribute == 1 || attribute == 8, INVALID);
  const struct object *o = &objects[function];
  *value = attribute == 8 ? o->shared : o->loaded ? cpu_shared(o->loaded) : 1024;
  return OK;
}
int cuFuncSetAttribute(u64 function, int attribute, int value) {
  ENTER(1);
  CHECK(find(function, FUNCTION), BAD_HANDLE);
  CHECK(attribute == 8 && value <= 232448 - 1024, INVALID);
  objects[function].shared = value;
  return OK;
}
int cuLaunchKernel(u64 function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, u64 stream, void **parameters, u64 *extra) {
  ENTER(1);
  CHECK(find(function, FUNCTION), BAD_HANDLE);
  CHECK((parameters == NULL || extra == NULL) && (int)shared <= objects[function].shared, INVALID);
  struct launch launch = {.grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared = shared};
  snprintf(launch.name, sizeof launch.name, "%s", objects[function].name);
  if (parameters != NULL) {  // they lie behind one another, and sizes are the kernel's to know
    launch.bytes = ARGUMENTS;
    memcpy(launch.arguments, parameters[0], ARGUMENTS);
  } else if (extra != NULL) {
    CHECK(extra[0] == 1 && extra[2] == 2 && extra[4] == 0, INVALID);
    u64 bytes = *(u64 *)extra[3];
    CHECK(bytes > 0 && bytes <= ARGUMENTS, INVALID);
    launch.bytes = (uint32_t)bytes;
    memcpy(launch.arguments, (void *)extra[1], bytes);
  }
  launch.function = objects[function].loaded;
  if (launch.function) CHECK(launch.bytes >= (uint32_t)cpu_argument_bytes(launch.function), INVALID);
  struct operation operation = {.type = KERNEL, .launch = malloc(sizeof launch)};
  *operation.launch = last = launch;
  launches++;
  return issue(stream, operation);
}

// Its address, sizes and tile, instead of what a GPU reads.
int cuTensorMapEncodeTiled(u64 *map, int type, unsigned rank, u64 address, const u64 *sizes, const u64 *strides,
                           const uint32_t *box, const uint32_t *steps, int interleave, int swizzle, int promotion,
                           int fill) {
  ENTER(1);
  CHECK((u64)map % 64 == 0 && type == 0 && rank == 2 && interleave == 0 && swizzle == 3 && fill == 0, INVALID);
  CHECK(address % 16 == 0 && strides[0] % 16 == 0 && sizes[0] <= strides[0], INVALID);
  CHECK(box[0] == 128 && box[1] > 0 && box[1] <= 256 && steps[0] == 1 && steps[1] == 1, INVALID);
  u64 told[16] = {address, sizes[0], sizes[1], strides[0], box[0], box[1], (u64)promotion};
  memcpy(map, told, sizeof told);
  return OK;
}

// -- graphs ------------------------------------------------------------------------------------------------------

int cuStreamBeginCapture_v2(u64 stream, int mode) {
  ENTER(1);
  CHECK(find(stream, STREAM) && !objects[stream].capture, BAD_HANDLE);
  CHECK(mode == 2, INVALID);
  objects[stream].capture = 1;
  objects[stream].list = (struct list){0};
  return OK;
}
int cuStreamEndCapture(u64 stream, u64 *graph) {
  ENTER(1);
  CHECK(find(stream, STREAM), BAD_HANDLE);
  CHECK(objects[stream].capture, INVALID);
  int invalid = objects[stream].capture == 2;
  objects[stream].capture = 0;
  if (invalid) return INVALIDATED;
  *graph = make(GRAPH);
  objects[*graph].list = objects[stream].list;
  return OK;
}
int cuStreamIsCapturing(u64 stream, int *status) {
  ENTER(1);
  CHECK(find(stream, STREAM), BAD_HANDLE);
  *status = objects[stream].capture;
  return OK;
}
int cuGraphGetNodes(u64 graph, u64 *nodes, u64 *count) {
  ENTER(1);
  CHECK(find(graph, GRAPH) && nodes == NULL, BAD_HANDLE);
  *count = objects[graph].list.count;
  return OK;
}
static struct operation cloned(struct operation o) {
  if (o.type == CALL) {
    void *copied = malloc(o.bytes);
    memcpy(copied, o.data, o.bytes);
    o.data = copied;
  }
  if (o.type == KERNEL) {
    struct launch *copied = malloc(sizeof *copied);
    *copied = *o.launch;
    o.launch = copied;
  }
  return o;
}
int cuGraphInstantiateWithFlags(u64 *executable, u64 graph, u64 flags) {
  ENTER(1);
  CHECK(find(graph, GRAPH) && flags == 0, BAD_HANDLE);
  *executable = make(EXECUTABLE);
  struct list *from = &objects[graph].list;
  for (size_t i = 0; i < from->count; i++) append(&objects[*executable].list, cloned(from->items[i]));
  return OK;
}
int cuGraphLaunch(u64 executable, u64 stream) {
  ENTER(1);
  CHECK(find(executable, EXECUTABLE), BAD_HANDLE);
  struct list *from = &objects[executable].list;
  for (size_t i = 0; i < from->count; i++) {
    int status = issue(stream, cloned(from->items[i]));
    if (status) return status;
  }
  return OK;
}
static int destroy(u64 handle, enum kind kind) {
  CHECK(find(handle, kind), BAD_HANDLE);
  struct list *list = &objects[handle].list;
  for (size_t i = 0; i < list->count; i++) {
    if (list->items[i].type == KERNEL) free(list->items[i].launch);
    if (list->items[i].type == CALL) free(list->items[i].data);
  }
  free(list->items);
  objects[handle].kind = FREE;
  return OK;
}
int cuGraphExecDestroy(u64 executable) { ENTER(1); return destroy(executable, EXECUTABLE); }
int cuGraphDestroy(u64 graph) { ENTER(1); return destroy(graph, GRAPH); }

// -- NVRTC: the "cubin" is the source, or what cuda_on_cpu.cpp makes of it ------------------------------------------

static const char LOG[] = "fake.cu(2): error: #error\n1 error detected\n";
struct program { char *text, *name, *image, *words; u64 imageBytes; };
// How many were compiled, how many are being compiled now, and the most that ever were: threads of the caller's do it.
static pthread_mutex_t compiling = PTHREAD_MUTEX_INITIALIZER;
static int compilations, running, mostRunning;
static void count_compilation(int begins) {
  pthread_mutex_lock(&compiling);
  compilations += begins;
  running += begins ? 1 : -1;
  if (running > mostRunning) mostRunning = running;
  pthread_mutex_unlock(&compiling);
}
const char *nvrtcGetErrorString(int status) { return status == 6 ? "NVRTC_ERROR_COMPILATION" : "an error"; }
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
int nvrtcCreateProgram(u64 *handle, const char *text, const char *name, int n, void *headers, void *names) {
  (void)n, (void)headers, (void)names;
  struct program *made = calloc(1, sizeof *made);
  made->text = strdup(text);
  made->name = strdup(name);
  *handle = (u64)(uintptr_t)made;
  return 0;
}
#define PROGRAM(handle) ((struct program *)(uintptr_t)(handle))
int nvrtcDestroyProgram(u64 *handle) {
  struct program *it = PROGRAM(*handle);
  free(it->text), free(it->name), free(it->image), free(it->words), free(it);
  *handle = 0;
  return 0;
}
int nvrtcCompileProgram(u64 handle, int count, const char **options) {
  (void)count, (void)options;
  struct program *it = PROGRAM(handle);
  count_compilation(1);
  int fits;
  if (cpu_compile) fits = cpu_compile(it->text, it->name, &it->image, &it->imageBytes, &it->words);
  else {
    if (strstr(it->text, "slow")) usleep(50000);
    it->image = strdup(it->text), it->imageBytes = strlen(it->text), it->words = strdup(LOG);
    fits = !strstr(it->text, "#error");
  }
  count_compilation(0);
  return fits ? 0 : 6;
}
int nvrtcGetCUBINSize(u64 handle, u64 *bytes) { *bytes = PROGRAM(handle)->imageBytes; return 0; }
int nvrtcGetCUBIN(u64 handle, char *out) { memcpy(out, PROGRAM(handle)->image, PROGRAM(handle)->imageBytes); return 0; }
int nvrtcGetProgramLogSize(u64 handle, u64 *bytes) { *bytes = strlen(PROGRAM(handle)->words) + 1; return 0; }
int nvrtcGetProgramLog(u64 handle, char *out) { strcpy(out, PROGRAM(handle)->words); return 0; }

// -- the tests' side ---------------------------------------------------------------------------------------------

// A fresh machine. `isPatient`: how many times a query says "not ready" while there is work.
void fake_reset(u64 bytes, int count, int isPatient, int computeCapability) {
  memset(objects, 0, sizeof objects);
  queue.count = 0;
  used = 0;
  lost = launches = contexts = failure = current = compilations = mostRunning = 0;
  total = bytes;
  devices = count;
  patience = isPatient;
  capability = computeCapability;
}
// The call of `name` after `after` more of them fails with `status`.
void fake_fail(const char *name, int status, int after) {
  snprintf(failing, sizeof failing, "%s", name);
  failure = status;
  failAfter = after;
}
// How many handles of all kinds are alive, contexts included.
int fake_alive(void) {
  int count = contexts;
  for (int i = 1; i < MOST; i++) count += objects[i].kind != FREE;
  return count;
}
u64 fake_used(void) { return used; }
int fake_launches(void) { return launches; }
int fake_compilations(void) { return compilations; }
// How many were compiled at a time, at most.
int fake_compilations_at_once(void) { return mostRunning; }
// The last launch: grid, block, shared memory and bytes of arguments as 8 words, then the arguments.
void fake_last_launch(uint32_t *sizes, unsigned char *arguments) {
  memcpy(sizes, last.grid, 12);
  memcpy(sizes + 3, last.block, 12);
  sizes[6] = last.shared;
  sizes[7] = last.bytes;
  memcpy(arguments, last.arguments, last.bytes);
}
