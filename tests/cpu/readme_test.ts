/** The README's commands, links and code are tried, so that they cannot rot. */
import assert from "node:assert/strict";
import { dirname, join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const README = Deno.readTextFileSync(join(ROOT, "README.md"));
const CONFIG = JSON.parse(Deno.readTextFileSync(join(ROOT, "deno.json")));

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

Deno.test("the README's program draws a picture", async () => {
  const code = [...README.matchAll(/```ts\n(.*?)```/gs)].map((match) => match[1]).find((text) =>
    text.includes("import")
  );
  assert.ok(code !== undefined);
  const folder = await Deno.makeTempDir();
  const program = join(folder, "program.ts");
  const config = join(ROOT, "deno.json");
  const modulePath = pathToFileURL(join(ROOT, "mod.ts")).href;
  await Deno.writeTextFile(
    program,
    code.replace("./mod.ts", modulePath) +
      "\nconsole.log(images[0].rgb.length === settings.height * settings.width * 3);\n",
  );
  const { code: exitCode, stdout, stderr } = await new Deno.Command("deno", {
    args: [
      "run",
      "--no-prompt",
      "--check",
      "--config",
      config,
      "--allow-read",
      "--allow-ffi",
      "--allow-env",
      program,
    ],
    cwd: ROOT,
  }).output();
  assert.equal(exitCode, 0, new TextDecoder().decode(stderr));
  assert.match(new TextDecoder().decode(stdout), /4\/4\ntrue\n$/);
});
