/** docs/ and the docstrings: their links, their tasks, and their code, which is run as it stands. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { ShapeError } from "../../ffi/errors.ts";
import { openDevice } from "../../ffi/open.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { assertClose } from "../support/compare.ts";
import { inFolder } from "../support/folders.ts";
import { TEST_GPU } from "../support/gpu_devices.ts";
import { ended, ROOT, TASKS } from "../support/programs.ts";
import { testOn } from "../support/test_device.ts";

const DOCS = [...Deno.readDirSync(join(ROOT, "docs"))].map(({ name }) => name).filter((name) =>
  name.endsWith(".md")
);

function read(name: string): string {
  return Deno.readTextFileSync(join(ROOT, name));
}

/** The code blocks of a text, in order. */
function blocksOf(text: string): { language: string; code: string }[] {
  return [...text.matchAll(/^```(\w+)\n(.*?)^```$/gms)].map(([, language, code]) => ({ language, code }));
}

/** Code with imports of the repository's modules from wherever it stands. @param from the folder that it is written for. */
function withModules(code: string, from: string): string {
  return code.replaceAll(
    /from "(\.[^"]+\.ts)"/g,
    (_, path) => `from "${pathToFileURL(join(ROOT, from, path)).href}"`,
  );
}

/** Runs a program in the repository's folder, type-checked, and returns what it prints. */
function run(code: string): Promise<string> {
  return inFolder(async (folder) => {
    const program = join(folder, "program.ts");
    await Deno.writeTextFile(program, code);
    const config = join(ROOT, "deno.json");
    const permissions = ["--no-prompt", "--allow-read", "--allow-ffi", "--allow-env", "--allow-sys=cpus"];
    const { code: exitCode, stdout, stderr } = await ended(
      new Deno.Command("deno", {
        args: ["run", "--quiet", "--check", ...permissions, "--config", config, program],
        cwd: ROOT,
      }),
    );
    assert.equal(exitCode, 0, stderr);
    return stdout;
  });
}

