import { ShapeError } from "../ffi/errors.ts";
import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import type { AttentionDType } from "./attention_tiles.ts";
import { cast } from "./cast.ts";
import { expect, expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import type { Qkv } from "./joint_qk_norm_rope.ts";

/** Dimensions of a head that it is asked for. */
const HEAD_DIM = 128;

export interface FlashAttention3Options {
  /** Factor on `q · k`; 1 / sqrt(128) when left out. */
  readonly scale?: number;
  /** Where the result is stored, bf16 in `q`'s shape with a dense last dimension; allocated when left out. */
  readonly out?: Tensor;
}

/**
 * Whether FlashAttention-3, as it is installed, runs on this GPU. Attends to one token to see that: so what is missing shows
 * at once, and what takes long is done.
 *
 * @throws FfiError where it is not installed, or does not fit to the PyTorch that is
 */
export function hasFlashAttention3(gpu: GpuDevice, dtype: AttentionDType): boolean {
  return gpu.scope(() => {
    const shape = [1, 1, 1, HEAD_DIM];
    const x = Tensor.empty(gpu, shape, dtype);
    const out = Tensor.empty(gpu, shape, "bf16");
    return gpu.attention({ library: "fa3", q: x, k: x, v: x, out, scale: 1 });
  });
}

/** Whether queries (or keys, or values) `[batch, tokens, heads, headDim]` are such that {@link flashAttention3} takes them. */
export function flashAttention3Takes({ dtype, shape, size }: Tensor): boolean {
  return dtype === "bf16" && shape[3] === HEAD_DIM && size > 0;
}

/**
 * Attention by FlashAttention-3 (Shah et al. 2024) as users have it installed, without a mask; softmax and sums in f32. What
 * it computes is attentionReference in attention.ts, on inputs in `dtype`: E4M3 without scales, saturating at 448, where
 * the softmax's weights are rounded to E4M3, too.
 *
 * @param qkv `q` `[batch, queries, heads, 128]`, `k` and `v` `[batch, keys, heads, 128]`, in `dtype` or cast to it.
 * @returns `[batch, queries, heads, 128]` bf16.
 * @throws ShapeError where the sizes do not fit, and for what the library does not take on this GPU. FfiError where it is
 *   not installed.
 */
export function flashAttention3(
  gpu: GpuDevice,
  { q, k, v }: Qkv,
  dtype: AttentionDType,
  options: FlashAttention3Options = {},
): Tensor {
  const [batch, , heads] = q.shape;
  expectShape("flashAttention3", "q", q, [null, null, null, HEAD_DIM]);
  expectShape("flashAttention3", "k", k, [batch, null, heads, HEAD_DIM]);
  expectShape("flashAttention3", "v", v, k.shape);
  const { scale = HEAD_DIM ** -0.5, out = Tensor.empty(gpu, q.shape, "bf16") } = options;
  expectShape("flashAttention3", "out", out, q.shape);
  expect(out.dtype === "bf16" && out.strides[3] === 1, "flashAttention3", () => `out is ${out}`);
  gpu.scope(() => {
    const [qs, ks, vs] = [q, k, v].map((x) => denseRows(cast(x, dtype)));
    if (gpu.attention({ library: "fa3", q: qs, k: ks, v: vs, out, scale })) return;
    throw new ShapeError(`flashAttention3: FlashAttention-3 does not take ${q}, ${k}, ${v} on ${gpu.name}`);
  });
  return out;
}
