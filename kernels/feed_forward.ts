import type { Tensor } from "../ffi/tensor.ts";
import { geluTanhFloat8 } from "./gelu_float8.ts";
import type { linear } from "./linear.ts";
import type { linearGelu } from "./linear_gelu.ts";
import type { LinearLayer } from "./linears.ts";

/** The Linear layers of an MLP with one hidden layer. */
export interface FeedForwardLayers {
  readonly up: LinearLayer;
  readonly down: LinearLayer;
}

/** The operators that {@link feedForward} is made of: the running plan's. */
export interface FeedForwardOps {
  readonly linear: typeof linear;
  readonly linearGelu: typeof linearGelu;
}

/**
 * The MLP of a double-stream block: up projection, GELU, down projection.
 * Composite: this body is the eager baseline; what hands the hidden layer on in another form may replace it.
 *
 * @param x `[..., in]`. @returns `[..., out]` in `x`'s dtype.
 */
export function feedForward(x: Tensor, { up, down }: FeedForwardLayers, ops: FeedForwardOps): Tensor {
  return x.device.scope(() => ops.linear(ops.linearGelu(x, up.weight, up.bias), down.weight, down.bias));
}

/**
 * {@link feedForward} with a hidden layer in E4M3: GELU is applied by the kernel that quantizes it, which waits for memory
 * and not for arithmetic, and not by the product before.
 *
 * @param ops whose `linear` takes quantized tensors for `down`.
 */
export function feedForwardFloat8(x: Tensor, { up, down }: FeedForwardLayers, ops: FeedForwardOps): Tensor {
  return x.device.scope(() =>
    ops.linear(geluTanhFloat8(ops.linear(x, up.weight, up.bias)), down.weight, down.bias)
  );
}
