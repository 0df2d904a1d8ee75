import { adaLayerNorm } from "../../kernels/ada_layer_norm.ts";
import { add } from "../../kernels/add.ts";
import { addRmsNorm } from "../../kernels/add_rms_norm.ts";
import { attention } from "../../kernels/attention.ts";
import { cast } from "../../kernels/cast.ts";
import { concat } from "../../kernels/concat.ts";
import { contiguous } from "../../kernels/contiguous.ts";
import { conv2d } from "../../kernels/conv2d.ts";
import { conv2dAdd } from "../../kernels/conv2d_add.ts";
import { doubleBlock } from "../../kernels/double_block.ts";
import { embedding } from "../../kernels/embedding.ts";
import { eulerStep } from "../../kernels/euler_step.ts";
import { feedForward } from "../../kernels/feed_forward.ts";
import { gatedAdaLayerNorm } from "../../kernels/gated_ada_layer_norm.ts";
import { gatedResidual } from "../../kernels/gated_residual.ts";
import { geluTanh } from "../../kernels/gelu_tanh.ts";
import { groupNorm } from "../../kernels/group_norm.ts";
import { groupNormSilu } from "../../kernels/group_norm_silu.ts";
import { jointAttention } from "../../kernels/joint_attention.ts";
import { layerNorm } from "../../kernels/layer_norm.ts";
import { linear } from "../../kernels/linear.ts";
import { linearGelu } from "../../kernels/linear_gelu.ts";
import { linears } from "../../kernels/linears.ts";
import { multiply } from "../../kernels/multiply.ts";
import { parallelBranches } from "../../kernels/parallel_branches.ts";
import { quickGelu } from "../../kernels/quick_gelu.ts";
import { rmsNorm } from "../../kernels/rms_norm.ts";
import { noRotaryPairs } from "../../kernels/rotary_pairs.ts";
import { scaleShift } from "../../kernels/scale_shift.ts";
import { silu } from "../../kernels/silu.ts";
import { singleBlock } from "../../kernels/single_block.ts";
import { timestepEmbedding } from "../../kernels/timestep_embedding.ts";
import { toPixels } from "../../kernels/to_pixels.ts";
import { upsampleConv } from "../../kernels/upsample_conv.ts";
import { upsampleNearest } from "../../kernels/upsample_nearest.ts";

/**
 * The unoptimized table of operators: one kernel after another, as PyTorch runs eagerly. The first group is primitive; the
 * second is composite, with a default body of primitives, one kernel each.
 */
export const eagerOps = {
  add,
  attention,
  cast,
  concat,
  contiguous,
  conv2d,
  embedding,
  eulerStep,
  geluTanh,
  groupNorm,
  layerNorm,
  linear,
  multiply,
  quickGelu,
  rmsNorm,
  scaleShift,
  silu,
  timestepEmbedding,
  toPixels,
  upsampleNearest,

  adaLayerNorm,
  addRmsNorm,
  conv2dAdd,
  doubleBlock,
  feedForward,
  gatedAdaLayerNorm,
  gatedResidual,
  groupNormSilu,
  jointAttention,
  linearGelu,
  linears,
  parallelBranches,
  rotaryPairs: noRotaryPairs,
  singleBlock,
  upsampleConv,
};

/** The operators that the model is written in. A recipe replaces entries of this table and never a line of the model. */
export type Ops = Readonly<typeof eagerOps>;
