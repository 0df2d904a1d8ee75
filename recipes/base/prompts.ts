/** Several prompts from a file, and where their pictures go. */
import { FileError, messageOf, UsageError } from "./errors.ts";

/** More would be drawn for days. */
const MOST_PROMPTS = 100_000;

/**
 * The prompts of a text file, UTF-8, one on each line; white space around them and empty lines do not count.
 *
 * @throws FileError that names the file where it cannot be read; UsageError where it has no prompts, or far too many.
 */
export async function readPrompts(path: string): Promise<string[]> {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await Deno.readFile(path));
  } catch (cause) {
    const reason = cause instanceof Deno.errors.NotFound
      ? "there is no such file"
      : cause instanceof TypeError
      ? "it is no UTF-8 text"
      : messageOf(cause);
    throw new FileError(`the prompts in ${path} cannot be read: ${reason}`, { cause });
  }
  const prompts = text.split(/\r\n|\r|\n/).map((line) => line.trim()).filter((line) => line !== "");
  if (prompts.length === 0) {
    throw new UsageError(`${path} has no prompts`, { hint: "write one on each line" });
  }
  if (prompts.length > MOST_PROMPTS) {
    throw new UsageError(`${path} has ${prompts.length} prompts: give at most ${MOST_PROMPTS}`);
  }
  return prompts;
}

/** Files of several pictures: of `a.png` `a-01.png` to `a-12.png`; of one that file itself. */
export function numberedPaths(path: string, count: number): string[] {
  if (count === 1) return [path];
  const digits = String(count).length;
  return Array.from(
    { length: count },
    (_, i) => path.replace(/(?=\.[^./]*$)/, `-${String(i + 1).padStart(digits, "0")}`),
  );
}
