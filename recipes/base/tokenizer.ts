/**
 * From a prompt to token ids, as FluxPipeline calls transformers' CLIPTokenizer and T5TokenizerFast:
 * `tokenizer(prompt, padding="max_length", max_length=..., truncation=True)` (diffusers `pipeline_flux.py`).
 *
 * Both go through @huggingface/tokenizers, given the pipelines that transformers 5 builds in
 * `tokenization_clip.py` and `tokenization_t5.py`. Where that library approximates what the Rust tokenizers do,
 * this file does it itself:
 * - JavaScript's `\s` and `toLowerCase` differ from Rust's (U+FEFF, U+0085, a final sigma): `\p{White_Space}`, and
 *   lower case character by character;
 * - SentencePiece's normalization is read from the model's table (charsmap.ts) instead of being taken for NFKC;
 * - Unigram fuses unknown characters within a word only, and treats a literal "<unk>" as any other piece;
 * - special tokens are looked for in the text once, and not again in what normalization makes of it ("＜/s＞").
 *
 * Left over: the Unicode version. Deno knows Unicode 17 and the Rust tokenizers less, so CLIP's ids can differ for the
 * 28 letters that got a lower case since, and for newer combining marks in an unusual order.
 */

import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import { z } from "zod";
import { Charsmap } from "./charsmap.ts";
import { listComponent, readJson, readText } from "./checkpoint.ts";
import { ModelError, UsageError } from "./errors.ts";
import { printable } from "./safetensors.ts";

/** One tokenized prompt. */
export interface Encoding {
  /** int32 [maxLength]: special tokens and text, then padding. */
  ids: Int32Array<ArrayBuffer>;
  /** How many of `ids` stand before the padding. */
  length: number;
  /** The text that did not fit, decoded from its tokens (so lower case for CLIP); undefined if all of it fitted. */
  truncated: string | undefined;
}

/** Ids of the tokens with a meaning of their own. T5 has no beginning token. */
export interface SpecialIds {
  /** Beginning of text. */
  bos: number | undefined;
  /** End of text. */
  eos: number;
  /** What fills up. */
  pad: number;
  /** What is not in the vocabulary. */
  unk: number;
}

/** A tokenizer as the pipeline sees it. */
export interface TextTokenizer {
  /** tokenizer_config.json's `model_max_length`: 77 for CLIP, 512 for T5. */
  readonly modelMaxLength: number;
  /** Ids of its special tokens. */
  readonly special: SpecialIds;
  /** The largest id that it gives: the text encoder's table of embeddings must have a row for it. */
  readonly maxId: number;
  /**
   * Ids of one prompt, cut and padded to `maxLength` (default `modelMaxLength`). Lone surrogates count as U+FFFD.
   * @throws UsageError if `maxLength` leaves no room for the special tokens.
   */
  encode(text: string, maxLength?: number): Encoding;
}

/**
 * CLIP's byte-level BPE from a folder with `vocab.json` and `merges.txt` (FLUX's `tokenizer/`), or else the same
 * two out of a `tokenizer.json`; special tokens from `tokenizer_config.json` or `special_tokens_map.json`.
 * @param folder the tokenizer's, inside the model's folder, out of which nothing is read.
 * @throws ModelError naming the file that is missing, unreadable or wrong.
 */
