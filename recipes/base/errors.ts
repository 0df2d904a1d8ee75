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

  constructor(message: string, options: { cause?: unknown; hint?: string } = {}) {
    super(message, "cause" in options ? { cause: options.cause } : undefined);
    this.name = new.target.name;
    this.hint = options.hint;
  }
}

/** A wrong flag, argument or option value: the caller has to change the call. Exit code 2. */
export class UsageError extends FluxError {
  override readonly exitCode: number = 2;
}

/** A model folder (config, tokenizer, weights) that is missing, damaged or not supported. */
export class ModelError extends FluxError {}

/** A file that could not be read or written; the message names the path and the reason. */
export class FileError extends FluxError {}
