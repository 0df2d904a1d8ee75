// Runs the threads of emulated kernels (simt.hpp), and multiplies and convolves for the emulated GPU.
//
// Blocks run one after another. A block's threads are fibers: each runs until it waits for others, and a fiber whose
// thread ended goes on with the next thread. So a kernel without barriers is a plain loop in one fiber.
// To bring missing barriers to light, odd blocks run their threads in the opposite order.
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "simt.hpp"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
const int warpSize = WARP;
// What a block may have at most on an H100 (AMD's have less), and a zone behind it that must stay untouched.
static const int SHARED_LIMIT = 227 << 10, SHARED_GUARD = 4096;
alignas(1024) char simtDynamicShared[SHARED_LIMIT + SHARED_GUARD];

namespace {

enum Fault { NONE, PARTIAL_BARRIER, PARTIAL_EXCHANGE, OVERFLOW, MEMORY, UNDEFINED };
enum State { RUNNING, AT_BARRIER, AT_EXCHANGE, IDLE };
const int MOST_THREADS = 1024, LANES = WARP, STACK = 128 << 10;

struct Fiber {
  char* stack;
  jmp_buf registers;
  bool started;
  State state;
  int thread;
  SimtMask mask;
  int operation;
};

struct Warp {
  unsigned long long brought[LANES];
  unsigned long long values[LANES];
  SimtMask present[LANES];
};

Fiber fibers[MOST_THREADS];
Warp warps[MOST_THREADS / LANES];
Fiber* fiberOf[MOST_THREADS];
Fiber* current;
jmp_buf scheduler;
sigjmp_buf launcher;
int threads, begun, ended;
bool reversed;
void (*kernel)(void**);
void** arguments;

int threadAt(int order) { return reversed ? threads - 1 - order : order; }

void enter(int thread) {
  current->thread = thread;
  current->state = RUNNING;
  fiberOf[thread] = current;
  unsigned t = thread;
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

// A fiber's life: thread after thread, then a wait for the next block.
void live() {
  for (;;) {
    while (begun < threads) {
      enter(threadAt(begun++));
      kernel(arguments);
      fiberOf[current->thread] = nullptr;
      ended++;
    }
    current->state = IDLE;
    if (_setjmp(current->registers) == 0) _longjmp(scheduler, 1);
  }
}

// Back to the scheduler; returns when it resumes this fiber.
__attribute__((noinline)) void wait(State state) {
  uint3 self = threadIdx;
  current->state = state;
  if (_setjmp(current->registers) == 0) _longjmp(scheduler, 1);
  threadIdx = self;
}

void resume(Fiber* fiber) {
  current = fiber;
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->registers, 1);
  fiber->started = true;
  if (!fiber->stack) {
    void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) abort();
    mprotect(stack, 4096, PROT_NONE);
    fiber->stack = (char*)stack;
  }
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber->stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

// Lets go the lanes of a warp that all wait for one another. Lanes that ended are not waited for.
bool releaseExchanges(int first) {
  bool released = false;
  Warp& warp = warps[first / LANES];
  int lanes = threads - first < LANES ? threads - first : LANES;
  for (int leader = 0; leader < lanes; leader++) {
    Fiber* head = fiberOf[first + leader];
    if (!head || head->state != AT_EXCHANGE) continue;
    SimtMask present = 0;
    bool complete = head->mask >> leader & 1;
    for (int lane = 0; lane < lanes && complete; lane++) {
      Fiber* fiber = fiberOf[first + lane];
      if (!(head->mask >> lane & 1) || !fiber) continue;
      present |= (SimtMask)1 << lane;
      complete = fiber->state == AT_EXCHANGE && fiber->mask == head->mask &&
                 fiber->operation == head->operation;
    }
    if (!complete) continue;
    for (int lane = 0; lane < lanes; lane++) {
      if (!(present >> lane & 1)) continue;
      warp.values[lane] = warp.brought[lane];
      warp.present[lane] = present;
      fiberOf[first + lane]->state = RUNNING;
    }
    released = true;
  }
  return released;
}

// Runs all threads of a block; says what they wait for in vain, if they do.
Fault runBlock() {
  begun = ended = 0;
  int used = 0;
  while (begun < threads) resume(&fibers[used++]);  // a new fiber whenever one waits
  while (ended < threads) {
    bool progress = false;
    // A thread that did not begin counts as one that ended, so exchanges are settled once all have begun.
    for (int first = 0; first < threads; first += LANES) progress |= releaseExchanges(first);
    int waiting = 0;
    for (int i = 0; i < threads; i++) waiting += fiberOf[i] && fiberOf[i]->state == AT_BARRIER;
    if (waiting == threads) {
      for (int i = 0; i < threads; i++) fiberOf[i]->state = RUNNING;
      progress = true;
    }
    if (!progress) {
      for (int i = 0; i < threads; i++) {
        if (!fiberOf[i]) continue;
        current = fiberOf[i];
        unsigned t = i;
        threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
        return current->state == AT_BARRIER ? PARTIAL_BARRIER : PARTIAL_EXCHANGE;
      }
    }
    for (int order = 0; order < threads; order++) {
      Fiber* fiber = fiberOf[threadAt(order)];
      if (fiber && fiber->state == RUNNING) resume(fiber);
    }
  }
  return NONE;
}

const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
const int SIGNAL_COUNT = sizeof(SIGNALS) / sizeof(*SIGNALS);

void onSignal(int signal, siginfo_t* info, void* context);

// Faults of a kernel end its launch instead of the process. Tests of several files run in one process, each with a copy of this
// library and a thread of its own: whose thread it is not hands a signal on to who was there before, and nobody ever leaves, since
// another may have come behind (so the library stays loaded, see emulated_compiler.ts).
thread_local bool launching;
struct Trap {
  char stack[64 << 10];
  stack_t oldStack;
  bool installed;
  struct sigaction old[SIGNAL_COUNT];
  void set() {
    stack_t own = {};
    own.ss_sp = stack;
    own.ss_size = sizeof(stack);
    sigaltstack(&own, &oldStack);
    launching = true;
    if (installed) return;
    installed = true;
    struct sigaction action = {};
    action.sa_sigaction = onSignal;
    action.sa_flags = SA_ONSTACK | SA_SIGINFO;
    for (int i = 0; i < SIGNAL_COUNT; i++) sigaction(SIGNALS[i], &action, &old[i]);
  }
  void clear() {
    launching = false;
    sigaltstack(&oldStack, nullptr);
  }
};
Trap trap;

void onSignal(int number, siginfo_t* info, void* context) {
  if (launching) siglongjmp(launcher, number == SIGSEGV || number == SIGBUS ? MEMORY : UNDEFINED);
  int i = 0;
  while (SIGNALS[i] != number) i++;
  const struct sigaction& before = trap.old[i];
  if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(number, info, context);
  else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) before.sa_handler(number);
  else signal(number, SIG_DFL);  // it comes again, and ends the process
}

}  // namespace