export function loadClipTokenizer(modelFolder: string, folder: string): TextTokenizer {
  const config = readConfig(modelFolder, folder);
  const { vocab, merges } = readBpe(modelFolder, folder);
  const where = join(modelFolder, folder);

  const special = config.special;
  const idOf = (content: string) => {
    const id = config.added.find((token) => token.content === content)?.id ?? vocab[content];
    if (id === undefined) {
      throw new ModelError(
        `${where}: the special token ${printable(content)} is missing; get the tokenizer folder again`,
      );
    }
    return id;
  };
  const names = {
    bos: special.bos_token?.content ?? "<|startoftext|>",
    eos: special.eos_token?.content ?? "<|endoftext|>",
    pad: special.pad_token?.content ?? "<|endoftext|>",
    unk: special.unk_token?.content ?? "<|endoftext|>",
  };
  const added = [...config.added];
  for (const content of new Set(Object.values(names))) {
    if (added.some((token) => token.content === content)) continue;
    const normalized = Object.values(special).find((token) => token?.content === content)?.normalized;
    added.push({ ...PLAIN_TOKEN, content, id: idOf(content), normalized: normalized ?? false });
  }

  const tokenizer = new Tokenizer({
    added_tokens: added,
    normalizer: null,
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        split(
          String
            .raw`<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+`,
        ),
        // ByteLevel's own regular expression, less its branches for spaces, which no longer occur here.
        split(String.raw`'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+`),
        { type: "ByteLevel", add_prefix_space: false, use_regex: false },
      ],
    },
    model: {
      type: "BPE",
      vocab,
      merges,
      unk_token: names.unk,
      continuing_subword_prefix: "",
      end_of_word_suffix: "</w>",
      fuse_unk: false,
    },
    post_processor: null,
    decoder: { type: "ByteLevel" },
  }, {});
  return makeTokenizer({
    tokenizer,
    added,
    normalize: (text) => lowerCase(text.normalize("NFC").replace(/\p{White_Space}+/gu, " ")),
    special: { bos: idOf(names.bos), eos: idOf(names.eos), pad: idOf(names.pad), unk: idOf(names.unk) },
    modelMaxLength: config.modelMaxLength ?? 77,
    // transformers never cleans up spaces after BPE, whatever the config says.
    decode: (ids) =>
      tokenizer.decode(ids, { clean_up_tokenization_spaces: false })
        .replace(/^\p{White_Space}+|\p{White_Space}+$/gu, ""), // trim() would take U+FEFF along
  });
}

/**
 * T5's Unigram from a folder with `tokenizer.json` (FLUX's `tokenizer_2/`). Of its pipeline only vocabulary, added
 * tokens and character table are used, as by transformers 5, which splits at white space and starts every piece of
 * text with "▁" (older releases ran the file's own pipeline, which differs after special tokens in the text).
 * @param folder the tokenizer's, inside the model's folder, out of which nothing is read.
 * @throws ModelError naming the file that is missing, unreadable or wrong.
 */
export function loadT5Tokenizer(modelFolder: string, folder: string): TextTokenizer {
  const config = readConfig(modelFolder, folder);
  const where = join(modelFolder, folder, "tokenizer.json");
  const file = readJson(modelFolder, join(folder, "tokenizer.json"), unigramFileSchema);
  const { vocab, unk_id } = file.model;
  if (unk_id >= vocab.length) {
    throw new ModelError(`${where}: unk_id ${unk_id} is outside the vocabulary; get the file again`);
  }
  const ids = new Map(vocab.map(([piece], id) => [piece, id]));
  const added = [...file.added_tokens];
  for (const token of config.added) {
    if (!added.some(({ content }) => content === token.content)) added.push(token);
  }
  const idOf = (content: string) => {
    const id = added.find((token) => token.content === content)?.id ?? ids.get(content);
    if (id === undefined) {
      throw new ModelError(
        `${where}: the special token ${printable(content)} is missing; get the file again`,
      );
    }
    return id;
  };

  const tokenizer = new Tokenizer({
    added_tokens: added,
    normalizer: null,
    pre_tokenizer: {
      type: "Sequence",
      pretokenizers: [
        { type: "Split", pattern: { Regex: String.raw`\s+` }, behavior: "Removed", invert: false },
        { type: "Metaspace", replacement: "▁", prepend_scheme: "always", split: true },
        // The library ignores Metaspace's `split`, which begins a new piece at every "▁".
        split("▁?[^▁]+|▁"),
      ],
    },
    model: { type: "Unigram", vocab, unk_id },
    post_processor: null,
    decoder: { type: "Metaspace", replacement: "▁", prepend_scheme: "always" },
  }, {});
  const table = findCharsmap(file.normalizer);
  const charsmap = table === undefined ? undefined : new Charsmap(table, where);
  const model = tokenizer.model!;
  const encodeWord = unigram(vocab, vocab[unk_id][0]);
  model.fuse_unk = false;
  model.encode = (words) => words.flatMap(encodeWord);

  return makeTokenizer({
    tokenizer,
    added,
    normalize: (text) => charsmap?.normalize(text) ?? text,
    special: {
      bos: undefined,
      eos: idOf(config.special.eos_token?.content ?? "</s>"),
      pad: idOf(config.special.pad_token?.content ?? "<pad>"),
      unk: unk_id,
    },
    modelMaxLength: config.modelMaxLength ?? 512,
    decode: (ids) => tokenizer.decode(ids, { clean_up_tokenization_spaces: config.cleanUp }),
  });
}

