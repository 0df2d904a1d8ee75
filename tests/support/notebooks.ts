/** Notebooks of examples/, run by Deno's Jupyter kernel through Python's jupyter_client. */
import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";
import { ROOT } from "./programs.ts";

/** One output of a cell, as notebook files have them. */
export interface CellOutput {
  readonly output_type: "stream" | "display_data" | "execute_result" | "error";
  /** Of a stream. */
  readonly text?: string;
  /** Content by MIME type. */
  readonly data?: Readonly<Record<string, string>>;
  /** Of an error. */
  readonly ename?: string;
  readonly evalue?: string;
}

/** A code cell that was run. */
export interface RunCell {
  readonly source: string;
  readonly outputs: readonly CellOutput[];
}

/** The user's Python, and Debian's own, for which its packages are. */
const PYTHONS = ["python3", "/usr/bin/python3"];

/** A Python that has jupyter_client, or undefined. */
const PYTHON = PYTHONS.find((python) => {
  try {
    return new Deno.Command(python, { args: ["-c", "import jupyter_client"] }).outputSync().success;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof Deno.errors.NotCapable) return false;
    throw error;
  }
});

/** Why notebooks cannot be run here, or undefined where they can. */
export const missingJupyter: string | undefined = PYTHON === undefined
  ? "no jupyter_client: apt-get install python3-jupyter-client"
  : undefined;

/** The notebook's file. */
export function notebookPath(name: string): string {
  return join(ROOT, "examples", `${name}.ipynb`);
}

/**
 * Runs a notebook from top to bottom; fails where a cell does, or is not reached.
 *
 * @param replacements what is replaced in its cells before. @param env what the kernel finds in its environment, too.
 */
export async function runNotebook(
  name: string,
  replacements: Readonly<Record<string, string>> = {},
  env: Readonly<Record<string, string>> = {},
): Promise<RunCell[]> {
  const path = notebookPath(name);
  const script = fileURLToPath(new URL("run_notebook.py", import.meta.url));
  const { code, stdout, stderr } = await new Deno.Command(PYTHON!, {
    args: [script, Deno.execPath(), path, ...Object.entries(replacements).flat()],
    env: { ...env, NO_COLOR: "1" },
  }).output();
  assert.equal(code, 0, new TextDecoder().decode(stderr));
  const cells: RunCell[] = JSON.parse(new TextDecoder().decode(stdout));
  for (const { source, outputs } of cells) {
    const error = outputs.find(({ output_type }) => output_type === "error");
    assert.ok(error === undefined, `${name}: ${error?.ename}: ${error?.evalue} in\n${source}`);
  }
  const all: { cell_type: string }[] = JSON.parse(await Deno.readTextFile(path)).cells;
  assert.equal(cells.length, all.filter(({ cell_type }) => cell_type === "code").length);
  return cells;
}

/** All that a notebook's cells printed. */
export function printed(cells: readonly RunCell[]): string {
  return cells.flatMap(({ outputs }) => outputs.map(({ text }) => text ?? "")).join("");
}

/** All content of a MIME type that cells have shown, in order. */
export function shown(cells: readonly RunCell[], type: string): string[] {
  return cells.flatMap(({ outputs }) => outputs.flatMap(({ data }) => data?.[type] ?? []));
}

/** A notebook's code cells as one program, for the folder examples/. */
export function notebookProgram(name: string): string {
  const { cells }: { cells: { cell_type: string; source: string[] }[] } = JSON.parse(
    Deno.readTextFileSync(notebookPath(name)),
  );
  return cells.filter(({ cell_type }) => cell_type === "code").map(({ source }) => source.join("")).join("\n")
    .replaceAll('from "../', `from "${pathToFileURL(ROOT).href}`);
}
