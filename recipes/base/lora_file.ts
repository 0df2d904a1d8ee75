/**
 * LoRA files (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"): a change `scale * up @ down` of rank r
 * for each of some Linear layers. The names are those of diffusers and PEFT, of Kohya's sd-scripts, or of Black Forest Labs.
 */
import { existsSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { z } from "zod";
import { bfloat16ToFloat32 } from "../../ffi/bfloat16.ts";
import { listed, type RowRange } from "./component_weights.ts";
import { ModelError } from "./errors.ts";
import { type LoraTargets, targetsOf } from "./lora_names.ts";
import type { Component } from "./plan.ts";
import { printable, SafetensorsFile } from "./safetensors.ts";

/** The change of one weight, or of a part of what the file has as one layer. */
export interface LoraChange {
  readonly component: Component;
  /** The weight, `[out, in]`. */
  readonly weight: string;
  /** Name of `[r, in]` in the file. */
  readonly down: string;
  /** Name of `[rows, r]` in the file; `rows` of it are `[out, r]`, all when left out. */
  readonly up: string;
  readonly rows: readonly RowRange[] | undefined;
  /** What `up @ down` is multiplied by, beside the scale that a user gives: alpha / r. */
  readonly scale: number;
}

/** An open LoRA file and what it changes. */
export interface LoraFile extends Disposable {
  readonly file: SafetensorsFile;
  readonly changes: readonly LoraChange[];
}

/** Ends of names, and what they are. In brackets the module. */
const PATTERNS: readonly (readonly [RegExp, "down" | "up" | "alpha"])[] = [
  [/^(.+)\.lora_A(?:\.(?!bias)\w+)?\.weight$/, "down"], // PEFT, with an adapter's name or without
  [/^(.+)\.lora_B(?:\.(?!bias)\w+)?\.weight$/, "up"],
  [/^(.+)\.lora_down\.weight$/, "down"], // Kohya
  [/^(.+)\.lora_up\.weight$/, "up"],
  [/^(.+)[._]lora\.down\.weight$/, "down"], // diffusers before PEFT
  [/^(.+)[._]lora\.up\.weight$/, "up"],
  [/^(.+)\.alpha$/, "alpha"],
];
/** Other methods, which share the files' form. */
const OTHER_METHODS: readonly (readonly [RegExp, string])[] = [
  [/\.dora_scale$|lora_magnitude_vector/, "DoRA"],
  [/\.hada_/, "LoHa"],
  [/\.lokr_/, "LoKr"],
  [/\.lora_mid\./, "a convolution's LoRA with a middle (LoCon)"],
  [/\.oft_|\.boft_/, "OFT"],
  [/\.diff(_b)?$|lora_B\.bias$/, "whole differences beside LoRA's"],
];

/** A layer as the file has it. */
interface Layer {
  down?: string;
  up?: string;
  alpha?: number;
}

/**
 * Opens a LoRA file and finds out what it changes of a model.
 *
 * @throws ModelError for one of another method, with layers that the model does not have or of other sizes, or with half
 * a layer; SafetensorsError for a damaged one.
 */
export function openLora(path: string, targets: LoraTargets): LoraFile {
  const file = SafetensorsFile.open(path);
  try {
    return { file, changes: changesOf(file, targets), [Symbol.dispose]: () => file[Symbol.dispose]() };
  } catch (error) {
    file[Symbol.dispose]();
    throw error;
  }
}

function changesOf(file: SafetensorsFile, targets: LoraTargets): LoraChange[] {
  const { path, names } = file;
  const layers = new Map<string, Layer>();
  const unknown: string[] = [];
  for (const name of names) {
    const method = OTHER_METHODS.find(([pattern]) => pattern.test(name));
    if (method !== undefined) {
      throw new ModelError(`${path} has ${method[1]} (${printable(name)}), which is not merged here`, {
        hint: "plain LoRA is: lora_A and lora_B, or lora_down and lora_up",
      });
    }
    const found = PATTERNS.map(([pattern, what]) => ({ module: name.match(pattern)?.[1], what })).find((
      { module },
    ) => module !== undefined);
    if (found?.module === undefined) {
      unknown.push(name);
      continue;
    }
    const layer = layers.get(found.module) ?? {};
    layers.set(found.module, layer);
    if (found.what === "alpha") layer.alpha = scalar(file, name);
    else layer[found.what] = name;
  }
  if (layers.size === 0) {
    throw new ModelError(
      `${path} is no LoRA: it has weights such as ${names.slice(0, 3).map(printable).join(", ")}`,
      {
        hint:
          "names that end in lora_A.weight and lora_B.weight, or lora_down.weight and lora_up.weight, are expected",
      },
    );
  }
  const metadata = readMetadata(file);
  const problems: string[] = unknown.map((name) => `${printable(name)} is no part of a LoRA`);
  const changes = [...layers].flatMap(([module, layer]) => {
    const place = targetsOf(targets, module);
    if (place === undefined) problems.push(`the model has no layer ${printable(module)}`);
    else if (layer.down === undefined || layer.up === undefined) {
      problems.push(`half of ${printable(module)} is missing`);
    } else {return changesOfLayer(
        file,
        module,
        layer as Required<Pick<Layer, "down" | "up">> & Layer,
        place,
        metadata,
        problems,
      );}
    return [];
  });
  if (problems.length > 0) {
    throw new ModelError(`${path} does not fit the model:${listed(problems, SHOWN)}`, {
      hint: "is it a LoRA for this FLUX.1 model?",
    });
  }
  return changes;
}

const SHOWN = 10;

function changesOfLayer(
  file: SafetensorsFile,
  module: string,
  { down, up, alpha }: Required<Pick<Layer, "down" | "up">> & Layer,
  place: NonNullable<ReturnType<typeof targetsOf>>,
  metadata: Metadata,
  problems: string[],
): LoraChange[] {
  const [downShape, upShape] = [down, up].map((name) => file.info(name).shape);
  const [rank, inputs] = downShape;
  const wrong = [down, up].map((name) => file.info(name)).find(({ dtype, shape }) =>
    !["f32", "bf16", "f16"].includes(dtype) || shape.slice(2).some((size) => size !== 1) || shape.length < 2
  );
  if (wrong !== undefined || upShape[1] !== rank || rank === 0) {
    problems.push(
      `${printable(module)} has ${file.info(down).dtype} [${downShape.join(", ")}] and ${
        file.info(up).dtype
      } [${upShape.join(", ")}], which make no product of matrices`,
    );
    return [];
  }
  const expected = place.reduce((sum, { outFeatures }) => sum + outFeatures, 0);
  if (inputs !== place[0].inFeatures || upShape[0] !== expected) {
    problems.push(
      `${printable(module)} is for [${upShape[0]}, ${inputs}], and the model's is [${expected}, ${
        place[0].inFeatures
      }]`,
    );
    return [];
  }
  const scale = alpha === undefined ? metadata(module, rank) : alpha / rank;
  if (!Number.isFinite(scale)) {
    problems.push(`${printable(module)} has an alpha of ${alpha}`);
    return [];
  }
  return place.map(({ component, weight, rows }) => ({ component, weight, down, up, rows, scale }));
}

/** A number that is a tensor. */
function scalar(file: SafetensorsFile, name: string): number {
  const { dtype, shape } = file.info(name);
  const bytes = file.bytes(name).slice().buffer;
  if (shape.every((size) => size === 1)) {
    if (dtype === "f32") return new Float32Array(bytes)[0];
    if (dtype === "f64") return new Float64Array(bytes)[0];
    if (dtype === "f16") return new Float16Array(bytes)[0];
    if (dtype === "i64") return Number(new BigInt64Array(bytes)[0]);
    if (dtype === "bf16") {
      const value = new Float32Array(1);
      bfloat16ToFloat32(new Uint16Array(bytes), value);
      return value[0];
    }
  }
  throw new ModelError(
    `${file.path}: ${printable(name)} is ${dtype} [${shape.join(", ")}], a number is expected`,
  );
}

/** The scale of a layer that has no alpha beside it. */
type Metadata = (module: string, rank: number) => number;

/** What diffusers keeps of PEFT's LoraConfig, for each part under its name. */
const adapterSchema = z.looseObject({
  lora_alpha: z.number().optional(),
  alpha_pattern: z.record(z.string(), z.number()).nullish(),
  use_rslora: z.boolean().nullish(),
  use_dora: z.literal(false, { error: "DoRA is not merged here" }).nullish(),
});

type AdapterConfig = z.infer<typeof adapterSchema>;

/**
 * By `lora_adapter_metadata`, which diffusers writes, or by the adapter_config.json that PEFT writes beside its
 * adapter_model.safetensors; without them alpha is the rank, as diffusers has it.
 */
function readMetadata({ metadata, path }: SafetensorsFile): Metadata {
  const text = metadata.get("lora_adapter_metadata");
  if (text === undefined) {
    const beside = join(dirname(path), "adapter_config.json");
    if (basename(path) !== "adapter_model.safetensors" || !existsSync(beside)) return () => 1;
    const config = checkConfig(beside, parseObject(beside, Deno.readTextFileSync(beside)));
    return (module, rank) => scaleOf(config, module, rank);
  }
  const where = `${path}: its lora_adapter_metadata`;
  const entries = Object.entries(parseObject(where, text));
  const parts = new Set(entries.map(([key]) => key.split(".")[0]));
  const configs = Array.from(parts, (part) => {
    const ofPart = entries.filter(([key]) => key.startsWith(`${part}.`)).map(([key, value]) => [
      key.slice(part.length + 1),
      value,
    ]);
    return [part, checkConfig(`${where}: ${part}`, Object.fromEntries(ofPart))] as const;
  });
  return (module, rank) => {
    const found = configs.find(([part]) => module.startsWith(`${part}.`));
    return found === undefined ? 1 : scaleOf(found[1], module, rank);
  };
}

function scaleOf(config: AdapterConfig, module: string, rank: number): number {
  // PEFT takes patterns for regular expressions; they are names of layers, or ends of them, and are taken for that.
  const pattern = Object.keys(config.alpha_pattern ?? {}).find((one) =>
    `.${module}`.endsWith(`.${one.replace(/^\^|\$$/g, "")}`)
  );
  const alpha = pattern === undefined ? config.lora_alpha ?? rank : config.alpha_pattern![pattern];
  return alpha / (config.use_rslora ? Math.sqrt(rank) : rank);
}

function parseObject(where: string, text: string): object {
  try {
    const value = JSON.parse(text);
    if (typeof value === "object" && value !== null) return value;
  } catch { // the same as what is no object
  }
  throw new ModelError(`${where} is no JSON object`, { hint: "the file is damaged: download it again" });
}

function checkConfig(where: string, value: unknown): AdapterConfig {
  const result = adapterSchema.safeParse(value);
  if (result.success) return result.data;
  const [{ path, message }] = result.error.issues;
  throw new ModelError(`${where}: ${path.join(".")}: ${message}`, {
    hint: "plain LoRA is merged, and nothing else",
  });
}