/** The parts that differ between CLIP and T5. */
interface Parts {
  /** For its pre-tokenizer and model; the steps around them are below. */
  tokenizer: Tokenizer;
  added: AddedToken[];
  normalize: (text: string) => string;
  special: SpecialIds;
  modelMaxLength: number;
  decode: (ids: number[]) => string;
}

/** Truncation, special tokens and padding, in the order of the Rust tokenizers. */
function makeTokenizer(parts: Parts): TextTokenizer {
  const { special, modelMaxLength, decode } = parts;
  const tokenize = textTokenizer(parts);
  const before = special.bos === undefined ? [] : [special.bos];
  const specials = before.length + 1;
  return {
    modelMaxLength,
    special,
    maxId: [...parts.tokenizer.model!.tokens_to_ids.values()].reduce((a, b) => Math.max(a, b)), // with added tokens
    encode(text, maxLength = modelMaxLength) {
      if (!Number.isSafeInteger(maxLength) || maxLength < specials) {
        throw new UsageError(
          `maximum sequence length ${maxLength}: give a whole number of ${specials} or more`,
        );
      }
      const content = tokenize(text.toWellFormed());
      const room = maxLength - specials;
      const kept = content.slice(0, room);
      const ids = new Int32Array(maxLength).fill(special.pad);
      ids.set([...before, ...kept, special.eos]);
      return {
        ids,
        length: kept.length + specials,
        truncated: content.length > room ? decode(content.slice(room)) : undefined,
      };
    },
  };
}

/**
 * Ids of a text without truncation or the special tokens around it: added tokens are cut out first from the text as
 * it is, then, those marked `normalized`, from the normalized rest; what remains goes through the model.
 */
function textTokenizer({ tokenizer, added, normalize, special }: Parts): (text: string) => number[] {
  const { pre_tokenizer: preTokenizer, model } = tokenizer;
  if (preTokenizer === null || model === null) {
    throw new TypeError("tokenizer without pre-tokenizer or model");
  }
  const splitRaw = splitter(added.filter((token) => !token.normalized));
  const splitNormalized = splitter(
    added.filter((token) => token.normalized).map((token) => ({
      ...token,
      content: normalize(token.content),
    })),
  );
  const pieceId = (piece: string) => model.tokens_to_ids.get(piece) ?? special.unk;
  return (text) =>
    splitRaw(text).flatMap((section) =>
      typeof section === "number"
        ? [section]
        : splitNormalized(normalize(section)).flatMap((part) =>
          typeof part === "number" ? [part] : model._call(preTokenizer.pre_tokenize(part)).map(pieceId)
        )
    );
}

/** Cuts a text at the given tokens, the leftmost and there the longest first, into text and token ids. */
function splitter(tokens: AddedToken[]): (text: string) => (string | number)[] {
  if (tokens.length === 0) return (text) => [text];
  const ids = new Map(tokens.map(({ content, id }) => [content, id]));
  const contents = [...ids.keys()].sort((a, b) => b.length - a.length);
  const pattern = new RegExp(`(${contents.map((content) => RegExp.escape(content)).join("|")})`, "u");
  return (text) =>
    text.split(pattern) // with a captured separator the odd parts are the tokens
      .map((part, i) => i % 2 === 1 ? ids.get(part)! : part)
      .filter((part) => part !== "");
}

/** A pre-tokenizer that keeps the matches of a regular expression. */
function split(regex: string) {
  return { type: "Split", pattern: { Regex: regex }, behavior: "Removed", invert: true };
}

/** Lower case of each character alone: JavaScript's own looks around for a final sigma, Rust's does not. */
function lowerCase(text: string): string {
  return text.replace(/Σ/g, "σ").toLowerCase();
}

