/**
 * FLUX.1 text-to-image in TypeScript on Deno: the public names.
 *
 * ```ts
 * import { bfloat16, compose, eagerPlan, FluxPipeline, Model, openDevice } from "./mod.ts";
 *
 * using device = await openDevice("cpu");
 * using model = await Model.load("models/tiny", device);
 * const pipeline = new FluxPipeline(model, compose(eagerPlan(device, model.weights), bfloat16));
 * const { images } = await pipeline.generate({ prompt: "a red apple", seed: 42 });
 * ```
 *
 * @module
 */
export type { Device, DeviceKind, DeviceProperties } from "./ffi/device.ts";
export type { DType } from "./ffi/dtype.ts";
export { FfiError, FluxError, OutOfMemoryError, ShapeError } from "./ffi/errors.ts";
export { DEVICE_NAMES, openDevice } from "./ffi/open.ts";
export { Tensor } from "./ffi/tensor.ts";
export { baselineFp32 } from "./recipes/00_baseline_fp32.ts";
export { bfloat16 } from "./recipes/01_bfloat16.ts";
export { compile } from "./recipes/02_compile.ts";
export { fuseQkv } from "./recipes/03_fuse_qkv.ts";
export { channelsLast } from "./recipes/04_channels_last.ts";
export { type AttentionDType, type AttentionProvider, flashAttention } from "./recipes/05_flash_attention.ts";
export { float8, type Float8Options } from "./recipes/06_float8.ts";
export { tuning } from "./recipes/07_tuning.ts";
export { firstBlockCache, type FirstBlockCacheOptions } from "./recipes/09_first_block_cache.ts";
export { float8TextEncoder, type TextEncoderFloat8 } from "./recipes/11_float8_text_encoder.ts";
export { type ExportedModel, exportedModel, type ExportFlags, exporting } from "./recipes/08_export.ts";
export { offload, piecesFor } from "./recipes/12_offload.ts";
export { fusedBlocks } from "./recipes/13_fused_blocks.ts";
export { ModelError, UsageError } from "./recipes/base/errors.ts";
export { type Bar, type BarChart, barChart } from "./recipes/base/bar_chart.ts";
export { Progress } from "./recipes/base/command_line.ts";
export { encodePng, parametersText, readPngText } from "./recipes/base/image.ts";
export { hubModel, type HubOptions } from "./recipes/base/hub.ts";
export { type LoraChoice, Loras } from "./recipes/base/lora.ts";
export { preferredSize, type Size } from "./recipes/base/kontext.ts";
export { measure, type Measurement, type MeasureOptions, type PictureTimes } from "./recipes/base/measure.ts";
export { type LoadOptions, Model } from "./recipes/base/model.ts";
export { type Displayable, showPicture, showPictures, showSvg } from "./recipes/base/notebook.ts";
export { eagerOps, type Ops } from "./recipes/base/ops.ts";
export {
  FluxPipeline,
  type GenerateOptions,
  type GenerateResult,
  type Picture,
  type ProgressEvent,
} from "./recipes/base/pipeline.ts";
export { compose, eagerPlan, type Plan, type Recipe } from "./recipes/base/plan.ts";
export { largestError, psnr } from "./recipes/base/psnr.ts";
export { Generator } from "./recipes/base/random.ts";
export type { PartFiles } from "./recipes/base/single_file.ts";
export { decodePicture, readPicture } from "./recipes/base/read_picture.ts";
export { SafetensorsError, SafetensorsFile, writeSafetensors } from "./recipes/base/safetensors.ts";
export { recipesFor, type Switches } from "./recipes/switches.ts";
