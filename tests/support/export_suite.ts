/** Recipe 08_export: what one process writes, the next one loads, or refuses with the reason. */
import assert from "node:assert/strict";
import { join } from "node:path";
import fc from "fast-check";
import { type DType, dtypeBytes, isDType } from "../../ffi/dtype.ts";
import { FileError } from "../../ffi/errors.ts";
import type { GpuDevice } from "../../ffi/gpu.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { baselineFp32 } from "../../recipes/00_baseline_fp32.ts";
import { bfloat16 } from "../../recipes/01_bfloat16.ts";
import { compile } from "../../recipes/02_compile.ts";
import { fuseQkv } from "../../recipes/03_fuse_qkv.ts";
import { channelsLast } from "../../recipes/04_channels_last.ts";
import { float8 } from "../../recipes/06_float8.ts";
import { exportedModel, type ExportFlags, exporting } from "../../recipes/08_export.ts";
import { EMBEDDED_MODEL } from "../../recipes/base/command_line.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import { Model } from "../../recipes/base/model.ts";
import {
  headerDigest,
  type Origin,
  Package,
  PackageError,
  writePackage,
} from "../../recipes/base/package.ts";
import { FluxPipeline, type GenerateOptions } from "../../recipes/base/pipeline.ts";
import { COMPONENTS, compose, eagerPlan, type Plan, type Recipe } from "../../recipes/base/plan.ts";
import { SafetensorsFile, writeSafetensors } from "../../recipes/base/safetensors.ts";
import { freeAll, weightsFrom } from "../../recipes/base/weights.ts";
import { recipesFor } from "../../recipes/switches.ts";
import { inFolder, withModelCopy } from "./folders.ts";
import { goldenPath } from "./golden.ts";
import { kontextOptions, withKontext } from "./golden_suite_kontext.ts";
import { namesIn } from "./programs.ts";
import { smallestPiecesFor } from "./smallest_pieces.ts";
import { type TestDevice, testOn } from "./test_device.ts";

const SMALL = goldenPath("schnell-like");
const ROWS: readonly Recipe[] = [bfloat16, compile, fuseQkv, channelsLast, float8(), exporting];
const RECIPES: readonly (readonly [what: string, recipes: readonly Recipe[]])[] = [
  ["float8 by row", ROWS],
  ["float8 by tensor", [
    ...[bfloat16, compile, fuseQkv, channelsLast],
    ...[float8({ granularity: "tensor" }), exporting],
  ]],
  ["bfloat16, nothing joined", [bfloat16, compile, exporting]],
  ["float32", [baselineFp32, compile, fuseQkv, exporting]],
];
const PICTURE = { prompt: "a red apple", seed: 5, height: 32, width: 32, numInferenceSteps: 2 };

/** A plan that has drawn {@link PICTURE}, and the picture. */
async function drawn(
  model: Model,
  device: GpuDevice,
  recipes: readonly Recipe[],
  options: GenerateOptions = PICTURE,
) {
  const plan = compose(eagerPlan(device, model.weights), ...recipes);
  const { images: [{ rgb }] } = await new FluxPipeline(model, plan).generate(options);
  return { plan, rgb };
}

/** The flags of a run, and what it told. */
function run(device: GpuDevice, recipes: readonly Recipe[], flags: ExportFlags) {
  const notes: string[] = [];
  const exported = exportedModel(flags, recipes, device, (message) => notes.push(message));
  return { exported: exported!, notes };
}

/** A device as it is, but for some members. */
function changed(device: GpuDevice, members: Partial<GpuDevice>): GpuDevice {
  return new Proxy(device, {
    get: (target, key) => {
      const value = Reflect.get(Object.hasOwn(members, key) ? members : target, key);
      return typeof value === "function" ? value.bind(target) : value;
    },
  });
}