/**
 * Unigram segmentation (Kudo 2018): the pieces of a word with the highest sum of scores, as in the Rust tokenizers'
 * `Unigram::encode_optimized`. Between equal sums the earlier-found, longer last piece wins. A character that is no
 * piece is unknown, at a score 10 below the lowest; neighbouring unknown characters become one piece.
 */
function unigram(vocab: [piece: string, score: number][], unk: string): (word: string) => string[] {
  const scores = new Map(vocab);
  let lowest = Infinity;
  let longest = 0;
  for (const [piece, score] of vocab) {
    lowest = Math.min(lowest, score);
    longest = Math.max(longest, piece.length);
  }
  const unknownScore = lowest - 10;

  return (word) => {
    const bestScore = new Float64Array(word.length + 1);
    const bestStart = new Int32Array(word.length + 1).fill(-1);
    const bestIsUnknown = new Uint8Array(word.length + 1);
    const offer = (start: number, end: number, score: number, isUnknown: boolean) => {
      const sum = score + bestScore[start];
      if (bestStart[end] !== -1 && sum <= bestScore[end]) return;
      bestScore[end] = sum;
      bestStart[end] = start;
      bestIsUnknown[end] = isUnknown ? 1 : 0;
    };
    let next: number;
    for (let start = 0; start < word.length; start = next) {
      next = start + (word.codePointAt(start)! > 0xffff ? 2 : 1);
      for (let end = next; end <= Math.min(start + longest, word.length); end++) {
        const piece = word.slice(start, end);
        const score = scores.get(piece);
        if (score !== undefined) offer(start, end, score, piece === unk);
        else if (end === next) offer(start, end, unknownScore, true);
      }
    }
    const pieces: string[] = [];
    let unknownEnd = -1; // end of a run of unknown characters, walking backwards
    for (let end = word.length; end > 0; end = bestStart[end]) {
      const start = bestStart[end];
      if (bestIsUnknown[end] === 1) {
        if (unknownEnd === -1) unknownEnd = end;
        if (start === 0) pieces.push(word.slice(0, unknownEnd));
      } else {
        if (unknownEnd !== -1) pieces.push(word.slice(end, unknownEnd));
        unknownEnd = -1;
        pieces.push(word.slice(start, end));
      }
    }
    return pieces.reverse();
  };
}

// Files

const onlyFalse = z.literal(false, { error: "only false is supported" }).default(false);

const addedTokenSchema = z.object({
  id: z.int().nonnegative(),
  content: z.string().min(1),
  // No FLUX tokenizer trims around its added tokens.
  lstrip: onlyFalse,
  rstrip: onlyFalse,
  single_word: onlyFalse,
  normalized: z.boolean().default(false),
  special: z.boolean().default(false),
});
type AddedToken = z.infer<typeof addedTokenSchema>;

const PLAIN_TOKEN = {
  lstrip: false,
  rstrip: false,
  single_word: false,
  normalized: false,
  special: true,
} as const;

/** A special token is a string or an object around it; null where there is none. */
const namedTokenSchema = z.union([
  z.string().transform((content) => ({ content, normalized: false })),
  z.object({ content: z.string(), normalized: z.boolean().default(false) }),
]).nullish().transform((token) => token ?? undefined);

const specialTokensSchema = z.object({
  bos_token: namedTokenSchema,
  eos_token: namedTokenSchema,
  pad_token: namedTokenSchema,
  unk_token: namedTokenSchema,
});

const configSchema = specialTokensSchema.extend({
  added_tokens_decoder: z.record(z.string().regex(/^\d+$/), addedTokenSchema.omit({ id: true })).default({}),
  // transformers writes 1e30 for "no limit".
  model_max_length: z.number().min(2).nullish(),
  clean_up_tokenization_spaces: z.boolean().nullish(),
});

const vocabSchema = z.record(z.string(), z.int().nonnegative());

const bpeFileSchema = z.object({
  model: z.object({
    type: z.literal("BPE"),
    vocab: vocabSchema,
    merges: z.array(z.union([z.string(), z.tuple([z.string(), z.string()])])),
  }),
});

