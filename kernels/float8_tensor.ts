import type { Device, Memory } from "../ffi/device.ts";
import type { DType } from "../ffi/dtype.ts";
import { ShapeError } from "../ffi/errors.ts";
import { elementCount, Tensor } from "../ffi/tensor.ts";

/** A matrix as 8-bit floats: `values * scales` is what it was, to within 1/16 of each value. */
export interface Float8Matrix {
  /** f8e4m3 `[..., k]`, dense. */
  readonly values: Tensor;
  /** f32: `[rows]`, or `[1]` for all rows. */
  readonly scales: Tensor;
  readonly rowwise: boolean;
}

/** Where scales start behind the values: at a multiple of this many bytes. */
const ALIGNMENT = 256;

/**
 * A tensor that was quantized: E4M3 values and their scales, in one memory, so that they are kept and freed together.
 * A view of the values alone would be other numbers, so it has no views; {@link values} is for those who know that.
 */
export class Float8Tensor extends Tensor implements Float8Matrix {
  readonly values: Tensor;
  readonly scales: Tensor;
  /** f32 `[rows]`: the Euclidean length of each row of what was quantized, where it was asked for. */
  readonly lengths: Tensor | undefined;

  private constructor(
    memory: Memory,
    shape: readonly number[],
    /** The dtype of what was quantized, in which products with it are given. */
    readonly source: DType,
    readonly rowwise: boolean,
    measured: boolean,
  ) {
    super(memory, "f8e4m3", shape);
    const { scales, start } = layout(shape, rowwise);
    this.values = new Tensor(memory, "f8e4m3", shape);
    this.scales = new Tensor(memory, "f32", [scales], undefined, start / 4);
    this.lengths = measured ? new Tensor(memory, "f32", [scales], undefined, start / 4 + scales) : undefined;
  }

  /**
   * Uninitialized, with a scale for each row of `shape` or one for all.
   *
   * @param source the dtype of what is quantized. @param measured whether it has the {@link lengths} of its rows.
   */
  static alloc(
    device: Device,
    shape: readonly number[],
    source: DType,
    { rowwise = true, measured = false } = {},
  ): Float8Tensor {
    const { scales, start } = layout(shape, rowwise);
    const bytes = start + 4 * scales * (measured ? 2 : 1);
    return new Float8Tensor(device.alloc(bytes), shape, source, rowwise, measured);
  }

  override reshape(): never {
    return this.#refuse("reshape");
  }

  override permute(): never {
    return this.#refuse("permute");
  }

  override narrow(): never {
    return this.#refuse("narrow");
  }

  #refuse(view: string): never {
    throw new ShapeError(`${view} of ${this}: it was quantized, and its scales would not follow`);
  }
}

/** The dtype of `x`, or of what it was before it was quantized. */
export function sourceOf(x: Tensor): DType {
  return x instanceof Float8Tensor ? x.source : x.dtype;
}

/** The scales of a result's rows where it is quantized, for kernels that store either. */
export function rowScalesOf(out: Tensor): Tensor | undefined {
  return out instanceof Float8Tensor ? out.scales : undefined;
}

/** The same for the lengths of its rows. */
export function rowLengthsOf(out: Tensor): Tensor | undefined {
  return out instanceof Float8Tensor ? out.lengths : undefined;
}

/** How many scales there are, and where they start, in bytes. */
function layout(shape: readonly number[], rowwise: boolean): { scales: number; start: number } {
  const size = elementCount(shape);
  const scales = rowwise ? elementCount(shape.slice(0, -1)) : 1;
  return { scales, start: Math.ceil(size / ALIGNMENT) * ALIGNMENT };
}
