/**
 * A model folder in diffusers' layout: `model_index.json`, and for each component a folder with a config and weights,
 * in one safetensors file or in shards that an index lists. Nothing outside the model folder is ever opened, whatever
 * an index or a symbolic link says.
 */
import { basename, dirname, join, sep } from "node:path";
import { z } from "zod";
import { CheckpointError, ComponentWeights, type WeightPlace, WRONG_MODEL } from "./component_weights.ts";
import { FluxError, ModelError } from "./errors.ts";
import { printable, SafetensorsFile } from "./safetensors.ts";

/** The folder must hold a model, so it has to be a folder with a certain entry: says what it is otherwise. */
export function resolveModelFolder(path: string, mark = "model_index.json"): string {
  let folder: string;
  try {
    folder = Deno.realPathSync(path);
  } catch (cause) {
    throw new ModelError(`${path}: there is no such model folder (${reasonOf(cause)})`, {
      cause,
      hint: "give a folder in diffusers' layout, one with a model_index.json",
    });
  }
  if (!Deno.statSync(folder).isDirectory) {
    throw new ModelError(`${path} is a file, not a model folder`, {
      hint: path.endsWith(".safetensors")
        ? "a transformer in one file is given to --transformer, an autoencoder to --vae, a LoRA to --lora; --ckpt is the " +
          "model with text encoders and tokenizers, a folder or an id such as black-forest-labs/FLUX.1-dev"
        : "give the folder that has model_index.json, not a file in it",
    });
  }
  const entries = listNames(folder);
  if (entries.includes(mark)) return folder;
  if (entries.length === 0) {
    throw new ModelError(`${path} is empty: no model in it`, {
      hint: "was the download interrupted? Start it again",
    });
  }
  throw new ModelError(`${path} has no ${mark}; it has ${summary(entries)}`, {
    hint: `give the folder in diffusers' layout that has ${mark} beside tokenizer/, text_encoder_2/, ...`,
  });
}

/**
 * The text of `<folder>/<file>`, UTF-8, without a byte order mark.
 *
 * @param file path inside the folder, e.g. "tokenizer/merges.txt"
 * @throws {ModelError} when it is missing, lies outside the model folder, or is no regular file or not UTF-8
 */
export function readText(folder: string, file: string): string {
  const path = insideModelFolder(folder, file);
  const refuse = (reason: string, cause?: unknown) =>
    new ModelError(`${path} cannot be read: ${reason}`, {
      cause,
      hint: "is the model folder complete? Download it again",
    });
  try {
    // Reading from a pipe would wait for its writer for ever.
    if (!Deno.statSync(path).isFile) throw refuse("it is no regular file");
    return new TextDecoder("utf-8", { fatal: true }).decode(Deno.readFileSync(path));
  } catch (cause) {
    if (cause instanceof ModelError) throw cause;
    throw refuse(cause instanceof TypeError ? "it is no UTF-8 text" : reasonOf(cause), cause);
  }
}

/**
 * Reads `<folder>/<file>` and checks it.
 *
 * @param file path inside the folder, e.g. "transformer/config.json"
 * @throws {ModelError} that names the file, and the fields that do not fit the schema
 */
export function readJson<S extends z.ZodType>(folder: string, file: string, schema: S): z.output<S> {
  const path = join(folder, file);
  const text = readText(folder, file);
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch { // not its cause: V8's message quotes the file
    throw new ModelError(`${path} is not valid JSON`, { hint: "the file is damaged: download it again" });
  }
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const { issues } = result.error;
  const problems = issues.slice(0, SHOWN_FIELDS).map((issue) =>
    `${issue.path.map(fieldName).join(".") || "the file"}: ${issue.message}`
  );
  const rest = issues.length > SHOWN_FIELDS ? `; and ${issues.length - SHOWN_FIELDS} more` : "";
  throw new ModelError(`${path}: ${problems.join("; ")}${rest}`, {
    cause: result.error,
    hint: "is this a FLUX.1 model? Its files must have these fields",
  });
}

/** A damaged vocabulary has one problem in each of its entries. */
const SHOWN_FIELDS = 20;

/** A key of a JSON file for messages. */
function fieldName(key: PropertyKey): string {
  const name = String(key);
  return /^\w{1,100}$/.test(name) ? name : printable(name);
}

