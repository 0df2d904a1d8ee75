// A CUPTI without a GPU, for tests: it records what fake_cuda.c runs, in the layouts of CUDA 12.9's and 13.0's header.
//
// Buffers are asked for and given back in the way that a test chooses: by the calling thread; by a thread of its own that
// the caller waits for, with a lock held, as CUPTI's worker may do while the program is inside a call of CUDA; or by such a
// thread while the program goes on, until the next flush.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef uint64_t u64;
enum { OK = 0, INVALID_PARAMETER = 1, INVALID_OPERATION = 7, MAX_LIMIT_REACHED = 12, INVALID_KIND = 21 };
enum { MEMCPY = 1, MEMSET = 2, CONCURRENT_KERNEL = 10, SYNCHRONIZATION = 38 };
enum { SAME_THREAD = 0, WAITED_FOR = 1, GOES_ON = 2 };

int fake_enter(const char *name, int needsContext);
#define ENTER do { int s = fake_enter(__func__, 0); if (s) return s; } while (0)

typedef void (*Request)(uint8_t **buffer, size_t *size, size_t *maxNumRecords);
typedef void (*Complete)(void *context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid);

static Request request;
static Complete complete;
static uint32_t version = 130000;
static int mode, fullAfter, enabled[64];
static u64 droppedRecords;
static int requests, completions;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// -- buffers -----------------------------------------------------------------------------------------------------

struct buffer {
  uint8_t *bytes;
  size_t size, valid;
  int records;
};
static struct buffer now;
static pthread_t going[64];
static int goingCount;

static void *asks(void *unused) {
  (void)unused;
  pthread_mutex_lock(&lock);
  size_t most = 1;
  now = (struct buffer){0};
  request(&now.bytes, &now.size, &most);
  if (most != 0 || (u64)now.bytes % 8 != 0) abort();
  memset(now.bytes, 0, now.size);
  requests++;
  pthread_mutex_unlock(&lock);
  return NULL;
}
static void *gives(void *given) {
  struct buffer *b = given;
  pthread_mutex_lock(&lock);
  complete(NULL, 0, b->bytes, b->size, b->valid);
  completions++;
  pthread_mutex_unlock(&lock);
  free(b);
  return NULL;
}
static void join(void) {
  while (goingCount > 0) pthread_join(going[--goingCount], NULL);
}
static void call(void *(*body)(void *), void *argument, int mayGoOn) {
  if (mode == SAME_THREAD) {
    body(argument);
    return;
  }
  if (goingCount == 64) join();
  pthread_create(&going[goingCount++], NULL, body, argument);
  if (mode == WAITED_FOR || !mayGoOn) join();
}
static void giveBack(void) {
  if (now.bytes == NULL) return;
  struct buffer *b = malloc(sizeof *b);
  *b = now;
  now.bytes = NULL;
  call(gives, b, 1);
}

static size_t sizeOf(uint32_t kind) {
  switch (kind) {
    case CONCURRENT_KERNEL: return version >= 130000 ? 216 : 208;
    case MEMCPY: return 96;
    case MEMSET: return 88;
    case SYNCHRONIZATION: return 64;
    default: return 0;
  }
}
static uint8_t *append(uint32_t kind) {
  if (now.bytes == NULL) call(asks, NULL, 0);
  uint8_t *record = now.bytes + now.valid;
  now.valid += sizeOf(kind);
  now.records++;
  memcpy(record, &kind, 4);
  return record;
}
static void put32(uint8_t *record, size_t at, uint32_t value) { memcpy(record + at, &value, 4); }
static void put64(uint8_t *record, size_t at, u64 value) { memcpy(record + at, &value, 8); }

// -- what fake_cuda.c tells --------------------------------------------------------------------------------------

u64 fake_clock(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return 1000000000u * (u64)t.tv_sec + (u64)t.tv_nsec;
}

