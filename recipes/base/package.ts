/**
 * A package: a plan's weights as its recipes have left them, and what its device has compiled, chosen and planned, in
 * one safetensors file.
 *
 * Each memory with weights is a tensor of the file, under the name of the first weight in it; what was joined stays one.
 * What the device has prepared are tensors of bytes. The header's metadata has a manifest (JSON): which weight is where,
 * checksums, and what all of it was made of and for.
 *
 * Every byte is checked when a package is loaded: the header by a SHA-256 in its metadata, prepared bytes by one each, and
 * weights by checksums that the GPU computes when they have arrived there, since reading 26 GB once more on the host
 * would take longer than loading them. This finds damage; it is no signature.
 */
import { createHash } from "node:crypto";
import { dirname } from "node:path";
import { z } from "zod";
import CONFIG from "../../deno.json" with { type: "json" };
import { type DType, isDType } from "../../ffi/dtype.ts";
import { writeError } from "../../ffi/files.ts";
import type { GpuDevice } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { checksums } from "../../kernels/checksum.ts";
import { gigabytes } from "./command_line.ts";
import { FluxError } from "./errors.ts";
import { type Block, blocksOf, outside, weightsOf } from "./memory_blocks.ts";
import { type Component, COMPONENTS, type Plan } from "./plan.ts";
import {
  SafetensorsError,
  SafetensorsFile,
  type TensorToWrite,
  type WriteOptions,
  writeSafetensors,
} from "./safetensors.ts";
import type { Weights } from "./weights.ts";

/** A package that cannot be used here. The message is one line: which one, and why. */
export class PackageError extends FluxError {}

/** What a package is made of and for: it serves where all of this is the same. Each has a text by what it says. */
export interface Origin {
  /** Of the device; see {@link GpuDevice.environment}. */
  readonly environment: Readonly<Record<string, string>>;
  /** Of the model's files. */
  readonly checkpoint: Readonly<Record<string, string>>;
  /** The recipes, with their options. */
  readonly recipes: Readonly<Record<string, string>>;
}

const texts = z.record(z.string(), z.string());

/** 2: rows of float8 have scales with which products are summed in f16. */
const FORMAT = 2;

const manifestSchema = z.strictObject({
  format: z.literal(FORMAT),
  /** Of this program. */
  version: z.literal(CONFIG.version),
  origin: z.strictObject({ environment: texts, checkpoint: texts, recipes: texts }),
  weights: z.record(
    z.enum(COMPONENTS),
    z.record(
      z.string(),
      z.strictObject({
        block: z.string(),
        dtype: z.custom<DType>((name) => typeof name === "string" && isDType(name)),
        shape: z.array(z.int().nonnegative()).readonly(),
        strides: z.array(z.int()).readonly(),
        offset: z.int().nonnegative(),
      }),
    ),
  ),
  /** Of each tensor with weights. */
  checksums: texts,
  /** SHA-256 of what the device has prepared, by its key, which is also the tensor's name. */
  prepared: texts,
});

/**
 * Writes a package of a plan that has run, so that its device has prepared all that a run needs. The file takes the place
 * of `path` when it is complete.
 *
 * @returns its size in bytes.
 * @throws FileError that says how much room it takes, where the disk does not take it; the signal's reason.
 */
export async function writePackage(
  path: string,
  device: GpuDevice,
  weights: Plan["weights"],
  origin: Origin,
  options: WriteOptions = {},
): Promise<number> {
  const { blocks, views } = blocksOf(weights);
  const sums = await checksums(device, blocks.map(({ memory }) => memory));
  const prepared = device.prepared();
  const tensors = [
    ...blocks.map((block) => tensorOf(device, block)),
    ...Array.from(prepared, ([name, bytes]): TensorToWrite => ({
      name,
      dtype: "u8",
      shape: [bytes.length],
      bytes,
    })),
  ];
  const manifest = JSON.stringify(
    {
      format: FORMAT,
      version: CONFIG.version,
      origin,
      weights: views,
      checksums: Object.fromEntries(blocks.map(({ name }, i) => [name, sums[i]])),
      prepared: Object.fromEntries(Array.from(prepared, ([key, bytes]) => [key, sha256(bytes)])),
    } satisfies z.input<typeof manifestSchema>,
  );
  let needed = 0;
  try {
    await Deno.mkdir(dirname(path), { recursive: true });
    const metadata = { manifest, sha256: headerDigest(manifest, tensors) };
    return await writeSafetensors(path, tensors, metadata, {
      ...options,
      onBytes: (written, total) => {
        needed = total;
        options.onBytes?.(written, total);
      },
    });
  } catch (error) {
    if (error instanceof FluxError || options.signal?.aborted) throw error;
    throw writeError(path, error, needed === 0 ? undefined : `it takes ${gigabytes(needed)} GB`);
  }
}

/** Its bytes come from the device when they are written. */
function tensorOf(device: GpuDevice, { name, memory, dtype, shape }: Block): TensorToWrite {
  const bytes = () => device.download(new Tensor(memory, "u8", [memory.byteLength]));
  return { name, dtype, shape, bytes };
}

/** A package that was made of and for what is here, open; its weights' bytes are not looked at so far. */
export class Package implements Disposable {
  readonly #file: SafetensorsFile;
  readonly #manifest: z.output<typeof manifestSchema>;

