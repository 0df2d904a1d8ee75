/**
 * 05 flash attention: attention of the transformer in float8.
 *
 * Idea: attention's two products grow with the square of the tokens, and the matrix units multiply E4M3 at twice
 * bfloat16's rate. QK-norm keeps q and k near one, so they are cast as they are, without scales, as flux-fast does.
 * Changes: q, k and v of the transformer are rounded to E4M3 (3 bits of mantissa), and so are the weights of the softmax;
 * logits stay in float32, and so do their sums with v but for our kernel's, which are f16 where that holds them. Text encoders
 * and the autoencoder, whose heads are not of 128, stay as they are. Exact: no.
 * Providers, by `--attention`: "own" is our kernel for Hopper GPUs (kernels/flash_attention.cu); on AMD's GPUs it is our
 * portable one (kernels/portable_attention.cu), which has bfloat16 only. "fa3" is FlashAttention-3 as it is installed for
 * PyTorch (`pip install fa3-fwd`), for Hopper GPUs. "aiter" is AMD's AITER (`pip install amd-aiter`), for theirs. "cudnn"
 * keeps cuDNN's attention in bfloat16. "auto" is "own" where the GPU has its instructions, "aiter" on AMD's GPUs where it is
 * installed, else what is there without this recipe; it is never "fa3", which loads over a gigabyte of PyTorch's libraries.
 * With `--disable_fa3` attention is in bfloat16, which is exact: by the provider that `--attention` names, else by what is
 * there without this recipe.
 * Measured on an H100: a step 117.3 to 110.9 ms; the kernel alone 832 TFLOP/s at 4352 tokens, in bfloat16 627, cuDNN 594.
 * The kernel is younger: on an H200 it has 920 TFLOP/s, in bfloat16 680, where the one before had 820 and 607.
 *
 *     deno run -A recipes/05_flash_attention.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import { FfiError } from "../ffi/errors.ts";
import { type AttentionLibrary, type GpuDevice, isGpu } from "../ffi/gpu.ts";
import type { AttentionDType } from "../kernels/attention_tiles.ts";
import { hasFlashAttention } from "../kernels/flash_attention.ts";
import { hasLibraryAttention, libraryAttentionTakes } from "../kernels/library_attention.ts";
import {
  jointAttentionByLibrary,
  jointAttentionByNamed,
  jointAttentionFused,
  jointAttentionPortable,
  jointAttentionTiled,
  jointAttentionTiledTakes,
} from "../kernels/joint_attention.ts";
import { UsageError } from "./base/errors.ts";
import type { Ops } from "./base/ops.ts";
import type { Plan, Recipe } from "./base/plan.ts";

export type { AttentionDType };
/** Who attends: see this file's banner. */
export type AttentionProvider = "auto" | "own" | "fa3" | "aiter" | "cudnn";
export const ATTENTION_PROVIDERS: readonly AttentionProvider[] = ["auto", "own", "fa3", "aiter", "cudnn"];
type JointAttention = Ops["jointAttention"];
/** Those that multiply in float8. */
const inFloat8 = new WeakSet<JointAttention>();
/** Those by our kernel, and what they multiply in. */
const ours = new WeakMap<JointAttention, AttentionDType>();

/** The recipe, for a provider. @param dtype what q, k and v are multiplied in; "cudnn" has bf16 only. */
export function flashAttention(
  provider: AttentionProvider = "auto",
  dtype: AttentionDType = "f8e4m3",
): Recipe {
  return {
    name: "05_flash_attention",
    exact: dtype === "bf16" || provider === "cudnn",
    devices: ["cuda", "hip"],
    options: { provider, dtype },
    apply: (plan: Plan) => {
      const { device, ops, weights } = plan;
      if (!isGpu(device)) throw new UsageError(`05_flash_attention: ${device.name} is no GPU`);
      if (weights.transformer.get("x_embedder.weight").dtype !== "bf16") {
        throw new UsageError("05_flash_attention needs 01_bfloat16 before it: its attention gives bfloat16", {
          hint: "leave out --disable_bf16, or --attention, or add --disable_fa3",
        });
      }
      const attend = device.kind === "hip"
        ? onAmd(device, provider, dtype, ops.jointAttention)
        : onNvidia(device, provider, dtype, ops.jointAttention);
      if (attend === undefined) return plan;
      if (dtype === "f8e4m3" && attend !== jointAttentionByLibrary && attend !== byPortable) {
        inFloat8.add(attend);
      }
      return { ...plan, ops: { ...ops, jointAttention: attend } };
    },
  };
}

