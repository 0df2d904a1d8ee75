/** Which recipes the flags give: every combination of flux-fast's switches, with stand-ins for rungs not written yet. */
import assert from "node:assert/strict";
import type { DeviceKind } from "../../ffi/device.ts";
import { ATTENTION_PROVIDERS } from "../../recipes/05_flash_attention.ts";
import { TEXT_ENCODER_FLOAT8 } from "../../recipes/11_float8_text_encoder.ts";
import { UsageError } from "../../recipes/base/errors.ts";
import {
  createPictureParser,
  cumulativeRungs,
  kindOf,
  LADDER,
  ladderTo,
  recipesFor,
  type Rung,
  type Switches,
  writtenRecipes,
} from "../../recipes/switches.ts";

/** What each rung will run on (design.md); only float8, in T5 too, is on fewer devices by default than it runs on. */
const RUNS_ON: Readonly<Record<string, readonly DeviceKind[]>> = {
  "04_channels_last": ["cuda", "hip"],
  "05_flash_attention": ["cuda", "hip"],
  "08_export": ["cuda", "hip"],
  "13_fused_blocks": ["cuda"],
};

/** The ladder with all rungs written. */
const COMPLETE: readonly Rung[] = LADDER.map((rung) => ({
  ...rung,
  recipe: () => ({
    name: rung.name,
    exact: true,
    devices: RUNS_ON[rung.name] ?? ["cpu", "cuda", "hip"],
    apply: (plan) => plan,
  }),
}));

const names = (switches: Switches, kind: DeviceKind, ladder: readonly Rung[] = COMPLETE) =>
  recipesFor(switches, kind, ladder).map(({ name }) => name);

const TOGGLES = [
  "disable_bf16",
  "disable_fused_projections",
  "disable_channels_last",
  "disable_fa3",
  "disable_quant",
  "disable_inductor_tuning_flags",
  "useCachedModel",
] as const;
const MODES = [undefined, "compile", "export_aoti", "disabled"] as const;
const ATTENTIONS = [undefined, ...ATTENTION_PROVIDERS] as const;
const COMBINATIONS = 2 ** TOGGLES.length * MODES.length * ATTENTIONS.length;

/** All settings of all switches: every pair, and all else. */
function* combinations(): Generator<Switches> {
  for (let bits = 0; bits < 2 ** TOGGLES.length; bits++) {
    const toggles = Object.fromEntries(TOGGLES.filter((_, i) => bits >> i & 1).map((name) => [name, true]));
    for (const mode of MODES) {
      for (const attention of ATTENTIONS) {
        yield {
          ...toggles,
          ...(mode === undefined ? {} : { compile_export_mode: mode }),
          ...(attention === undefined ? {} : { attention }),
        };
      }
    }
  }
}

/** What must come out, written rung by rung: names, or the flags that the error must show. */
function expected(
  given: Switches,
  kind: DeviceKind,
): { names: string[] } | { flags: string[] } {
  const gpu = kind !== "cpu";
  const { compile_export_mode: mode, attention = "auto" } = given;
  const attends = attention !== "auto";
  const exporting = mode === "export_aoti" || given.useCachedModel === true;
  const flags: string[] = [];
  if (given.useCachedModel && (mode === "compile" || mode === "disabled")) {
    flags.push("--use-cached-model", `--compile_export_mode ${mode}`);
  } else if (exporting && !gpu) {
    flags.push(mode === "export_aoti" ? "--compile_export_mode export_aoti" : "--use-cached-model");
  }
  if (attends && !gpu) flags.push(`--attention ${attention}`);
  else if (attends && given.disable_bf16) flags.push(`--attention ${attention}`, "--disable_bf16");
  if (flags.length > 0) return { flags };
  return {
    names: [
      given.disable_bf16 ? "00_baseline_fp32" : "01_bfloat16",
      ...(mode === "disabled" ? [] : ["02_compile"]),
      ...(given.disable_fused_projections ? [] : ["03_fuse_qkv"]),
      ...(given.disable_channels_last || !gpu ? [] : ["04_channels_last"]),
      // In bfloat16 where float8 is disabled and somebody is named.
      ...(attends || !given.disable_fa3 && !given.disable_bf16 && gpu ? ["05_flash_attention"] : []),
      ...(given.disable_quant || given.disable_bf16 || !gpu ? [] : ["06_float8"]),
      ...(given.disable_inductor_tuning_flags || mode === "disabled" ? [] : ["07_tuning"]),
      ...(mode === "compile" || mode === "disabled" || !gpu ? [] : ["08_export"]),
      ...(given.disable_quant || given.disable_bf16 || !gpu ? [] : ["11_float8_text_encoder"]),
      ...(kind === "cuda" && mode !== "disabled" && !given.disable_bf16 && !given.disable_fused_projections
        ? ["13_fused_blocks"]
        : []),
    ],
  };
}

