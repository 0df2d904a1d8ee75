import assert from "node:assert/strict";
import { existsSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import { openComponent, readJson, resolveModelFolder } from "../../recipes/base/checkpoint.ts";
import { CheckpointError, type ComponentWeights } from "../../recipes/base/component_weights.ts";
import { ModelError } from "../../recipes/base/errors.ts";
import {
  SafetensorsError,
  SafetensorsFile,
  type TensorToWrite,
  writeSafetensors,
} from "../../recipes/base/safetensors.ts";
import { inFolder, mkfifo } from "../support/folders.ts";
import { symlink } from "../support/symlink.ts";

function ramp(name: string, shape: number[]): TensorToWrite {
  const length = shape.reduce((product, size) => product * size, 1);
  return {
    name,
    dtype: "f32",
    shape,
    bytes: new Uint8Array(Float32Array.from({ length }, (_, i) => i).buffer),
  };
}

const INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json";
const SHARDS = [1, 2].map((i) => `diffusion_pytorch_model-0000${i}-of-00002.safetensors`);

/** A model folder with a transformer in two shards: a [2, 3] in the first, b [4] and c [] in the second. */
async function shardedModel(model: string): Promise<string> {
  const folder = join(model, "transformer");
  Deno.mkdirSync(folder, { recursive: true });
  Deno.writeTextFileSync(join(model, "model_index.json"), "{}");
  await writeSafetensors(join(folder, SHARDS[0]), [ramp("a", [2, 3])]);
  await writeSafetensors(join(folder, SHARDS[1]), [ramp("b", [4]), ramp("c", [])]);
  writeIndex(folder, { a: SHARDS[0], b: SHARDS[1], c: SHARDS[1] });
  return folder;
}

function writeIndex(folder: string, weightMap: unknown): void {
  Deno.writeTextFileSync(
    join(folder, INDEX_NAME),
    JSON.stringify({ metadata: { total_size: 44 }, weight_map: weightMap }),
  );
}

function floats(weights: ComponentWeights, name: string): number[] {
  const { bytes } = weights.get(name);
  return [...new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4)];
}

/** Runs `call` and returns the ModelError that it must throw. */
function modelError(call: () => unknown): ModelError {
  try {
    call();
  } catch (error) {
    assert(error instanceof ModelError, String(error));
    assert(error.hint, "the error says what to do next");
    return error;
  }
  assert.fail("expected a ModelError");
}

Deno.test("weights over several shards read as one", () =>
  inFolder(async (model) => {
    const folder = await shardedModel(model);
    const weights = openComponent(model, "transformer");
    assert.equal(weights.folder, folder);
    assert.deepEqual(weights.names(), ["a", "b", "c"]);
    assert.equal(weights.has("b"), true);
    assert.equal(weights.has("toString"), false);
    assert.equal(weights.byteLength, 4 * (6 + 4 + 1));
    assert.equal(weights.mapped, true);
    assert.deepEqual(weights.info("a").shape, [2, 3]);
    assert.equal(weights.get("c").dtype, "f32");
    assert.deepEqual(floats(weights, "b"), [0, 1, 2, 3]);
    const b = weights.get("b");
    assert.equal(new Deno.UnsafePointerView(Deno.UnsafePointer.create(b.pointer)!).getFloat32(12), 3);
    assert.match(modelError(() => weights.get("d")).message, /"d"/);
    weights[Symbol.dispose]();
    assert.throws(() => weights.get("b"), SafetensorsError);
    assert.throws(() => b.pointer, SafetensorsError);
    assert.equal(b.bytes.length, 0);
  }));

Deno.test("a single file of either name, and the name that was asked for", () =>
  inFolder(async (model) => {
    Deno.mkdirSync(join(model, "vae"));
    await writeSafetensors(join(model, "vae", "model.safetensors"), [ramp("m", [1])]);
    {
      using weights = openComponent(model, "vae");
      assert.deepEqual(weights.names(), ["m"]);
    }
    const error = modelError(() => openComponent(model, "vae", { baseName: "diffusion_pytorch_model" }));
    assert.match(error.message, /no diffusion_pytorch_model\.safetensors .* it has "model\.safetensors"/);
    await writeSafetensors(join(model, "vae", "diffusion_pytorch_model.safetensors"), [ramp("d", [1])]);
    using weights = openComponent(model, "vae");
    assert.deepEqual(weights.names(), ["d"]);
    using asked = openComponent(model, "vae", { baseName: "model" });
    assert.deepEqual(asked.names(), ["m"]);
  }));

