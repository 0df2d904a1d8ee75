import { FileError, FluxError, messageOf } from "../../ffi/errors.ts";

export { FileError, FluxError, messageOf };

/** A wrong flag, argument or option value: the caller has to change the call. Exit code 2. */
export class UsageError extends FluxError {
  /** 2, as for every wrong call. */
  override readonly exitCode: number = 2;
}

/** A model folder (config, tokenizer, weights) that is missing, damaged or not supported. */
export class ModelError extends FluxError {}