void simtSyncThreads() { wait(AT_BARRIER); }

int simtLane() { return current->thread % LANES; }

const unsigned long long* simtExchange(SimtMask mask, int operation, unsigned long long value,
                                       SimtMask* present) {
  Fiber* self = current;
  Warp& warp = warps[self->thread / LANES];
  int lane = self->thread % LANES;
  warp.brought[lane] = value;
  self->mask = mask;
  self->operation = operation;
  wait(AT_EXCHANGE);
  *present = warp.present[lane];
  return warp.values;
}

void simtRun(const SimtLaunch* launch, SimtFault* fault, void (*body)(void**), char* shared,
             char* sharedEnd) {
  const int *grid = launch->grid, *block = launch->block;
  kernel = body;
  arguments = launch->arguments;
  gridDim = {(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]};
  blockDim = {(unsigned)block[0], (unsigned)block[1], (unsigned)block[2]};
  threads = block[0] * block[1] * block[2];
  long long blocks = (long long)grid[0] * grid[1] * grid[2];
  int guard = SHARED_GUARD;
  volatile int code = NONE;
  trap.set();
  int signalled = sigsetjmp(launcher, 1);
  if (signalled != 0) code = signalled;
  else {
    memset(simtDynamicShared, 0xff, sizeof(simtDynamicShared));
    for (long long i = 0; i < blocks && code == NONE; i++) {
      blockIdx = {(unsigned)(i % grid[0]), (unsigned)(i / grid[0] % grid[1]),
                  (unsigned)(i / ((long long)grid[0] * grid[1]))};
      reversed = i % 2 == 1;
      if (shared != sharedEnd) memset(shared, 0xff, sharedEnd - shared);
      memset(simtDynamicShared, 0xff, launch->sharedBytes);
      code = runBlock();
      for (int at = 0; at < guard && code == NONE; at++) {
        if (simtDynamicShared[launch->sharedBytes + at] != (char)0xff) code = OVERFLOW;
      }
    }
  }
  trap.clear();
  *fault = {code,
            {(int)blockIdx.x, (int)blockIdx.y, (int)blockIdx.z},
            {(int)threadIdx.x, (int)threadIdx.y, (int)threadIdx.z}};
  if (code == NONE) return;
  // The fibers are stuck somewhere inside of the kernel: they start anew.
  for (Fiber& fiber : fibers) fiber.started = false;
  memset(fiberOf, 0, sizeof(fiberOf));
}

