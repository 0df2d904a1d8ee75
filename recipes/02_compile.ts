/**
 * 02 compile: fused kernels, planned memory, one graph for each part.
 *
 * Idea: between two matrix products stand three or four small operators, each of which reads and writes all tokens. One
 * kernel, compiled at run time, reads them once. And since a step is the same sequence of launches each time, it is
 * recorded once as a graph (text encoders, denoising step, decoder): replaying it costs the host one call instead of two
 * thousand, and the memory of its intermediates is planned by the recording.
 * Changes: adaptive layer norms, residual connections with the norm behind them, QK-norm with RoPE and the joining of
 * text and image, attention (our own kernel on Hopper GPUs), attention beside the MLP, GELU in the up projection, group norm
 * with SiLU. Exact: yes; intermediates
 * that are no longer stored are no longer rounded to bfloat16.
 * Measured on an H100 (FLUX.1-schnell, 1024 x 1024): a step 125.8 to 116.4 ms, text encoders 17 to 7.3, decoder 41 to
 * 38, a picture 564 to 515.
 *
 *     deno run -A recipes/02_compile.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import { isGpu } from "../ffi/gpu.ts";
import { adaLayerNormFused } from "../kernels/ada_layer_norm.ts";
import { addRmsNormFused } from "../kernels/add_rms_norm.ts";
import { gatedAdaLayerNormFused } from "../kernels/gated_ada_layer_norm.ts";
import { groupNormSiluFused } from "../kernels/group_norm_silu.ts";
import { jointAttentionFused } from "../kernels/joint_attention.ts";
import { linearGeluFused } from "../kernels/linear_gelu.ts";
import { parallelBranchesFused } from "../kernels/parallel_branches.ts";
import { graphExecute } from "./base/graph_execute.ts";
import type { Plan, Recipe } from "./base/plan.ts";

/** 02: fused kernels, and one graph for each part of the pipeline. Exact. */
export const compile: Recipe = {
  name: "02_compile",
  exact: true,
  devices: ["cpu", "cuda", "hip"],
  apply: (plan: Plan) => ({
    ...plan,
    ...(isGpu(plan.device) && graphExecute(plan.device)),
    ops: {
      ...plan.ops,
      adaLayerNorm: adaLayerNormFused,
      addRmsNorm: addRmsNormFused,
      gatedAdaLayerNorm: gatedAdaLayerNormFused,
      groupNormSilu: groupNormSiluFused,
      jointAttention: jointAttentionFused,
      linearGelu: linearGeluFused,
      parallelBranches: parallelBranchesFused,
    },
  }),
};

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(compile.name));