const LADDERS = [["stand-ins", COMPLETE], ["the recipes", LADDER]] as const;
const CASES = (["cpu", "cuda", "hip"] as const).flatMap((kind) =>
  LADDERS.map(([what, ladder]) => ({ kind, what, ladder }))
);
for (const { kind, what: recipes, ladder } of CASES) {
  const title = `all ${COMBINATIONS} combinations of the switches give their recipes or name what clashes`;
  Deno.test(`${title} (${kind}, ${recipes})`, () => {
    let clashes = 0;
    for (const given of combinations()) {
      const wanted = expected(given, kind);
      const what = JSON.stringify(given);
      if ("names" in wanted) {
        assert.deepEqual(names(given, kind, ladder), wanted.names, what);
        continue;
      }
      clashes++;
      assert.throws(() => names(given, kind, ladder), (error) => {
        assert.ok(error instanceof UsageError, String(error));
        assert.ok(error.hint !== undefined, "nothing says what to do");
        const text = `${error.message}\n${error.hint}`;
        // An error about the device comes first: what it names is enough.
        const shown = wanted.flags.filter((flag) => text.includes(flag));
        assert.ok(shown.length === wanted.flags.length || /not on cpu/.test(text), `${what}: ${text}`);
        return true;
      });
    }
    assert.ok(clashes > 50 && clashes < COMBINATIONS, String(clashes));
  });
}

Deno.test("everything is on by default, as far as the device runs it", () => {
  const all = COMPLETE.map(({ name }) => name).filter((name) => !/^(0[09]|12)/.test(name));
  assert.deepEqual(names({}, "cuda"), all);
  assert.deepEqual(names({}, "cpu"), ["01_bfloat16", "02_compile", "03_fuse_qkv", "07_tuning"]);
  assert.deepEqual(
    names({ cache_dit_config: { threshold: 0.1 } }, "cuda"),
    [...all, "09_first_block_cache"].toSorted(),
    "what has to be asked for",
  );
});

Deno.test("a recipe's file runs the ladder up to itself, itself for sure and nothing beyond", () => {
  const of = (name: string, given: Switches, kind: DeviceKind) => names(given, kind, ladderTo(name));
  assert.deepEqual(of("00_baseline_fp32", { disable_bf16: true }, "cpu"), ["00_baseline_fp32"]);
  assert.deepEqual(of("01_bfloat16", {}, "cuda"), ["01_bfloat16"]);
  assert.deepEqual(of("03_fuse_qkv", {}, "cpu"), ["01_bfloat16", "02_compile", "03_fuse_qkv"]);
  // On a CPU float8 is emulated, and on by this wish only.
  assert.deepEqual(of("06_float8", {}, "cpu").at(-1), "06_float8");
  assert.deepEqual(of("07_tuning", {}, "cpu").at(-1), "07_tuning");
  assert.deepEqual(
    of("08_export", {}, "cuda"),
    names({ disable_fused_blocks: true, t5_float8: "off" }, "cuda"),
  );
  assert.deepEqual(of("13_fused_blocks", {}, "cuda"), names({}, "cuda"));
  const refused = (name: string, given: Switches, kind: DeviceKind, message: RegExp) =>
    assert.throws(() => of(name, given, kind), (error) => {
      assert.ok(error instanceof UsageError);
      assert.match(`${error.message} | ${error.hint}`, message);
      return true;
    });
  refused("05_flash_attention", {}, "cpu", /05_flash_attention.ts .* not on cpu \| use --device cuda$/);
  refused("06_float8", { disable_quant: true }, "cuda", /--disable_quant clashes with recipes\/06_float8.ts/);
  refused("06_float8", { disable_bf16: true }, "cpu", /--disable_bf16 clashes with recipes\/06_float8.ts/);
  refused("02_compile", { attention: "own" }, "cuda", /recipes\/02_compile.ts clashes with --attention own/);
  refused("07_tuning", { useCachedModel: true }, "cuda", /07_tuning.ts clashes with --use-cached-model/);
});