// -- what libraries do on a GPU: sums in double, so that the emulated GPU is the exact one --------------------------

namespace {

// A strided tensor of up to four dimensions. Element types: see DTYPES in emulated_libraries.ts.
struct View {
  char* pointer;
  long long type;
  long long size[4], stride[4];
};
enum Type { F32, BF16, F16, F8E4M3, F8E4M3_FNUZ };  // the last two are only loaded

float load(const View& view, long long at) {
  if (view.type == F32) return ((float*)view.pointer)[at];
  if (view.type == F8E4M3_FNUZ) {
    unsigned char code = view.pointer[at];
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float value = code == 0x80    ? __builtin_nanf("")
                  : exponent == 0 ? __builtin_ldexpf(mantissa, -10)
                                  : __builtin_ldexpf(8 + mantissa, exponent - 11);
    return code & 0x80 ? -value : value;
  }
  if (view.type == F8E4M3) {
    unsigned char code = view.pointer[at];
    int exponent = code >> 3 & 15, mantissa = code & 7;
    float value = (code & 0x7f) == 0x7f ? __builtin_nanf("")
                  : exponent == 0      ? __builtin_ldexpf(mantissa, -9)
                                       : __builtin_ldexpf(8 + mantissa, exponent - 10);
    return code & 0x80 ? -value : value;
  }
  unsigned short bits = ((unsigned short*)view.pointer)[at];
  if (view.type == BF16) return __uint_as_float((unsigned)bits << 16);
  return (float)simtBits<_Float16>(bits);
}

void store(const View& view, long long at, double value) {
  if (view.type == F32) {
    ((float*)view.pointer)[at] = (float)value;
  } else if (view.type == BF16) {
    unsigned raw = __float_as_uint((float)value);
    bool nan = (raw & 0x7fffffffu) > 0x7f800000u;
    ((unsigned short*)view.pointer)[at] = nan ? 0x7fff : (raw + 0x7fffu + (raw >> 16 & 1u)) >> 16;
  } else {
    ((unsigned short*)view.pointer)[at] = simtBits<unsigned short>((_Float16)(float)value);
  }
}

double dot(const float* a, const float* b, long long length) {
  double sums[8] = {};
  long long i = 0;
  for (; i + 8 <= length; i += 8) {
    for (int j = 0; j < 8; j++) sums[j] += (double)a[i + j] * b[i + j];
  }
  for (; i < length; i++) sums[0] += (double)a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// Rows of two dimensions of a view as dense floats.
void loadRows(float* to, const View& view, long long from, int rows, int columns) {
  for (long long r = 0; r < view.size[rows]; r++) {
    for (long long c = 0; c < view.size[columns]; c++) {
      *to++ = load(view, from + r * view.stride[rows] + c * view.stride[columns]);
    }
  }
}

float* floats(long long count) { return (float*)malloc((count > 0 ? count : 1) * sizeof(float)); }

}  // namespace

extern "C" {

// out [batch, m, n] = alpha * a [batch, m, k] b [batch, n, k]^T + bias [n], each in a View's first dimensions. The sums
// are multiplied by scaleA [m] and scaleB [n], or [1], where they are there; `gelu` says whether GELU follows (tanh form).
void simtMatmul(const View* a, const View* b, const View* bias, const View* scaleA, const View* scaleB,
                const View* out, float alpha, int gelu) {
  long long m = a->size[1], k = a->size[2], n = b->size[1];
  float *left = floats(m * k), *right = floats(n * k);
  for (long long batch = 0; batch < a->size[0]; batch++) {
    loadRows(left, *a, batch * a->stride[0], 1, 2);
    loadRows(right, *b, batch * b->stride[0], 1, 2);
    for (long long i = 0; i < m; i++) {
      for (long long j = 0; j < n; j++) {
        double sum = alpha * dot(left + i * k, right + j * k, k);
        if (scaleA->pointer) {
          sum *= load(*scaleA, scaleA->size[0] == 1 ? 0 : i);
          sum *= load(*scaleB, scaleB->size[0] == 1 ? 0 : j);
        }
        if (bias->pointer) sum += load(*bias, j * bias->stride[0]);
        if (gelu) {
          double cubic = 0.7978845608028654 * (sum + 0.044715 * sum * sum * sum);
          sum = 0.5 * sum * (1 + __builtin_tanh(cubic));
        }
        store(*out, batch * out->stride[0] + i * out->stride[1] + j * out->stride[2], sum);
      }
    }
  }
  free(left);
  free(right);
}

// x [n, c, h, w], weight [o, c, kh, kw], bias [o], residual and out [n, o, oh, ow].
void simtConv(const View* x, const View* weight, const View* bias, const View* residual, const View* out,
              int stride, int top, int left) {
  long long channels = x->size[1], height = weight->size[2], width = weight->size[3];
  long long taps = channels * height * width, filters = weight->size[0];
  // The picture with its zeros around it, as far as the patches reach.
  long long rows = (out->size[2] - 1) * stride + height, columns = (out->size[3] - 1) * stride + width;
  float *filter = floats(filters * taps), *patch = floats(taps), *padded = floats(channels * rows * columns);
  for (long long o = 0; o < filters; o++) {
    for (long long c = 0; c < channels; c++) {
      long long from = o * weight->stride[0] + c * weight->stride[1];
      loadRows(filter + (o * channels + c) * height * width, *weight, from, 2, 3);
    }
  }
  for (long long n = 0; n < out->size[0]; n++) {
    float* pixel = padded;
    for (long long c = 0; c < channels; c++) {
      for (long long r = -top; r < rows - top; r++) {
        for (long long s = -left; s < columns - left; s++) {
          bool inside = r >= 0 && r < x->size[2] && s >= 0 && s < x->size[3];
          long long at = n * x->stride[0] + c * x->stride[1] + r * x->stride[2] + s * x->stride[3];
          *pixel++ = inside ? load(*x, at) : 0.0f;
        }
      }
    }
    for (long long row = 0; row < out->size[2]; row++) {
      for (long long column = 0; column < out->size[3]; column++) {
        for (long long i = 0; i < channels * height; i++) {
          long long line = (i / height * rows + row * stride + i % height) * columns;
          memcpy(patch + i * width, padded + line + column * stride, width * sizeof(float));
        }
        for (long long o = 0; o < filters; o++) {
          double sum = dot(filter + o * taps, patch, taps);
          if (bias->pointer) sum += load(*bias, o * bias->stride[0]);
          const long long* step = out->stride; // the residual's, too
          long long at = n * step[0] + o * step[1] + row * step[2] + column * step[3];
          if (residual->pointer) sum += load(*residual, at);
          store(*out, at, sum);
        }
      }
    }
  }
  free(filter);
  free(patch);
  free(padded);
}

// q and out [batch, queries, heads, dim], k and v [batch, keys, heads, dim].
void simtAttention(const View* q, const View* k, const View* v, const View* out, float scale) {
  long long queries = q->size[1], keys = k->size[1], dim = q->size[3];
  float *query = floats(queries * dim), *key = floats(keys * dim), *value = floats(keys * dim);
  double* weights = (double*)malloc(keys * sizeof(double));
  for (long long item = 0; item < q->size[0] * q->size[2]; item++) {
    long long batch = item / q->size[2], head = item % q->size[2];
    loadRows(query, *q, batch * q->stride[0] + head * q->stride[2], 1, 3);
    loadRows(key, *k, batch * k->stride[0] + head * k->stride[2], 1, 3);
    loadRows(value, *v, batch * v->stride[0] + head * v->stride[2], 1, 3);
    for (long long i = 0; i < queries; i++) {
      double most = -__builtin_huge_val(), total = 0;
      for (long long j = 0; j < keys; j++) {
        weights[j] = scale * dot(query + i * dim, key + j * dim, dim);
        most = weights[j] > most ? weights[j] : most;
      }
      for (long long j = 0; j < keys; j++) total += weights[j] = __builtin_exp(weights[j] - most);
      for (long long d = 0; d < dim; d++) {
        double sum = 0;
        for (long long j = 0; j < keys; j++) sum += weights[j] * value[j * dim + d];
        long long at = batch * out->stride[0] + i * out->stride[1] + head * out->stride[2] +
                       d * out->stride[3];
        store(*out, at, sum / total);
      }
    }
  }
  free(query);
  free(key);
  free(value);
  free(weights);
}
}
