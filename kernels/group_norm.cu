// Group norm: y = (x - mean) / sqrt(variance + eps) * weight[channel] + bias[channel], with mean and variance over a group
// of channels and the whole picture; with SiLU the result is y * sigmoid(y). The pictures are planar (NCHW) or interleaved
// (NHWC).
//
//   out, x [batch, channels, pixels] or [batch, pixels, channels] T      weight, bias   [channels] W
//   partials [batch * groups, parts] Moments      statistics [batch * groups, 2] f32: mean, 1 / sqrt(variance + eps)
//
// A group is up to millions of elements, so three kernels share it out:
// 1. moments*: each block reads a part of the picture and leaves count, mean and sum of squared differences of it;
// 2. mergeMoments: one block a group merges the parts' moments (Chan, Golub & LeVeque 1979);
// 3. normalize*: reads the picture again and writes the result.
// Sums of squares are only ever of differences from a mean near by: E[x^2] - E[x]^2 would cancel.
// Bytes moved: read, read and write. Floor for [1, 128, 1024, 1024], the decoder's largest, at 3.0 TB/s: bf16 805 MB,
// 268 us; f32 537 us. Pictures up to about 25 MB are read the second time from an H100's L2 cache.
// T, W: the dtypes. N: elements that move at a time: a divisor of pixels (planar) or of channels (interleaved).
// VECTORS: how many of them a thread has on their way at a time. BLOCK: threads of a block that reads, at most. LANES: threads along
// the channels (interleaved). SILU: 1 where SiLU follows, else 0.
#include "common.cuh"

struct Moments { float n, mean, squares; };

// The moments of both together.
__device__ __forceinline__ void merge(Moments& a, Moments b) {
  float n = a.n + b.n;
  if (n == 0.0f) return;
  float delta = b.mean - a.mean, share = delta * (b.n / n);
  a.mean += share;
  a.squares += b.squares + share * (delta * a.n);
  a.n = n;
}

// The moments of all threads together, in every thread; the first thread has some. Sums are of distances from its mean,
// so that a large mean costs no digits. Once a kernel.
__device__ __forceinline__ Moments mergeBlock(Moments mine) {
  __shared__ float partials[4][32];
  const int warps = blockDim.x / WARP;
  if (threadIdx.x == 0) partials[0][0] = mine.mean;
  __syncthreads();
  const float near = partials[0][0];
  Moments all;
  all.n = blockSum(mine.n, partials[1], warps);
  all.mean = near + blockSum(mine.n * (mine.mean - near), partials[2], warps) / all.n;
  float delta = mine.mean - all.mean;
  all.squares = blockSum(mine.squares + mine.n * delta * delta, partials[3], warps);
  return all;
}

// The moments of what a thread has read, of KINDS kinds of elements, as many of each.
template <int KINDS> struct Running {
  float n, mean[KINDS], squares[KINDS];
};

// Adds `count` vectors, VECTORS at most, at p, p + step, ...: element i of each is of kind i % KINDS.
template <int KINDS>
__device__ __forceinline__ void addTile(Running<KINDS>& all, const T* p, long long step, int count) {
  Vec<T, N> held[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    if (j < count) held[j] = loadVec<N>(p + j * step);
  }
  // Divided once for all kinds.
  const float n = (float)(count * (N / KINDS)), inverse = 1.0f / n, share = n / (all.n + n);
#pragma unroll
  for (int kind = 0; kind < KINDS; kind++) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
#pragma unroll
      for (int i = kind; i < N; i += KINDS) sum += j < count ? toFloat(held[j].v[i]) : 0.0f;
    }
    const float mean = sum * inverse;
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
#pragma unroll
      for (int i = kind; i < N; i += KINDS) {
        float difference = j < count ? toFloat(held[j].v[i]) - mean : 0.0f;
        squares += difference * difference;
      }
    }
    // As merge does.
    const float delta = mean - all.mean[kind], change = delta * share;
    all.mean[kind] += change;
    all.squares[kind] += squares + change * (delta * all.n);
  }
  all.n += n;
}

// The moments of any number of vectors.
template <int KINDS>
__device__ __forceinline__ Running<KINDS> momentsOf(const T* p, long long step, int count) {
  Running<KINDS> all = {};
  int first = 0;
  // With a constant count the comparisons in a tile go away.
  for (; first + VECTORS <= count; first += VECTORS) addTile<KINDS>(all, p + first * step, step, VECTORS);
  if (first < count) addTile<KINDS>(all, p + first * step, step, count - first);
  return all;
}

// How many of the items first, first + step, ... lie below end.
__device__ __forceinline__ int countBelow(long long first, long long end, int step) {
  return first < end ? (int)((end - first + step - 1) / step) : 0;
}

// A planar group is one run of `size` elements; each block takes `chunk` of them, a multiple of N.
extern "C" __global__ void __launch_bounds__(BLOCK)
momentsPlanar(Moments* partials, const T* x, long long size, int parts, long long chunk) {
  const int group = blockIdx.x / parts, part = blockIdx.x % parts;
  const long long first = part * chunk + (long long)threadIdx.x * N;
  const long long end = min(part * chunk + chunk, size);
  const Running<1> mine = momentsOf<1>(x + group * size + first, BLOCK * N, countBelow(first, end, BLOCK * N));
  const Moments all = mergeBlock({mine.n, mine.mean[0], mine.squares[0]});
  if (threadIdx.x == 0) partials[blockIdx.x] = all;
}

