/**
 * The errors that a user may see. Each message is one line: what is wrong, where, and what to do next.
 * A program prints `message` (and `hint`) without a stack trace; anything that is not a FluxError is a bug.
 */

/** Base of every expected failure. `hint` is an optional second line: the next thing to try. */
export class FluxError extends Error {
  /** What the user can do next, when it does not fit into the message. */
  readonly hint: string | undefined;
  /** The exit code of a program that ends with this error. */
  readonly exitCode: number = 1;

  /** An error for people. @param message one line. @param options `hint` is the next thing to try, `cause` what led to it. */
  constructor(message: string, options: { cause?: unknown; hint?: string } = {}) {
    super(message, "cause" in options ? { cause: options.cause } : undefined);
    this.name = new.target.name;
    this.hint = options.hint;
  }
}

/** A call into a device or a native library that failed or cannot be made. */
export class FfiError extends FluxError {}

/** A tensor whose shape, dtype or layout an operator does not take; the message names the operator. */
export class ShapeError extends FluxError {}

/** Device memory ran out: says how much was asked for, used and available. */
export class OutOfMemoryError extends FfiError {}

/** A file that could not be read or written; the message names the path and the reason. */
export class FileError extends FluxError {}

/** What was thrown, in its own words; anything can be thrown. */
export function messageOf(thrown: unknown): string {
  return thrown instanceof Error ? thrown.message : String(thrown);
}

/** The same in one line: without the list of places where a library was looked for. */
export function briefly(thrown: unknown): string {
  return messageOf(thrown).split(". Searched:")[0];
}
