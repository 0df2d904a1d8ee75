/**
 * Token ids against transformers (tests/golden/tokenizers): 500 strings through the small tokenizers of the golden
 * models and, where the data folder has them, through FLUX.1-schnell's own vocabularies.
 */

import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import fc from "fast-check";
import { Charsmap } from "../../recipes/base/charsmap.ts";
import { loadClipTokenizer, loadT5Tokenizer, type TextTokenizer } from "../../recipes/base/tokenizer.ts";
import { ModelError, UsageError } from "../../recipes/base/errors.ts";

const GOLDEN = fileURLToPath(new URL("../golden/", import.meta.url));
const DATA = Deno.env.get("FLUX_TEST_DATA") ??
  fileURLToPath(new URL("../../../shared/data", import.meta.url));
const REAL = join(DATA, "FLUX.1-schnell");
const OWN = join(GOLDEN, "schnell-like");

function exists(path: string): boolean {
  try {
    Deno.statSync(path);
    return true;
  } catch {
    return false; // not there, or not ours to read
  }
}

interface Golden {
  max_length: number;
  pad: number;
  /** Ids of each string, cut to max_length, without padding. */
  ids: number[][];
  /** Index of a string that was cut to its full number of ids. */
  untruncated: Record<string, number>;
}

const readGolden = <T>(name: string): T =>
  JSON.parse(Deno.readTextFileSync(join(GOLDEN, "tokenizers", `${name}.json`))) as T;

function compare(tokenizer: TextTokenizer, name: string): void {
  const strings = readGolden<string[]>("strings");
  const golden = readGolden<Golden>(name);
  assert.equal(strings.length, golden.ids.length);
  assert.ok(strings.length >= 500);
  assert.equal(tokenizer.special.pad, golden.pad);
  const wrong: string[] = [];
  strings.forEach((text, i) => {
    const { ids, length, truncated } = tokenizer.encode(text, golden.max_length);
    const expected = [...golden.ids[i]];
    while (expected.length < golden.max_length) expected.push(golden.pad);
    const full = golden.untruncated[i];
    const same = ids.length === expected.length && expected.every((id, j) => id === ids[j]) &&
      length === golden.ids[i].length && (truncated !== undefined) === (full !== undefined) &&
      (full === undefined || tokenizer.encode(text, full).truncated === undefined);
    if (!same) wrong.push(`${i} ${JSON.stringify(text.slice(0, 60))}: ${ids.slice(0, length)}`);
  });
  assert.deepEqual(wrong, []);
}

for (const [which, folder, needed] of [["own", OWN, "golden models"], ["real", REAL, "FLUX_TEST_DATA"]]) {
  const cases = [["clip", "tokenizer", loadClipTokenizer], ["t5", "tokenizer_2", loadT5Tokenizer]] as const;
  for (const [kind, subfolder, load] of cases) {
    const missing = [join(folder, subfolder), join(GOLDEN, "tokenizers", `${which}.${kind}.json`)]
      .filter((path) => !exists(path));
    const note = missing.length === 0 ? "" : ` (skipped: ${needed} not found at ${missing.join(", ")})`;
    Deno.test({
      name: `${kind} tokenizer, ${which} vocabulary: transformers' ids for 500 strings${note}`,
      ignore: missing.length > 0,
      fn: async () => compare(await load(join(folder, subfolder)), `${which}.${kind}`),
    });
  }
}

const ownTokenizers = () =>
  Promise.all([loadClipTokenizer(join(OWN, "tokenizer")), loadT5Tokenizer(join(OWN, "tokenizer_2"))]);

Deno.test("encode: always full length, special tokens in place, the rest padding", async () => {
  const tokenizers = await ownTokenizers();
  const text = fc.string({ unit: "binary", maxLength: 60 });
  fc.assert(fc.property(text, fc.integer({ min: 2, max: 90 }), (value, maxLength) => {
    for (const { encode, special } of tokenizers) {
      const { ids, length, truncated } = encode(value, maxLength);
      assert.equal(ids.length, maxLength);
      assert.ok(length >= 1 && length <= maxLength);
      if (special.bos !== undefined) assert.equal(ids[0], special.bos);
      assert.equal(ids[length - 1], special.eos);
      assert.ok(ids.subarray(length).every((id) => id === special.pad));
      if (truncated !== undefined) assert.equal(length, maxLength);
      // A longer limit keeps what a shorter one kept.
      const longer = encode(value, maxLength + 5).ids;
      assert.deepEqual(longer.subarray(0, length - 1), ids.subarray(0, length - 1));
    }
  }));
});