Deno.test("weights of a file whose data is not aligned come aligned", () =>
  inFolder(async (model) => {
    Deno.mkdirSync(join(model, "vae"));
    const path = join(model, "vae", "model.safetensors");
    await writeSafetensors(path, [ramp("m", [3])]);
    // One space less of padding, as writers before padding left it.
    const bytes = Deno.readFileSync(path);
    const text = new TextDecoder().decode(bytes.subarray(8, bytes.length - 12)).trimEnd();
    const header = new TextEncoder().encode(text + " ".repeat((5 - (text.length % 4)) % 4));
    assert.notEqual(header.length % 4, 0);
    Deno.writeFileSync(
      path,
      Uint8Array.from([header.length, 0, 0, 0, 0, 0, 0, 0, ...header, ...bytes.slice(-12)]),
    );
    using weights = openComponent(model, "vae");
    assert.deepEqual(floats(weights, "m"), [0, 1, 2]);
    const view = new Deno.UnsafePointerView(Deno.UnsafePointer.create(weights.get("m").pointer)!);
    assert.equal(view.getFloat32(8), 2);
  }));

Deno.test("checkShapes lists every missing weight and unexpected shape at once, and returns the unused", () =>
  inFolder(async (model) => {
    const folder = await shardedModel(model);
    using weights = openComponent(model, "transformer");
    assert.deepEqual(weights.checkShapes(new Map([["a", [2, 3]], ["c", []]])), { unused: ["b"] });
    const expected = new Map([["a", [3, 2]], ["b", [4, 1]], ["c", []], ["d", [5]], ["__proto__", []]]);
    const error = modelError(() => weights.checkShapes(expected));
    assert(error instanceof CheckpointError);
    assert.equal(error.folder, folder);
    assert.deepEqual(error.problems, [
      'shape: "a" is [2, 3], expected [3, 2]',
      'shape: "b" is [4], expected [4, 1]',
      'missing: "d" [5]',
      'missing: "__proto__" []',
    ]);
    for (const problem of error.problems) assert(error.message.includes(problem));
    assert(error.message.startsWith(folder));
    // A very long list is cut in the message only.
    const many = new Map(Array.from({ length: 300 }, (_, i): [string, number[]] => [`w${i}`, [1]]));
    const long = modelError(() => weights.checkShapes(many));
    assert(long instanceof CheckpointError && long.problems.length === 300);
    assert.match(long.message, /and 250 more$/);
  }));

Deno.test("missing shards are listed together", () =>
  inFolder(async (model) => {
    const folder = await shardedModel(model);
    writeIndex(folder, { a: "gone-1.safetensors", b: SHARDS[1], z: "gone-2.safetensors" });
    const error = modelError(() => openComponent(model, "transformer"));
    assert(error instanceof CheckpointError);
    assert.deepEqual(error.problems, ["gone-1.safetensors", "gone-2.safetensors"]);
    assert.match(error.message, /2 of 3 shards are missing/);
    assert(error.message.startsWith(folder));
  }));

Deno.test("an index that does not fit its shards: every misplaced weight", () =>
  inFolder(async (model) => {
    const folder = await shardedModel(model);
    writeIndex(folder, { a: SHARDS[1], b: SHARDS[1], nope: SHARDS[0] });
    const error = modelError(() => openComponent(model, "transformer"));
    assert(error instanceof CheckpointError);
    assert.deepEqual(error.problems, [`"a" is not in ${SHARDS[1]}`, `"nope" is not in ${SHARDS[0]}`]);
  }));

Deno.test("a damaged shard: the safetensors error names the shard", () =>
  inFolder(async (model) => {
    const folder = await shardedModel(model);
    Deno.truncateSync(join(folder, SHARDS[1]), 200);
    assert.throws(
      () => openComponent(model, "transformer"),
      (error: unknown) => error instanceof SafetensorsError && error.file === join(folder, SHARDS[1]),
    );
  }));