  private constructor(file: SafetensorsFile, here: Origin) {
    this.#file = file;
    this.#manifest = readManifest(file);
    for (const part of ["environment", "checkpoint", "recipes"] as const) {
      const difference = firstDifference(this.#manifest.origin[part], here[part]);
      if (difference !== undefined) throw new PackageError(`${file.path} does not fit: ${difference}`);
    }
    const { checksums, weights } = this.#manifest;
    const wrong = outside(
      weights,
      (block) => Object.hasOwn(checksums, block) && file.has(block) ? file.info(block).byteLength : undefined,
    );
    if (wrong !== undefined) {
      throw new PackageError(`${file.path} is damaged: ${wrong} is not inside of its tensor`);
    }
    const missing = Object.keys(this.#manifest.prepared).find((key) => !file.has(key));
    if (missing !== undefined) throw new PackageError(`${file.path} is damaged: ${missing} is missing`);
  }

  /**
   * Opens a package, for what is here now.
   *
   * @throws PackageError; SafetensorsError for a file that is not even of that format
   */
  static open(path: string, here: Origin): Package {
    const file = openFile(path);
    try {
      return new Package(file, here);
    } catch (error) {
      file[Symbol.dispose]();
      throw error;
    }
  }

  /** Bytes of the weights. */
  get byteLength(): number {
    return this.#blocks.reduce((sum, name) => sum + this.#file.info(name).byteLength, 0);
  }

  /**
   * Brings the weights to the device, which takes over what was prepared.
   *
   * @param onBytes called now and then with how many bytes of weights are in place so far.
   * @throws PackageError for bytes that are not those that were written; then no weight stays. Also what placing weights
   * throws.
   */
  async place(device: GpuDevice, onBytes?: (bytes: number) => void): Promise<Record<Component, Weights>> {
    const { prepared, checksums: expected, weights } = this.#manifest;
    const entries = Object.entries(prepared).map(([key, digest]) => {
      const bytes = this.#file.bytes(key).slice(); // the file is closed when some of it is used
      if (sha256(bytes) !== digest) throw this.#damaged(key);
      return [key, bytes] as const;
    });
    device.adopt(new Map(entries));
    const names = this.#blocks;
    const memories = await device.placeAll(names.map((name) => this.#file.bytes(name)), onBytes);
    const found = await checksums(device, memories);
    const damaged = names.find((name, i) => found[i] !== expected[name]);
    if (damaged !== undefined) {
      for (const memory of memories) device.free(memory);
      throw this.#damaged(damaged);
    }
    return weightsOf(weights, new Map(names.map((name, i) => [name, memories[i]])));
  }

  [Symbol.dispose](): void {
    this.#file[Symbol.dispose]();
  }

  /** Names of the tensors with weights, in the order of the file. */
  get #blocks(): string[] {
    return this.#file.names.filter((name) => Object.hasOwn(this.#manifest.checksums, name));
  }

  #damaged(tensor: string): PackageError {
    return new PackageError(`${this.#file.path} is damaged: ${tensor} is not what was written`);
  }
}

function openFile(path: string): SafetensorsFile {
  try {
    return SafetensorsFile.open(path);
  } catch (error) {
    if (!(error instanceof SafetensorsError && error.cause instanceof Deno.errors.NotFound)) throw error;
    throw new PackageError(`${path} is not there: it was not written for this model and these recipes`);
  }
}

function readManifest(file: SafetensorsFile): z.output<typeof manifestSchema> {
  const manifest = file.metadata.get("manifest");
  if (manifest === undefined) throw new PackageError(`${file.path} is no package: it has no manifest`);
  const tensors = file.names.map((name) => ({ name, ...file.info(name) }));
  if (file.metadata.get("sha256") !== headerDigest(manifest, tensors)) {
    throw new PackageError(`${file.path} is damaged: its header is not what was written`);
  }
  let parsed: unknown;
  try {
    parsed = JSON.parse(manifest);
  } catch (cause) {
    throw new PackageError(`${file.path} is damaged: its manifest is no JSON`, { cause });
  }
  const result = manifestSchema.safeParse(parsed);
  if (result.success) return result.data;
  throw new PackageError(`${file.path} is of another version of this program`, { cause: result.error });
}

/** SHA-256 of the manifest, and of name, dtype and shape of each tensor in any order. */
export function headerDigest(
  manifest: string,
  tensors: readonly Pick<TensorToWrite, "name" | "dtype" | "shape">[],
): string {
  const lines = tensors.map(({ name, dtype, shape }) => JSON.stringify([name, dtype, shape])).sort();
  return sha256(new TextEncoder().encode([manifest, ...lines].join("\n")));
}

function sha256(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

/** The first entry that the two do not share, in words. */
function firstDifference(
  made: Readonly<Record<string, string>>,
  here: Readonly<Record<string, string>>,
): string | undefined {
  const text = (value: string | undefined) => value ?? "not there";
  const key = [...Object.keys(made), ...Object.keys(here)].find((key) => made[key] !== here[key]);
  return key === undefined ? undefined : `its ${key} is ${text(made[key])}, and ${text(here[key])} here`;
}