/** Whether a plan's attention multiplies in float8. */
export function attendsInFloat8({ ops }: Plan): boolean {
  return inFloat8.has(ops.jointAttention);
}

/** Who attends; undefined for who was there. */
function onNvidia(
  gpu: GpuDevice,
  provider: AttentionProvider,
  dtype: AttentionDType,
  otherwise: JointAttention,
): JointAttention | undefined {
  if (provider === "cudnn") return jointAttentionByLibrary;
  if (provider === "aiter") {
    throw new UsageError(`05_flash_attention: ${gpu.name} is no AMD GPU, which AITER is for`, {
      hint: "--attention auto takes what is the fastest here",
    });
  }
  if (provider === "auto" && !hasFlashAttention(gpu)) return undefined;
  if (provider !== "fa3") return byOurKernel(gpu, dtype, otherwise);
  if (!hasLibraryAttention(gpu, "fa3", dtype)) throw noHopper(gpu, "FlashAttention-3 is for");
  return byNamed(gpu, "fa3", dtype, otherwise);
}

/** The same on AMD's GPUs. */
function onAmd(
  gpu: GpuDevice,
  provider: AttentionProvider,
  dtype: AttentionDType,
  otherwise: JointAttention,
): JointAttention | undefined {
  if (provider === "own") return byPortable;
  if (provider === "fa3" || provider === "cudnn") {
    const library = provider === "fa3" ? "FlashAttention-3" : "cuDNN";
    throw new UsageError(`05_flash_attention: ${library} is for NVIDIA GPUs, not for ${gpu.name}`, {
      hint: "--attention aiter, or --attention own for our kernel in bfloat16",
    });
  }
  const has = () => hasLibraryAttention(gpu, "aiter", dtype);
  if (provider === "auto" ? !orFalse(has) : !has()) {
    if (provider === "auto") return undefined; // the device says, when it comes to it, that AITER would be faster
    throw new UsageError(`05_flash_attention: AITER has no attention in ${dtype} for ${gpu.name}`, {
      hint: "--attention own is our kernel in bfloat16",
    });
  }
  return byNamed(gpu, "aiter", dtype, otherwise);
}

/** False for what is not installed, too. */
function orFalse(body: () => boolean): boolean {
  try {
    return body();
  } catch (error) {
    if (error instanceof FfiError) return false;
    throw error;
  }
}

/** By our portable kernel, whatever library there is. */
const byPortable: JointAttention = (streams, cos, sin, eps, options = {}) =>
  jointAttentionPortable(streams, cos, sin, eps, options) ??
    jointAttentionByLibrary(streams, cos, sin, eps, options);

/**
 * What a plan's attention by our kernel multiplies in; undefined where another's attends. Where 07_tuning may choose, ours
 * counts.
 */
export function ownAttention({ device, ops: { jointAttention } }: Plan): AttentionDType | undefined {
  if (!isGpu(device) || !hasFlashAttention(device)) return undefined;
  return jointAttention === jointAttentionFused ? "bf16" : ours.get(jointAttention);
}

function byOurKernel(gpu: GpuDevice, dtype: AttentionDType, otherwise: JointAttention): JointAttention {
  if (!hasFlashAttention(gpu)) throw noHopper(gpu, "our kernel is for");
  const attend: JointAttention = (streams, cos, sin, eps, options = {}) =>
    jointAttentionTiledTakes(gpu, streams)
      ? jointAttentionTiled(gpu, streams, cos, sin, eps, dtype, options)
      : otherwise(streams, cos, sin, eps, options);
  ours.set(attend, dtype);
  return attend;
}

function byNamed(
  gpu: GpuDevice,
  library: AttentionLibrary,
  dtype: AttentionDType,
  otherwise: JointAttention,
): JointAttention {
  return (streams, cos, sin, eps, options = {}) =>
    libraryAttentionTakes(streams[0].q)
      ? jointAttentionByNamed(gpu, library, streams, cos, sin, eps, dtype, options)
      : otherwise(streams, cos, sin, eps, options);
}

function noHopper({ name }: GpuDevice, what: string): UsageError {
  return new UsageError(`05_flash_attention: ${name} is no Hopper GPU, which ${what}`, {
    hint: "--attention cudnn keeps cuDNN's attention in bfloat16",
  });
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(flashAttention().name));