/**
 * Names of the files in `<folder>/<component>`, sorted.
 *
 * @throws {ModelError} when there is no such folder, or it lies outside the model folder
 */
export function listComponent(folder: string, component: string): string[] {
  try {
    return listNames(insideModelFolder(folder, component));
  } catch (cause) {
    if (cause instanceof ModelError) throw cause;
    throw new ModelError(`${join(folder, component)} cannot be opened: ${reasonOf(cause)}`, {
      cause,
      hint: "is the model folder complete? Download it again",
    });
  }
}

/** The most layers that a config may ask for, far above any model's: a damaged number must not fill the memory. */
export const MAX_LAYERS = 1000;

/** The names that diffusers and transformers give to a component's weights. */
export const WEIGHT_BASES = ["diffusion_pytorch_model", "model"] as const;
export type WeightsBaseName = (typeof WEIGHT_BASES)[number];

/** An index of shards. z.custom leaves the map as it is: rebuilding it would drop a key named "__proto__". */
const INDEX = z.looseObject({
  weight_map: z.custom<Readonly<Record<string, string>>>(
    (value) =>
      typeof value === "object" && value !== null && !Array.isArray(value) &&
      Object.values(value).every((shard) => typeof shard === "string"),
    "expected an object from weight names to shard names",
  ),
});

/**
 * Opens the weights of a component: `<base>.safetensors`, else the shards of `<base>.safetensors.index.json`.
 *
 * @param modelFolder the model's folder; the component's folder is in it
 * @param component e.g. "transformer", "text_encoder_2"
 * @param options.baseName which file name to look for; without it both are tried
 * @throws {CheckpointError} listing every missing shard, or every weight that is not where the index says
 * @throws {ModelError} when there are no weights that can be read, or a path leaves the model folder
 * @throws {SafetensorsError} for a file that breaks the format's rules
 */
export function openComponent(
  modelFolder: string,
  component: string,
  options: { readonly baseName?: WeightsBaseName } = {},
): ComponentWeights {
  const folder = join(modelFolder, component);
  if (!isPlainName(component)) {
    throw new ModelError(`${printable(component)} is no name of a folder in ${modelFolder}`, {
      hint: "the model_index.json or the call names a component by a path: use a plain folder name",
    });
  }
  const entries = listComponent(modelFolder, component);
  const baseNames: readonly WeightsBaseName[] = options.baseName ? [options.baseName] : WEIGHT_BASES;
  for (const base of baseNames) {
    const single = `${base}.safetensors`;
    if (entries.includes(single)) {
      const file = SafetensorsFile.open(insideModelFolder(modelFolder, join(component, single)));
      return new ComponentWeights(
        folder,
        [file],
        new Map(file.names.map((name) => [name, { file, tensor: name }])),
      );
    }
    if (entries.includes(`${single}.index.json`)) {
      return openShards(modelFolder, component, `${single}.index.json`);
    }
  }
  throw noWeights(folder, entries, baseNames);
}

function openShards(modelFolder: string, component: string, index: string): ComponentWeights {
  const folder = join(modelFolder, component);
  const { weight_map: weightMap } = readJson(modelFolder, join(component, index), INDEX);
  const wanted = Object.entries(weightMap);
  const shardNames = [...new Set(wanted.map(([, shard]) => shard))].sort();
  if (shardNames.length === 0) {
    throw new CheckpointError(folder, `${index} lists no weights`, [], WRONG_MODEL);
  }

  const entries = listComponent(modelFolder, component);
  const unsafe = shardNames.filter((shard) => !isPlainName(shard) || !shard.endsWith(".safetensors"));
  if (unsafe.length > 0) {
    const hint = "do not use this model: an index has to name files of its own folder, with plain names";
    throw new CheckpointError(
      folder,
      `${index} names shards that it may not name`,
      unsafe.map(printable),
      hint,
    );
  }
  const absent = shardNames.filter((shard) => !entries.includes(shard));
  if (absent.length > 0) {
    const what = `${absent.length} of ${shardNames.length} shards are missing`;
    throw new CheckpointError(folder, what, absent, "the download is not complete: start it again");
  }

  const shards = new Map<string, SafetensorsFile>();
  try {
    for (const shard of shardNames) {
      shards.set(shard, SafetensorsFile.open(insideModelFolder(modelFolder, join(component, shard))));
    }
    const places = new Map<string, WeightPlace>();
    const misplaced: string[] = [];
    for (const [name, shard] of wanted) {
      const file = shards.get(shard)!; // one entry for every name in the index
      if (file.has(name)) places.set(name, { file, tensor: name });
      else misplaced.push(`${printable(name)} is not in ${shard}`);
    }
    if (misplaced.length > 0) {
      throw new CheckpointError(folder, `${index} does not fit the shards`, misplaced, WRONG_MODEL);
    }
    return new ComponentWeights(folder, [...shards.values()], places);
  } catch (error) {
    for (const file of shards.values()) file[Symbol.dispose]();
    throw error;
  }
}

