import { ShapeError } from "../ffi/errors.ts";
import { Float, type GpuDevice } from "../ffi/gpu.ts";
import type { Tensor } from "../ffi/tensor.ts";
import { expect, expectShape } from "./check.ts";
import FLASH_ATTENTION_FLOAT8_CU from "./flash_attention_float8.cu" with { type: "text" };
import { type QkvTiles, TILE, tilesOf } from "./float8_tiles.ts";
import { launch } from "./gpu.ts";

const SOURCE = { name: "flash_attention_float8.cu", text: FLASH_ATTENTION_FLOAT8_CU };

/** A warpgroup that brings tiles, and two that compute. */
const THREADS = 384;
const QUERIES = 128;
/** A tile of q, four of k and of v, and what it takes to start at a multiple of 1024. */
const SHARED_BYTES = 9 * TILE * TILE + 1024;

/** Whether this GPU has the instructions of {@link flashAttentionFloat8}: Hopper's. */
export function hasFlashAttentionFloat8({ limits }: GpuDevice): boolean {
  return limits.architecture === "sm_90a";
}

/**
 * Attention with q, k and v in E4M3 without scales, as flux-fast has them, sums and softmax in f32 (Shah et al. 2024,
 * FlashAttention-3). What it computes is attentionReference in attention.ts, on rounded inputs; the softmax's weights are
 * rounded to E4M3 too.
 *
 * @param tiles of `batch * heads` heads. @param out `[batch, queries, heads, 128]` bf16 with a dense last dimension.
 * @throws ShapeError where the sizes do not fit, or on a GPU without {@link hasFlashAttentionFloat8}.
 */
export function flashAttentionFloat8(
  gpu: GpuDevice,
  { q, k, v, keys }: QkvTiles,
  scale: number,
  out: Tensor,
): void {
  const [batch, queries, heads] = out.shape;
  if (!hasFlashAttentionFloat8(gpu)) {
    throw new ShapeError(`flashAttentionFloat8: ${gpu.name} is no Hopper GPU`);
  }
  expectShape("flashAttentionFloat8", "out", out, [null, null, null, TILE]);
  expectShape("flashAttentionFloat8", "q", q, [batch * heads, tilesOf(queries), TILE * TILE]);
  expectShape("flashAttentionFloat8", "k", k, [batch * heads, tilesOf(keys), TILE * TILE]);
  expectShape("flashAttentionFloat8", "v", v, k.shape);
  expect(out.dtype === "bf16", "flashAttentionFloat8", () => `out is ${out}, expected bf16`);
  if (out.size === 0 || keys === 0) {
    throw new ShapeError(`flashAttentionFloat8: nothing to attend for ${out}`);
  }
  launch(gpu, SOURCE, {
    entry: "flashAttentionFloat8",
    types: {},
    grid: [Math.ceil(queries / QUERIES), batch * heads],
    block: THREADS,
    shared: SHARED_BYTES,
    args: [
      out,
      q,
      k,
      v,
      queries,
      keys,
      k.shape[1],
      heads,
      ...out.strides.slice(0, 3).map(BigInt),
      new Float(scale * Math.LOG2E),
    ],
  });
}