// Work that the GPU did. `sizes`: grid, block and shared memory, for a kernel. A kernel called "timeless" gets no times.
void fake_activity(uint32_t kind, u64 stream, u64 start, u64 end, const char *name, const uint32_t *sizes, u64 bytes) {
  if (!enabled[kind]) return;
  uint8_t *record = append(kind);
  if (!name || strcmp(name, "timeless") != 0) {
    put64(record, 16, start);
    put64(record, 24, end);
  }
  if (kind == CONCURRENT_KERNEL) {
    static char names[64][64];
    int i = 0;
    while (i < 63 && names[i][0] && strcmp(names[i], name) != 0) i++;
    strncpy(names[i], name, 63);
    record[6] = 40;  // registers
    put32(record, 48, (uint32_t)stream);
    for (int j = 0; j < 6; j++) put32(record, 52 + 4 * (size_t)j, sizes[j]);
    put32(record, 76, 1024);
    put32(record, 80, sizes[6]);
    put64(record, 104, (u64)names[i]);
  } else {
    put64(record, 8, bytes);
    put32(record, 40, (uint32_t)stream);
    if (kind == MEMCPY) record[4] = 8, record[5] = record[6] = 3;
  }
  append(SYNCHRONIZATION);  // which nobody has asked for
  if (fullAfter > 0 && now.records >= fullAfter) giveBack();
}

// -- CUPTI -------------------------------------------------------------------------------------------------------

int cuptiGetVersion(uint32_t *out) { ENTER; *out = version; return OK; }
int cuptiGetResultString(int result, const char **text) {
  *text = result == INVALID_OPERATION ? "CUPTI_ERROR_INVALID_OPERATION"
        : result == 39 ? "CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED" : NULL;
  return *text ? OK : INVALID_PARAMETER;
}
int cuptiGetTimestamp(u64 *out) { ENTER; *out = fake_clock(); return OK; }
int cuptiActivityRegisterCallbacks(Request requested, Complete completed) {
  ENTER;
  if (!requested || !completed) return INVALID_PARAMETER;
  request = requested;
  complete = completed;
  return OK;
}
int cuptiActivityEnable(int kind) {
  ENTER;
  if (!request) return INVALID_OPERATION;
  enabled[kind] = 1;
  return OK;
}
int cuptiActivityDisable(int kind) { ENTER; enabled[kind] = 0; return OK; }
int cuptiActivityFlushAll(uint32_t flag) {
  ENTER;
  if (!request || flag != 1) return INVALID_OPERATION;
  giveBack();
  join();
  return OK;
}
int cuptiActivityGetNextRecord(uint8_t *buffer, size_t valid, uint8_t **record) {
  ENTER;
  uint8_t *next = buffer;
  uint32_t kind;
  if (*record) {
    memcpy(&kind, *record, 4);
    next = *record + sizeOf(kind);
  }
  if (next >= buffer + valid) return MAX_LIMIT_REACHED;
  memcpy(&kind, next, 4);
  if (sizeOf(kind) == 0) return INVALID_KIND;
  *record = next;
  return OK;
}
int cuptiActivityGetNumDroppedRecords(void *context, uint32_t stream, size_t *dropped) {
  ENTER;
  (void)context, (void)stream;
  *dropped = droppedRecords;
  droppedRecords = 0;
  return OK;
}

// -- the tests' side ---------------------------------------------------------------------------------------------

// A fresh CUPTI. `recordsPerBuffer`: 0 for as many as fit.
void fake_cupti_reset(uint32_t itsVersion, int threads, int recordsPerBuffer) {
  memset(enabled, 0, sizeof enabled);
  request = NULL;
  complete = NULL;
  now = (struct buffer){0};
  version = itsVersion;
  mode = threads;
  fullAfter = recordsPerBuffer;
  droppedRecords = 0;
  requests = completions = 0;
}
void fake_cupti_drop(u64 count) { droppedRecords += count; }
// What comes next in the current buffer is of a kind that is none.
void fake_cupti_spoil(void) { if (now.bytes) now.valid += 8; }
int fake_cupti_buffers(int which) { return which == 0 ? requests : completions; }
int fake_cupti_enabled(void) {
  int count = 0;
  for (int i = 0; i < 64; i++) count += enabled[i];
  return count;
}