/** Says why a component's folder has nothing to open. */
function noWeights(folder: string, entries: readonly string[], baseNames: readonly string[]): ModelError {
  const wanted = baseNames.map((base) => `${base}.safetensors`).join(" or ");
  const pickles = entries.filter((name) => /\.(bin|pt|pth|ckpt|pkl|msgpack)$/.test(name));
  const safetensors = entries.some((name) => name.endsWith(".safetensors"));
  if (pickles.length > 0 && !safetensors) {
    return new ModelError(
      `${folder} has its weights only in ${pickles.join(", ")}: pickle files are not read`,
      {
        hint:
          "a pickle is a program that runs when it is loaded, and needs Python: get the safetensors files " +
          "of the model, or convert it with save_pretrained(..., safe_serialization=True)",
      },
    );
  }
  return new ModelError(`${folder} has no ${wanted} and no index of shards; it has ${summary(entries)}`, {
    hint: "the download is not complete, or a file has another name: rename it, or download the model again",
  });
}

/**
 * The path `<folder>/<file>`, if after every symbolic link it lies in the model folder. Hugging Face's cache is the
 * one exception: there `models--<name>/snapshots/<revision>/` holds links into
 * `models--<name>/blobs/`, so links may go anywhere inside that `models--` folder.
 *
 * @throws {ModelError} when the file does not exist or lies elsewhere
 */
function insideModelFolder(folder: string, file: string): string {
  let root: string;
  let real: string;
  try {
    root = cacheRoot(Deno.realPathSync(folder));
    real = Deno.realPathSync(join(folder, file));
  } catch (cause) {
    throw new ModelError(`${join(folder, file)} cannot be opened: ${reasonOf(cause)}`, {
      cause,
      hint: "is the model folder complete? Download it again",
    });
  }
  if (!real.startsWith(root.endsWith(sep) ? root : root + sep)) {
    throw new ModelError(`${join(folder, file)} leads out of the model folder, to ${real}`, {
      hint: "nothing outside the model folder is read: put the file itself there, not a link",
    });
  }
  return join(folder, file); // not the real path: in a cache that is a hash, which tells a reader of errors nothing
}

/** The repository folder of Hugging Face's cache if `folder` is a snapshot in one, else `folder`. */
function cacheRoot(folder: string): string {
  const snapshots = dirname(folder);
  const repository = dirname(snapshots);
  const isSnapshot = basename(snapshots) === "snapshots" && basename(repository).startsWith("models--");
  return isSnapshot ? repository : folder;
}

/** Whether a name is that of an entry of a folder: no separators, no "..", nothing that a terminal would act on. */
export function isPlainName(name: string): boolean {
  return /^[\w.+-]+$/.test(name) && name !== "." && name !== "..";
}

function listNames(folder: string): string[] {
  return Array.from(Deno.readDirSync(folder), (entry) => entry.name).sort();
}

/** A few names for a message. */
function summary(names: readonly string[]): string {
  if (names.length === 0) return "nothing in it";
  const shown = names.slice(0, 8).map(printable).join(", ");
  return names.length > 8 ? `${shown} and ${names.length - 8} more` : shown;
}

/** A short reason for a failed system call, in words that do not repeat the path. */
function reasonOf(error: unknown): string {
  if (error instanceof Deno.errors.NotFound) return "it does not exist";
  if (error instanceof Deno.errors.PermissionDenied) return "this user may not read it";
  if (error instanceof Deno.errors.NotCapable) return "Deno may not read it (--allow-read)";
  if (error instanceof FluxError || error instanceof Error) return error.message;
  return String(error);
}