Deno.test("a bad index names the file and the field", () =>
  inFolder(async (model) => {
    const folder = await shardedModel(model);
    for (const weightMap of [undefined, null, [], { a: 1 }, "x"]) {
      writeIndex(folder, weightMap);
      const { message } = modelError(() => openComponent(model, "transformer"));
      assert(message.includes(INDEX_NAME) && message.includes("weight_map"), message);
    }
    writeIndex(folder, {});
    assert.match(modelError(() => openComponent(model, "transformer")).message, /lists no weights/);
    Deno.writeTextFileSync(join(folder, INDEX_NAME), "{");
    assert.match(modelError(() => openComponent(model, "transformer")).message, /is not valid JSON/);
    // A weight named __proto__ is a weight like any other: here one that its shard does not have.
    Deno.writeTextFileSync(join(folder, INDEX_NAME), `{"weight_map":{"__proto__":"${SHARDS[0]}"}}`);
    assert.match(modelError(() => openComponent(model, "transformer")).message, /"__proto__" is not in/);
  }));

Deno.test("no path leaves the model folder: names", () =>
  inFolder(async (root) => {
    const model = join(root, "model");
    const folder = await shardedModel(model);
    await writeSafetensors(join(root, "outside.safetensors"), [ramp("a", [1])]);
    const outside = [
      "../../outside.safetensors",
      join(root, "outside.safetensors"),
      "..\\outside.safetensors",
      "..",
      "",
      "./x.safetensors",
      "a/../b.safetensors",
      "x\0.safetensors",
      "\x1b[2J.safetensors",
    ];
    for (const shard of outside) {
      writeIndex(folder, { a: shard, b: SHARDS[1] });
      const error = modelError(() => openComponent(model, "transformer"));
      assert.match(error.message, /may not name/, shard);
      // deno-lint-ignore no-control-regex
      assert.doesNotMatch(error.message, /[\x00\x1b]/);
    }
    // Plain, but not a safetensors file.
    writeIndex(folder, { a: "config.json" });
    assert.match(modelError(() => openComponent(model, "transformer")).message, /may not name/);
    for (const component of ["..", ".", "", "../model/transformer", "/etc", "a/b"]) {
      assert.match(modelError(() => openComponent(model, component)).message, /is no name of a folder/);
    }
    Deno.writeTextFileSync(join(root, "secret.json"), "{}");
    const error = modelError(() => readJson(model, "../secret.json", z.looseObject({})));
    assert.match(error.message, /leads out of the model folder/);
  }));

Deno.test("no path leaves the model folder: links", () =>
  inFolder(async (root) => {
    const model = join(root, "model");
    const folder = await shardedModel(model);
    const outside = join(root, "outside.safetensors");
    await writeSafetensors(outside, [ramp("a", [2, 3])]);
    const replaceByLink = (target: string) => {
      Deno.removeSync(join(folder, SHARDS[0]));
      symlink(target, join(folder, SHARDS[0]));
    };
    // A link to a file of the model itself is fine.
    Deno.renameSync(join(folder, SHARDS[0]), join(model, "real.safetensors"));
    symlink("../real.safetensors", join(folder, SHARDS[0]));
    openComponent(model, "transformer")[Symbol.dispose]();
    for (const target of [outside, "../../outside.safetensors"]) {
      replaceByLink(target);
      const error = modelError(() => openComponent(model, "transformer"));
      assert.match(error.message, /leads out of the model folder/);
      assert(error.message.includes(join(folder, SHARDS[0])));
    }
    // A sibling whose name begins with the model folder's name is outside too.
    Deno.mkdirSync(`${model}-2`);
    await writeSafetensors(join(`${model}-2`, "x.safetensors"), [ramp("a", [2, 3])]);
    replaceByLink(join(`${model}-2`, "x.safetensors"));
    assert.match(modelError(() => openComponent(model, "transformer")).message, /leads out/);
    // So is a whole component behind a link, and a dangling link is an error, not a crash.
    Deno.mkdirSync(join(root, "elsewhere"));
    await writeSafetensors(join(root, "elsewhere", "model.safetensors"), [ramp("a", [1])]);
    symlink("../elsewhere", join(model, "vae"));
    assert.match(modelError(() => openComponent(model, "vae")).message, /leads out/);
    // Not even the names of what is there are told.
    Deno.removeSync(join(root, "elsewhere", "model.safetensors"));
    assert.match(modelError(() => openComponent(model, "vae")).message, /leads out/);
    replaceByLink("nowhere");
    assert.match(modelError(() => openComponent(model, "transformer")).message, /it does not exist/);
    // A model folder that is itself behind a link is the user's choice.
    symlink("model", join(root, "alias"));
    assert.equal(resolveModelFolder(join(root, "alias")), model);
  }));

