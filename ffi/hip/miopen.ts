/**
 * MIOpen by FFI: convolutions on AMD GPUs, by its "immediate" functions, which propose solutions without running them. The
 * twin of cuda/cudnn.ts.
 *
 * MIOpen adds no bias to bfloat16 (`miopenConvolutionForwardBias` answers "not implemented"), so none is added here:
 * {@link GpuLimits.convAddsBias} says so, and kernels do it. It pads both sides of a picture alike; for others (the
 * encoder's strided convolutions) the picture is copied into zeros first.
 *
 * Source: `miopen.h` of MIOpen 3.2 (ROCm 6.2).
 */
import type { ConvPlan } from "../device.ts";
import type { DType } from "../dtype.ts";
import { FfiError, ShapeError } from "../errors.ts";
import { type OpenedLibrary, openLibrary, pinLibrary, textAt } from "../library.ts";
import { dtypeBytes } from "../dtype.ts";
import type { Tensor } from "../tensor.ts";
import type { HipContext } from "./context.ts";
import { INSTALL_ROCM } from "./versions.ts";

/** The C functions that we call. */
export const MIOPEN = {
  // miopenStatus_t miopenGetVersion(size_t *major, size_t *minor, size_t *patch)
  miopenGetVersion: { parameters: ["buffer", "buffer", "buffer"], result: "i32" },
  // const char *miopenGetErrorString(miopenStatus_t error)
  miopenGetErrorString: { parameters: ["i32"], result: "pointer" },
  // miopenStatus_t miopenCreateWithStream(miopenHandle_t *handle, miopenAcceleratorQueue_t stream)
  miopenCreateWithStream: { parameters: ["buffer", "u64"], result: "i32" },
  // miopenStatus_t miopenDestroy(miopenHandle_t handle)
  miopenDestroy: { parameters: ["u64"], result: "i32" },
  // miopenStatus_t miopenCreateTensorDescriptor(miopenTensorDescriptor_t *tensorDesc)
  miopenCreateTensorDescriptor: { parameters: ["buffer"], result: "i32" },
  // miopenStatus_t miopenSetNdTensorDescriptorWithLayout(miopenTensorDescriptor_t tensorDesc,
  //     miopenDataType_t dataType, miopenTensorLayout_t tensorLayout, const int *lens, int num_lens): lens in NCHW order
  miopenSetNdTensorDescriptorWithLayout: {
    parameters: ["u64", "i32", "i32", "buffer", "i32"],
    result: "i32",
  },
  // miopenStatus_t miopenDestroyTensorDescriptor(miopenTensorDescriptor_t tensorDesc)
  miopenDestroyTensorDescriptor: { parameters: ["u64"], result: "i32" },
  // miopenStatus_t miopenCreateConvolutionDescriptor(miopenConvolutionDescriptor_t *convDesc)
  miopenCreateConvolutionDescriptor: { parameters: ["buffer"], result: "i32" },
  // miopenStatus_t miopenInitConvolutionDescriptor(miopenConvolutionDescriptor_t convDesc,
  //     miopenConvolutionMode_t c_mode, int pad_h, int pad_w, int stride_h, int stride_w, int dilation_h,
  //     int dilation_w)
  miopenInitConvolutionDescriptor: {
    parameters: ["u64", "i32", "i32", "i32", "i32", "i32", "i32", "i32"],
    result: "i32",
  },
  // miopenStatus_t miopenDestroyConvolutionDescriptor(miopenConvolutionDescriptor_t convDesc)
  miopenDestroyConvolutionDescriptor: { parameters: ["u64"], result: "i32" },
  // miopenStatus_t miopenConvolutionForwardGetSolutionCount(miopenHandle_t handle,
  //     const miopenTensorDescriptor_t wDesc, const miopenTensorDescriptor_t xDesc,
  //     const miopenConvolutionDescriptor_t convDesc, const miopenTensorDescriptor_t yDesc, size_t *solutionCount)
  miopenConvolutionForwardGetSolutionCount: {
    parameters: ["u64", "u64", "u64", "u64", "u64", "buffer"],
    result: "i32",
  },
  // miopenStatus_t miopenConvolutionForwardGetSolution(miopenHandle_t handle, const miopenTensorDescriptor_t wDesc,
  //     const miopenTensorDescriptor_t xDesc, const miopenConvolutionDescriptor_t convDesc,
  //     const miopenTensorDescriptor_t yDesc, const size_t maxSolutionCount, size_t *solutionCount,
  //     miopenConvSolution_t *solutions)
  miopenConvolutionForwardGetSolution: {
    parameters: ["u64", "u64", "u64", "u64", "u64", "usize", "buffer", "buffer"],
    result: "i32",
  },
  // miopenStatus_t miopenConvolutionForwardCompileSolution(miopenHandle_t handle,
  //     const miopenTensorDescriptor_t wDesc, const miopenTensorDescriptor_t xDesc,
  //     const miopenConvolutionDescriptor_t convDesc, const miopenTensorDescriptor_t yDesc,
  //     const uint64_t solution_id)
  miopenConvolutionForwardCompileSolution: {
    parameters: ["u64", "u64", "u64", "u64", "u64", "u64"],
    result: "i32",
  },
  // miopenStatus_t miopenConvolutionForwardImmediate(miopenHandle_t handle, const miopenTensorDescriptor_t wDesc,
  //     const void *w, const miopenTensorDescriptor_t xDesc, const void *x,
  //     const miopenConvolutionDescriptor_t convDesc, const miopenTensorDescriptor_t yDesc, void *y,
  //     void *workSpace, size_t workSpaceSize, const uint64_t solution_id)
  miopenConvolutionForwardImmediate: {
    parameters: ["u64", "u64", "u64", "u64", "u64", "u64", "u64", "u64", "u64", "usize", "u64"],
    result: "i32",
  },
} as const satisfies Deno.ForeignLibraryInterface;