Deno.test("every relative link of docs/ leads to a file, and every task that it names exists", () => {
  assert.ok(DOCS.includes("recipes.md") && DOCS.includes("kernels.md") && DOCS.includes("architecture.md"));
  for (const name of DOCS) {
    const text = read(`docs/${name}`).replaceAll(
      /^```.*?^```$/gms,
      (block) => block.startsWith("```sh") ? block : "",
    );
    for (const [, to] of text.matchAll(/\]\(([^)#]+)(?:#[^)]*)?\)/g)) {
      if (!to.includes("://")) assert.ok(Deno.statSync(join(ROOT, "docs", to)), `${name}: ${to}`);
    }
    for (const [, task] of text.matchAll(/deno task ([\w:]+)/g)) {
      assert.ok(Object.hasOwn(TASKS, task), `${name}: ${task}`);
    }
  }
});

Deno.test("the files that architecture.md's diagram names are where it says", () => {
  const [diagram] = blocksOf(read("docs/architecture.md")).filter(({ language }) => language === "mermaid");
  const boxes = [...diagram.code.matchAll(/\["<b>([\w/]+)\/<\/b>([^\]]*)"\]/g)];
  assert.equal(boxes.length, 4);
  for (const [, folder, text] of boxes) {
    for (const [file] of text.matchAll(/\b\w+\.ts\b/g)) {
      if (file !== "name.ts") assert.ok(Deno.statSync(join(ROOT, folder, file)), `${folder}/${file}`);
    }
  }
});

Deno.test("the recipe of docs/recipes.md has about 30 lines, and prints what stands behind it", async () => {
  const blocks = blocksOf(read("docs/recipes.md"));
  const at = blocks.findIndex(({ language, code }) => language === "ts" && code.includes("../mod.ts"));
  const [{ code }, { language, code: expected }] = blocks.slice(at, at + 2);
  assert.equal(language, "text");
  assert.ok(code.trim().split("\n").length <= 31, `${code.split("\n").length} lines`);
  const decibels = (text: string) => Number(/^([0-9.]+) dB\n$/.exec(text)?.[1]);
  const printed = decibels(await run(withModules(code, "examples")));
  // Processors round in different orders.
  assert.ok(Math.abs(printed - decibels(expected)) <= 2, `${printed} dB`);
});

Deno.test("the recipe of docs/recipes.md goes behind 02_compile, and refuses to follow 06_float8", async () => {
  const [{ code }] = blocksOf(read("docs/recipes.md")).filter(({ code }) => code.includes("../mod.ts"));
  const after = (names: readonly string[], calls: string) =>
    withModules(
      code.replace("import {", `import { ${names.join(", ")},`)
        .replace("draw(bfloat16, sigmoidGelu)", `draw(bfloat16, ${calls}, sigmoidGelu)`),
      "examples",
    );
  const printed = await run(after(["compile", "fuseQkv"], "compile, fuseQkv"));
  assert.ok(Number(/^([0-9.]+) dB\n$/.exec(printed)?.[1]) > 35, printed);
  await assert.rejects(run(after(["float8"], "float8()")), /sigmoid_gelu goes before 06_float8/);
});

interface SoftCap {
  readonly softCap: (x: Tensor, limit: number) => Tensor;
  readonly softCapReference: (out: Float32Array, x: Float32Array, limit: number) => void;
}

/** Calls `body` with the operator of docs/kernels.md, from its two files as they stand there. */
function withSoftCap(body: (operator: SoftCap) => Promise<void>): Promise<void> {
  return inFolder(async (folder) => {
    const blocks = blocksOf(read("docs/kernels.md"));
    const codeIn = (language: string) => blocks.find((block) => block.language === language)!.code;
    await Deno.writeTextFile(join(folder, "soft_cap.cu"), codeIn("cuda"));
    await Deno.writeTextFile(join(folder, "soft_cap.ts"), withModules(codeIn("ts"), "kernels"));
    await body(await import(pathToFileURL(join(folder, "soft_cap.ts")).href));
  });
}

const VALUES = Float32Array.from({ length: 3 * 37 }, (_, i) => (i - 50) / 4);

Deno.test("the operator of docs/kernels.md computes on the CPU, and refuses a wrong limit", () =>
  withSoftCap(async ({ softCap }) => {
    using device = await openDevice("cpu");
    const x = Tensor.fromFloat32(device, VALUES, [3, 37]);
    assertClose(
      await softCap(x, 5).toFloat32(),
      VALUES.map((value) => 5 * Math.tanh(value / 5)),
      1e-6,
      "soft cap",
    );
    assert.throws(() => softCap(x, 0), ShapeError);
  }));

testOn(
  TEST_GPU,
  "the kernel of docs/kernels.md equals its reference, strided, too",
  (device) =>
    withSoftCap(async ({ softCap, softCapReference }) => {
      const x = Tensor.fromFloat32(device, VALUES, [3, 37]);
      for (const view of [x, x.permute([1, 0]), x.narrow(1, 1, 8)]) {
        const values = await view.toFloat32();
        const expected = new Float32Array(values.length);
        softCapReference(expected, values, 3);
        assertClose(await softCap(view, 3).toFloat32(), expected, 1e-6, "soft cap");
      }
    }),
);

Deno.test("the example of mod.ts runs", async () => {
  const text = read("mod.ts").replaceAll(/^ \* ?/gm, "");
  const [{ code }] = blocksOf(text).filter(({ language }) => language === "ts");
  const program = `${withModules(code, ".")}\nconsole.log(images[0].width, images[0].rgb.length);\n`;
  assert.equal(await run(program), "256 196608\n");
});

Deno.test("every public symbol is documented: deno doc --lint", async () => {
  const { code, stdout, stderr } = await new Deno.Command("deno", {
    args: ["doc", "--quiet", "--lint", "mod.ts"],
    cwd: ROOT,
    env: { NO_COLOR: "1" },
  }).output();
  assert.equal(code, 0, [stdout, stderr].map((bytes) => new TextDecoder().decode(bytes)).join(""));
});