// Each block takes LANES * N channels of `chunk` pixels. It leaves the moments of single channels, so that groups need
// not be whole vectors: partials [batch * groups, parts, channels of a group].
extern "C" __global__ void __launch_bounds__(BLOCK)
momentsInterleaved(Moments* partials, const T* x, int channels, int perGroup, long long pixels, int parts,
                   int chunk) {
  __shared__ Moments found[BLOCK * N];
  const int rows = blockDim.x / LANES;
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const int slices = (channels + LANES * N - 1) / (LANES * N);
  const int part = blockIdx.x % parts, slice = blockIdx.x / parts % slices, batch = blockIdx.x / parts / slices;
  const int channel = (slice * LANES + lane) * N;
  const long long first = (long long)part * chunk + row;
  const long long end = channel < channels ? min((long long)part * chunk + chunk, pixels) : 0;
  const T* from = x + (batch * pixels + first) * channels + channel;
  const Running<N> mine = momentsOf<N>(from, (long long)rows * channels, countBelow(first, end, rows));
#pragma unroll
  for (int i = 0; i < N; i++) found[threadIdx.x * N + i] = {mine.n, mine.mean[i], mine.squares[i]};
  __syncthreads();
  for (int i = threadIdx.x; i < LANES * N; i += blockDim.x) {
    int at = slice * LANES * N + i;
    if (at >= channels) break;
    Moments all = found[i];
    for (int r = 1; r < rows; r++) merge(all, found[r * LANES * N + i]);
    long long group = (long long)batch * (channels / perGroup) + at / perGroup;
    partials[(group * parts + part) * perGroup + at % perGroup] = all;
  }
}

extern "C" __global__ void __launch_bounds__(1024)
mergeMoments(float* statistics, const Moments* partials, int parts, float eps) {
  partials += (long long)blockIdx.x * parts;
  Moments mine = {0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int part = threadIdx.x; part < parts; part += blockDim.x) merge(mine, partials[part]);
  mine = mergeBlock(mine);
  if (threadIdx.x != 0) return;
  statistics[2 * blockIdx.x] = mine.mean;
  statistics[2 * blockIdx.x + 1] = rsqrtf(mine.squares / mine.n + eps);
}

// What becomes of an element; the scale is the weight / sqrt(variance + eps).
__device__ __forceinline__ T normalized(T x, float mean, float scale, float shift) {
  const float y = (toFloat(x) - mean) * scale + shift;
  return fromFloat<T>(SILU ? timesSigmoid(y, y) : y);
}

// Each block takes BLOCK * VECTORS vectors of one plane; `parts` blocks cover it.
extern "C" __global__ void __launch_bounds__(BLOCK)
normalizePlanar(T* out, const T* x, const float* statistics, const W* weight, const W* bias, int channels,
                int perGroup, long long pixels, int parts) {
  const int plane = blockIdx.x / parts, part = blockIdx.x % parts;
  const long long first = ((long long)part * (BLOCK * VECTORS) + threadIdx.x) * N;
  x += plane * pixels;
  out += plane * pixels;
  Vec<T, N> held[VECTORS];
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * BLOCK * N;
    if (at < pixels) held[j] = loadVec<N>(x + at);
  }
  const int channel = plane % channels;
  const float mean = statistics[plane / perGroup * 2], factor = statistics[plane / perGroup * 2 + 1];
  const float scale = factor * toFloat(weight[channel]), shift = toFloat(bias[channel]);
#pragma unroll
  for (int j = 0; j < VECTORS; j++) {
    long long at = first + j * BLOCK * N;
    if (at >= pixels) continue;
    Vec<T, N> result;
#pragma unroll
    for (int i = 0; i < N; i++) result.v[i] = normalized(held[j].v[i], mean, scale, shift);
    storeVec(out + at, result);
  }
}

// Each block takes LANES * N channels of `chunk` pixels, as in momentsInterleaved; a thread keeps its channels' numbers.
extern "C" __global__ void __launch_bounds__(BLOCK)
normalizeInterleaved(T* out, const T* x, const float* statistics, const W* weight, const W* bias, int channels,
                     int perGroup, long long pixels, int parts, int chunk) {
  const int rows = blockDim.x / LANES;
  const int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  const int slices = (channels + LANES * N - 1) / (LANES * N);
  const int part = blockIdx.x % parts, slice = blockIdx.x / parts % slices, batch = blockIdx.x / parts / slices;
  const int channel = (slice * LANES + lane) * N;
  if (channel >= channels) return;
  float mean[N], scale[N], shift[N];
#pragma unroll
  for (int i = 0; i < N; i++) {
    int group = batch * (channels / perGroup) + (channel + i) / perGroup;
    mean[i] = statistics[2 * group];
    scale[i] = statistics[2 * group + 1] * toFloat(weight[channel + i]);
    shift[i] = toFloat(bias[channel + i]);
  }
  const long long first = (long long)part * chunk + row;
  const int count = countBelow(first, min((long long)part * chunk + chunk, pixels), rows);
  const long long start = (batch * pixels + first) * channels + channel, step = (long long)rows * channels;
  for (int done = 0; done < count; done += VECTORS) {
    Vec<T, N> held[VECTORS];
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
      if (done + j < count) held[j] = loadVec<N>(x + start + (done + j) * step);
    }
#pragma unroll
    for (int j = 0; j < VECTORS; j++) {
      if (done + j >= count) continue;
      Vec<T, N> result;
#pragma unroll
      for (int i = 0; i < N; i++) result.v[i] = normalized(held[j].v[i], mean[i], scale[i], shift[i]);
      storeVec(out + start + (done + j) * step, result);
    }
  }
}
