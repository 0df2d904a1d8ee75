import type { Device } from "../../ffi/device.ts";
import { type DType, dtypeBytes } from "../../ffi/dtype.ts";
import { elementCount, Tensor } from "../../ffi/tensor.ts";
import { fillRandom } from "../../kernels/random_fill.ts";
import type { ModelConfigs } from "./model_parts.ts";
import { type Component, COMPONENTS } from "./plan.ts";
import { type Weights, weightsFrom, type WeightShapes } from "./weights.ts";

/** Random numbers of one part start so far behind those of the one before; no part has that many weights. */
const STREAMS_PER_PART = 2 ** 20;

/**
 * Weights of a part of a model, drawn on the device: for benchmarks and tests without a download. Activations keep their
 * size through all layers, so that nothing overflows or dies out, and matrix units do the work that they do with
 * trained weights.
 *
 * @param dtype that the weights are made in. @param seed the same one gives the same weights.
 * @param names of those that are made; all of the part when left out.
 */
export function randomPart(
  device: Device,
  configs: ModelConfigs,
  component: Component,
  shapes: WeightShapes,
  dtype: DType,
  seed: number,
  names: readonly string[] = [...shapes.keys()],
): Weights {
  const first = COMPONENTS.indexOf(component) * STREAMS_PER_PART;
  const places = new Map([...shapes.keys()].map((name, i) => [name, first + i]));
  const tensors = names.map((name): [string, Tensor] => {
    const shape = shapes.get(name)!;
    const weight = new Tensor(device.alloc(elementCount(shape) * dtypeBytes(dtype), "weights"), dtype, shape);
    const stream = places.get(name)!;
    fillRandom(weight, { seed, stream, kind: "normal", ...distribution(name, shape, configs) });
    return [name, weight];
  });
  return weightsFrom(new Map(tensors));
}

/** Tables that are looked up, not multiplied with. */
const TABLES = /(token_embedding|position_embedding|embed_tokens|shared|relative_attention_bias)\.weight$/;
/** Linear layers that give shifts, scales and gates. */
const MODULATIONS = /(^|\.)(norm1|norm1_context|norm|norm_out)\.linear\.weight$/;
const T5_QUERY = /\.SelfAttention\.q\.weight$/;

/** Mean (`shift`) and standard deviation (`scale`) of a weight's elements. */
function distribution(
  name: string,
  shape: readonly number[],
  { text_encoder_2: t5 }: ModelConfigs,
): { readonly scale: number; readonly shift: number } {
  if (name.endsWith(".bias")) return { scale: 0.02, shift: 0 };
  if (shape.length === 1) return { scale: 0.02, shift: 1 }; // norms
  if (TABLES.test(name)) return { scale: 1, shift: 0 };
  // The sum of as many products as there are inputs has the inputs' variance (LeCun et al. 1998).
  const scale = 1 / Math.sqrt(elementCount(shape.slice(1)));
  // Gates are small, as trained ones are, so that 57 blocks add little to the residual stream.
  if (MODULATIONS.test(name)) return { scale: scale / 2, shift: 0 };
  // T5 has no attention scale: its queries are trained small (Raffel et al. 2020).
  if (T5_QUERY.test(name)) return { scale: scale / Math.sqrt(t5.d_kv), shift: 0 };
  return { scale, shift: 0 };
}
