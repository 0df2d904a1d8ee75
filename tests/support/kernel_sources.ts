/**
 * The texts that a GPU gets to compile, without one: pictures are drawn on a GPU that computes nothing, by every recipe,
 * and what is left of the kernels is asked for one by one.
 */
import type { DType } from "../../ffi/dtype.ts";
import type { GpuLimits, KernelSource } from "../../ffi/gpu.ts";
import { NullGpu, type NullKernel } from "../../ffi/null_gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { addBias } from "../../kernels/add_bias.ts";
import { attention } from "../../kernels/attention.ts";
import { boxMuller } from "../../kernels/box_muller.ts";
import { cast } from "../../kernels/cast.ts";
import { checksums } from "../../kernels/checksum.ts";
import { concat } from "../../kernels/concat.ts";
import { contiguous } from "../../kernels/contiguous.ts";
import { dequantize } from "../../kernels/dequantize_float8.ts";
import { valueTiles } from "../../kernels/attention_tiles.ts";
import { linearFewRows } from "../../kernels/linear_few_rows.ts";
import { multiply } from "../../kernels/multiply.ts";
import { layerBound, outputScales } from "../../kernels/output_scales.ts";
import { portableAttention } from "../../kernels/portable_attention.ts";
import { quantizeRows, quantizeTensor } from "../../kernels/quantize_float8.ts";
import { quantizeWeightRows } from "../../kernels/quantize_weight_rows.ts";
import { relativeChange } from "../../kernels/relative_change.ts";
import { rotaryPairs } from "../../kernels/rotary_pairs.ts";
import { scaleInto } from "../../kernels/scale_into.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { Model } from "../../recipes/base/model.ts";
import { FluxPipeline } from "../../recipes/base/pipeline.ts";
import { compose, eagerPlan, type Recipe } from "../../recipes/base/plan.ts";
import { recipesFor } from "../../recipes/switches.ts";
import { goldenPath } from "./golden.ts";
import { watchLaunches } from "./watch_launches.ts";

/** A text to compile, and what of it is launched. */
export interface UsedSource extends KernelSource {
  readonly entries: Set<string>;
}

/** The texts of all kernels that a GPU with these limits launches, by what recipes and tests use. */
export async function kernelSources(limits: GpuLimits): Promise<UsedSource[]> {
  const gpu = new NullGpu({ kind: "hip", limits });
  const sources = new Map<string, UsedSource>();
  watchLaunches(gpu, (kernel) => {
    const { source, entry } = kernel as NullKernel;
    const used = sources.get(source.text) ?? { ...source, entries: new Set() };
    sources.set(source.text, used);
    used.entries.add(entry);
  });
  const rungs: readonly (readonly Recipe[])[] = [
    [baselineFp32],
    [bfloat16],
    recipesFor({ compile_export_mode: "compile" }, "hip"),
    [bfloat16, float8({ granularity: "tensor" })],
  ];
  for (const recipes of rungs) {
    using model = await Model.random(
      goldenPath("dev-like"),
      gpu,
      recipes[0] === baselineFp32 ? "f32" : "bf16",
    );
    const pipeline = new FluxPipeline(model, compose(eagerPlan(gpu, model.weights), ...recipes));
    const size = { height: 32, width: 32, numInferenceSteps: 1, maxSequenceLength: 16 };
    for (let picture = 0; picture < 2; picture++) await pipeline.generate({ prompt: "a", seed: 1, ...size });
  }
  const of = (shape: number[], dtype: DType) => Tensor.empty(gpu, shape, dtype);
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    cast(of([64], dtype), dtype === "f32" ? "bf16" : "f32");
    cast(of([64], dtype), "f8e4m3");
    cast(of([63], "f8e4m3"), dtype);
    addBias(of([1, 8, 4, 4], dtype), of([8], dtype));
  }
  for (const dtype of ["f32", "bf16"] as const) {
    for (const width of [64, 63]) {
      dequantize(quantizeRows(of([4, width], dtype)), dtype);
      dequantize(quantizeTensor(of([4, width], dtype)), dtype);
      quantizeWeightRows(of([4, width], dtype));
      linearFewRows(of([4, width], dtype), quantizeRows(of([4, width], dtype)));
    }
    valueTiles(gpu, [of([1, 4, 2, 128], dtype)]);
    contiguous(of([4, 6, 8], dtype).permute([2, 1, 0]));
    concat([of([1, 4, 8], dtype), of([1, 3, 8], dtype)], 1);
    multiply(of([64], dtype), of([64], dtype));
    scaleInto(of([8, 8], dtype), of([4, 8], "f32"), 2);
    await relativeChange(of([64], dtype), of([64], dtype));
    attention(of([1, 5, 2, 64], dtype), of([1, 7, 2, 64], dtype), of([1, 7, 2, 64], dtype));
  }
  const x = of([1, 40, 2, 128], "bf16");
  portableAttention(gpu, { q: x, k: x, v: x, out: x, scale: 1 });
  boxMuller(of([32], "f32"), "bf16");
  layerBound(gpu, quantizeRows(of([4, 64], "bf16")));
  outputScales(gpu, of([4], "f32"), undefined);
  rotaryPairs(gpu, of([4, 128], "f32"), of([4, 128], "f32"));
  await checksums(gpu, [of([64], "f32").memory]);
  return [...sources.values()];
}