Deno.test("Hugging Face's cache: links into the repository's blobs are followed, others are not", () =>
  inFolder(async (root) => {
    const repository = join(root, "models--black-forest-labs--FLUX.1-schnell");
    const model = join(repository, "snapshots", "0123abcd");
    Deno.mkdirSync(join(model, "vae"), { recursive: true });
    Deno.mkdirSync(join(repository, "blobs"));
    const link = join(model, "vae", "diffusion_pytorch_model.safetensors");
    await writeSafetensors(join(repository, "blobs", "5e1f"), [ramp("a", [2])]);
    symlink("../../../blobs/5e1f", link);
    Deno.writeTextFileSync(join(repository, "blobs", "c0nf"), '{"x":1}');
    symlink("../../blobs/c0nf", join(model, "model_index.json"));
    {
      using weights = openComponent(resolveModelFolder(model), "vae");
      assert.deepEqual(floats(weights, "a"), [0, 1]);
    }
    assert.deepEqual(readJson(model, "model_index.json", z.object({ x: z.number() })), { x: 1 });

    // A folder that only looks like a snapshot is a model folder like any other.
    const lookalike = join(root, "mine", "snapshots", "1");
    Deno.mkdirSync(join(lookalike, "vae"), { recursive: true });
    await writeSafetensors(join(root, "mine", "blob"), [ramp("a", [2])]);
    symlink("../../../blob", join(lookalike, "vae", "model.safetensors"));
    assert.match(modelError(() => openComponent(lookalike, "vae")).message, /leads out/);

    const other = join(root, "models--someone--else", "blobs");
    Deno.mkdirSync(other, { recursive: true });
    Deno.renameSync(join(repository, "blobs", "5e1f"), join(other, "5e1f"));
    Deno.removeSync(link);
    symlink(join(other, "5e1f"), link);
    assert.match(modelError(() => openComponent(model, "vae")).message, /leads out/);
  }));

Deno.test("pickle files are refused, with the reason", () =>
  inFolder(async (model) => {
    Deno.mkdirSync(join(model, "vae"));
    await Deno.writeFile(join(model, "vae", "diffusion_pytorch_model.bin"), new Uint8Array(8));
    const error = modelError(() => openComponent(model, "vae"));
    assert.match(error.message, /diffusion_pytorch_model\.bin: pickle files are not read/);
    assert.match(error.hint!, /program/);
  }));

Deno.test("resolveModelFolder says what is wrong with a path", () =>
  inFolder(async (root) => {
    assert.match(modelError(() => resolveModelFolder(join(root, "none"))).message, /no such model folder/);
    assert.match(modelError(() => resolveModelFolder(root)).message, /is empty/);
    await Deno.writeTextFile(join(root, "model.gguf"), "x");
    assert.match(
      modelError(() => resolveModelFolder(join(root, "model.gguf"))).message,
      /is a file, not a model/,
    );
    assert.match(
      modelError(() => resolveModelFolder(root)).message,
      /no model_index\.json; it has "model\.gguf"/,
    );
    await Deno.writeTextFile(join(root, "model_index.json"), "{}");
    assert.equal(resolveModelFolder(root), root);
    assert.equal(resolveModelFolder(`${root}/../${root.split("/").at(-1)}/`), root);
    assert.match(
      modelError(() => openComponent(root, "vae")).message,
      /vae cannot be opened: it does not exist/,
    );
    Deno.mkdirSync(join(root, "vae"));
    assert.match(modelError(() => openComponent(root, "vae")).message, /it has nothing in it/);
  }));

