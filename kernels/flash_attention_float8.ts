import { ShapeError } from "../ffi/errors.ts";
import { Float, type GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import type { AttentionOptions } from "./attention.ts";
import { attentionTiles, TILE } from "./attention_tiles.ts";
import { expectShape } from "./check.ts";
import FLASH_ATTENTION_FLOAT8_CU from "./flash_attention_float8.cu" with { type: "text" };
import { gpuOf, launch } from "./gpu.ts";

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

/** Whether {@link flashAttentionFloat8} can take the place of this call of attention. */
export function flashAttentionFloat8Takes(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: AttentionOptions,
): boolean {
  return options.bias === undefined && !options.causal && q.size > 0 && k.size > 0 &&
    [q, k, v].every(({ dtype, shape }) => dtype === "bf16" && shape[3] === TILE);
}

/**
 * Attention with q, k and v cast to E4M3 as they are (without scales, as flux-fast does), sums and softmax in f32
 * (Shah et al. 2024, FlashAttention-3). What it computes is attentionReference in attention.ts, on rounded inputs; the
 * softmax's weights are rounded to E4M3 too.
 *
 * @param q `[batch, queries, heads, 128]` f32 or bf16. @param k `[batch, keys, heads, 128]`. @param v the same.
 * @param out `[batch, queries, heads, 128]` bf16 with a dense last dimension; a new one when left out.
 * @throws ShapeError where the sizes do not fit, or on a GPU without {@link hasFlashAttentionFloat8}.
 */
export function flashAttentionFloat8(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  scale: number = TILE ** -0.5,
  out: Tensor = Tensor.empty(q.device, q.shape, "bf16"),
): Tensor {
  const [batch, queries, heads] = q.shape;
  expectShape("flashAttentionFloat8", "q", q, [null, null, null, TILE]);
  expectShape("flashAttentionFloat8", "k", k, [batch, null, heads, TILE]);
  const keys = k.shape[1];
  expectShape("flashAttentionFloat8", "v", v, [batch, keys, heads, TILE]);
  expectShape("flashAttentionFloat8", "out", out, q.shape);
  const gpu = gpuOf(q);
  if (gpu === undefined || !hasFlashAttentionFloat8(gpu)) {
    throw new ShapeError(`flashAttentionFloat8: ${q.device.name} is no Hopper GPU`);
  }
  if (out.size === 0 || keys === 0) {
    throw new ShapeError(`flashAttentionFloat8: nothing to attend in ${q}, ${k}`);
  }
  gpu.scope(() => {
    const [qTiles, kTiles, vTiles] = ([["query", q], ["key", k], ["value", v]] as const).map(([kind, x]) =>
      attentionTiles(gpu, kind, x)
    );
    launch(gpu, SOURCE, {
      entry: "flashAttentionFloat8",
      types: {},
      grid: [Math.ceil(queries / QUERIES), batch * heads],
      block: THREADS,
      shared: SHARED_BYTES,
      args: [
        out,
        qTiles,
        kTiles,
        vTiles,
        queries,
        keys,
        kTiles.shape[1],
        heads,
        ...out.strides.slice(0, 3).map(BigInt),
        new Float(scale * Math.LOG2E),
      ],
    });
  });
  return out;
}
