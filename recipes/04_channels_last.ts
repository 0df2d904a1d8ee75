/**
 * 04 channels last: the autoencoder's pictures with their channels last in memory (NHWC).
 *
 * Idea: matrix units multiply runs of channels. From NCHW pictures cuDNN has to make them first and turn its result
 * around again, at each convolution; pictures that lie as NHWC all along are turned once at either end of the
 * autoencoder, where they have 16 or 3 channels. There a 1 x 1 convolution is a matrix product.
 * Changes: the convolutions' weights become `[out, kernelHeight, kernelWidth, in]` in memory; pictures follow them,
 * since operators keep the layout that they find. Group norm and SiLU become one operator, whose kernels read the
 * channels of a pixel side by side. Where a picture is upsampled and convolved, the small one is convolved instead
 * (kernels/upsample_conv.ts): 1.2 TFLOP of the decoder's 10.5 where there were 2.8. Residual connections are added by the
 * convolution in front of them, where cuDNN does that (kernels/conv2d_add.ts).
 * Exact: yes, up to the order of sums; sums of weights behind upsampling are rounded to bfloat16. For bfloat16: in float32
 * cuDNN computes in NCHW (9.14 on an H100), and then the turning is its own.
 * Measured on an H100: the decoder 38.2 to 24.2 ms, and to 19.6 with upsampling and residual connections in the convolutions.
 *
 *     deno run -A recipes/04_channels_last.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import { Tensor } from "../ffi/tensor.ts";
import { copyInto } from "../kernels/copy_into.ts";
import { conv2dAddFused } from "../kernels/conv2d_add.ts";
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
  apply: (plan: Plan) => {
    const vae = withPhases(withChannelsLast(plan.weights.vae));
    const phases = phasesOf(vae);
    return {
      ...plan,
      weights: { ...plan.weights, vae },
      ops: {
        ...plan.ops,
        conv2dAdd: conv2dAddFused,
        groupNormSilu: groupNormSiluFused,
        upsampleConv(x, weight, bias, ops) {
          const filters = phases.get(weight);
          if (filters === undefined) return plan.ops.upsampleConv(x, weight, bias, ops);
          return upsampleConvPolyphase(x, filters.weight, filters.bias, ops);
        },
      },
    };
  },
};

/** The same weights, those of convolutions with their input channels last. Each old one is freed when it was copied. */
function withChannelsLast(weights: Weights): Weights {
  const own = new Map<string, Tensor>();
  for (const name of weights.names) {
    const weight = weights.get(name);
    // 1 x 1 weights lie the same way in both layouts.
    if (weight.rank !== 4 || weight.permute(NHWC).isContiguous) continue;
    own.set(name, copyOf(weight));
    // Memory is given out again in the order of the work, so nothing overwrites the weight before it was read.
    weights.free(name);
  }
  return replaced(weights, own);
}

/** A convolution behind upsampling. */
const UPSAMPLING = /^(decoder\.up_blocks\.\d+\.upsamplers\.0\.conv)\.weight$/;

/** What a convolution behind upsampling is computed with. */
interface Phases {
  readonly weight: Tensor;
  readonly bias: Tensor;
}

/**
 * The same weights, and beside those of a convolution behind upsampling the filters and the bias of its phases, which follow them
 * when other values are stored. Not for float32, in which nothing is to be rounded, and not on AMD's GPUs, on which nobody
 * has measured MIOpen's convolutions of 2 x 2.
 */
function withPhases(weights: Weights): Weights {
  const own = new Map<string, Tensor>();
  for (const module of modulesBehindUpsampling(weights)) {
    const { device, dtype } = weights.get(`${module}.weight`);
    if (device.kind !== "cuda" || dtype === "f32" || weights.has(`${module}.phases.weight`)) continue;
    device.scope(() => {
      for (const [name, value] of computedPhases(weights, module)) own.set(name, copyOf(value));
    });
  }
  const all = replaced(weights, own);
  return {
    ...all,
    assign(values) {
      all.assign(values);
      for (const module of modulesBehindUpsampling(all)) {
        if (!all.has(`${module}.phases.weight`)) continue;
        if (!["weight", "bias"].some((name) => values.has(`${module}.${name}`))) continue;
        all.get(`${module}.weight`).device.scope(() => all.assign(computedPhases(all, module)));
      }
    },
  };
}

/** By the weight that the model knows. */
function phasesOf(weights: Weights): WeakMap<Tensor, Phases> {
  const modules = modulesBehindUpsampling(weights).filter((module) => weights.has(`${module}.phases.weight`));
  return new WeakMap(modules.map((module) => {
    const [weight, bias] = ["weight", "bias"].map((name) => weights.get(`${module}.phases.${name}`));
    return [weights.get(`${module}.weight`), { weight, bias }];
  }));
}

function modulesBehindUpsampling(weights: Weights): string[] {
  return weights.names.flatMap((name) => name.match(UPSAMPLING)?.[1] ?? []);
}

/** The weights of a module's phases, by their names. */
function computedPhases(weights: Weights, module: string): Map<string, Tensor> {
  return new Map([
    [`${module}.phases.weight`, polyphaseFilters(weights.get(`${module}.weight`))],
    [`${module}.phases.bias`, polyphaseBias(weights.get(`${module}.bias`))],
  ]);
}

/** A copy that lives as weights do; of a convolution's weight with its input channels last. */
function copyOf(weight: Tensor): Tensor {
  const [order, back] = weight.rank === 4 ? [NHWC, NCHW] : [[0], [0]];
  const shape = order.map((dim) => weight.shape[dim]);
  const copy = Tensor.empty(weight.device, shape, weight.dtype, "weights").permute(back);
  copyInto(copy, weight);
  return copy;
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(channelsLast.name));
