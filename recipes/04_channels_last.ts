/**
 * 04 channels last: the autoencoder's pictures with their channels last in memory (NHWC).
 *
 * Idea: matrix units multiply runs of channels. From NCHW pictures cuDNN has to make them first and turn its result
 * around again, at each convolution; pictures that lie as NHWC all along are turned once at either end of the
 * autoencoder, where they have 16 or 3 channels. There a 1 x 1 convolution is a matrix product.
 * Changes: the convolutions' weights become `[out, kernelHeight, kernelWidth, in]` in memory; pictures follow them,
 * since operators keep the layout that they find. Group norm and SiLU become one operator, whose kernels read the
 * channels of a pixel side by side. Where a picture is upsampled and convolved, the weights become those of a convolution of
 * the small picture (kernels/upsample_conv.ts): 1.2 TFLOP of the decoder's 10.5 where there were 2.8. Exact: yes, up to the
 * order of sums, and sums of those weights are rounded to bfloat16. For bfloat16: in float32 cuDNN computes in NCHW (9.14 on
 * an H100), and then the turning is its own.
 * Measured on an H100, before upsampling was changed: the decoder 38.2 to 24.2 ms.
 *
 *     deno run -A recipes/04_channels_last.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import { Tensor } from "../ffi/tensor.ts";
import { copyInto } from "../kernels/copy_into.ts";
import { groupNormSiluFused } from "../kernels/group_norm_silu.ts";
import { NCHW, NHWC } from "../kernels/layout.ts";
import { polyphaseBias, polyphaseFilters, upsampleConvPolyphase } from "../kernels/upsample_conv.ts";
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
    weights: { ...plan.weights, vae: withPhases(withChannelsLast(plan.weights.vae)) },
    ops: { ...plan.ops, groupNormSilu: groupNormSiluFused, upsampleConv: upsampleConvPolyphase },
  }),
};

/** The same weights, those of convolutions with their input channels last. Each old one is freed when it was copied. */
function withChannelsLast(weights: Weights): Weights {
  const own = new Map<string, Tensor>();
  for (const name of weights.names) {
    const weight = weights.get(name);
    // 1 x 1 weights lie the same way in both layouts.
    if (weight.rank !== 4 || weight.permute(NHWC).isContiguous) continue;
    own.set(name, copied(weight));
    // Memory is given out again in the order of the work, so nothing overwrites the weight before it was read.
    weights.free(name);
  }
  return replaced(weights, own);
}

/**
 * The same weights, those behind upsampling as {@link upsampleConvPolyphase} takes them; what is stored under their names is
 * changed alike. Float32 stays as it is, where nothing is to be rounded, and so does everything on AMD's GPUs, on which nobody
 * has measured MIOpen's convolutions of 2 x 2.
 */
function withPhases(weights: Weights): Weights {
  const own = new Map<string, Tensor>();
  for (const name of weights.names) {
    if (!/^decoder\.up_blocks\.\d+\.upsamplers\.0\.conv\.weight$/.test(name)) continue;
    const { device, dtype, shape } = weights.get(name);
    if (device.kind !== "cuda" || dtype === "f32" || shape[2] !== 3) continue;
    for (const one of [name, name.replace(/weight$/, "bias")]) {
      device.scope(() => void own.set(one, copied(phasesOf(weights.get(one)))));
      weights.free(one); // as above
    }
  }
  const changed = replaced(weights, own);
  return {
    ...changed,
    assign(values) {
      for (const [name, value] of values) {
        const isChanged = changed.get(name).size !== value.size;
        value.device.scope(() => changed.assign(new Map([[name, isChanged ? phasesOf(value) : value]])));
      }
    },
  };
}

/** A convolution's weight or its bias for all phases. */
function phasesOf(weight: Tensor): Tensor {
  return weight.rank === 1 ? polyphaseBias(weight) : polyphaseFilters(weight);
}

/** A copy that lives as weights do; of a convolution's weight with its input channels last. */
function copied(weight: Tensor): Tensor {
  const [order, back] = weight.rank === 4 ? [NHWC, NCHW] : [[0], [0]];
  const shape = order.map((dim) => weight.shape[dim]);
  const copy = Tensor.empty(weight.device, shape, weight.dtype, "weights").permute(back);
  copyInto(copy, weight);
  return copy;
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(channelsLast.name));