Deno.test("encode: names the text that was cut off", async () => {
  for (const tokenizer of await ownTokenizers()) {
    const words = Array.from({ length: 40 }, () => "a cat").join(" ");
    const whole = tokenizer.encode(words, 500);
    assert.equal(whole.truncated, undefined);
    const cut = tokenizer.encode(words, 10);
    assert.ok(cut.truncated !== undefined && cut.truncated.endsWith("a cat"), cut.truncated);
    assert.ok(cut.truncated.length < words.length);
  }
});

Deno.test("encode: special tokens in the text, lone surrogates, limits", async () => {
  const [clip, t5] = await ownTokenizers();
  const inside = (tokenizer: TextTokenizer, text: string) => {
    const { ids, length } = tokenizer.encode(text, 100);
    return [...ids.subarray(tokenizer.special.bos === undefined ? 0 : 1, length - 1)];
  };
  const { bos, eos } = clip.special;
  assert.deepEqual(inside(clip, "<|startoftext|><|endoftext|><|STARTOFTEXT|>"), [bos, eos, bos]);
  assert.ok(!inside(clip, "<|ENDOFTEXT|>").includes(eos)); // found before lower case only
  assert.deepEqual(inside(t5, "</s><pad><unk>"), [t5.special.eos, t5.special.pad, t5.special.unk]);
  for (const tokenizer of [clip, t5]) {
    assert.deepEqual(tokenizer.encode("\ud800x").ids, tokenizer.encode("\ufffdx").ids);
    assert.equal(tokenizer.encode("").ids.length, tokenizer.modelMaxLength);
    for (const maxLength of [0, -1, 1.5, NaN]) {
      assert.throws(() => tokenizer.encode("a", maxLength), UsageError);
    }
  }
  assert.deepEqual([clip.modelMaxLength, t5.modelMaxLength], [77, 512]);
});

Deno.test("T5: ties, unknown characters and the character table, as the Rust tokenizers have them", async () => {
  const folder = await Deno.makeTempDir();
  const vocab = [
    ...[["<unk>", 0], ["</s>", 0], ["<pad>", 0], ["▁", -1], ["a", -1], ["b", -1]],
    ...[["ab", -2], ["x", 9.5], ["xy", -3], ["p", 10.5], ["pq", -3]],
  ];
  const encode = async (text: string, file: object) => {
    await Deno.writeTextFile(join(folder, "tokenizer.json"), JSON.stringify(file));
    const { ids, length } = (await loadT5Tokenizer(folder)).encode(text);
    return [...ids.subarray(0, length - 1)];
  };
  const file = { normalizer: null, model: { type: "Unigram", unk_id: 0, vocab } };
  try {
    // Expected: tokenizers 0.23.3, models.Unigram(vocab, 0).tokenize(word).
    assert.deepEqual(await encode("ab", file), [3, 6]); // a + b has the same score
    assert.deepEqual(await encode("xy", file), [3, 8]); // unknown is 10 below the lowest score, -3
    assert.deepEqual(await encode("pq", file), [3, 9, 0]);
    assert.deepEqual(await encode("a☃☃b☃ ☃", file), [3, 4, 0, 5, 0, 3, 0]); // fused inside a word only
    assert.deepEqual(await encode("a▁b", file), [3, 4, 3, 5]);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }

  // Expected: tokenizers' normalizers.Precompiled on the golden model's table, which has the ligature and e + acute.
  const path = join(OWN, "tokenizer_2", "tokenizer.json");
  const { normalizer } = JSON.parse(await Deno.readTextFile(path)) as {
    normalizer: { normalizers: { precompiled_charsmap?: string }[] };
  };
  const table = normalizer.normalizers.find((one) => one.precompiled_charsmap !== undefined);
  const charsmap = new Charsmap(table!.precompiled_charsmap!, path);
  assert.equal(charsmap.normalize("\ufb01\u0301"), "fi"); // 5 bytes: the whole grapheme by its first character
  assert.equal(charsmap.normalize("\ufb01\u0301\u0302"), "fi\u0301\u0302"); // 7 bytes: character by character
  assert.equal(charsmap.normalize("e\u0301\u0302"), "\xe9"); // the shortest entry, and the rest is lost
  assert.equal(charsmap.normalize("a\u0301\0\xbd"), "a\u0301\x001\u20442");
});

