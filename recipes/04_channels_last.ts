/**
 * 04 channels last: the autoencoder's pictures with their channels last in memory (NHWC).
 *
 * Idea: matrix units multiply runs of channels. From NCHW pictures cuDNN has to make them first and turn its result
 * around again, at each convolution; pictures that lie as NHWC all along are turned once at either end of the
 * autoencoder, where they have 16 or 3 channels. There a 1 x 1 convolution is a matrix product.
 * Changes: the convolutions' weights become `[out, kernelHeight, kernelWidth, in]` in memory; pictures follow them,
 * since operators keep the layout that they find. Group norm and SiLU become one operator, whose kernels read the
 * channels of a pixel side by side. Exact: yes, up to the order of sums. For bfloat16: in float32 cuDNN computes in
 * NCHW (9.14 on an H100), and then the turning is its own.
 * Measured on an H100: the decoder 38.2 to 24.2 ms.
 *
 *     deno run -A recipes/04_channels_last.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import type { GpuDevice } from "../ffi/gpu.ts";
import { Tensor } from "../ffi/tensor.ts";
import { groupNormSiluFused } from "../kernels/group_norm_silu.ts";
import { NCHW, NHWC } from "../kernels/layout.ts";
import { copyStridedOnGpu } from "../kernels/strided_copy.ts";
import type { Plan, Recipe } from "./base/plan.ts";
import { replaced, type Weights } from "./base/weights.ts";

/** The plan's autoencoder is consumed: neither that plan nor another one of the same model works afterwards. */
export const channelsLast: Recipe = {
  name: "04_channels_last",
  exact: true,
  devices: ["cuda", "hip"],
  preparesWeights: true,
  apply: (plan: Plan) => ({
    ...plan,
    weights: { ...plan.weights, vae: withChannelsLast(plan.device as GpuDevice, plan.weights.vae) },
    ops: { ...plan.ops, groupNormSilu: groupNormSiluFused },
  }),
};

/** The same weights, those of convolutions with their input channels last. Each old one is freed when it was copied. */
function withChannelsLast(gpu: GpuDevice, weights: Weights): Weights {
  const own = new Map<string, Tensor>();
  for (const name of weights.names) {
    const weight = weights.get(name);
    // 1 x 1 weights lie the same way in both layouts.
    if (weight.rank !== 4 || weight.permute(NHWC).isContiguous) continue;
    const shape = NHWC.map((dim) => weight.shape[dim]);
    const turned = Tensor.empty(gpu, shape, weight.dtype, "weights").permute(NCHW);
    copyStridedOnGpu(gpu, turned, weight);
    // Memory is given out again in the order of the work, so nothing overwrites the weight before it was read.
    weights.free(name);
    own.set(name, turned);
  }
  return replaced(weights, own);
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(channelsLast.name));