/** Defines the tests on a device. */
export function exportSuite(target: TestDevice<GpuDevice>): void {
  const test = (name: string, body: (device: GpuDevice) => Promise<void>) =>
    testOn(target, `08_export: ${name}`, body);

  for (const [what, recipes] of RECIPES) {
    test(`what was written is loaded, and recipes have nothing left to do (${what})`, (device) =>
      inFolder(async (cacheDir) => {
        const flags = { ckpt: SMALL, cacheDir, useCachedModel: true } as const;
        const first = run(device, recipes, flags);
        assert.equal(await first.exported.load(), undefined);
        assert.match(first.notes[0], /^no exported model is used: .* is not there: .*; building it$/);
        let expected: Uint8Array;
        {
          using model = await Model.load(SMALL, device, { pieces: smallestPiecesFor(recipes) });
          const { plan, rgb } = await drawn(model, device, recipes);
          expected = rgb;
          await first.exported.write(plan);
          assert.match(first.notes[1], /^exported 0\.\d+ GB to .*: --use-cached-model starts from there$/);
        }

        await target.use(async (later) => {
          const before = later.memoryUse().weights;
          (await run(later, recipes, flags).exported.load())![Symbol.dispose]();
          assert.ok(later.memoryUse().weights <= before, "what was loaded is freed");
          const second = run(later, recipes, flags);
          {
            using model = await second.exported.load();
            assert.deepEqual([second.notes, model?.name], [[], "schnell-like"]);
            const held = later.memoryUse().weights;
            const plan = compose(eagerPlan(later, model!.weights), ...recipes);
            for (const component of COMPONENTS) {
              const [loaded, used] = [model!.weights[component], plan.weights[component]];
              assert.deepEqual(used.names, loaded.names);
              for (const name of used.names) {
                assert.ok(used.get(name) === loaded.get(name), `${component}'s ${name} was made again`);
              }
            }
            assert.ok(later.memoryUse().weights <= held);
            assert.deepEqual((await drawn(model!, later, recipes)).rgb, expected);
            await second.exported.write(plan);
            assert.deepEqual(second.notes, [], "what was loaded is not written again");
          }
        });
      }));
  }

  test("the embedded model with all recipes of a GPU draws the same picture from its package", (device) =>
    inFolder(async (cacheDir) => {
      const recipes = recipesFor({}, "cuda");
      assert.ok(recipes.includes(exporting));
      const options = { ...PICTURE, height: 64, width: 64, numInferenceSteps: 1 };
      const first = run(device, recipes, { cacheDir });
      let expected: Uint8Array;
      {
        using model = await Model.load(EMBEDDED_MODEL, device);
        const { plan, rgb } = await drawn(model, device, recipes, options);
        expected = rgb;
        await first.exported.write(plan);
      }
      const { path } = first.exported;
      assert.match(path, /\/exported\/tiny-[0-9a-f]{8}-[0-9a-f]{8}\.safetensors$/);
      {
        // It is an ordinary file of tensors: what was joined is one, what was quantized is float8.
        using file = SafetensorsFile.open(path);
        const joined = file.info("transformer/single_transformer_blocks.0.attn.to_q.weight");
        const block = "transformer/transformer_blocks.0.attn.to_q";
        assert.deepEqual([joined.dtype, file.info(`${block}.weight`).dtype], ["f8e4m3", "f8e4m3"]);
        assert.equal(file.info(`${block}.weight_scale`).dtype, "f32");
        assert.equal(file.info(`${block}.weight_scale`).shape[0], file.info(`${block}.weight`).shape[0]);
        assert.ok(!file.has("transformer/transformer_blocks.0.attn.to_k.weight"));
        assert.ok(joined.shape[0] > file.info(`${block}.weight`).shape[0], "with the MLP's rows");
        const [, height, width] = file.info("vae/decoder.conv_in.weight").shape;
        assert.deepEqual([height, width], [3, 3], "channels last");
      }
      const second = run(device, recipes, { cacheDir, useCachedModel: true });
      using model = await second.exported.load();
      assert.deepEqual(second.notes, []);
      assert.deepEqual((await drawn(model!, device, recipes, options)).rgb, expected);
    }));

  test("a Kontext model edits a picture from its package as before", (device) =>
    withKontext((ckpt) =>
      inFolder(async (cacheDir) => {
        const options = await kontextOptions("one");
        let expected: Uint8Array;
        {
          using model = await Model.load(ckpt, device);
          const { plan, rgb } = await drawn(model, device, ROWS, options);
          expected = rgb;
          await run(device, ROWS, { ckpt, cacheDir }).exported.write(plan);
        }
        const later = run(device, ROWS, { ckpt, cacheDir, useCachedModel: true });
        using model = await later.exported.load();
        assert.deepEqual([later.notes, model?.kontext], [[], true]);
        assert.deepEqual((await drawn(model!, device, ROWS, options)).rgb, expected);
      })
    ));

  test("a damaged file is refused with the reason, nothing of it stays, and it is written anew", (device) =>
    inFolder(async (cacheDir) => {
      const flags = { ckpt: SMALL, cacheDir, useCachedModel: true } as const;
      using model = await Model.load(SMALL, device);
      const { plan } = await drawn(model, device, ROWS);
      await run(device, ROWS, flags).exported.write(plan);
      const { exported: { path } } = run(device, ROWS, flags);
      const intact = await Deno.readFile(path);
      const text = new TextDecoder("latin1").decode(intact);
      const at = (what: string) => text.indexOf(what);
      const headerEnd = 8 + Number(new DataView(intact.buffer).getBigUint64(0, true));
      using file = SafetensorsFile.open(path);
      const tensor = (name: string) => file.info(name).byteOffset;
      const flipped = (place: number, bit = 0) => intact.with(place, intact[place] ^ 1 << bit);
      const prepared = file.names.filter((name) => file.info(name).dtype === "u8").at(-1)!;

      const damages: [string, Uint8Array, RegExp][] = [
        ["nothing left", new Uint8Array(0), /rule: file-size/],
        ["the size of the header alone", intact.slice(0, 8), /rule: header-size/],
        ["a half", intact.slice(0, intact.length >> 1), /rule: (truncated|header-size)/],
        ["the last byte is missing", intact.slice(0, -1), /rule: truncated/],
        ["a byte too many", new Uint8Array([...intact, 0]), /rule: trailing-bytes/],
        ["zeros behind the header", intact.slice().fill(0, headerEnd), /is damaged: /],
        [
          "the manifest",
          flipped(at("emulated GPU") < 0 ? at("NVIDIA") : at("emulated GPU")),
          /header is not/,
        ],
        ["the header's digest", flipped(at(`"sha256"`) + 12), /(header is not|rule: json)/],
        ["a tensor's name", flipped(at(`":{"dtype"`) - 1), /(header is not|rule: )/],
        ["a checksum", flipped(at(`checksums`) + 60), /(header is not|rule: )/],
        [
          "a weight",
          flipped(tensor("vae/decoder.conv_in.weight") + 5, 7),
          /vae\/decoder.conv_in.weight is not/,
        ],
        [
          "a scale",
          flipped(tensor("transformer/transformer_blocks.0.attn.to_q.weight_scale")),
          /to_q.weight_sc/,
        ],
        ["what the device prepared", flipped(tensor(prepared)), /is damaged: .* is not what was written/],
      ];
      for (const [what, bytes, reason] of damages) {
        await Deno.writeFile(path, bytes);
        const before = device.memoryUse().weights;
        const { exported, notes } = run(device, ROWS, flags);
        assert.equal(await exported.load(), undefined, what);
        assert.equal(notes.length, 1, what);
        assert.match(notes[0], reason, what);
        assert.match(notes[0], /^no exported model is used: [^\n]*; building it$/, what);
        assert.ok(device.memoryUse().weights <= before, what);
        await exported.write(plan);
        const { exported: again, notes: none } = run(device, ROWS, flags);
        using model = await again.load();
        assert.ok(model !== undefined && none.length === 0, `${what}: ${none}`);
      }

      // Any bit of the file, wherever it is.
      for (let i = 0; i < 40; i++) {
        const place = Math.floor(intact.length * (i + Math.random()) / 40);
        await Deno.writeFile(path, flipped(place, i % 8));
        const { exported, notes } = run(device, ROWS, flags);
        assert.equal(await exported.load(), undefined, `bit ${i % 8} of byte ${place} makes no difference`);
        assert.equal(notes.length, 1);
      }
    }));

  test("a package of something else is refused with what differs", (device) =>
    inFolder(async (folder) => {
      using model = await Model.load(SMALL, device);
      const plan = compose(eagerPlan(device, model.weights), bfloat16, exporting);
      const path = join(folder, "a.safetensors");
      const origin: Origin = {
        environment: { GPU: "NVIDIA H100", driver: "580.159.04", cuDNN: "9.14.0" },
        checkpoint: { "vae/model.safetensors": "100 bytes of 2026-01-01" },
        recipes: { "01_bfloat16": "on", "06_float8": "on with granularity row" },
      };
      await writePackage(path, device, plan.weights, origin);
      Package.open(path, structuredClone(origin))[Symbol.dispose]();
      const differ = (part: keyof Origin, entries: Record<string, string>, message: RegExp) =>
        assert.throws(() => Package.open(path, { ...origin, [part]: entries }), {
          name: "PackageError",
          message,
        });
      const { environment, recipes } = origin;
      const gone = { GPU: "NVIDIA H100", driver: "580.159.04" };
      differ(
        "environment",
        { ...environment, GPU: "NVIDIA H200" },
        /its GPU is NVIDIA H100, and NVIDIA H200 here$/,
      );
      differ("environment", { ...environment, driver: "590" }, /its driver is 580\.159\.04, and 590 here$/);
      differ("environment", { ...environment, cuDNN: "9.15.0" }, /its cuDNN is 9\.14\.0, and 9\.15\.0 here$/);
      differ("environment", gone, /its cuDNN is 9\.14\.0, and not there here$/);
      differ("environment", { ...environment, cuSPARSE: "1" }, /its cuSPARSE is not there, and 1 here$/);
      differ(
        "checkpoint",
        { "vae/model.safetensors": "99 bytes" },
        /its vae.* is 100 bytes of .*, and 99 bytes h/,
      );
      differ(
        "recipes",
        { ...recipes, "06_float8": "on" },
        /its 06_float8 is on with granularity row, and on here/,
      );

      const other = join(folder, "weights.safetensors");
      await Deno.copyFile(join(SMALL, "vae/diffusion_pytorch_model.safetensors"), other);
      assert.throws(
        () => Package.open(other, origin),
        /^PackageError: .* is no package: it has no manifest$/,
      );
      assert.throws(() => Package.open(join(folder, "none"), origin), PackageError);

      // Made up with care: digests fit, what the manifest says does not.
      const forge = async (change: (manifest: string) => string) => {
        using file = SafetensorsFile.open(path);
        const tensors = file.names.map((name) => {
          const { dtype, shape } = file.info(name);
          assert.ok(isDType(dtype));
          return { name, dtype, shape, bytes: file.bytes(name).slice() };
        });
        const manifest = change(file.metadata.get("manifest")!);
        const forged = join(folder, "forged.safetensors");
        await writeSafetensors(forged, tensors, { manifest, sha256: headerDigest(manifest, tensors) });
        return () => Package.open(forged, origin);
      };
      const view = (change: (view: Record<string, unknown>) => void) => (manifest: string) => {
        const parsed = JSON.parse(manifest);
        change(parsed.weights.vae["decoder.conv_in.weight"]);
        return JSON.stringify(parsed);
      };
      const refused: [(manifest: string) => string, RegExp][] = [
        [view((it) => it.offset = 1), /vae\/decoder\.conv_in\.weight is not inside/],
        [view((it) => it.shape = [2 ** 40, 1, 1, 1]), /conv_in\.weight is not inside/],
        [view((it) => it.strides = [-1, 1, 1, 1]), /conv_in\.weight is not inside/],
        [view((it) => it.strides = []), /conv_in\.weight is not inside/],
        [view((it) => it.block = "vae/nothing"), /conv_in\.weight is not inside/],
        [
          (manifest) => manifest.replace('"prepared":{', '"prepared":{"gone":"0",').replace(",}", "}"),
          /gone is missing/,
        ],
        [() => "{", /its manifest is no JSON/],
        [() => "[]", /another version of this program/],
      ];
      for (const [change, message] of refused) {
        assert.throws(await forge(change), { name: "PackageError", message });
      }
      (await forge((manifest) => manifest))()[Symbol.dispose]();
    }));

  test("changed weights, and configs that they do not fit, are refused; other recipes have their own", (device) =>
    withModelCopy("schnell-like", (ckpt) =>
      inFolder(async (cacheDir) => {
        const flags = { ckpt, cacheDir, useCachedModel: true } as const;
        using model = await Model.load(ckpt, device);
        const { plan } = await drawn(model, device, ROWS);
        await run(device, ROWS, flags).exported.write(plan);
        const refusal = async (recipes = ROWS) => {
          const { exported, notes } = run(device, recipes, flags);
          using loaded = await exported.load();
          return loaded === undefined ? notes.join() : undefined;
        };
        assert.equal(await refusal(), undefined);
        assert.match(await refusal([bfloat16, compile, exporting]) ?? "", /is not there/);
        assert.match(await refusal(RECIPES[1][1]) ?? "", /is not there/, "options are part of the recipe");

        const weights = join(ckpt, "vae/diffusion_pytorch_model.safetensors");
        const { mtime, size } = await Deno.stat(weights);
        await Deno.utime(weights, new Date(), new Date(2001, 1, 1));
        assert.match(
          await refusal() ?? "",
          new RegExp(`its vae/.*safetensors is ${size} bytes of ${mtime!.toISOString()}, and .* of 2001-`),
        );
        await Deno.utime(weights, mtime!, mtime!);
        assert.equal(await refusal(), undefined);
        const config = join(ckpt, "transformer/config.json");
        const text = await Deno.readTextFile(config);
        await Deno.writeTextFile(config, `${text} `);
        assert.match(await refusal() ?? "", /its transformer\/config\.json is /);
      })));

  test("weights that are not those of the configs make no model, and are freed", async (device) => {
    const placed = () => {
      const tensor = Tensor.empty(device, [3], "f32");
      return { tensor, weights: only(new Map([["x_embedder.weight", tensor]])) };
    };
    const { weights, tensor } = placed();
    assert.throws(() => Model.placed(SMALL, weights, false), {
      name: "ModelError",
      message: /schnell-like: the text_encoder's \S+ is missing, its config wants \[/,
    });
    assert.throws(() => device.free(tensor.memory), /freed twice/);
    using model = await Model.load(SMALL, device);
    const { transformer } = placed().weights;
    assert.throws(() => Model.placed(SMALL, { ...model.weights, transformer }, false), {
      name: "ModelError",
      message: /the transformer's x_embedder\.weight is f32 \[3\], its config wants \[\d+, \d+\]$/,
    });
  });

  test("what cannot be written leaves nothing behind, and the old file as it was", (device) =>
    inFolder(async (folder) => {
      const path = join(folder, "a.safetensors");
      const origin: Origin = { environment: {}, checkpoint: {}, recipes: {} };
      const weight = (i: number) => [`${i}.weight`, Tensor.empty(device, [64, 64], "f32")] as const;
      const weights = only(new Map([1, 2, 3, 4].map(weight)));
      await writePackage(path, device, weights, origin);
      const before = await Deno.readFile(path);

      let downloads = 0;
      const full = Object.assign(new Error("No space left on device (os error 28)"), { code: "ENOSPC" });
      const disk = changed(device, {
        download: (tensor) => ++downloads > 2 ? Promise.reject(full) : device.download(tensor),
      });
      await assert.rejects(writePackage(path, disk, weights, origin), (error) => {
        assert.ok(error instanceof FileError, String(error));
        assert.match(error.message, /^cannot write .*a\.safetensors: the disk is full; free some space or/);
        assert.match(error.hint ?? "", /^it takes 0\.\d+ GB$/);
        return true;
      });

      const controller = new AbortController();
      const reason = new UsageError("stopped");
      await assert.rejects(
        writePackage(path, device, weights, origin, {
          signal: controller.signal,
          onBytes: (written, total) => {
            if (written > total / 2) controller.abort(reason);
          },
        }),
        (error) => error === reason,
      );
      await assert.rejects(
        writePackage(join(path, "b.safetensors"), device, weights, origin),
        /^FileError: cannot write .*a\.safetensors\/b\.safetensors: /,
      );
      assert.deepEqual([namesIn(folder), await Deno.readFile(path)], [["a.safetensors"], before]);
      freeAll(weights.transformer);
    }));

  test("any weights come back as they lay, those that shared a memory too", (device) =>
    inFolder(async (folder) => {
      const path = join(folder, "a.safetensors");
      const origin: Origin = { environment: {}, checkpoint: {}, recipes: {} };
      const bytesOf = ({ memory }: Tensor) => device.download(new Tensor(memory, "u8", [memory.byteLength]));
      const property = fc.asyncProperty(fc.array(LAID, { maxLength: 5 }), async (memories) => {
        const tensors = memories.flatMap((laid, i) =>
          lay(device, laid).map((tensor, j) => [`${i}.${j}.weight`, tensor] as const)
        );
        const weights = only(new Map(tensors));
        await writePackage(path, device, weights, origin);
        using exported = Package.open(path, origin);
        const { transformer } = await exported.place(device);
        assert.deepEqual(transformer.names, tensors.map(([name]) => name));
        for (const [name, tensor] of tensors) {
          const found = transformer.get(name);
          for (const key of ["dtype", "shape", "strides", "offset"] as const) {
            assert.deepEqual(found[key], tensor[key], `${name}'s ${key}`);
          }
          assert.deepEqual(await bytesOf(found), await bytesOf(tensor), name);
          for (const [other, neighbour] of tensors) {
            const share = (a: Tensor, b: Tensor) => [a === b, a.memory === b.memory];
            assert.deepEqual(
              share(transformer.get(other), found),
              share(neighbour, tensor),
              `${name}, ${other}`,
            );
          }
        }
        freeAll(transformer);
        freeAll(weights.transformer);
      });
      await fc.assert(property, { numRuns: 40 });
    }));

  test("by default only the first package of a model is written, and none of random weights", (device) =>
    inFolder(async (folder) => {
      const cacheDir = join(folder, "cache");
      using model = await Model.load(SMALL, device);
      const { plan } = await drawn(model, device, ROWS);
      const files = () => namesIn(join(cacheDir, "exported"));
      const write = async (flags: ExportFlags, recipes = ROWS) => {
        const { exported, notes } = run(device, recipes, { ckpt: SMALL, cacheDir, ...flags });
        await exported?.write(plan);
        return notes;
      };
      assert.deepEqual(await write({ randomWeights: true }), []);
      assert.deepEqual(await write({ cacheDir: undefined }), []);
      assert.deepEqual(await write({}, ROWS.filter((recipe) => recipe !== exporting)), []);
      assert.throws(() => Deno.statSync(cacheDir), Deno.errors.NotFound);
      assert.match((await write({})).join(), /^exported /);
      const [first] = files();
      assert.deepEqual(await write({}), []);
      assert.deepEqual(await write({}, RECIPES[1][1]), []);
      assert.deepEqual(files(), [first]);
      assert.match((await write({ compile_export_mode: "export_aoti" }, RECIPES[1][1])).join(), /^exported /);
      assert.equal(files().length, 2);

      await assert.rejects(write({ cacheDir: undefined, useCachedModel: true }), {
        name: "UsageError",
        message: /kept in --cache-dir, and there is none/,
      });
      const nowhere = { cacheDir: join(cacheDir, "exported", first) };
      assert.match((await write(nowhere)).join(), /^cannot write .*\.safetensors\/exported\//);
      await assert.rejects(write({ ...nowhere, compile_export_mode: "export_aoti" }), FileError);
    }));

  test("random weights are exported and loaded as such where it is asked for", (device) =>
    inFolder(async (cacheDir) => {
      const flags = { ckpt: SMALL, cacheDir, randomWeights: true, useCachedModel: true } as const;
      const first = run(device, ROWS, flags);
      let expected: Uint8Array;
      {
        using model = await Model.random(SMALL, device, "bf16");
        const { plan, rgb } = await drawn(model, device, ROWS);
        expected = rgb;
        await first.exported.write(plan);
      }
      const second = run(device, ROWS, flags);
      using model = await second.exported.load();
      assert.equal(model!.name, "schnell-like with random weights");
      assert.deepEqual((await drawn(model!, device, ROWS)).rgb, expected);
      const real = run(device, ROWS, { ...flags, randomWeights: undefined });
      assert.equal(await real.exported.load(), undefined);
    }));
}

/** Weights of the transformer, and none of the other parts. */
function only(transformer: ReadonlyMap<string, Tensor>): Plan["weights"] {
  const none = () => weightsFrom(new Map());
  return {
    text_encoder: none(),
    text_encoder_2: none(),
    transformer: weightsFrom(transformer),
    vae: none(),
  };
}

/** A memory with weights in it, as recipes lay them. */
type Laid = {
  readonly dtype: DType;
  readonly columns: number;
  /** Of each weight. */
  readonly rows: readonly number[];
  readonly way: "behind one another" | "columns first" | "twice the same" | "with a gap";
};

const LAID: fc.Arbitrary<Laid> = fc.record({
  dtype: fc.constantFrom("f32", "bf16", "f16", "f8e4m3"),
  columns: fc.integer({ min: 1, max: 9 }),
  rows: fc.array(fc.integer({ min: 1, max: 7 }), { minLength: 1, maxLength: 4 }),
  way: fc.constantFrom("behind one another", "columns first", "twice the same", "with a gap"),
});

/** The weights of a memory full of different bytes. */
function lay(device: GpuDevice, { dtype, columns, rows, way }: Laid): Tensor[] {
  const total = rows.reduce((sum, count) => sum + count, way === "with a gap" ? 2 : 0);
  const memory = device.alloc(total * columns * dtypeBytes(dtype), "weights");
  device.upload(Uint8Array.from({ length: memory.byteLength }, (_, i) => (i * 37 + columns) & 255), memory);
  const whole = new Tensor(memory, dtype, [total, columns]);
  if (way === "columns first") return [whole.reshape([columns, total]).permute([1, 0])];
  if (way === "twice the same") return [whole, whole];
  let start = way === "with a gap" ? 1 : 0;
  return rows.map((count) => whole.narrow(0, (start += count) - count, count));
}
