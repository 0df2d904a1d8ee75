import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expectShape } from "./check.ts";
import { denseRows } from "./contiguous.ts";
import { launch } from "./gpu.ts";
import ROTARY_PAIRS_CU from "./rotary_pairs.cu" with { type: "text" };

const SOURCE = { name: "rotary_pairs.cu", text: ROTARY_PAIRS_CU };
const BLOCK = 256;

/**
 * Rotary tables as pairs of cosine and sine, for kernels that turn many heads by them: half as much to read.
 *
 * @param cos `[tokens, headDim]` f32, each number twice. @param sin the same. @returns `[tokens, headDim / 2, 2]` f32.
 */
export function rotaryPairs(gpu: GpuDevice, cos: Tensor, sin: Tensor): Tensor {
  const [tokens, headDim] = cos.shape;
  expectShape("rotaryPairs", "sin", sin, cos.shape);
  const out = Tensor.empty(gpu, [tokens, headDim / 2, 2], "f32");
  gpu.scope(() => {
    const [cosines, sines] = [cos, sin].map(denseRows);
    const count = tokens * headDim / 2;
    launch(gpu, SOURCE, {
      entry: "rotaryPairs",
      types: {},
      grid: Math.ceil(count / BLOCK),
      block: BLOCK,
      args: [out, cosines, sines, count, headDim / 2, BigInt(cosines.strides[0]), BigInt(sines.strides[0])],
    });
  });
  return out;
}

/** For operators that turn by the tables as they are: no pairs. */
export function noRotaryPairs(_cos: Tensor, _sin: Tensor): Tensor | undefined {
  return undefined;
}

/** `cos` and `sin` `[tokens, headDim]`. */
export function rotaryPairsReference(out: Float32Array, cos: Float32Array, sin: Float32Array): void {
  for (let i = 0; i < cos.length; i += 2) [out[i], out[i + 1]] = [cos[i], sin[i]];
}
