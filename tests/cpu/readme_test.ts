/** The README's commands, links and code are tried, so that they cannot rot. */
import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { inFolder } from "../support/folders.ts";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const README = Deno.readTextFileSync(join(ROOT, "README.md"));
const CONFIG: { readonly tasks: Readonly<Record<string, { readonly command: string }>> } = JSON.parse(
  Deno.readTextFileSync(join(ROOT, "deno.json")),
);

Deno.test("every task that the README names exists", () => {
  const tasks = [...README.matchAll(/deno task (\S+?)[\s`]/g)].map((match) => match[1]);
  assert.ok(tasks.includes("generate") && tasks.includes("test") && tasks.includes("check"));
  for (const task of tasks) assert.ok(Object.hasOwn(CONFIG.tasks, task), task);
});

for (const document of ["README.md", "docs/amd.md"]) {
  Deno.test(`every relative link of ${document} leads to a file`, () => {
    const text = Deno.readTextFileSync(join(ROOT, document));
    const links = [...text.matchAll(/\]\(([^)#]+)\)/g)].map((match) => match[1]).filter((to) =>
      !to.includes("://")
    );
    assert.ok(links.length > 5);
    for (const link of links) assert.ok(Deno.statSync(join(ROOT, dirname(document), link)), link);
  });
}

Deno.test("the README's programs run: a picture, another operator, LoRAs", async () => {
  const blocks = [...README.matchAll(/```ts\n(.*?)```/gs)].map((match) => match[1]);
  const blockWith = (text: string) => {
    const found = blocks.filter((block) => block.includes(text));
    assert.equal(found.length, 1, text);
    return found[0];
  };
  const [program, operator, loras] = ["import {", "ops: {", "new Loras"].map(blockWith);
  assert.equal(blocks.length, 3, "a block that no test runs");
  const code = `
    ${
    program.replace("./mod.ts", pathToFileURL(join(ROOT, "mod.ts")).href).replace(
      "import {",
      "import { Loras,",
    )
  }
    {
      ${operator}
      const sizes = [images, other.images].map(([{ rgb }]) => rgb.length);
      console.log(sizes.every((size) => size === settings.height * settings.width * 3));
    }
    {
      using model = await Model.load("tests/golden/schnell-like", device);
      const plan = compose(eagerPlan(device, model.weights), bfloat16);
      ${
    loras.replace("style.safetensors", "tests/golden/lora/schnell-like.a.safetensors")
      .replace("other.safetensors", "tests/golden/lora/schnell-like.b.safetensors")
  }
      console.log("merged and removed");
    }`;
  await inFolder(async (folder) => {
    const path = join(folder, "program.ts");
    await Deno.writeTextFile(path, code);
    const permissions = ["--allow-read", "--allow-ffi", "--allow-env", "--allow-sys=cpus"];
    const { code: exitCode, stdout, stderr } = await new Deno.Command("deno", {
      args: ["run", "--no-prompt", "--check", "--config", join(ROOT, "deno.json"), ...permissions, path],
      cwd: ROOT,
    }).output();
    assert.equal(exitCode, 0, new TextDecoder().decode(stderr));
    assert.match(new TextDecoder().decode(stdout), /4\/4\ntrue\nmerged and removed\n$/);
  });
});

Deno.test("tasks that start programs do so where LD_LIBRARY_PATH is set, too", () => {
  // Deno starts one with that variable only where all programs may be started. Our loader reads the folders in the other one.
  const moved = 'export FLUX_LIB_PATH="$FLUX_LIB_PATH:$LD_LIBRARY_PATH" && unset LD_LIBRARY_PATH && ';
  const starting = Object.entries(CONFIG.tasks).filter(([, { command }]) => / --allow-run/.test(command));
  assert.ok(starting.length > 0);
  for (const [task, { command }] of starting) assert.ok(command.includes(moved), task);
});
