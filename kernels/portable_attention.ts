import { type AttentionPlan, Float, type GpuDevice } from "../ffi/gpu.ts";
import { launch, vectorWidth } from "./gpu.ts";
import PORTABLE_ATTENTION_CU from "./portable_attention.cu" with { type: "text" };

const SOURCE = { name: "portable_attention.cu", text: PORTABLE_ATTENTION_CU };

const HEAD_DIM = 128;
/** Queries of a block, and its threads. */
const QUERIES = 128;
const THREADS = 256;
/** Elements that move at a time. */
const WIDTH = 8;

/** GPUs whose matrix units multiply as it wants: AMD's CDNA 2 (gfx90a), 3 (gfx94x) and 4 (gfx950). */
const MATRIX_UNITS = /^gfx9(0a|4[0-2]|50)$/;

/**
 * Whether {@link portableAttention} takes a plan on this GPU: heads of 128 in bfloat16 whose rows start at multiples of 16
 * bytes, on a GPU with the matrix units that it is made for.
 */
export function portableAttentionTakes({ limits }: GpuDevice, { q, k, v, out }: AttentionPlan): boolean {
  if (!MATRIX_UNITS.test(limits.architecture) || q.shape[3] !== HEAD_DIM) return false;
  const all = [q, k, v, out];
  return all.every(({ dtype, size }) => dtype === "bf16" && size > 0) && vectorWidth(HEAD_DIM, all) === WIDTH;
}

/**
 * Attention by our own kernel, for AMD GPUs without AITER: softmax and sums in f32, the softmax's weights rounded to bfloat16.
 * What it computes is attentionReference in attention.ts.
 *
 * @param plan that {@link portableAttentionTakes}.
 */
export function portableAttention(gpu: GpuDevice, { q, k, v, out, scale }: AttentionPlan): void {
  const [batch, queries, heads] = q.shape;
  launch(gpu, SOURCE, {
    entry: "portableAttention",
    types: {},
    grid: [Math.ceil(queries / QUERIES), heads, batch],
    block: THREADS,
    args: [
      out,
      q,
      k,
      v,
      queries,
      k.shape[1],
      ...[out, q, k, v].flatMap(({ strides }) => strides.slice(0, 3).map(BigInt)),
      new Float(scale * Math.LOG2E),
    ],
  });
}
