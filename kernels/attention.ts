import { viewOf } from "../ffi/cpu/device.ts";
import type { DType } from "../ffi/dtype.ts";
import type { AttentionPlan, GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { cast } from "./cast.ts";
import { expect, expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { readFloat32 } from "./cpu.ts";
import { gpuOf } from "./gpu.ts";
import { portableAttention, portableAttentionTakes } from "./portable_attention.ts";
import { softmaxOnGpu } from "./softmax.ts";
import SOFTMAX_WAT from "./softmax.wat" with { type: "text" };
import { address, elementSize, share, wasmKernels } from "./wasm.ts";

export interface AttentionOptions {
  /** Factor on `q · k`; 1 / sqrt(head dim) when left out. T5 uses 1. */
  readonly scale?: number;
  /** Each query sees only keys up to its own position. */
  readonly causal?: boolean;
  /** Added to the scaled logits: `[heads, queries, keys]`, the same for the whole batch. */
  readonly bias?: Tensor;
  /** Where the result is stored, in `q`'s shape and dtype with a dense last dimension; allocated when left out. */
  readonly out?: Tensor;
}

/** Bytes of logits that a GPU has at a time, about. */
const LOGITS_BYTES = 512 * 2 ** 20;

/**
 * Scaled dot-product attention (Vaswani et al. 2017): `softmax(scale * q k^T + bias) v`, logits and softmax in f32.
 *
 * @param q `[batch, queries, heads, headDim]`.
 * @param k `[batch, keys, heads, headDim]`.
 * @param v `[batch, keys, heads, headDim]`.
 * @returns `[batch, queries, heads, headDim]` in `q`'s dtype.
 * @throws ShapeError where the sizes do not fit, or for an `out` that does not.
 */
export function attention(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions = {}): Tensor {
  const [batch, queries, heads, headDim] = q.shape;
  expectShape("attention", "k", k, [batch, null, heads, headDim]);
  const keys = k.shape[1];
  expectShape("attention", "v", v, [batch, keys, heads, headDim]);
  if (options.bias !== undefined) expectShape("attention", "bias", options.bias, [heads, queries, keys]);
  expect(
    !options.causal || queries === keys,
    "attention",
    () => "a causal mask takes as many queries as keys",
  );
  const { device } = q;
  const out = options.out ?? Tensor.empty(device, q.shape, q.dtype);
  expectShape("attention", "out", out, q.shape);
  expect(
    out.dtype === q.dtype && (headDim === 1 || out.strides[3] === 1),
    "attention",
    () => `out is ${out} with strides [${out.strides.join(", ")}], q is ${q}`,
  );
  const scale = options.scale ?? headDim ** -0.5;
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    attentionOnGpu(gpu, q, k, v, out, scale, options);
    return out;
  }
  // A block of rows at a time, so that the logits stay in the cache and never take queries * keys of memory.
  const rows = Math.min(queries, Math.max(64, Math.floor(2 ** 20 / keys)));
  for (let b = 0; b < batch; b++) {
    for (let head = 0; head < heads; head++) {
      const headOf = (x: Tensor) => x.narrow(0, b, 1).narrow(2, head, 1).reshape([x.shape[1], headDim]);
      const [qHead, kHead, vHead, outHead] = [q, k, v, out].map(headOf);
      for (let start = 0; start < queries; start += rows) {
        const count = Math.min(rows, queries - start);
        device.scope(() => {
          const logits = Tensor.empty(device, [count, keys], "f32");
          device.matmul({ a: qHead.narrow(0, start, count), b: kHead, out: logits, alpha: scale });
          const bias = options.bias?.narrow(0, head, 1).reshape([queries, keys]).narrow(0, start, count);
          device.matmul({
            a: softmax(logits, q.dtype, bias, options.causal ? start : undefined),
            b: vHead.permute([1, 0]),
            out: outHead.narrow(0, start, count),
          });
        });
      }
    }
  }
  return out;
}

/** Attention by a library where one takes it, else by our portable kernel, or by matrix products. */
function attentionOnGpu(
  gpu: GpuDevice,
  q: Tensor,
  k: Tensor,
  v: Tensor,
  out: Tensor,
  scale: number,
  options: AttentionOptions,
): void {
  gpu.scope(() => {
    const plan = { q: denseRows(q), k: denseRows(k), v: denseRows(v), out, scale };
    if (options.bias === undefined && !options.causal) {
      if (gpu.attention(plan)) return;
      if (portableAttentionTakes(gpu, plan)) return portableAttention(gpu, plan);
    }
    const rowBytes = 4 * q.shape[2] * k.shape[1];
    attentionByMatmul(gpu, plan, options, Math.max(1, Math.floor(LOGITS_BYTES / rowBytes)));
  });
}

/**
 * Attention as two matrix products over all heads with a softmax between them, for at most `rows` queries at a time, in
 * parts of about the same size.
 */
export function attentionByMatmul(
  gpu: GpuDevice,
  { q, k, v, out, scale }: AttentionPlan,
  { bias, causal }: AttentionOptions,
  rows: number,
): void {
  const [batch, queries, heads] = q.shape;
  const keys = k.shape[1];
  const part = Math.ceil(queries / Math.ceil(queries / rows));
  for (let b = 0; b < batch; b++) {
    const [qHeads, kHeads, vHeads, outHeads] = [q, k, v, out].map((x) => headsOf(x, b));
    for (let start = 0; start < queries; start += part) {
      const count = Math.min(part, queries - start);
      gpu.scope(() => {
        const logits = Tensor.empty(gpu, [heads, count, keys], "f32");
        gpu.matmul({ a: qHeads.narrow(1, start, count), b: kHeads, out: logits, alpha: scale });
        const weights = softmaxOnGpu(
          gpu,
          logits,
          q.dtype,
          bias?.narrow(1, start, count),
          causal ? start : undefined,
        );
        gpu.matmul({ a: weights, b: vHeads.permute([0, 2, 1]), out: outHeads.narrow(1, start, count) });
      });
    }
  }
}

/** Sample `b` of `[batch, tokens, heads, headDim]` as a batch of matrices, `[heads, tokens, headDim]`. */
function headsOf({ memory, dtype, shape, strides, offset }: Tensor, b: number): Tensor {
  const order = [2, 1, 3];
  return new Tensor(
    memory,
    dtype,
    order.map((dim) => shape[dim]),
    order.map((dim) => strides[dim]),
    offset + b * strides[0],
  );
}

/** {@link softmaxRows} of f32 `logits` `[rows, keys]`, which are overwritten; the result in `dtype`. */
function softmax(
  logits: Tensor,
  dtype: DType,
  bias: Tensor | undefined,
  causalStart: number | undefined,
): Tensor {
  const [rows, keys] = logits.shape;
  const out = dtype === "f32" ? logits : Tensor.empty(logits.device, logits.shape, dtype);
  const wasm = bias === undefined || bias.dtype === "f32"
    ? wasmKernels("softmax.wat", SOFTMAX_WAT, out, bias === undefined ? [] : [bias])
    : undefined;
  if (wasm === undefined) {
    const values = bias === undefined ? undefined : readFloat32(bias);
    softmaxRows(viewOf(logits, "f32", logits.size), keys, values, causalStart);
    return cast(logits, dtype);
  }
  const { perJob, jobs } = share(rows, keys);
  wasm.runner.run(
    wasm.kernels.softmax,
    jobs,
    [
      address(logits),
      address(out),
      rows,
      keys,
      perJob,
      bias === undefined ? 0 : address(bias),
      causalStart ?? -1,
      elementSize(out),
    ],
  );
  return out;
}

/**
 * Softmax of each row of `logits` `[rows, keys]` in place, after adding `bias` of the same shape; with
 * `causalStart`, row `i` sees keys up to `causalStart + i`.
 */
export function softmaxRows(
  logits: Float32Array,
  keys: number,
  bias?: Float32Array,
  causalStart?: number,
): void {
  for (let row = 0; row < logits.length / keys; row++) {
    const start = row * keys;
    const end = start + (causalStart === undefined ? keys : causalStart + row + 1);
    let largest = -Infinity;
    for (let i = start; i < end; i++) {
      if (bias !== undefined) logits[i] += bias[i];
      if (logits[i] > largest) largest = logits[i];
    }
    let sum = 0;
    for (let i = start; i < end; i++) {
      const e = Math.exp(logits[i] - largest);
      logits[i] = e;
      sum += e;
    }
    const factor = 1 / sum;
    for (let i = start; i < end; i++) logits[i] *= factor;
    logits.fill(0, end, start + keys);
  }
}

/** Reference on dense `[batch, tokens, heads, headDim]` arrays; `bias` `[heads, queries, keys]` or empty. */
export function attentionReference(
  out: Float32Array,
  q: Float32Array,
  k: Float32Array,
  v: Float32Array,
  bias: Float32Array,
  shape: { batch: number; queries: number; keys: number; heads: number; headDim: number },
  scale: number,
  causal: boolean,
): void {
  const { batch, queries, keys, heads, headDim } = shape;
  const at = (b: number, tokens: number, token: number, head: number) =>
    ((b * tokens + token) * heads + head) * headDim;
  const logits = new Float32Array(keys);
  for (let b = 0; b < batch; b++) {
    for (let head = 0; head < heads; head++) {
      for (let i = 0; i < queries; i++) {
        for (let j = 0; j < keys; j++) {
          let dot = 0;
          for (let d = 0; d < headDim; d++) {
            dot += q[at(b, queries, i, head) + d] * k[at(b, keys, j, head) + d];
          }
          logits[j] = dot * scale + (bias.length > 0 ? bias[(head * queries + i) * keys + j] : 0);
        }
        softmaxRows(logits, keys, undefined, causal ? i : undefined);
        for (let d = 0; d < headDim; d++) {
          let sum = 0;
          for (let j = 0; j < keys; j++) sum += logits[j] * v[at(b, keys, j, head) + d];
          out[at(b, queries, i, head) + d] = sum;
        }
      }
    }
  }
}