Deno.test("load: a missing or damaged file is a ModelError that names it", async () => {
  const folder = await Deno.makeTempDir();
  const copy = async (from: string, changes: Record<string, string | null>) => {
    for (const { name } of Deno.readDirSync(folder)) await Deno.remove(join(folder, name));
    for (const { name } of Deno.readDirSync(from)) {
      const changed = changes[name];
      if (changed === null) continue;
      await Deno.writeTextFile(join(folder, name), changed ?? await Deno.readTextFile(join(from, name)));
    }
  };
  const clip = join(OWN, "tokenizer");
  const t5 = join(OWN, "tokenizer_2");
  const t5File = JSON.parse(await Deno.readTextFile(join(t5, "tokenizer.json"))) as {
    model: { vocab: unknown[] };
  };
  const t5With = (change: object) => JSON.stringify({ ...t5File, model: { ...t5File.model, ...change } });
  const charsmap = { type: "Precompiled", precompiled_charsmap: "AAAA" };
  const cases = [
    [loadClipTokenizer, clip, { "vocab.json": null }, /vocab\.json is missing/],
    [loadClipTokenizer, clip, { "merges.txt": null }, /merges\.txt is missing/],
    [loadClipTokenizer, clip, { "vocab.json": "{" }, /vocab\.json is not JSON/],
    [loadClipTokenizer, clip, { "vocab.json": '{"a": "b"}' }, /vocab\.json: a: /],
    [
      loadClipTokenizer,
      clip,
      { "merges.txt": "#version: 0.2\na notthere\n" },
      /merges\.txt: merge "a notthere"/,
    ],
    [loadClipTokenizer, clip, { "merges.txt": "abc\n" }, /merges\.txt: merge "abc"/],
    [loadClipTokenizer, clip, { "tokenizer_config.json": "[]" }, /tokenizer_config\.json: /],
    [loadT5Tokenizer, t5, { "tokenizer.json": null }, /tokenizer\.json is missing/],
    [loadT5Tokenizer, t5, { "tokenizer.json": "null" }, /tokenizer\.json: /],
    [loadT5Tokenizer, t5, { "tokenizer.json": t5With({ type: "BPE" }) }, /tokenizer\.json: model\.type/],
    [loadT5Tokenizer, t5, { "tokenizer.json": t5With({ unk_id: 1e6 }) }, /tokenizer\.json: unk_id/],
    [loadT5Tokenizer, t5, { "tokenizer.json": t5With({ byte_fallback: true }) }, /byte_fallback/],
    [
      loadT5Tokenizer,
      t5,
      { "tokenizer.json": JSON.stringify({ ...t5File, normalizer: charsmap }) },
      /precompiled_charsmap/,
    ],
  ] as const;
  try {
    for (const [load, from, changes, message] of cases) {
      await copy(from, changes);
      await assert.rejects(load(folder), (error) => {
        assert.ok(error instanceof ModelError, String(error));
        assert.match(error.message, message);
        assert.ok(error.message.includes(folder) && !error.message.includes("\n"), error.message);
        return true;
      });
    }
    // The configs may be missing: the special tokens are then the usual ones.
    await copy(clip, { "tokenizer_config.json": null, "special_tokens_map.json": null });
    const bare = await loadClipTokenizer(folder);
    const full = await loadClipTokenizer(clip);
    assert.deepEqual(bare.special, full.special);
    assert.deepEqual(bare.encode("A cat, 2 dogs").ids, full.encode("A cat, 2 dogs").ids);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