/** File names of the library. */
export const MIOPEN_SONAMES: readonly string[] = ["libMIOpen.so.1"];

/** Values, sizes and offsets of the header, under its names. */
export const HEADER = {
  miopenHalf: 0,
  miopenFloat: 1,
  miopenBFloat16: 5,
  miopenTensorNCHW: 0,
  miopenTensorNHWC: 1,
  miopenConvolution: 0,
  "sizeof(miopenConvSolution_t)": 32,
  "offsetof(miopenConvSolution_t, workspace_size)": 8,
  "offsetof(miopenConvSolution_t, solution_id)": 16,
} as const;

const DATA_TYPES: Partial<Record<DType, number>> = {
  f32: HEADER.miopenFloat,
  f16: HEADER.miopenHalf,
  bf16: HEADER.miopenBFloat16,
};

/** Solutions that are measured, at most: some compile for seconds. */
const MEASURED = 5;
/** Scratch starts at multiples of this. */
const ALIGNMENT = 256;

/** A way to do a convolution. */
interface Solution {
  readonly id: bigint;
  readonly workspaceBytes: number;
}

/** The descriptors of a convolution, and the solution that was chosen for it. */
interface Prepared extends Disposable {
  readonly weight: bigint;
  readonly x: bigint;
  readonly convolution: bigint;
  readonly out: bigint;
  readonly solution: Solution;
}

/** Where the tensors of a convolution are. */
interface Addresses {
  readonly x: bigint;
  readonly weight: bigint;
  readonly out: bigint;
  /** Bytes at the start of the scratch that x lies in where it was padded. */
  readonly padded: number;
}

/** Convolutions, prepared once for each layout of their tensors. */
export class Miopen implements Disposable {
  /** E.g. `"3.2.0"`. */
  readonly version: string;
  readonly #library: OpenedLibrary<typeof MIOPEN>;
  readonly #miopen: OpenedLibrary<typeof MIOPEN>["symbols"];
  readonly #prepared = new Map<string, Prepared>();
  #opened: bigint | undefined;