Deno.test("an error names both flags and says what to type", () => {
  const message = (given: Switches, kind: DeviceKind = "cuda") => {
    try {
      recipesFor(given, kind, COMPLETE);
    } catch (error) {
      if (error instanceof UsageError) return `${error.message} | ${error.hint}`;
    }
    return assert.fail("no UsageError");
  };
  assert.equal(
    message({ disable_bf16: true, attention: "own" }),
    "--disable_bf16 clashes with --attention own | leave one of them out",
  );
  assert.equal(
    message({ compile_export_mode: "compile", useCachedModel: true }),
    "--compile_export_mode compile clashes with --use-cached-model | leave --use-cached-model out",
  );
  assert.equal(
    message({ compile_export_mode: "export_aoti" }, "cpu"),
    "--compile_export_mode export_aoti asks for recipe 08_export, which runs on cuda and hip, not on cpu | " +
      "use --device cuda, or leave --compile_export_mode export_aoti out",
  );
  assert.match(
    message({ attention: "own" }, "cpu"),
    /^--attention own asks for recipe 05_flash_attention, which/,
  );
});

Deno.test("--attention says who attends, --disable_fa3 that it is in bfloat16", () => {
  const found = (given: Switches) =>
    recipesFor(given, "cuda").find(({ name }) => name === "05_flash_attention");
  for (const provider of ATTENTION_PROVIDERS) {
    const given: Switches = { attention: provider };
    assert.equal(found(given)?.exact, provider === "cudnn", provider); // which has no float8
    const inBfloat16 = found({ ...given, disable_fa3: true });
    assert.equal(inBfloat16?.exact, provider === "auto" ? undefined : true, provider);
  }
  assert.equal(found({})?.exact, false);
  assert.equal(found({ disable_fa3: true }), undefined);
});

Deno.test("--t5_float8 says how T5 is quantized; without it that goes with --disable_quant", () => {
  const mode = (given: Switches, kind: DeviceKind = "cuda") =>
    recipesFor(given, kind).find(({ name }) => name === "11_float8_text_encoder")?.options?.mode;
  assert.equal(mode({}), "dynamic");
  assert.equal(mode({}, "hip"), "dynamic");
  assert.equal(mode({}, "cpu"), undefined);
  assert.equal(mode({ disable_quant: true }), undefined);
  assert.equal(mode({ disable_bf16: true }), undefined);
  assert.equal(mode({ t5_float8: "off" }), undefined);
  for (const t5_float8 of TEXT_ENCODER_FLOAT8) {
    for (const kind of ["cpu", "cuda"] as const) {
      assert.equal(mode({ t5_float8 }, kind), t5_float8);
      assert.equal(mode({ t5_float8, disable_quant: true }, kind), t5_float8, "what is asked for stays");
    }
    assert.throws(() => mode({ t5_float8, disable_bf16: true }), {
      name: "UsageError",
      message: `--disable_bf16 clashes with --t5_float8 ${t5_float8}`,
    });
  }
  assert.deepEqual(
    names({ disable_bf16: true, t5_float8: "off" }, "cuda"),
    names({ disable_bf16: true }, "cuda"),
  );
});

Deno.test("what builds on a rung that is switched off goes with it", () => {
  assert.deepEqual(names({ disable_bf16: true }, "cuda"), [
    "00_baseline_fp32",
    "02_compile",
    "03_fuse_qkv",
    "04_channels_last",
    "07_tuning",
    "08_export",
  ]);
  assert.ok(!names({ compile_export_mode: "disabled" }, "cuda").some((name) => /^0[278]/.test(name)));
});

