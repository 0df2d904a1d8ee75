/**
 * Token ids against transformers (tests/golden/tokenizers): 500 strings through the small tokenizers of the golden
 * models and, where the data folder has them, through FLUX.1-schnell's own vocabularies.
 */

import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import fc from "fast-check";
import { Charsmap } from "../../recipes/base/charsmap.ts";
import { loadClipTokenizer, loadT5Tokenizer, type TextTokenizer } from "../../recipes/base/tokenizer.ts";
import { ModelError, UsageError } from "../../recipes/base/errors.ts";
import { copyFolder, inFolder } from "../support/folders.ts";
import { symlink } from "../support/symlink.ts";

const GOLDEN = fileURLToPath(new URL("../golden/", import.meta.url));
const DATA = Deno.env.get("FLUX_TEST_DATA") ??
  fileURLToPath(new URL("../../../shared/data", import.meta.url));
const REAL = join(DATA, "FLUX.1-schnell");
const OWN = join(GOLDEN, "schnell-like");

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
      .filter((path) => !existsSync(path));
    const note = missing.length === 0 ? "" : ` (skipped: ${needed} not found at ${missing.join(", ")})`;
    Deno.test({
      name: `${kind} tokenizer, ${which} vocabulary: transformers' ids for 500 strings${note}`,
      ignore: missing.length > 0,
      fn: () => compare(load(folder, subfolder), `${which}.${kind}`),
    });
  }
}

const ownTokenizers = () => [loadClipTokenizer(OWN, "tokenizer"), loadT5Tokenizer(OWN, "tokenizer_2")];