  /**
   * Finds and opens libMIOpen; the handle is made at the first use.
   *
   * @throws {FfiError} where it, or a library that it needs, is not installed
   */
  constructor(private readonly context: HipContext) {
    this.#library = openLibrary("MIOpen", MIOPEN, {
      sonames: MIOPEN_SONAMES,
      hint: `apt-get install miopen-hip, or ${INSTALL_ROCM}`,
    });
    this.#miopen = this.#library.symbols;
    pinLibrary(this.#library.path);
    const numbers = [0, 0, 0].map(() => new BigUint64Array(1));
    const [major, minor, patch] = numbers;
    this.#check(this.#miopen.miopenGetVersion(major, minor, patch), "miopenGetVersion");
    this.version = numbers.map(([number]) => number).join(".");
  }

  /**
   * Issues a convolution without bias to the device's stream. `x`, `weight` and `out` are all f32, all bf16 or all f16; all
   * of them dense NCHW with `[o, c, kh, kw]` weights, or all NHWC with weights `[o, kh, kw, c]` in memory. Sums are in f32.
   *
   * @throws {ShapeError} for other layouts and a bias
   * @throws {FfiError} with the tensors, where no solution takes them, and for every other status
   */
  conv(plan: ConvPlan): void {
    const { x, weight, out } = plan;
    if (out.size === 0) return;
    const channelsLast = orderOf(plan);
    const key = describe(plan, channelsLast);
    if (plan.bias !== undefined) throw new ShapeError(`MIOpen adds no bias: ${key}`);
    this.context.driver.enter();
    const [top, left, bottom, right] = plan.padding;
    const alike = top === bottom && left === right;
    const paddedShape = [x.shape[0], x.shape[1], x.shape[2] + top + bottom, x.shape[3] + left + right];
    const bytes = alike ? 0 : paddedShape.reduce((a, b) => a * b) * dtypeBytes(x.dtype);
    const addresses: Addresses = {
      x: x.pointer,
      weight: weight.pointer,
      out: out.pointer,
      padded: Math.ceil(bytes / ALIGNMENT) * ALIGNMENT,
    };
    const pad = () => this.#pad(plan, paddedShape, channelsLast, this.context.workspace(addresses.padded));
    let prepared = this.#prepared.get(key);
    if (prepared === undefined) {
      const shape = alike ? x.shape : paddedShape;
      prepared = this.#prepare(key, plan, shape, alike ? [top, left] : [0, 0], channelsLast, addresses, pad);
      this.#prepared.set(key, prepared);
    }
    if (!alike) pad();
    const status = this.#issue(prepared, prepared.solution, addresses);
    if (status !== 0) throw this.#failure(status, "miopenConvolutionForwardImmediate", key);
  }

  [Symbol.dispose](): void {
    if (this.#opened !== undefined) {
      this.context.driver.enter();
      for (const prepared of this.#prepared.values()) prepared[Symbol.dispose]();
      this.#check(this.#miopen.miopenDestroy(this.#opened), "miopenDestroy");
    }
    this.#library.close();
  }

  get #handle(): bigint {
    if (this.#opened === undefined) {
      const { stream } = this.context;
      this.#opened = this.#created(
        "miopenCreateWithStream",
        (out) => this.#miopen.miopenCreateWithStream(out, stream),
      );
    }
    return this.#opened;
  }

  #prepare(
    key: string,
    { x, weight, out, stride }: ConvPlan,
    xShape: readonly number[],
    [padHeight, padWidth]: readonly number[],
    channelsLast: boolean,
    addresses: Addresses,
    pad: () => void,
  ): Prepared {
    const { miopenCreateConvolutionDescriptor, miopenDestroyConvolutionDescriptor } = this.#miopen;
    using made = new DisposableStack();
    const layout = channelsLast ? HEADER.miopenTensorNHWC : HEADER.miopenTensorNCHW;
    const tensors = [weight.shape, xShape, out.shape].map((shape) =>
      this.#tensor(made, DATA_TYPES[x.dtype]!, layout, shape)
    );
    const convolution = this.#created("miopenCreateConvolutionDescriptor", miopenCreateConvolutionDescriptor);
    made.defer(() =>
      this.#check(miopenDestroyConvolutionDescriptor(convolution), "miopenDestroyConvolutionDescriptor")
    );
    this.#check(
      this.#miopen.miopenInitConvolutionDescriptor(
        convolution,
        HEADER.miopenConvolution,
        padHeight,
        padWidth,
        stride,
        stride,
        1,
        1,
      ),
      "miopenInitConvolutionDescriptor",
    );
    const described = { weight: tensors[0], x: tensors[1], convolution, out: tensors[2] };
    const solutions = this.#solutions(key, described);
    const index = this.context.choose(`MIOpen ${this.version} ${key}`, () => {
      if (addresses.padded > 0) pad();
      return solutions.map((solution) => () =>
        this.#compiles(described, solution) && this.#issue(described, solution, addresses) === 0
      );
    });
    const solution = solutions[index] ?? solutions[0];
    if (!this.#compiles(described, solution)) {
      throw new FfiError(`MIOpen ${this.version} does not compile its solution ${solution.id} for ${key}`);
    }
    const kept = made.move();
    return { ...described, solution, [Symbol.dispose]: () => kept.dispose() };
  }

  #tensor(made: DisposableStack, dataType: number, layout: number, shape: readonly number[]): bigint {
    const { miopenCreateTensorDescriptor, miopenSetNdTensorDescriptorWithLayout } = this.#miopen;
    const descriptor = this.#created("miopenCreateTensorDescriptor", miopenCreateTensorDescriptor);
    made.defer(() =>
      this.#check(
        this.#miopen.miopenDestroyTensorDescriptor(descriptor),
        "miopenDestroyTensorDescriptor",
      )
    );
    const lengths = Int32Array.from(shape);
    this.#check(
      miopenSetNdTensorDescriptorWithLayout(descriptor, dataType, layout, lengths, lengths.length),
      "miopenSetNdTensorDescriptorWithLayout",
    );
    return descriptor;
  }

  /** Ways to do it, what MIOpen thinks the fastest first. */
  #solutions(
    key: string,
    { weight, x, convolution, out }: Omit<Prepared, "solution" | typeof Symbol.dispose>,
  ) {
    const { miopenConvolutionForwardGetSolutionCount, miopenConvolutionForwardGetSolution } = this.#miopen;
    const count = new BigUint64Array(1);
    this.#check(
      miopenConvolutionForwardGetSolutionCount(this.#handle, weight, x, convolution, out, count),
      "miopenConvolutionForwardGetSolutionCount",
      key,
    );
    const stride = HEADER["sizeof(miopenConvSolution_t)"];
    const most = Math.min(MEASURED, Number(count[0]));
    const results = new Uint8Array(most * stride);
    if (most > 0) {
      this.#check(
        miopenConvolutionForwardGetSolution(
          this.#handle,
          weight,
          x,
          convolution,
          out,
          BigInt(most),
          count,
          results,
        ),
        "miopenConvolutionForwardGetSolution",
        key,
      );
    }
    const view = new DataView(results.buffer);
    const solutions = Array.from({ length: Math.min(most, Number(count[0])) }, (_, i): Solution => ({
      id: view.getBigUint64(i * stride + HEADER["offsetof(miopenConvSolution_t, solution_id)"], true),
      workspaceBytes: Number(
        view.getBigUint64(i * stride + HEADER["offsetof(miopenConvSolution_t, workspace_size)"], true),
      ),
    }));
    if (solutions.length === 0) throw new FfiError(`MIOpen ${this.version} has no solution for ${key}`);
    return solutions;
  }

  /** Loads a solution's kernels, or compiles them. */
  #compiles(
    { weight, x, convolution, out }: Pick<Prepared, "weight" | "x" | "convolution" | "out">,
    { id }: Solution,
  ): boolean {
    const { miopenConvolutionForwardCompileSolution: compile } = this.#miopen;
    return compile(this.#handle, weight, x, convolution, out, id) === 0;
  }

  /** Returns the library's status. */
  #issue(
    { weight, x, convolution, out }: Pick<Prepared, "weight" | "x" | "convolution" | "out">,
    { id, workspaceBytes }: Solution,
    addresses: Addresses,
  ): number {
    const { padded } = addresses;
    const scratch = padded + workspaceBytes === 0 ? 0n : this.context.workspace(padded + workspaceBytes);
    return this.#miopen.miopenConvolutionForwardImmediate(
      this.#handle,
      weight,
      addresses.weight,
      x,
      padded === 0 ? addresses.x : scratch,
      convolution,
      out,
      addresses.out,
      workspaceBytes === 0 ? 0n : scratch + BigInt(padded),
      BigInt(workspaceBytes),
      id,
    );
  }

  /** The picture with its zeros around it, at `target`. */
  #pad({ x, padding }: ConvPlan, shape: readonly number[], channelsLast: boolean, target: bigint): void {
    const { driver, stream } = this.context;
    const [top, left] = padding;
    const element = dtypeBytes(x.dtype);
    driver.memsetD8Async(target, 0, shape.reduce((a, b) => a * b) * element, stream);
    const [images, channels, height, width] = x.shape;
    const [pixel, planes] = channelsLast ? [channels * element, images] : [element, images * channels];
    const [row, paddedRow] = [width * pixel, shape[3] * pixel];
    for (let plane = 0; plane < planes; plane++) {
      const to = plane * shape[2] * paddedRow + top * paddedRow + left * pixel;
      const from = x.pointer + BigInt(plane * height * row);
      driver.memcpy2DAsync(target + BigInt(to), paddedRow, from, row, row, height, stream);
    }
  }

  #created(call: string, create: (out: BigUint64Array<ArrayBuffer>) => number): bigint {
    const out = new BigUint64Array(1);
    this.#check(create(out), call);
    return out[0];
  }

  #check(status: number, call: string, context?: string): void {
    if (status !== 0) throw this.#failure(status, call, context);
  }

  #failure(status: number, call: string, context: string | undefined): FfiError {
    const words = textAt(this.#miopen.miopenGetErrorString(status)) ?? "no text";
    return new FfiError(
      `MIOpen: ${call} failed${context === undefined ? "" : ` for ${context}`}: ${words} (${status})`,
    );
  }
}

/** Whether all tensors have their channels last; throws {@link ShapeError} where they are in no common order. */
function orderOf(plan: ConvPlan): boolean {
  const { x, weight, out } = plan;
  const all = [x, weight, out];
  const dense = (order: readonly number[]) => all.every((tensor) => tensor.permute(order).isContiguous);
  const known = all.every(({ dtype }) => dtype === x.dtype && DATA_TYPES[dtype] !== undefined);
  if (known && dense([0, 1, 2, 3])) return false;
  if (known && dense([0, 2, 3, 1])) return true;
  throw new ShapeError(`MIOpen takes dense tensors in one order and dtype, not ${describe(plan, undefined)}`);
}

/** A convolution in words: the key of what is prepared for it, and part of messages. */
function describe({ x, weight, out, stride, padding }: ConvPlan, channelsLast: boolean | undefined): string {
  const strides = ({ strides }: Tensor) => channelsLast === undefined ? ` with strides [${strides}]` : "";
  const order = channelsLast === undefined ? "" : channelsLast ? " NHWC" : " NCHW";
  return `conv${order} x ${x}${strides(x)}, weight ${weight}${strides(weight)}, out ${out}${strides(out)}, ` +
    `stride ${stride}, padding [${padding}]`;
}
