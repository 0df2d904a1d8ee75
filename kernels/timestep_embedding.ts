import type { DType } from "../ffi/dtype.ts";
import { Tensor } from "../ffi/tensor.ts";
import { expect } from "./check.ts";
import { contiguous } from "./contiguous.ts";
import { onCpu } from "./cpu.ts";
import { blockSize, gpuOf, launch } from "./gpu.ts";
import TIMESTEP_EMBEDDING_CU from "./timestep_embedding.cu" with { type: "text" };

const SOURCE = { name: "timestep_embedding.cu", text: TIMESTEP_EMBEDDING_CU };

/**
 * Sinusoidal embedding of a scalar (Vaswani et al. 2017; Ho et al. 2020), cosines first, as diffusers'
 * `get_timestep_embedding(flip_sin_to_cos=True, downscale_freq_shift=0)` has it.
 *
 * @param timesteps f32 `[batch]`, on the scale of 0 to 1000. @param width even. @param dtype of the result.
 * @returns `[batch, width]`: `cos(t f_i)`, then `sin(t f_i)`, `f_i = 10000^(-i / (width / 2))`.
 */
export function timestepEmbedding(timesteps: Tensor, width: number, dtype: DType): Tensor {
  expect(timesteps.dtype === "f32", "timestepEmbedding", () => `timesteps are ${timesteps}, expected f32`);
  expect(width % 2 === 0, "timestepEmbedding", () => `width ${width} is odd`);
  const out = Tensor.empty(timesteps.device, [timesteps.size, width], dtype);
  const gpu = gpuOf(out);
  if (gpu !== undefined) {
    if (out.size === 0) return out;
    gpu.scope(() => {
      const block = blockSize(gpu, width / 2);
      launch(gpu, SOURCE, {
        entry: "timestepEmbedding",
        types: { T: dtype },
        grid: [Math.ceil(width / 2 / block), timesteps.size],
        block,
        args: [out, contiguous(timesteps), width / 2],
      });
    });
    return out;
  }
  return onCpu(out, [timesteps], (o, t) => timestepEmbeddingReference(o, t, width));
}

/** The angles are rounded to f32 at each step: at t = 1000 half a unit in the last place turns by 3e-5. */
export function timestepEmbeddingReference(out: Float32Array, timesteps: Float32Array, width: number): void {
  const half = width / 2;
  const { fround } = Math;
  for (let row = 0; row < timesteps.length; row++) {
    for (let i = 0; i < half; i++) {
      const frequency = fround(Math.exp(fround(fround(-fround(Math.log(10000)) * i) / half)));
      const angle = fround(timesteps[row] * frequency);
      out[row * width + i] = Math.cos(angle);
      out[row * width + half + i] = Math.sin(angle);
    }
  }
}
