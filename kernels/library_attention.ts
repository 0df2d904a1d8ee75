import { ShapeError } from "../ffi/errors.ts";
import type { AttentionLibrary, GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import type { AttentionDType } from "./attention_tiles.ts";
import { cast } from "./cast.ts";
import { expect, expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import type { Qkv } from "./joint_qk_norm_rope.ts";

/** The libraries' names for people. */
const NAMES: Readonly<Record<AttentionLibrary, string>> = { fa3: "FlashAttention-3", aiter: "AITER" };

/** Dimensions of a head that they are asked for. */
const HEAD_DIM = 128;

export interface LibraryAttentionOptions {
  /** Factor on `q · k`; 1 / sqrt(128) when left out. */
  readonly scale?: number;
  /** Where the result is stored, bf16 in `q`'s shape with a dense last dimension; allocated when left out. */
  readonly out?: Tensor;
}

/**
 * Whether a library, as it is installed, attends on this GPU. Attends to one token to see that: so what is missing shows at
 * once, and what takes long is done.
 *
 * @throws FfiError where it is not installed, or does not fit to what it needs
 */
export function hasLibraryAttention(
  gpu: GpuDevice,
  library: AttentionLibrary,
  dtype: AttentionDType,
): boolean {
  return gpu.scope(() => {
    const shape = [1, 1, 1, HEAD_DIM];
    const x = Tensor.empty(gpu, shape, dtype);
    const out = Tensor.empty(gpu, shape, "bf16");
    return gpu.attention({ library, q: x, k: x, v: x, out, scale: 1 });
  });
}

/** Whether queries (or keys, or values) `[batch, tokens, heads, headDim]` are such that {@link libraryAttention} takes them. */
export function libraryAttentionTakes({ dtype, shape, size }: Tensor): boolean {
  return dtype === "bf16" && shape[3] === HEAD_DIM && size > 0;
}

/**
 * Attention by a library as users have it installed, without a mask: FlashAttention-3 (Shah et al. 2024), or AITER on AMD
 * GPUs; softmax and sums in f32. What it computes is attentionReference in attention.ts, on inputs in `dtype`: E4M3 without
 * scales, saturating at its largest value, where the softmax's weights are rounded to E4M3, too.
 *
 * @param qkv `q` `[batch, queries, heads, 128]`, `k` and `v` `[batch, keys, heads, 128]`, in `dtype` or cast to it.
 * @returns `[batch, queries, heads, 128]` bf16.
 * @throws ShapeError where the sizes do not fit, and for what the library does not take on this GPU. FfiError where it is
 *   not installed.
 */
export function libraryAttention(
  gpu: GpuDevice,
  library: AttentionLibrary,
  { q, k, v }: Qkv,
  dtype: AttentionDType,
  options: LibraryAttentionOptions = {},
): Tensor {
  const [batch, , heads] = q.shape;
  expectShape("libraryAttention", "q", q, [null, null, null, HEAD_DIM]);
  expectShape("libraryAttention", "k", k, [batch, null, heads, HEAD_DIM]);
  expectShape("libraryAttention", "v", v, k.shape);
  const { scale = HEAD_DIM ** -0.5, out = Tensor.empty(gpu, q.shape, "bf16") } = options;
  expectShape("libraryAttention", "out", out, q.shape);
  expect(out.dtype === "bf16" && out.strides[3] === 1, "libraryAttention", () => `out is ${out}`);
  gpu.scope(() => {
    const [qs, ks, vs] = [q, k, v].map((x) => denseRows(cast(x, dtype)));
    if (gpu.attention({ library, q: qs, k: ks, v: vs, out, scale })) return;
    throw new ShapeError(`${NAMES[library]} does not attend to ${q}, ${k}, ${v} on ${gpu.name}`);
  });
  return out;
}
