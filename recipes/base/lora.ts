import type { Memory } from "../../ffi/device.ts";
import { OutOfMemoryError } from "../../ffi/errors.ts";
import { type DType, isDType } from "../../ffi/dtype.ts";
import { isGpu } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { add } from "../../kernels/add.ts";
import { cast } from "../../kernels/cast.ts";
import { scaleInto } from "../../kernels/scale_into.ts";
import { type LoraChange, type LoraFile, openLora } from "./lora_file.ts";
import { type LoraTargets, loraTargets } from "./lora_names.ts";
import { depositOf } from "./deposits.ts";
import { UsageError } from "./errors.ts";
import type { Model } from "./model.ts";
import type { Component, Plan } from "./plan.ts";
import { freeAll, scaleName, type Weights } from "./weights.ts";

/** A LoRA file, and how much of it. */
export interface LoraChoice {
  /** The safetensors file. */
  readonly path: string;
  /** 1 for the change that was trained; any finite number. */
  readonly scale: number;
}

/** A weight of a part. */
interface WeightName {
  readonly component: Component;
  readonly weight: string;
}

/** One of the changes of a weight, with the factors on the device. */
interface Factors {
  /** `[r, in]` and `[out, r]`: of several ranges of rows one behind another. */
  readonly down: Tensor;
  readonly up: readonly Tensor[];
  readonly scale: number;
}

/** Ranks are filled up to multiples of this with zeros, as matrix units like them. */
const RANK_MULTIPLE = 16;

/**
 * LoRAs merged into a plan's weights: each changed weight becomes `original + sum of scale * up @ down`, rounded once, in the
 * form in which the plan's recipes keep it. Nothing is added while a picture is drawn, and addresses stay, so that
 * recorded graphs go on; what has been merged can be exchanged and removed without a trace, since originals are kept.
 *
 * Originals of weights that have been changed once stay on the device, where its memory suffices: twice the bytes of a
 * bfloat16 weight, thrice those of a float8 one. Else they are read again from the model's files each time.
 */
export class Loras {
  readonly #targets: LoraTargets;
  readonly #kept = new Map<string, Tensor>();
  /** Whether there was memory for originals so far. */
  #keeps = true;
  #busy = false;
  /** What is changed now. */
  #changed: readonly WeightName[] = [];

  /**
   * None is applied yet.
   *
   * @param plan of the model, finished: a recipe that changes its weights afterwards would not know of them.
   * @param note is told what is worth knowing.
   */
  constructor(
    private readonly model: Model,
    private readonly plan: Plan,
    private readonly note: (message: string) => void = () => {},
  ) {
    this.#targets = loraTargets(model.configs.transformer, plan.weights);
  }