Deno.test("encode: always full length, special tokens in place, the rest padding", () => {
  const tokenizers = ownTokenizers();
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

Deno.test("encode: names the text that was cut off", () => {
  for (const tokenizer of ownTokenizers()) {
    const words = Array.from({ length: 40 }, () => "a cat").join(" ");
    const whole = tokenizer.encode(words, 500);
    assert.equal(whole.truncated, undefined);
    const cut = tokenizer.encode(words, 10);
    assert.ok(cut.truncated !== undefined && cut.truncated.endsWith("a cat"), cut.truncated);
    assert.ok(cut.truncated.length < words.length);
  }
});

Deno.test("encode: special tokens in the text, lone surrogates, limits", () => {
  const [clip, t5] = ownTokenizers();
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
  const vocab = [
    ...[["<unk>", 0], ["</s>", 0], ["<pad>", 0], ["▁", -1], ["a", -1], ["b", -1]],
    ...[["ab", -2], ["x", 9.5], ["xy", -3], ["p", 10.5], ["pq", -3]],
  ];
  const file = { normalizer: null, model: { type: "Unigram", unk_id: 0, vocab } };
  await inFolder((model) => {
    Deno.mkdirSync(join(model, "t5"));
    Deno.writeTextFileSync(join(model, "t5", "tokenizer.json"), JSON.stringify(file));
    const tokenizer = loadT5Tokenizer(model, "t5");
    const encode = (text: string) => {
      const { ids, length } = tokenizer.encode(text);
      return [...ids.subarray(0, length - 1)];
    };
    assert.equal(tokenizer.maxId, 10);
    // Expected: tokenizers 0.23.3, models.Unigram(vocab, 0).tokenize(word).
    assert.deepEqual(encode("ab"), [3, 6]); // a + b has the same score
    assert.deepEqual(encode("xy"), [3, 8]); // unknown is 10 below the lowest score, -3
    assert.deepEqual(encode("pq"), [3, 9, 0]);
    assert.deepEqual(encode("a☃☃b☃ ☃"), [3, 4, 0, 5, 0, 3, 0]); // fused inside a word only
    assert.deepEqual(encode("a▁b"), [3, 4, 3, 5]);
  });

  // Expected: tokenizers' normalizers.Precompiled on the golden model's table, which has the ligature and e + acute.
  const path = join(OWN, "tokenizer_2", "tokenizer.json");
  const { normalizer } = JSON.parse(Deno.readTextFileSync(path)) as {
    normalizer: { normalizers: { precompiled_charsmap?: string }[] };
  };
  const table = normalizer.normalizers.find((one) => one.precompiled_charsmap !== undefined);
  const charsmap = new Charsmap(table!.precompiled_charsmap!, path);
  assert.equal(charsmap.normalize("\ufb01\u0301"), "fi"); // 5 bytes: the whole grapheme by its first character
  assert.equal(charsmap.normalize("\ufb01\u0301\u0302"), "fi\u0301\u0302"); // 7 bytes: character by character
  assert.equal(charsmap.normalize("e\u0301\u0302"), "\xe9"); // the shortest entry, and the rest is lost
  assert.equal(charsmap.normalize("a\u0301\0\xbd"), "a\u0301\x001\u20442");
});

const LOADERS = { tokenizer: loadClipTokenizer, tokenizer_2: loadT5Tokenizer } as const;

/** A folder with the own tokenizers, and files of `folder` changed, or removed where null. */
function withTokenizers(
  folder: keyof typeof LOADERS,
  changes: Record<string, string | null>,
  body: (model: string) => void,
): Promise<void> {
  return inFolder((model) => {
    for (const name of Object.keys(LOADERS)) copyFolder(join(OWN, name), join(model, name));
    for (const [name, text] of Object.entries(changes)) {
      const path = join(model, folder, name);
      if (text === null) Deno.removeSync(path);
      else Deno.writeTextFileSync(path, text);
    }
    body(model);
  });
}

Deno.test("load: a missing or damaged file is a ModelError that names it", async () => {
  const t5File = JSON.parse(Deno.readTextFileSync(join(OWN, "tokenizer_2", "tokenizer.json"))) as {
    model: { vocab: unknown[] };
  };
  const t5With = (change: object) => JSON.stringify({ ...t5File, model: { ...t5File.model, ...change } });
  const charsmap = { type: "Precompiled", precompiled_charsmap: "AAAA" };
  const clip = "tokenizer";
  const t5 = "tokenizer_2";
  const cases: [keyof typeof LOADERS, Record<string, string | null>, RegExp][] = [
    [clip, { "vocab.json": null }, /vocab\.json cannot be opened: it does not exist/],
    [clip, { "merges.txt": null }, /merges\.txt cannot be opened: it does not exist/],
    [clip, { "vocab.json": "{" }, /vocab\.json is not valid JSON/],
    [clip, { "vocab.json": '{"a": "b"}' }, /vocab\.json: a: /],
    [clip, { "merges.txt": "#version: 0.2\na notthere\n" }, /merges\.txt: merge 1 /],
    [clip, { "merges.txt": "abc\n" }, /merges\.txt: merge 1 /],
    [clip, { "tokenizer_config.json": "[]" }, /tokenizer_config\.json: /],
    [clip, { "tokenizer_config.json": '{"model_max_length":1}' }, /model_max_length/],
    [clip, { "special_tokens_map.json": '{"eos_token":"<none>"}' }, /special token "<none>"/],
    [t5, { "tokenizer.json": null }, /tokenizer\.json cannot be opened: it does not exist/],
    [t5, { "tokenizer.json": "null" }, /tokenizer\.json: /],
    [t5, { "tokenizer.json": t5With({ type: "BPE" }) }, /tokenizer\.json: model\.type/],
    [t5, { "tokenizer.json": t5With({ unk_id: 1e6 }) }, /tokenizer\.json: unk_id/],
    [t5, { "tokenizer.json": t5With({ byte_fallback: true }) }, /byte_fallback/],
    [t5, { "tokenizer.json": JSON.stringify({ ...t5File, normalizer: charsmap }) }, /precompiled_charsmap/],
  ];
  for (const [folder, changes, message] of cases) {
    await withTokenizers(folder, changes, (model) => {
      assert.throws(() => LOADERS[folder](model, folder), (error) => {
        assert.ok(error instanceof ModelError, String(error));
        assert.match(error.message, message);
        assert.ok(
          error.message.includes(join(model, folder)) && !error.message.includes("\n"),
          error.message,
        );
        return true;
      });
    });
  }
});

Deno.test("load: the configs may be missing, the special tokens are then the usual ones", () =>
  withTokenizers("tokenizer", { "tokenizer_config.json": null, "special_tokens_map.json": null }, (model) => {
    const bare = loadClipTokenizer(model, "tokenizer");
    const full = loadClipTokenizer(OWN, "tokenizer");
    assert.deepEqual(bare.special, full.special);
    assert.deepEqual(bare.encode("A cat, 2 dogs").ids, full.encode("A cat, 2 dogs").ids);
  }));

Deno.test("load: the largest id may be that of an added token", () => {
  const config = { added_tokens_decoder: { 900: { content: "<extra>" } } };
  return withTokenizers("tokenizer", { "tokenizer_config.json": JSON.stringify(config) }, (model) => {
    assert.equal(loadClipTokenizer(model, "tokenizer").maxId, 900);
    assert.equal(loadClipTokenizer(OWN, "tokenizer").maxId, 713);
  });
});

Deno.test("load: a byte order mark in front of merges.txt or vocab.json changes nothing", () => {
  const marked = (name: string) => [name, `\ufeff${Deno.readTextFileSync(join(OWN, "tokenizer", name))}`];
  const changes = Object.fromEntries(["merges.txt", "vocab.json"].map(marked));
  return withTokenizers("tokenizer", changes, (model) => {
    const ids = (folder: string) => loadClipTokenizer(folder, "tokenizer").encode("A cat, 2 dogs").ids;
    assert.deepEqual(ids(model), ids(OWN));
  });
});

Deno.test("load: no link leads out of the model folder, and what it leads to is not shown", async () => {
  const files: [keyof typeof LOADERS, string][] = [
    ["tokenizer", "vocab.json"],
    ["tokenizer", "merges.txt"],
    ["tokenizer", "tokenizer_config.json"],
    ["tokenizer_2", "tokenizer.json"],
    ["tokenizer_2", "special_tokens_map.json"],
    ["tokenizer", ""], // the folder itself
    ["tokenizer_2", ""],
  ];
  for (const [folder, file] of files) {
    await withTokenizers(folder, {}, (model) => {
      const path = join(model, folder, file);
      Deno.removeSync(path, { recursive: true });
      symlink(join(OWN, folder, file), path); // valid, but elsewhere
      assert.throws(() => LOADERS[folder](model, folder), (error) => {
        assert.ok(error instanceof ModelError, String(error));
        return /leads out of the model folder/.test(error.message);
      }, join(folder, file));
    });
  }
  await withTokenizers("tokenizer", { "vocab.json": null }, (model) => {
    symlink("/etc/passwd", join(model, "tokenizer", "vocab.json"));
    assert.throws(
      () => loadClipTokenizer(model, "tokenizer"),
      (error) =>
        error instanceof ModelError && !/root|nologin/.test(Deno.inspect(error).split("\n    at ")[0]),
    );
    // A link that stays inside is a file like any other.
    Deno.removeSync(join(model, "tokenizer", "vocab.json"));
    Deno.copyFileSync(join(OWN, "tokenizer", "vocab.json"), join(model, "real.json"));
    symlink("../real.json", join(model, "tokenizer", "vocab.json"));
    assert.equal(loadClipTokenizer(model, "tokenizer").encode("a").length, 3);
  });
});
