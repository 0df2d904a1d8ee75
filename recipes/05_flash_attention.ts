/**
 * 05 flash attention: attention of the transformer in float8.
 *
 * Idea: attention's two products grow with the square of the tokens, and the matrix units multiply E4M3 at twice
 * bfloat16's rate. QK-norm keeps q and k near one, so they are cast as they are, without scales, as flux-fast does.
 * Changes: q, k and v of the transformer are rounded to E4M3 (3 bits of mantissa), and so are the weights of the softmax;
 * sums stay in float32. Text encoders and the autoencoder, whose heads are not of 128, stay as they are. Exact: no.
 * Providers: "own" is our kernel for Hopper GPUs (kernels/flash_attention_float8.cu); "cudnn" keeps cuDNN's attention in
 * bfloat16, which is exact; "auto" is "own" where the GPU has its instructions, else "cudnn".
 * Measured on an H100: a step 117.7 to 114.6 ms; the kernel alone 729 TFLOP/s at 4352 tokens, cuDNN in bfloat16 608.
 *
 *     deno run -A recipes/05_flash_attention.ts --device cuda --ckpt FLUX.1-schnell --random-weights --verbose
 */
import { isGpu } from "../ffi/gpu.ts";
import type { attention } from "../kernels/attention.ts";
import {
  flashAttentionFloat8,
  flashAttentionFloat8Takes,
  hasFlashAttentionFloat8,
} from "../kernels/flash_attention_float8.ts";
import { UsageError } from "./base/errors.ts";
import type { Plan, Recipe } from "./base/plan.ts";

export const ATTENTION_PROVIDERS = ["auto", "own", "cudnn"] as const;
export type AttentionProvider = (typeof ATTENTION_PROVIDERS)[number];

export function flashAttention(provider: AttentionProvider = "auto"): Recipe {
  return {
    name: "05_flash_attention",
    exact: false,
    devices: ["cuda"],
    options: { provider },
    apply: (plan: Plan) => {
      const { device } = plan;
      const own = isGpu(device) && hasFlashAttentionFloat8(device);
      if (provider === "own" && !own) {
        throw new UsageError(`05_flash_attention: ${device.name} is no Hopper GPU, which our kernel is for`, {
          hint: "--attention cudnn keeps cuDNN's attention in bfloat16",
        });
      }
      if (plan.weights.transformer.get("x_embedder.weight").dtype !== "bf16") {
        throw new UsageError(
          "05_flash_attention needs 01_bfloat16 before it: float8 attention gives bfloat16",
          {
            hint: "leave out --disable_bf16, or add --disable_fa3",
          },
        );
      }
      if (provider === "cudnn" || !own) return plan;
      const { ops } = plan;
      const attend: typeof attention = (q, k, v, options = {}) =>
        flashAttentionFloat8Takes(q, k, v, options)
          ? flashAttentionFloat8(q, k, v, options.scale, options.out)
          : ops.attention(q, k, v, options);
      return {
        ...plan,
        ops: {
          ...ops,
          attention: attend,
          attentionBesideMlp: (q, k, v, mlp) => ops.attentionBesideMlp(q, k, v, mlp, attend),
        },
      };
    },
  };
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(flashAttention().name));
