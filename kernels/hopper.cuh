// Hopper's asynchronous units, for kernels that use its instructions (sm_90a): barriers in shared memory, bulk copies,
// and products of whole warpgroups. Follows common.cuh.
//
// Words after NVIDIA's PTX manual (mbarrier, cp.async.bulk, wgmma).

// A tile in shared memory has rows of 128 bytes, swizzled in groups of 8 rows: piece c of 16 bytes of row r stands at
// c ^ (r % 8). Tiles start at multiples of 1024 bytes.
constexpr int ROW_BYTES = 128;

__device__ __forceinline__ unsigned sharedAddress(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// -- barriers ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void initBarrier(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}
// At the same barrier of a block of this cluster.
__device__ __forceinline__ void arriveAt(unsigned barrier, unsigned block) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }"
               : : "r"(barrier), "r"(block) : "memory");
}
// Arrives, and lets the phase end only when this many bytes have come too.
__device__ __forceinline__ void arriveExpecting(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the barrier's phase of this parity. The phase before the first counts as ended.
__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
  unsigned done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
  } while (!done);
}
// Makes initialized barriers known to the copies and to the other blocks of a cluster.
__device__ __forceinline__ void fenceBarriers() { asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory"); }
__device__ __forceinline__ void meetCluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" : : : "memory");
}
__device__ __forceinline__ unsigned blockInCluster() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// -- copies ------------------------------------------------------------------------------------------------------------

// A piece of memory to shared memory; its bytes count for the barrier.
__device__ __forceinline__ void copyBulk(unsigned to, const void* from, int bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               : : "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// How a matrix lies in memory, for copies of its tiles: cuTensorMapEncodeTiled makes it.
struct alignas(64) TensorMap { unsigned char bytes[128]; };

// The tile that starts at byte x of row y; what is behind the matrix becomes 0.
__device__ __forceinline__ void copyTile(unsigned to, const TensorMap* map, int x, int y, unsigned barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               : : "r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y) : "memory");
}
// The same to the same place in each block of the cluster that has a bit in the mask, and for the barrier there.
__device__ __forceinline__ void copyTileTo(unsigned short blocks, unsigned to, const TensorMap* map, int x, int y,
                                           unsigned barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
               "[%1, {%3, %4}], [%2], %5;"
               : : "r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks) : "memory");
}

// -- products ----------------------------------------------------------------------------------------------------------

// Where rows of 128 bytes start in shared memory, for the matrix units. 32 bytes further along the rows are 2 more. Rows
// are the summed dimension's own, or, for a transposed operand in bfloat16, the other one's: then `columns` is how far the
// next 64 columns are.
__device__ __forceinline__ unsigned long long descriptor(unsigned address, int columns = 16) {
  return (unsigned long long)((address & 0x3ffffu) >> 4) | (unsigned long long)(columns >> 4) << 16 | 64ull << 32 |
         1ull << 62;
}
__device__ __forceinline__ void fenceProducts() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ __forceinline__ void commitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <int PENDING> __device__ __forceinline__ void waitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}
// The compiler must not move reads of an accumulator before the wait.
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) : : "memory");
}
template <int N> __device__ __forceinline__ void hold(unsigned (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i]) : : "memory");
}

// A product of a warpgroup has 64 rows. Its thread holds of columns 8 j + 2 t and the one behind (t = lane % 4) the sums
// d[4 j] and d[4 j + 1] of row 16 * warp + lane / 4, and d[4 j + 2] and d[4 j + 3] of the row 8 further.

// Sums of products of E4M3 may be f16 (fused_linear.cu): in words of two neighbouring ones.
template <bool HALVES> struct SumsOf { using Type = float; };
template <> struct SumsOf<true> { using Type = unsigned; };
__device__ __forceinline__ void widenHalves(unsigned word, float& first, float& second) {
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(first), "=f"(second) : "r"(word));
}

// The sums of an instruction as its text names them, and as its operands: elements of d, in registers of kind c ("f" or "r").
#define NAMES_32                                                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "              \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_52                                                                                                      \
  NAMES_32 ", "                                                                                                       \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51"
#define NAMES_64                                                                                                      \
  NAMES_52 ", "                                                                                                       \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_104                                                                                                     \
  NAMES_64 ", "                                                                                                       \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "              \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103"
#define NAMES_128                                                                                                     \
  NAMES_104 ", "                                                                                                      \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "            \
  "%121, %122, %123, %124, %125, %126, %127"
#define FOUR(c, i) "+" c(d[i]), "+" c(d[i + 1]), "+" c(d[i + 2]), "+" c(d[i + 3])
#define EIGHT(c, i) FOUR(c, i), FOUR(c, i + 4)
#define SUMS_32(c) EIGHT(c, 0), EIGHT(c, 8), EIGHT(c, 16), EIGHT(c, 24)
#define SUMS_52(c) SUMS_32(c), EIGHT(c, 32), EIGHT(c, 40), FOUR(c, 48)
#define SUMS_64(c) SUMS_52(c), FOUR(c, 52), EIGHT(c, 56)
#define SUMS_104(c) SUMS_64(c), EIGHT(c, 64), EIGHT(c, 72), EIGHT(c, 80), EIGHT(c, 88), EIGHT(c, 96)
#define SUMS_128(c) SUMS_104(c), EIGHT(c, 104), EIGHT(c, 112), EIGHT(c, 120)

// The 4 threads of a quad have 4 words each; thread i gets word i of all of them, in their order.
__device__ __forceinline__ void transposeQuad(unsigned (&w)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    if (odd) w[i] = other;
    else w[i + 1] = other;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
    if (upper) w[i] = other;
    else w[i + 2] = other;
  }
}

__device__ __forceinline__ unsigned toBfloat16Pair(float first, float second) {
  unsigned pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}
