import { type Component, COMPONENTS } from "./plan.ts";
import { isPlainName, WEIGHT_BASES } from "./checkpoint.ts";
import { ModelError } from "./errors.ts";

/** Files of a repository or of a folder, by their paths in it. */
export interface FileList {
  readonly has: (path: string) => boolean;
}

/** Read where they are there, and not missed where not: so they come first, and are there when the others are. */
const OPTIONAL = [
  "tokenizer/tokenizer_config.json",
  "tokenizer/special_tokens_map.json",
  "tokenizer_2/tokenizer_config.json",
  "tokenizer_2/special_tokens_map.json",
];
/** Of each line one is needed, the first that is there. */
const NEEDED: readonly (readonly (readonly string[])[])[] = [
  [["tokenizer/vocab.json", "tokenizer/merges.txt"], ["tokenizer/tokenizer.json"]],
  [["tokenizer_2/tokenizer.json"]],
  [["scheduler/scheduler_config.json"]],
];

/** Which parts of a model are wanted. */
export interface Wanted {
  /** Parts whose configs are read. */
  readonly configs: readonly Component[];
  /** Parts whose weights are read. */
  readonly weights: readonly Component[];
}

export const WHOLE_MODEL: Wanted = { configs: COMPONENTS, weights: COMPONENTS };

/**
 * The files beside the weights that this program reads of a model in diffusers' layout; those of indexes of shards are among
 * them. `missing` are those that the repository does not have.
 */
export function smallFiles(
  list: FileList,
  { configs, weights }: Wanted,
): { files: string[]; missing: string[] } {
  const sets = [
    ...NEEDED,
    ...configs.map((component) => [[`${component}/config.json`]]),
    [["model_index.json"]],
  ].map((choices) => choices.find((set) => set.every(list.has)) ?? choices[0]);
  const indexes = weights.map((component) => weightsIn(component, list)).flatMap((found) =>
    found?.index === undefined ? [] : [found.index]
  );
  const needed = sets.flat();
  return {
    files: [...OPTIONAL.filter(list.has), ...indexes, ...needed.filter(list.has)],
    missing: needed.filter((path) => !list.has(path)),
  };
}

/** A part's weights, in one file or in the shards of an index; undefined where there are none as safetensors. */
function weightsIn(
  component: Component,
  { has }: FileList,
): { readonly single?: string; readonly index?: string } | undefined {
  for (const base of WEIGHT_BASES) {
    const single = `${component}/${base}.safetensors`;
    if (has(single)) return { single };
    if (has(`${single}.index.json`)) return { index: `${single}.index.json` };
  }
  return undefined;
}

/**
 * The files with the weights of the wanted parts.
 *
 * @param readIndex the text of an index. @throws ModelError for an index that is none, or names other files than shards.
 */
export function weightFiles(
  list: FileList,
  { weights }: Wanted,
  readIndex: (path: string) => string,
): { files: string[]; missing: string[] } {
  const paths = weights.flatMap((component) => {
    const found = weightsIn(component, list);
    if (found === undefined) return [`${component}/${WEIGHT_BASES[0]}.safetensors`];
    if (found.single !== undefined) return [found.single];
    return shardsOf(found.index!, readIndex(found.index!)).map((shard) => `${component}/${shard}`);
  });
  return { files: paths.filter(list.has), missing: paths.filter((path) => !list.has(path)) };
}

function shardsOf(path: string, text: string): string[] {
  let shards: unknown[];
  try {
    shards = [...new Set(Object.values(JSON.parse(text).weight_map as object))];
  } catch {
    throw new ModelError(`${path} is no index of shards`, {
      hint: "the file is damaged: remove it and start again",
    });
  }
  const isShard = (name: unknown): name is string =>
    typeof name === "string" && isPlainName(name) && name.endsWith(".safetensors");
  if (!shards.every(isShard)) {
    throw new ModelError(`${path} names shards that it may not name`, {
      hint: "do not use this model: an index has to name files of its own folder, with plain names",
    });
  }
  return shards.sort();
}
