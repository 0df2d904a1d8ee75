/** The weights of one part of a model as its files have them. */
import { concatBytes } from "../../ffi/concat_bytes.ts";
import { elementCount } from "../../ffi/tensor.ts";
import { ModelError } from "./errors.ts";
import {
  alignedBytes,
  type FileDType,
  fileDTypeBits,
  printable,
  type SafetensorsFile,
} from "./safetensors.ts";

/** One error for all that is wrong with the weights of a component, or of several. */
export class CheckpointError extends ModelError {
  constructor(
    /** The component's folder; the model's where several components are at fault. */
    readonly folder: string,
    what: string,
    /** Every single problem; of several components, all that is wrong with one. The message shows {@link SHOWN}. */
    readonly problems: readonly string[],
    hint: string,
  ) {
    super(`${folder}: ${what}${listed(problems, SHOWN)}`, { hint });
  }
}

const SHOWN = 50;

/** A line for each problem, the first `most` of them, and how many more there are. */
export function listed(problems: readonly string[], most: number): string {
  const rest = problems.length > most ? `\n  and ${problems.length - most} more` : "";
  return problems.slice(0, most).map((problem) => `\n  ${problem}`).join("") + rest;
}

/** A weight as the model sees it. */
export interface Weight {
  readonly dtype: FileDType;
  readonly shape: readonly number[];
  /** Row-major, little-endian, aligned for its dtype; a read-only view of the file wherever the file is aligned. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  /** Address of the first byte, for native code. Needs --allow-ffi. */
  readonly pointer: bigint;
}

/** Where a weight lies: a tensor of a file, or some of its rows. */
export interface WeightPlace {
  readonly file: SafetensorsFile;
  readonly tensor: string;
  /** First row and how many, of one range or of several behind one another; all rows when left out. */
  readonly rows?: readonly RowRange[] | undefined;
  /** The weight's shape where the file writes it with others of as many elements, `[c, c, 1, 1]` for `[c, c]`. */
  readonly shape?: readonly number[] | undefined;
}

/** First row of a matrix, and how many rows. */
export type RowRange = readonly [first: number, count: number];

/** The weights of one component, over one file or several shards. Dispose it when no weight is in use any more. */
export class ComponentWeights implements Disposable {
  readonly #shards: readonly SafetensorsFile[];
  readonly #places: ReadonlyMap<string, WeightPlace>;

  /** Made by openComponent and openSingleFile; `places` says where each weight is. */
  constructor(
    /** The component's folder, or its file. */
    readonly folder: string,
    shards: readonly SafetensorsFile[],
    places: ReadonlyMap<string, WeightPlace>,
  ) {
    this.#shards = shards;
    this.#places = places;
  }

  /** Names of all weights. */
  names(): string[] {
    return [...this.#places.keys()];
  }

  /** Whether there is a weight of this name. */
  has(name: string): boolean {
    return this.#places.has(name);
  }

  /** Size of all weights in bytes. */
  get byteLength(): number {
    return this.names().reduce((sum, name) => {
      const { dtype, shape } = this.info(name);
      return sum + elementCount(shape) * fileDTypeBits(dtype) / 8;
    }, 0);
  }

  /** Whether all shards are memory-mapped; false when they had to be read into memory (worth a warning). */
  get mapped(): boolean {
    return this.#shards.every((shard) => shard.mapped);
  }

  /** Dtype and shape of a weight, without its bytes. Throws {@link CheckpointError} when there is none. */
  info(name: string): { readonly dtype: FileDType; readonly shape: readonly number[] } {
    const { file, tensor, rows, shape } = this.#place(name);
    const info = file.info(tensor);
    const [, ...rest] = info.shape;
    const count = rows?.reduce((sum, [, count]) => sum + count, 0);
    return { dtype: info.dtype, shape: shape ?? (count === undefined ? info.shape : [count, ...rest]) };
  }

  /**
   * A weight.
   *
   * @throws {CheckpointError} when there is none of this name
   * @throws {SafetensorsError} after disposal
   */
  get(name: string): Weight {
    const { file, tensor, rows } = this.#place(name);
    const { dtype, shape } = this.info(name);
    const all = file.bytes(tensor);
    const bytes = alignedBytes(
      rows === undefined ? all : rowsOf(all, file.info(tensor).shape[0], rows),
      Math.max(1, fileDTypeBits(dtype) / 8),
    );
    return {
      dtype,
      shape,
      bytes,
      get pointer(): bigint {
        // After the file was closed `bytes` is empty and has no address: let the shard say so.
        if (bytes.byteLength === 0) return file.pointer(tensor);
        return Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes));
      },
    };
  }

  /**
   * Checks that the weights are those of a model.
   *
   * @param expected the shape of every weight that the model reads
   * @returns names in the files that the model does not read: worth a warning, not an error
   * @throws {CheckpointError} that lists every missing weight and every unexpected shape
   */
  checkShapes(expected: ReadonlyMap<string, readonly number[]>): { unused: string[] } {
    const problems: string[] = [];
    for (const [name, shape] of expected) {
      if (!this.has(name)) {
        problems.push(`missing: ${printable(name)} [${shape.join(", ")}]`);
        continue;
      }
      const found = this.info(name).shape;
      if (found.length !== shape.length || found.some((size, dim) => size !== shape[dim])) {
        problems.push(`shape: ${printable(name)} is [${found.join(", ")}], expected [${shape.join(", ")}]`);
      }
    }
    if (problems.length > 0) {
      throw new CheckpointError(
        this.folder,
        "the weights do not fit the config",
        problems,
        "config and weights must be of the same model: download both again",
      );
    }
    return { unused: this.names().filter((name) => !expected.has(name)) };
  }

  /** Closes all shards. */
  [Symbol.dispose](): void {
    for (const shard of this.#shards) shard[Symbol.dispose]();
  }

  #place(name: string): WeightPlace {
    const place = this.#places.get(name);
    if (place === undefined) {
      throw new CheckpointError(this.folder, "a weight is missing", [printable(name)], WRONG_MODEL);
    }
    return place;
  }
}

/** Some of a tensor's rows: a view of one range, or a copy of several. */
function rowsOf(
  bytes: Uint8Array<ArrayBuffer>,
  count: number,
  ranges: readonly RowRange[],
): Uint8Array<ArrayBuffer> {
  const row = bytes.length / count;
  const parts = ranges.map(([first, count]) => bytes.subarray(first * row, (first + count) * row));
  return parts.length === 1 ? parts[0] : concatBytes(parts);
}

export const WRONG_MODEL = "the folder is incomplete or of another model: download it again";