Deno.test("flags of rungs that are not written are refused by name, and a recipe in the table ends that", () => {
  const without = (...missing: string[]) =>
    COMPLETE.map((rung) => missing.includes(rung.name) ? { ...rung, recipe: undefined } : rung);
  const refusals: [string, Switches, RegExp][] = [
    [
      "02_compile",
      { compile_export_mode: "disabled" },
      /^--compile_export_mode disabled is not.*02_compile$/,
    ],
    ["02_compile", { compile_export_mode: "compile" }, /^--compile_export_mode compile is not.*02_compile$/],
    ["03_fuse_qkv", { disable_fused_projections: true }, /^--disable_fused_projections is not.*03_fuse_qkv$/],
    ["04_channels_last", { disable_channels_last: true }, /^--disable_channels_last is.*04_channels_last$/],
    ["05_flash_attention", { disable_fa3: true }, /^--disable_fa3 is not available yet.*05_flash_attention$/],
    ["06_float8", { disable_quant: true }, /^--disable_quant is not available yet.*06_float8$/],
    ["07_tuning", { disable_inductor_tuning_flags: true }, /^--disable_inductor_tuning_flags is.*07_tuning$/],
    ["08_export", { useCachedModel: true }, /^--use-cached-model is not available yet.*08_export$/],
    ["08_export", { compile_export_mode: "export_aoti" }, /^--compile_export_mode export_aoti.*08_export$/],
    ["09_first_block_cache", { cache_dit_config: {} }, /^--cache_dit_config is.*09_first_block_cache$/],
  ];
  for (const [missing, given, message] of refusals) {
    assert.throws(() => recipesFor(given, "cuda", without(missing)), { name: "UsageError", message });
    if (missing !== "02_compile" || given.compile_export_mode === "compile") {
      recipesFor(given, "cuda", COMPLETE); // all of them are taken once the recipe is there
    }
  }
  // Without the recipe that exports, the flag that asks for none of it works.
  assert.ok(names({ compile_export_mode: "compile" }, "cuda", without("08_export")).includes("02_compile"));
  // What builds on a rung that is not written waits for it.
  assert.deepEqual(names({}, "cuda", without("02_compile")).slice(-2), [
    "06_float8",
    "11_float8_text_encoder",
  ]);
  assert.ok(!names({ disable_fused_blocks: true }, "cuda").includes("13_fused_blocks"));
});

Deno.test("the measured ladder adds one recipe at a time", () => {
  const rungs = (kind: DeviceKind, ladder: readonly Rung[] = COMPLETE) =>
    cumulativeRungs(kind, ladder).map((rung) => rung.map(({ name }) => name.slice(0, 2)).join("+"));
  assert.deepEqual(rungs("cuda").slice(0, 4), ["00", "01", "01+02", "01+02+03"]);
  assert.equal(rungs("cuda").at(-1), "01+02+03+04+05+06+07+11+13", "08 changes nothing in the drawing");
  assert.equal(
    rungs("cpu").at(-1),
    "01+02+03+06+07+11",
    "float8 is emulated there: measured, but not on by default",
  );
  const early = COMPLETE.map((rung) => rung.name === "02_compile" ? { ...rung, recipe: undefined } : rung);
  assert.equal(rungs("cuda", early).at(-1), "01+03+04+05+06+11");
});

Deno.test("the table is in order, and recipes have their row's name", () => {
  assert.deepEqual(LADDER.map(({ name }) => name), LADDER.map(({ name }) => name).toSorted());
  for (const { name, recipe, devices, needs = [] } of LADDER) {
    const made = recipe?.({});
    if (made !== undefined) {
      assert.equal(made.name, name);
      assert.ok(devices.every((kind) => made.devices.includes(kind)), `${name} is on where it does not run`);
    }
    for (const below of needs) assert.ok(below < name && LADDER.some((rung) => rung.name === below), below);
  }
  assert.ok(writtenRecipes().length >= 2);
});

Deno.test("the parser knows flux-fast's switches with its spelling, and shows those that are written", () => {
  const parser = () => createPictureParser("p", "d");
  const flags = parser().parse([
    ...["--disable_bf16", "--disable_fused_projections", "--disable_channels_last", "--disable_fa3"],
    ...["--disable_quant", "--disable_inductor_tuning_flags", "--use-cached-model"],
    ...["--compile_export_mode", "export_aoti", "--cache_dit_config", "0.1"],
  ], { from: "user" }).opts();
  const switches: Switches = flags;
  for (const name of TOGGLES) assert.equal(switches[name], true, name);
  assert.equal(switches.compile_export_mode, "export_aoti");
  assert.deepEqual(switches.cache_dit_config, { threshold: 0.1 });
  const defaults: Switches = parser().parse([], { from: "user" }).opts();
  for (const name of TOGGLES) assert.equal(defaults[name], undefined, name);
  const help = parser().helpInformation();
  for (const { flag, recipe } of LADDER) {
    assert.equal(help.includes(flag), recipe !== undefined, flag);
  }
});

Deno.test("a device's name says its kind", () => {
  assert.deepEqual(["cpu", "cuda", "cuda:3", "hip:0"].map(kindOf), ["cpu", "cuda", "cuda", "hip"]);
});