Deno.test("readJson names the file and every field", () =>
  inFolder(async (root) => {
    const schema = z.object({ layers: z.number(), axes: z.array(z.number()) });
    await Deno.writeTextFile(join(root, "config.json"), '{"layers":"19","axes":[16,"56"]}');
    const { message } = modelError(() => readJson(root, "config.json", schema));
    assert(message.startsWith(join(root, "config.json")));
    assert.match(message, /layers: .*; axes\.1: /);
    await Deno.writeTextFile(join(root, "config.json"), "[]");
    assert.match(modelError(() => readJson(root, "config.json", schema)).message, /the file: /);
    await Deno.writeTextFile(join(root, "config.json"), '{"layers":19,"axes":[16,56,56]}');
    assert.equal(readJson(root, "config.json", schema).layers, 19);
    assert.match(modelError(() => readJson(root, "none.json", schema)).message, /it does not exist/);
    // Keys that a terminal would act on, and more problems than anybody reads.
    const many = Object.fromEntries(Array.from({ length: 30 }, (_, i) => [`\x1b[${i}m`, "x"]));
    Deno.writeTextFileSync(join(root, "config.json"), JSON.stringify(many));
    const bad = modelError(() => readJson(root, "config.json", z.record(z.string(), z.number())));
    assert.match(bad.message, /"\\u\{1b\}\[0m": .*; and 10 more$/);
  }));

Deno.test("readJson: a byte order mark is no error; pipes, other encodings and broken JSON are, unquoted", () =>
  inFolder((root) => {
    const path = join(root, "config.json");
    const read = () => readJson(root, "config.json", z.object({ x: z.number() }));
    Deno.writeTextFileSync(path, '\ufeff{"x":1}');
    assert.deepEqual(read(), { x: 1 });
    Deno.writeFileSync(path, Uint8Array.from([...'{"x":1,"'].map((c) => c.charCodeAt(0)).concat(0xff)));
    assert.match(modelError(read).message, /it is no UTF-8 text/);
    Deno.writeTextFileSync(path, "secret:x:0:0");
    const error = modelError(read);
    assert.match(error.message, /config\.json is not valid JSON$/);
    assert.doesNotMatch(Deno.inspect(error), /secret/);
    Deno.removeSync(path);
    mkfifo(path);
    assert.match(modelError(read).message, /no regular file/);
    Deno.removeSync(path);
    Deno.mkdirSync(path);
    assert.match(modelError(read).message, /no regular file/);
  }));

// ---- the real index of FLUX.1-schnell ----

const DATA = Deno.env.get("FLUX_TEST_DATA") ??
  fileURLToPath(new URL("../../../shared/data", import.meta.url));
const SCHNELL = join(DATA, "FLUX.1-schnell");
const hasSchnell = existsSync(join(SCHNELL, "model_index.json"));
if (!hasSchnell) {
  console.warn(`skipped: no FLUX.1-schnell under ${DATA} (set FLUX_TEST_DATA to a folder that has it)`);
}

Deno.test({
  name: "FLUX.1-schnell's own index: without shards they are listed; with shards all 1,156 weights are found",
  ignore: !hasSchnell,
  fn: () =>
    inFolder(async (model) => {
      const error = modelError(() => openComponent(resolveModelFolder(SCHNELL), "transformer"));
      assert.match(error.message, /3 of 3 shards are missing/);
      assert.match(error.message, /diffusion_pytorch_model-00002-of-00003\.safetensors/);
      assert.match(
        modelError(() => openComponent(SCHNELL, "text_encoder_2")).message,
        /2 of 2 shards are missing/,
      );

      // The same index over shards with empty tensors of the real names.
      const index = readJson(
        SCHNELL,
        `transformer/${INDEX_NAME}`,
        z.object({ weight_map: z.record(z.string(), z.string()) }),
      );
      const folder = join(model, "transformer");
      Deno.mkdirSync(folder);
      Deno.copyFileSync(join(SCHNELL, "transformer", INDEX_NAME), join(folder, INDEX_NAME));
      const byShard = Map.groupBy(Object.entries(index.weight_map), ([, shard]) => shard);
      for (const [shard, entries] of byShard) {
        const tensors = entries.map(([name]): TensorToWrite => ({
          name,
          dtype: "bf16",
          shape: [0],
          bytes: new Uint8Array(),
        }));
        await writeSafetensors(join(folder, shard), tensors);
        using file = SafetensorsFile.open(join(folder, shard));
        assert.equal(file.names.length, entries.length);
      }
      using weights = openComponent(model, "transformer", { baseName: "diffusion_pytorch_model" });
      assert.equal(weights.names().length, Object.keys(index.weight_map).length);
      assert.equal(weights.names().length, 1156);
      const expected = new Map(weights.names().map((name): [string, number[]] => [name, [0]]));
      assert.deepEqual(weights.checkShapes(expected), { unused: [] });
    }),
});
