import assert from "node:assert/strict";
import { fileURLToPath } from "node:url";
import type { Device } from "../../ffi/device.ts";
import { isDType } from "../../ffi/dtype.ts";
import { elementCount, Tensor } from "../../ffi/tensor.ts";
import { bfloat16ToFloat32 } from "../../ffi/bfloat16.ts";
import { fluxModulations } from "../../recipes/base/modulations.ts";
import type { Ops } from "../../recipes/base/ops.ts";
import { rotaryEmbedding } from "../../recipes/base/rotary.ts";
import { SafetensorsFile } from "../../recipes/base/safetensors.ts";
import { fluxTransformer, type TransformerConfig } from "../../recipes/base/transformer.ts";
import type { Weights } from "../../recipes/base/weights.ts";

/** Path of a file or folder under tests/golden. */
export function goldenPath(name: string): string {
  return fileURLToPath(new URL(`../golden/${name}`, import.meta.url));
}

/** Tensors of a golden file: on the device, or as plain numbers. */
export class Golden implements Disposable {
  readonly #file: SafetensorsFile;

  constructor(name: string, private readonly device: Device) {
    this.#file = SafetensorsFile.open(goldenPath(name));
  }

  get names(): readonly string[] {
    return this.#file.names;
  }

  tensor(name: string): Tensor {
    const { dtype, shape } = this.#file.info(name);
    if (!isDType(dtype)) throw new TypeError(`${name} is ${dtype}`);
    return Tensor.fromBytes(this.device, this.#file.bytes(name), shape, dtype);
  }

  values(name: string): Float32Array {
    const { dtype, shape } = this.#file.info(name);
    const bytes = this.#file.bytes(name).slice().buffer;
    switch (dtype) {
      case "f32":
        return new Float32Array(bytes);
      case "bf16": {
        const values = new Float32Array(elementCount(shape));
        bfloat16ToFloat32(new Uint16Array(bytes), values);
        return values;
      }
      case "i64":
        return Float32Array.from(new BigInt64Array(bytes), Number);
      case "u8":
        return Float32Array.from(new Uint8Array(bytes));
      default:
        throw new TypeError(`${name} is ${dtype}`);
    }
  }

  /** Token ids, row by row. */
  ids(name: string): Int32Array[] {
    const [rows, length] = this.#file.info(name).shape;
    const values = Int32Array.from(this.values(name));
    return Array.from({ length: rows }, (_, row) => values.slice(row * length, (row + 1) * length));
  }

  [Symbol.dispose](): void {
    this.#file[Symbol.dispose]();
  }
}

/** A dense tensor's values on the host. */
export async function valuesOf(tensor: Tensor): Promise<Float32Array> {
  const { buffer } = await tensor.device.download(tensor);
  if (tensor.dtype === "f32") return new Float32Array(buffer);
  if (tensor.dtype === "u8") return Float32Array.from(new Uint8Array(buffer));
  const values = new Float32Array(tensor.size);
  bfloat16ToFloat32(new Uint16Array(buffer), values);
  return values;
}

/** All bytes of some weights, by name. */
export async function bytesOf(weights: Weights): Promise<Map<string, string>> {
  const bytes = new Map<string, string>();
  for (const name of weights.names) {
    const tensor = weights.get(name);
    assert.ok(tensor.isContiguous, name);
    bytes.set(name, `${tensor.dtype} ${(await tensor.device.download(tensor)).toBase64()}`);
  }
  return bytes;
}

/** Positions of a transformer's golden tokens, text first: `[tokens, 3]`. */
export function positionsOf(golden: Golden): Float32Array {
  return Float32Array.of(...golden.values("in.txt_ids"), ...golden.values("in.img_ids"));
}

/** The transformer's velocity for a golden file's inputs. */
export function transformerVelocity(
  golden: Golden,
  device: Device,
  config: TransformerConfig,
  weights: Weights,
  ops: Ops,
): Tensor {
  return device.scope(() =>
    fluxTransformer(config, weights, ops, {
      hiddenStates: golden.tensor("in.hidden_states"),
      encoderHiddenStates: golden.tensor("in.encoder_hidden_states"),
      modulations: fluxModulations(config, weights, ops, {
        pooledProjections: golden.tensor("in.pooled_projections"),
        timestep: golden.tensor("in.timestep"),
        guidance: config.guidance_embeds ? golden.tensor("in.guidance") : undefined,
      }),
      rotary: rotaryEmbedding(device, positionsOf(golden), config.axes_dims_rope),
    })
  );
}
