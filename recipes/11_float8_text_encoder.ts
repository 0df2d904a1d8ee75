/**
 * 11 float8 text encoder: T5's Linear layers in 8-bit floats (E4M3).
 *
 * Idea: T5-XXL has 4.7 G parameters, 9.5 GB in bfloat16, for a part that runs once a picture and is bound by reading them. Two
 * ways, by `--t5_float8`:
 * "dynamic", the default wherever 06_float8 is on: what they are multiplied with is quantized, too, with a scale for each token
 * found anew, as 06_float8 does in the transformer, and multiplied in float8. But for `wo`, which reads the gated hidden layer
 * and needs the range: it stays in bfloat16, as transformers keeps it in float32 where all else is in float16. T5 has 5.9 GB
 * then.
 * "weights": all of them in float8, multiplied in bfloat16, a weight being widened for its product: 4.8 GB, but slower, and no closer to
 * bfloat16, since `wo` is among them.
 * Changes: q, k, v, o, wi_0, wi_1 and wo of each layer of T5, with a scale for each row. Embeddings, norms and the position bias
 * stay, and so do CLIP and everything else. Exact: no. Needs bfloat16 before it. `--t5_float8 off`, or `--disable_quant`, is to be
 * without it.
 * Measured on an H100: weights 22.0 to 18.3 GB, text encoders 8.5 to 6.2 ms ("weights": 17.3 GB, 12.6 ms).
 *
 *     deno run -A recipes/11_float8_text_encoder.ts --device cuda --ckpt FLUX.1-dev --verbose
 */
import { float8Products, matricesOf, quantizeWeights, WIDE_PRODUCTS } from "./06_float8.ts";
import { UsageError } from "./base/errors.ts";
import type { Plan, Recipe } from "./base/plan.ts";

/** What is in float8: T5's weights, or most of them and what they are multiplied with. */
export type TextEncoderFloat8 = "weights" | "dynamic";
export const TEXT_ENCODER_FLOAT8: readonly TextEncoderFloat8[] = ["weights", "dynamic"];

/** T5's Linear layers, by mode; its tables, which are matrices too, are looked up. */
const LINEAR: Readonly<Record<TextEncoderFloat8, RegExp>> = {
  weights: /\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi_0|wi_1|wo))\.weight$/,
  dynamic: /\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi_0|wi_1))\.weight$/,
};
/** What float8 matrix units read at a time: sizes are multiples of it. */
const MULTIPLE = 16;

/** The recipe. @param mode what is in float8: "weights" alone, or "dynamic": what they are multiplied with, too. */
export function float8TextEncoder(mode: TextEncoderFloat8 = "dynamic"): Recipe {
  return {
    name: "11_float8_text_encoder",
    exact: false,
    devices: ["cpu", "cuda", "hip"],
    options: { mode },
    preparesWeights: true,
    apply: (plan: Plan) => {
      const { device, ops, weights } = plan;
      const wide = weights.text_encoder_2.names.find((name) =>
        LINEAR[mode].test(name) && !["bf16", "f8e4m3"].includes(weights.text_encoder_2.get(name).dtype)
      );
      if (wide !== undefined) {
        throw new UsageError(
          `11_float8_text_encoder takes bfloat16 weights, and ${wide} is ${weights.text_encoder_2.get(wide)}`,
          { hint: "leave out --disable_bf16, or --t5_float8" },
        );
      }
      const quantized = quantizeWeights(
        device,
        weights.text_encoder_2,
        true,
        (name, { shape }) => LINEAR[mode].test(name) && shape.every((size) => size % MULTIPLE === 0),
      );
      const matrices = matricesOf(quantized, true);
      const products = float8Products(ops, matrices, mode === "dynamic" ? undefined : WIDE_PRODUCTS);
      return {
        ...plan,
        weights: { ...weights, text_encoder_2: quantized },
        ops: { ...ops, ...products },
      };
    },
  };
}

if (import.meta.main) void import("./run_rung.ts").then(({ runRung }) => runRung(float8TextEncoder().name));