const unigramFileSchema = z.object({
  added_tokens: z.array(addedTokenSchema).default([]),
  normalizer: z.unknown(),
  model: z.object({
    type: z.literal("Unigram"),
    unk_id: z.int().nonnegative(),
    vocab: z.array(z.tuple([z.string(), z.number()])).min(1),
    byte_fallback: onlyFalse,
  }),
});

const precompiledSchema = z.object({ type: z.literal("Precompiled"), precompiled_charsmap: z.string() });
const sequenceSchema = z.object({ type: z.literal("Sequence"), normalizers: z.array(z.unknown()) });

/** The first `precompiled_charsmap` among a tokenizer.json's normalizers. */
function findCharsmap(normalizer: unknown): string | undefined {
  const sequence = sequenceSchema.safeParse(normalizer);
  for (const one of sequence.success ? sequence.data.normalizers : [normalizer]) {
    const precompiled = precompiledSchema.safeParse(one);
    if (precompiled.success) return precompiled.data.precompiled_charsmap;
  }
  return undefined;
}

interface Config {
  special: z.infer<typeof specialTokensSchema>;
  added: AddedToken[];
  modelMaxLength: number | undefined;
  cleanUp: boolean;
}

/** The schema's own defaults, where there is no such file. */
function readOptional<S extends z.ZodType>(
  modelFolder: string,
  folder: string,
  file: string,
  schema: S,
): z.output<S> {
  return listComponent(modelFolder, folder).includes(file)
    ? readJson(modelFolder, join(folder, file), schema)
    : schema.parse({});
}

/** tokenizer_config.json, with special_tokens_map.json for what it does not say. Both may be missing. */
function readConfig(modelFolder: string, folder: string): Config {
  const config = readOptional(modelFolder, folder, "tokenizer_config.json", configSchema);
  const map = readOptional(modelFolder, folder, "special_tokens_map.json", specialTokensSchema);
  const limit = config.model_max_length;
  return {
    special: {
      // The map's objects say whether the token is normalized; the config mostly has bare strings.
      bos_token: map.bos_token ?? config.bos_token,
      eos_token: map.eos_token ?? config.eos_token,
      pad_token: map.pad_token ?? config.pad_token,
      unk_token: map.unk_token ?? config.unk_token,
    },
    added: Object.entries(config.added_tokens_decoder).map(([id, token]) => ({ ...token, id: Number(id) })),
    modelMaxLength: limit != null && Number.isSafeInteger(limit) ? limit : undefined,
    cleanUp: config.clean_up_tokenization_spaces ?? false,
  };
}

interface Bpe {
  vocab: Record<string, number>;
  merges: [string, string][];
}

function readBpe(modelFolder: string, folder: string): Bpe {
  const names = listComponent(modelFolder, folder);
  const file = (name: string) => join(folder, name);
  if (!names.includes("vocab.json") && names.includes("tokenizer.json")) {
    const { vocab, merges } = readJson(modelFolder, file("tokenizer.json"), bpeFileSchema).model;
    const pairs = merges.map((merge) => typeof merge === "string" ? merge.split(" ") : merge);
    return { vocab, merges: checkMerges(pairs, vocab, join(modelFolder, file("tokenizer.json"))) };
  }
  const vocab = readJson(modelFolder, file("vocab.json"), vocabSchema);
  // Only the version line is a comment: "# #</w>" is a merge.
  const lines = readText(modelFolder, file("merges.txt")).split(/\r?\n/)
    .filter((line) => line !== "" && !line.startsWith("#version"));
  const merges = checkMerges(
    lines.map((line) => line.split(" ")),
    vocab,
    join(modelFolder, file("merges.txt")),
  );
  return { vocab, merges };
}

/** Each merge joins two tokens of the vocabulary into a third. */
function checkMerges(merges: string[][], vocab: Record<string, number>, where: string): [string, string][] {
  return merges.map((merge, i) => {
    const [left, right] = merge;
    const known = merge.length === 2 &&
      [left, right, left + right].every((token) => Object.hasOwn(vocab, token));
    if (!known) {
      throw new ModelError(
        `${where}: merge ${i + 1} does not join two tokens of the vocabulary; get both files again`,
      );
    }
    return [left, right];
  });
}