  /**
   * Merges these LoRAs and no others: those that were merged before are gone. An empty list leaves the model's own weights.
   * Not while a picture is drawn, which would be drawn with some weights of each.
   *
   * @param onProgress told how many weights are done, of how many.
   * @throws ModelError for a file that is no LoRA for this model, SafetensorsError for a damaged one, and nothing has
   * changed then; OutOfMemoryError, and the model's own weights are back then as far as they can be; UsageError while another
   * call has not ended.
   */
  async merge(
    choices: readonly LoraChoice[],
    onProgress?: (event: { done: number; total: number }) => void,
  ): Promise<void> {
    this.model.checkOpen();
    if (this.#busy) throw new UsageError("LoRAs are being merged already: wait for that to end");
    this.#busy = true;
    try {
      await this.#merge(choices, onProgress);
    } finally {
      this.#busy = false;
    }
  }

  async #merge(
    choices: readonly LoraChoice[],
    onProgress?: (event: { done: number; total: number }) => void,
  ): Promise<void> {
    using stack = new DisposableStack();
    const files = choices.map(({ path }) => stack.use(openLora(path, this.#targets)));
    const changes = files.flatMap(({ changes }, i) =>
      changes.map((change) => ({ change, file: i, scale: change.scale * choices[i].scale }))
    );
    const byWeight = Map.groupBy(changes, ({ change }) => keyOf(change));
    const wanted = new Map<string, WeightName>();
    for (const { change: { component, weight } } of changes) {
      wanted.set(keyOf({ component, weight }), { component, weight });
    }
    for (const name of this.#changed) wanted.set(keyOf(name), name);
    for (const component of new Set(Array.from(wanted.values(), ({ component }) => component))) {
      if (depositOf(this.plan.weights[component]) === undefined) continue;
      throw new UsageError(
        `a LoRA changes the ${component}, which is not on the device while it is offloaded`,
        {
          hint: "leave --offload out, or take a LoRA of the transformer alone",
        },
      );
    }
    const all = this.#withMates([...wanted.values()]);
    const groups = [...Map.groupBy(all, (name) => this.#place(name).memory).values()];

    const uploaded = await upload(this.plan, files);
    try {
      if (this.#keeps) await this.#keep(all);
      let done = 0;
      onProgress?.({ done, total: all.length });
      try {
        // Before the first one changes: so that whatever happens, all of them are put back.
        this.#changed = all;
        for (const group of groups) {
          await this.#store(
            group,
            (name) =>
              (byWeight.get(keyOf(name)) ?? []).map(({ change, file, scale }) =>
                uploaded.factors(file, change, scale)
              ),
          );
          onProgress?.({ done: done += group.length, total: all.length });
        }
        this.#changed = all.filter((name) => byWeight.has(keyOf(name)));
      } catch (error) {
        for (const group of groups) await this.#store(group, () => []).catch(() => {}); // the first error is the one to tell
        throw error;
      }
      await this.plan.device.synchronize();
    } finally {
      uploaded.free();
    }
  }

  /** Stores weights of one memory anew: their originals with these changes. */
  async #store(
    group: readonly WeightName[],
    factorsOf: (name: WeightName) => readonly Factors[],
  ): Promise<void> {
    const { device } = this.plan;
    const missing = group.filter((name) => !this.#kept.has(keyOf(name)));
    const fetched = await this.#fetch(missing);
    try {
      for (const [component, names] of Map.groupBy(group, ({ component }) => component)) {
        device.scope(() => {
          const values = names.map((name): [string, Tensor] => {
            const original = this.#kept.get(keyOf(name)) ?? fetched.get(keyOf(name))!;
            return [name.weight, merged(original, factorsOf(name))];
          });
          this.plan.weights[component].assign(new Map(values));
        });
      }
      if (fetched.size > 0) await device.synchronize();
    } finally {
      for (const { memory } of fetched.values()) device.free(memory);
    }
  }

  /** Weights that a memory has beside these: with one scale for all of it they are stored together. */
  #withMates(names: readonly WeightName[]): WeightName[] {
    const found = new Map<string, WeightName>();
    for (const [component, ofPart] of Map.groupBy(names, ({ component }) => component)) {
      const weights = this.plan.weights[component];
      const shared = new Map<Memory, string[]>(); // those of quantized weights whose scale is one for several
      for (const name of weights.names) {
        if (!weights.has(scaleName(name)) || weights.get(scaleName(name)).size !== 1) continue;
        const { memory } = weights.get(name);
        shared.set(memory, [...shared.get(memory) ?? [], name]);
      }
      for (const name of ofPart) {
        const mates = shared.get(this.#place(name).memory) ?? [];
        for (const weight of [name.weight, ...mates]) {
          found.set(keyOf({ component, weight }), { component, weight });
        }
      }
    }
    return [...found.values()];
  }

  #place({ component, weight }: WeightName): Tensor {
    return this.plan.weights[component].get(weight);
  }

  /** Brings the originals that are not here yet, to stay. */
  async #keep(names: readonly WeightName[]): Promise<void> {
    try {
      const fetched = await this.#fetch(names.filter((name) => !this.#kept.has(keyOf(name))));
      for (const [key, tensor] of fetched) this.#kept.set(key, tensor);
    } catch (error) {
      if (!(error instanceof OutOfMemoryError)) throw error;
      this.#keeps = false;
      this.note(
        "there is no room on the device for the originals of merged weights: each change reads them again",
      );
    }
  }

  /** Originals as the plan's weights are rounded, by {@link keyOf}; the caller frees them. */
  async #fetch(names: readonly WeightName[]): Promise<Map<string, Tensor>> {
    const originals = new Map<string, Tensor>();
    try {
      for (const [component, ofPart] of Map.groupBy(names, ({ component }) => component)) {
        const weights = await this.model.originals(component, ofPart.map(({ weight }) => weight));
        for (const { weight } of ofPart) {
          const dtype = this.#place({ component, weight }).dtype === "f32" ? "f32" : "bf16";
          originals.set(keyOf({ component, weight }), inDType(weights, weight, dtype));
        }
      }
      return originals;
    } catch (error) {
      for (const { memory } of originals.values()) memory.device.free(memory);
      throw error;
    }
  }

  /** Gives the kept originals back. What is merged stays merged; merging again reads them again. */
  release(): void {
    for (const { memory } of this.#kept.values()) this.plan.device.free(memory);
    this.#kept.clear();
  }
}

function keyOf({ component, weight }: WeightName): string {
  return `${component}/${weight}`;
}

/** A weight of a part in a dtype; one that is cast is freed. */
function inDType(weights: Weights, name: string, dtype: DType): Tensor {
  const weight = weights.get(name);
  if (weight.dtype === dtype) return weight;
  const own = Tensor.empty(weight.device, weight.shape, dtype, "weights");
  try {
    cast(weight, dtype, own.memory);
  } catch (error) {
    weight.device.free(own.memory);
    freeAll(weights);
    throw error;
  }
  if (isGpu(weight.device)) weights.free(name);
  return own;
}

/** `original + sum of scale * up @ down`, in the original's dtype, which the factors are rounded to; the sum is in f32. */
function merged(original: Tensor, factors: readonly Factors[]): Tensor {
  if (factors.length === 0) return original;
  const { device, shape: [outFeatures, inFeatures], dtype } = original;
  return device.scope(() => {
    const ranks = factors.map(({ down }) => down.shape[0]);
    const rank = Math.ceil(ranks.reduce((a, b) => a + b) / RANK_MULTIPLE) * RANK_MULTIPLE;
    const up = Tensor.empty(device, [outFeatures, rank], dtype);
    const down = Tensor.empty(device, [rank, inFeatures], dtype);
    let start = 0;
    factors.forEach((one, i) => {
      const width = i === factors.length - 1 ? rank - start : ranks[i]; // the last one fills up with zeros
      scaleInto(down.narrow(0, start, width), one.down, 1);
      let row = 0;
      for (const part of one.up) {
        scaleInto(up.narrow(0, row, part.shape[0]).narrow(1, start, width), part, one.scale);
        row += part.shape[0];
      }
      start += width;
    });
    const change = Tensor.empty(device, [outFeatures, inFeatures], "f32");
    device.matmul({ a: up, b: down.permute([1, 0]), out: change });
    return add(original, change);
  });
}

/** Brings the factors of all files to the device. */
async function upload({ device }: Plan, files: readonly LoraFile[]) {
  const names = files.flatMap(({ file, changes }, i) =>
    [...new Set(changes.flatMap(({ down, up }) => [down, up]))].map((name) => ({ file, name, i }))
  );
  const memories = await device.placeAll(names.map(({ file, name }) => file.bytes(name)));
  const tensors = new Map(names.map(({ file, name, i }, at) => {
    const { dtype, shape } = file.info(name);
    if (!isDType(dtype)) throw new TypeError(dtype); // openLora has looked
    return [`${i} ${name}`, new Tensor(memories[at], dtype, shape.slice(0, 2))] as const;
  }));
  return {
    factors: (file: number, { down, up, rows }: LoraChange, scale: number): Factors => {
      const whole = tensors.get(`${file} ${up}`)!;
      return {
        down: tensors.get(`${file} ${down}`)!,
        up: rows?.map(([first, count]) => whole.narrow(0, first, count)) ?? [whole],
        scale,
      };
    },
    free: () => {
      for (const memory of memories) device.free(memory);
    },
  };
}
