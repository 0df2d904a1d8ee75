import assert from "node:assert/strict";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** The repository's folder. */
export const ROOT: string = fileURLToPath(new URL("../..", import.meta.url));

/** deno.json's tasks. */
export const TASKS: Readonly<Record<string, { readonly command: string }>> =
  JSON.parse(Deno.readTextFileSync(join(ROOT, "deno.json"))).tasks;

/**
 * A task as a process of its own, by the command line of deno.json, so that its permissions are what is tested.
 *
 * @param change what the test has to have different in a flag of that line.
 */
export function taskCommand(
  task: string,
  args: readonly string[],
  env: Readonly<Record<string, string>> = {},
  change: (flag: string) => string = (flag) => flag,
): Deno.Command {
  // What stands in "$(...)" is a command whose output takes its place, as in a shell.
  const command = TASKS[task].command.replaceAll(/"\$\((.*?)\)"/g, (_, inner: string) => {
    const [program, ...flags] = inner.split(" ");
    const { stdout } = new Deno.Command(program, { args: flags, cwd: ROOT, env: { ...env } }).outputSync();
    return new TextDecoder().decode(stdout).trim();
  });
  // What stands before it brings LD_LIBRARY_PATH out of Deno's way, as this process's own task did.
  const [program, ...flags] = command.split(" && ").at(-1)!.split(" ");
  return new Deno.Command(program, {
    args: [...flags.map(change), ...args],
    cwd: ROOT,
    env: { ...env },
    stdout: "piped",
    stderr: "piped",
  });
}

/** What a program left when it ended. */
export interface Ended {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** Runs a task to its end. */
export function runTask(task: string, ...args: string[]): Promise<Ended> {
  return ended(taskCommand(task, args));
}

/** Runs a program to its end. */
export async function ended(command: Deno.Command): Promise<Ended> {
  const { code, stdout, stderr } = await command.output();
  const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);
  return { code, stdout: text(stdout), stderr: text(stderr) };
}

/** A wrong call's arguments, exit code, and what its message is like. */
export type WrongCall = readonly [args: string[], code: number, message: RegExp];

/**
 * Checks, each in a step of `test`, that wrong calls of a task end with their codes and messages, and without output or a
 * stack trace.
 *
 * @param common arguments before each call's own.
 */
export async function checkWrongCalls(
  test: Deno.TestContext,
  task: string,
  calls: readonly WrongCall[],
  common: readonly string[] = [],
): Promise<void> {
  for (const [args, code, message] of calls) {
    await test.step(args.join(" "), async () => {
      const result = await runTask(task, ...common, ...args);
      assert.equal(result.code, code, result.stderr);
      assert.match(result.stderr, message);
      assert.equal(result.stdout, "");
      assert.ok(!/^\s+at /m.test(result.stderr), `a stack trace:\n${result.stderr}`);
    });
  }
}

/** Names in a folder, sorted. */
export function namesIn(folder: string): string[] {
  return [...Deno.readDirSync(folder)].map(({ name }) => name).sort();
}
