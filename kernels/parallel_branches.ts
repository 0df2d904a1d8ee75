import { Tensor } from "../ffi/tensor.ts";
import type { concat } from "./concat.ts";
import { expectShape } from "./check.ts";
import { sourceOf } from "./float8_tensor.ts";
import { geluTanhFloat8 } from "./gelu_float8.ts";
import type { geluTanh } from "./gelu_tanh.ts";
import { gpuOf } from "./gpu.ts";
import type { jointAttention } from "./joint_attention.ts";
import { qkvStream } from "./joint_qk_norm_rope.ts";
import type { linear } from "./linear.ts";
import type { linearGelu } from "./linear_gelu.ts";
import type { LinearLayer, linears } from "./linears.ts";
import { runFastest } from "./run_fastest.ts";

/** The Linear layers and norms of a single-stream block; all but the last read the block's input. */
export interface ParallelLayers {
  readonly q: LinearLayer;
  readonly k: LinearLayer;
  readonly v: LinearLayer;
  /** The MLP's up projection. */
  readonly mlp: LinearLayer;
  /** `[hidden, heads * headDim + mlpHidden]`: reads attention's output and, beside it, the MLP's. */
  readonly out: LinearLayer;
  /** `[headDim]`: weights of QK-norm. */
  readonly normQ: Tensor;
  readonly normK: Tensor;
  readonly heads: number;
}

/** The operators that {@link parallelBranches} is made of: the running plan's. */
export interface ParallelOps {
  readonly concat: typeof concat;
  readonly geluTanh: typeof geluTanh;
  readonly jointAttention: typeof jointAttention;
  readonly linear: typeof linear;
  readonly linearGelu: typeof linearGelu;
  readonly linears: typeof linears;
}

/**
 * A single-stream block without its norm and its residual connection: attention and MLP of the same tokens, with one
 * output projection (Dehghani et al. 2023).
 * Composite: this body of primitives is the eager baseline; kernels that write side by side may replace it.
 *
 * @param x `[batch, tokens, in]`. @param cos `[tokens, headDim]` f32. @param sin the same.
 * @returns `[batch, tokens, hidden]` in `x`'s dtype.
 */
export function parallelBranches(
  x: Tensor,
  layers: ParallelLayers,
  cos: Tensor,
  sin: Tensor,
  eps: number,
  ops: ParallelOps,
): Tensor {
  const { out } = layers;
  return x.device.scope(() => {
    const { attended, up } = branches(x, layers, cos, sin, eps, ops);
    const both = ops.concat([attended, ops.geluTanh(up)], 2);
    return ops.linear(both, out.weight, out.bias);
  });
}

/**
 * {@link parallelBranches} on a GPU without copies: attention and MLP write where their columns belong. There are two ways,
 * of which {@link GpuDevice.measuring} finds the faster: GELU in the epilogue of a product of its own, or one product for
 * all of q, k, v and MLP, and then a pass of GELU. On the CPU the same as parallelBranches.
 */
export function parallelBranchesFused(
  x: Tensor,
  layers: ParallelLayers,
  cos: Tensor,
  sin: Tensor,
  eps: number,
  ops: ParallelOps,
): Tensor {
  const gpu = gpuOf(x);
  if (gpu === undefined) return parallelBranches(x, layers, cos, sin, eps, ops);
  const { q, k, v, mlp, out, heads } = layers;
  const [batch, tokens] = x.shape;
  const hidden = q.weight.shape[0];
  const mlpHidden = mlp.weight.shape[0];
  expectShape("parallelBranches", "out", out.weight, [null, hidden + mlpHidden]);
  return gpu.scope(() => {
    const both = Tensor.empty(gpu, [batch, tokens, hidden + mlpHidden], sourceOf(x));
    const up = both.narrow(2, hidden, mlpHidden);
    const project = [
      () => {
        ops.linearGelu(x, mlp.weight, mlp.bias, up);
        return ops.linears(x, [q, k, v]);
      },
      () => {
        const [qkv, raw] = split(ops.linears(x, [q, k, v, mlp]));
        ops.geluTanh(raw, up);
        return qkv;
      },
    ];
    const joined = q.weight.memory === mlp.weight.memory ? "joined" : "apart";
    const qkv = runFastest(gpu, `parallelBranches ${x} ${q.weight} ${mlp.weight} ${joined}`, project);
    const attended = both.narrow(2, 0, hidden).reshape([batch, tokens, heads, hidden / heads]);
    ops.jointAttention([qkvStream(qkv, heads, layers)], cos, sin, eps, { out: attended });
    return ops.linear(both, out.weight, out.bias);
  });
}

/**
 * {@link parallelBranches} with an output projection that reads E4M3: attention's output and GELU of the MLP's up projection
 * are quantized side by side, by the kernel that applies GELU, so that nothing joins them before.
 *
 * @param ops whose `linear` takes quantized tensors for `out`.
 */
export function parallelBranchesFloat8(
  x: Tensor,
  layers: ParallelLayers,
  cos: Tensor,
  sin: Tensor,
  eps: number,
  ops: ParallelOps,
): Tensor {
  const { out } = layers;
  return x.device.scope(() => {
    const { attended, up } = branches(x, layers, cos, sin, eps, ops);
    return ops.linear(geluTanhFloat8(up, attended), out.weight, out.bias);
  });
}

/** Attention's output and the MLP's up projection, `[batch, tokens, ...]` each, from one product for q, k, v and MLP. */
function branches(
  x: Tensor,
  layers: ParallelLayers,
  cos: Tensor,
  sin: Tensor,
  eps: number,
  ops: ParallelOps,
): { readonly attended: Tensor; readonly up: Tensor } {
  const { q, k, v, mlp, heads } = layers;
  const [qkv, up] = split(ops.linears(x, [q, k, v, mlp]));
  const attended = ops.jointAttention([qkvStream(qkv, heads, layers)], cos, sin, eps);
  const [batch, tokens] = attended.shape;
  return { attended: attended.reshape([batch, tokens, -1]), up };
}

function split([q, k, v, mlp]: readonly Tensor[]): [qkv: Tensor[], mlp: Tensor] {
  return [[q, k, v], mlp];
}
