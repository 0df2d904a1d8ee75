/** `--help` of every program teaches with examples, and a missing library sends to the doctor. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { LADDER } from "../../recipes/switches.ts";
import { inFolder } from "../support/folders.ts";
import { ended, ROOT, TASKS } from "../support/programs.ts";

/** All programs: files that run by themselves, but for the one that `watch` starts. */
const PROGRAMS = ["recipes", "examples"].flatMap((folder) =>
  [...Deno.readDirSync(join(ROOT, folder))].map(({ name }) => `${folder}/${name}`).filter((path) =>
    path.endsWith(".ts") &&
    (path.startsWith("examples/") || Deno.readTextFileSync(join(ROOT, path)).includes("import.meta.main"))
  )
).filter((path) => path !== "recipes/live_drawing.ts").sort();

function run(program: string, args: string[], env: Record<string, string> = {}) {
  const permissions = [
    "--no-prompt",
    "--allow-read",
    "--allow-write",
    "--allow-env",
    "--allow-ffi",
    "--allow-sys=cpus,statfs",
  ];
  return ended(
    new Deno.Command("deno", {
      args: ["run", "--quiet", ...permissions, join(ROOT, program), ...args],
      cwd: ROOT,
      env: { NO_COLOR: "1", ...env },
    }),
  );
}

Deno.test("every program is found", () => {
  for (const name of ["gen_image", "run_benchmark", "ladder", "doctor", ...LADDER.map(({ name }) => name)]) {
    assert.ok(PROGRAMS.includes(`recipes/${name}.ts`), name);
  }
});

for (const program of PROGRAMS) {
  Deno.test(`${program} --help has examples of itself, with flags that it has`, async () => {
    const { code, stdout, stderr } = await run(program, ["--help"]);
    assert.equal(code, 0, stderr);
    const [usage, examples] = stdout.split(/^Examples.*:$/m);
    assert.ok(examples !== undefined, stdout);
    const lines = examples.split("\n").filter((line) => line.startsWith("  ")).map((line) => line.trim());
    assert.ok(lines.length >= 2, examples);
    for (const line of lines) {
      const [, task, file] = /^(?:\w+=\S+ )?deno (?:task (\S+)|run -A (\S+))/.exec(line) ?? [];
      assert.ok(file === program || TASKS[task]?.command.includes(program), line);
      for (const [flag] of line.matchAll(/(?<= )--[\w-]+/g)) {
        assert.ok(usage.includes(flag), `${flag} in: ${line}`);
      }
    }
  });
}

Deno.test("a wrong call of the examples or the doctor is one line and where to look, without a stack trace", async () => {
  const edit = await run("examples/kontext_edit.ts", ["only-a-folder"]);
  assert.equal(edit.code, 2);
  assert.match(edit.stderr, /^kontext_edit: give a model folder, .*\n {2}--help has examples\n$/);
  const doctor = await run("recipes/doctor.ts", ["--jsno"]);
  assert.equal(doctor.code, 2);
  assert.match(doctor.stderr, /unknown option '--jsno'[\s\S]*--help lists all flags with examples/);
});

Deno.test("a missing library's first advice is the doctor", () =>
  inFolder(async (folder) => {
    // Files that are no libraries, in the place that is searched first.
    for (const name of ["libcuda.so.1", "libamdhip64.so.7", "libamdhip64.so.6"]) {
      await Deno.writeTextFile(join(folder, name), "no library");
    }
    for (const device of ["cuda", "hip"]) {
      const args = ["--device", device, "--output-file", join(folder, "a.png")];
      const { code, stderr } = await run("recipes/gen_image.ts", args, { FLUX_LIB_PATH: folder });
      if (code === 0) continue; // the next place has a GPU's
      assert.match(stderr, /was found but could not be opened/);
      assert.match(
        stderr,
        /\n {2}deno task doctor shows what is found and how to install the rest; take /,
      );
    }
  }));
