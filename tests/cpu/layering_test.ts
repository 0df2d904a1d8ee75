/** Imports go down only: recipes and examples -> recipes/base -> kernels -> ffi; and only ffi opens native libraries. */
import assert from "node:assert/strict";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
/** Lower layers first. */
const LAYERS = ["ffi", "kernels", "recipes/base", "recipes"];

/** Height of a file's layer, or -1 for files outside all layers. */
export function layerOf(file: string): number {
  const folders = LAYERS.map((folder, layer) => ({ folder, layer }))
    .filter(({ folder }) => file.startsWith(`${folder}/`))
    .sort((a, b) => b.folder.length - a.folder.length);
  return folders[0]?.layer ?? -1;
}

/** Import specifiers of a module, static and dynamic. */
export function importsOf(text: string): string[] {
  const patterns = [
    /\bfrom\s+"([^"]+)"/g,
    /\bimport\s+"([^"]+)"/g,
    /\bimport\(\s*"([^"]+)"/g,
    /new URL\(\s*"([^"]+)"/g,
  ];
  return patterns.flatMap((pattern) => [...text.matchAll(pattern)].map((match) => match[1]));
}

function* sources(folder: string): Generator<string> {
  for (const entry of Deno.readDirSync(join(ROOT, folder))) {
    const path = `${folder}/${entry.name}`;
    if (entry.isDirectory) yield* sources(path);
    else if (entry.name.endsWith(".ts")) yield path;
  }
}

const FILES = ["ffi", "kernels", "recipes"].flatMap((folder) => [...sources(folder)]);

Deno.test("importsOf and layerOf see what they should", () => {
  assert.deepEqual(importsOf(`import { a } from "./a.ts";\nexport * from "b";\nawait import("./c.ts")`), [
    "./a.ts",
    "b",
    "./c.ts",
  ]);
  assert.deepEqual(
    ["ffi/cpu/x.ts", "kernels/x.ts", "recipes/base/x.ts", "recipes/x.ts", "mod.ts"].map(layerOf),
    [
      0,
      1,
      2,
      3,
      -1,
    ],
  );
});

Deno.test("no module imports from a layer above it", () => {
  assert.ok(FILES.length > 40, `only ${FILES.length} files were found`);
  const wrong: string[] = [];
  for (const file of FILES) {
    for (const specifier of importsOf(Deno.readTextFileSync(join(ROOT, file)))) {
      if (!specifier.startsWith(".")) continue;
      const target = relative(ROOT, join(ROOT, dirname(file), specifier));
      if (specifier.endsWith(".ts") && layerOf(target) > layerOf(file)) {
        wrong.push(`${file} imports ${target}`);
      }
      if (target.startsWith("tests/")) wrong.push(`${file} imports ${target}`);
    }
  }
  assert.deepEqual(wrong, []);
});

Deno.test("only ffi opens native libraries, and packages are imported by their bare names", () => {
  const wrong: string[] = [];
  for (const file of FILES) {
    const text = Deno.readTextFileSync(join(ROOT, file));
    if (!file.startsWith("ffi/") && text.includes("Deno.dlopen")) wrong.push(`${file} calls Deno.dlopen`);
    for (const specifier of importsOf(text)) {
      if (/^(npm|jsr|https?):/.test(specifier)) {
        wrong.push(`${file} imports ${specifier}: map it in deno.json`);
      }
    }
  }
  assert.deepEqual(wrong, []);
});
