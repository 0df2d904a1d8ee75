/**
 * Draws with a recipe, and again whenever its code changes: `deno task watch recipes/02_compile.ts`.
 *
 * A kernel file is compiled anew with the model kept loaded (live_drawing.ts). TypeScript cannot be taken out of a running
 * program, so where that has changed the program is started again, model and all.
 */
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import CONFIG from "../deno.json" with { type: "json" };
import { printLine, runProgram, userPath } from "./base/command_line.ts";
import { FileError, UsageError } from "./base/errors.ts";
import { fileChanges } from "./base/file_changes.ts";
import { hubHosts } from "./base/hub_hosts.ts";

const NAME = "watch";
const ROOT = fileURLToPath(new URL("..", import.meta.url));

const HELP =
  `Usage: deno task watch <recipe.ts> [flags of deno task generate: --device, --ckpt, --random-weights, --prompt, --output-file, ...]

Draws a picture with the recipe, and again whenever something changes:
  a kernel (kernels/*.cu, *.cuh)  is compiled anew, and the model stays loaded; needs a GPU
  TypeScript and .wat             start the program again, with the model

The recipe is a rung, with all up to it, or a file of yours that exports a recipe, on top of all others. Where a kernel does not compile, the compiler's log is shown with the file's line numbers, and the next change is waited for. Ctrl-C ends it.

Examples:
  deno task watch recipes/02_compile.ts --device cuda --ckpt ~/models/FLUX.1-schnell
  deno task watch recipes/02_compile.ts --device cuda --ckpt ~/models/FLUX.1-schnell-configs --random-weights
  deno task watch my_recipe.ts --prompt "a red apple" --output-file apple.png`;

async function runWatch([recipe, ...flags]: string[]): Promise<number> {
  if (recipe === "--help" || recipe === "-h") {
    printLine(HELP);
    return 0;
  }
  if (recipe === undefined || !recipe.endsWith(".ts")) {
    throw new UsageError("give the recipe's file first: deno task watch recipes/02_compile.ts", {
      hint: "--help says more",
    });
  }
  const path = userPath(recipe);
  try {
    await Deno.stat(path);
  } catch (cause) {
    throw new FileError(`there is no recipe ${path}`, { cause });
  }
  const folders = ["recipes", "kernels", "ffi"].flatMap((folder) => [...foldersIn(join(ROOT, folder))]);
  const changes = fileChanges([...new Set([...folders, dirname(path)])]);
  let changed = codeChange(changes);
  for (let first = true;; first = false) {
    const child = start([path, ...flags]);
    const code = await Promise.race([child.status.then(({ code }) => code), changed.then(() => undefined)]);
    // It was asked for help, or called in a wrong way, which no change of the code makes right.
    if (code === 0 || code === 2 && first) return code;
    if (code !== undefined) console.error(`${NAME}: waiting for a change of the code`);
    const file = await changed;
    changed = codeChange(changes);
    console.error(`${NAME}: ${file} changed, starting again`);
    await child.stdin.close().catch(() => {}); // which ends it
    await child.status;
  }
}

/** Resolves when something has changed that only a new process sees. */
async function codeChange(changes: AsyncGenerator<string[], void>): Promise<string> {
  for (;;) {
    const { value = [] } = await changes.next();
    const file = value.find((path) => /\.(ts|wat)$/.test(path));
    if (file !== undefined) return basename(file);
  }
}

function* foldersIn(folder: string): Generator<string> {
  yield folder;
  for (const { name, isDirectory } of Deno.readDirSync(folder)) {
    if (isDirectory) yield* foldersIn(join(folder, name));
  }
}

/** The drawing program, with the permissions of the task that draws. */
function start(args: readonly string[]): Deno.ChildProcess {
  // In the task a shell puts the hub's hosts in.
  const hosts = hubHosts(Deno.env.get("HF_ENDPOINT")).join(",");
  const words = CONFIG.tasks.generate.command.replace(/"\$\(.*?\)"/, () => hosts).split(" ").slice(1, -1);
  return new Deno.Command("deno", {
    args: [...words, "recipes/live_drawing.ts", ...args],
    cwd: ROOT,
    stdin: "piped",
  }).spawn();
}

if (import.meta.main) Deno.exit(await runProgram(NAME, () => runWatch(Deno.args)));
