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
export type {
  ConvPlan,
  Device,
  DeviceKind,
  DeviceProperties,
  MatmulPlan,
  Memory,
  MemoryPurpose,
  MemoryUse,
} from "./ffi/device.ts";
export type { DType } from "./ffi/dtype.ts";
export { FfiError, FluxError, OutOfMemoryError, ShapeError } from "./ffi/errors.ts";
export type { OpenGpuOptions } from "./ffi/gpu_open.ts";
export { DEVICE_NAMES, openDevice } from "./ffi/open.ts";
export { Tensor } from "./ffi/tensor.ts";
export { JUPYTER_DISPLAY } from "./ffi/tensor_display.ts";
export { baselineFp32 } from "./recipes/00_baseline_fp32.ts";
export { bfloat16 } from "./recipes/01_bfloat16.ts";
export { compile } from "./recipes/02_compile.ts";
export { fuseQkv } from "./recipes/03_fuse_qkv.ts";
export { channelsLast } from "./recipes/04_channels_last.ts";
export { type AttentionDType, type AttentionProvider, flashAttention } from "./recipes/05_flash_attention.ts";
export { float8, type Float8Options } from "./recipes/06_float8.ts";
export { tuning } from "./recipes/07_tuning.ts";
export { type ExportedModel, exportedModel, type ExportFlags, exporting } from "./recipes/08_export.ts";
export { firstBlockCache, type FirstBlockCacheOptions } from "./recipes/09_first_block_cache.ts";
export { float8TextEncoder, type TextEncoderFloat8 } from "./recipes/11_float8_text_encoder.ts";
export { offload } from "./recipes/12_offload.ts";
export { fusedBlocks } from "./recipes/13_fused_blocks.ts";
export {
  type CompileExportMode,
  recipesFor,
  type Rung,
  type Switches,
  type Wish,
} from "./recipes/switches.ts";
export type { AutoencoderConfig } from "./recipes/base/autoencoder.ts";
export { type Bar, type BarChart, barChart } from "./recipes/base/bar_chart.ts";
export type { ClipConfig } from "./recipes/base/clip.ts";
export { Progress } from "./recipes/base/command_line.ts";
export { ModelError, UsageError } from "./recipes/base/errors.ts";
export { type DownloadProgress, hubModel, type HubOptions } from "./recipes/base/hub.ts";
export type { Wanted } from "./recipes/base/hub_files.ts";
export type { HubSettings } from "./recipes/base/hub_settings.ts";
export { encodePng, type Parameters, parametersText, readPngText } from "./recipes/base/image.ts";
export { preferredSize, type Size } from "./recipes/base/kontext.ts";
export type { ModelChoice } from "./recipes/base/loading.ts";
export { type LoraChoice, Loras } from "./recipes/base/lora.ts";
export {
  measure,
  type Measurement,
  type MeasureOptions,
  type PictureTimes,
  type Power,
  type Statistics,
} from "./recipes/base/measure.ts";
export { type LoadOptions, Model } from "./recipes/base/model.ts";
export type { ModelConfigs } from "./recipes/base/model_parts.ts";
export { type Displayable, showPicture, showPictures, showSvg } from "./recipes/base/notebook.ts";
export { eagerOps, type Ops } from "./recipes/base/ops.ts";
export { type Pieces, piecesFor } from "./recipes/base/pieces.ts";
export {
  FluxPipeline,
  type GenerateOptions,
  type GenerateResult,
  type Picture,
  type ProgressEvent,
} from "./recipes/base/pipeline.ts";
export {
  type Component,
  compose,
  eagerPlan,
  type Execute,
  type Plan,
  type Recipe,
  type StepInputs,
  type Stepper,
} from "./recipes/base/plan.ts";
export { largestError, psnr } from "./recipes/base/psnr.ts";
export { Generator } from "./recipes/base/random.ts";
export { decodePicture, readPicture } from "./recipes/base/read_picture.ts";
export type { Rotary } from "./recipes/base/rotary.ts";
export {
  type FileDType,
  SafetensorsError,
  SafetensorsFile,
  type SafetensorsRule,
  type TensorInfo,
  type TensorToWrite,
  type WriteOptions,
  writeSafetensors,
} from "./recipes/base/safetensors.ts";
export {
  FlowMatchEulerScheduler,
  type Schedule,
  type ScheduleOptions,
  type SchedulerConfig,
} from "./recipes/base/scheduler.ts";
export type { FilePart, PartFiles } from "./recipes/base/single_file.ts";
export type { T5Config } from "./recipes/base/t5.ts";
export type { Encoding, SpecialIds, TextTokenizer } from "./recipes/base/tokenizer.ts";
export type { TransformerConfig } from "./recipes/base/transformer.ts";
export type { Weights } from "./recipes/base/weights.ts";
