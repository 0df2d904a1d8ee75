/** What vendors' libraries do, on the emulated GPU: products, convolutions and attention by simt_runtime.cpp. */
import { columnMajorGemm } from "../../ffi/column_major_gemm.ts";
import { flashAttention3TakesPlan } from "../../ffi/cuda/flash_attn3.ts";
import type { ConvPlan, MatmulPlan } from "../../ffi/device.ts";
import type { DType } from "../../ffi/dtype.ts";
import { FfiError } from "../../ffi/errors.ts";
import { type Float8Format, float8FormatOf } from "../../ffi/float8.ts";
import type { AttentionPlan, ConvAddPlan, GpuDevice } from "../../ffi/gpu.ts";
import { aiterTakesPlan } from "../../ffi/hip/aiter.ts";
import type { OpenedLibrary } from "../../ffi/library.ts";
import { Tensor } from "../../ffi/tensor.ts";
import { type Architecture, openCompiled, runtimeLibrary } from "./emulated_compiler.ts";
import type { EmulatedStream } from "./emulated_stream.ts";

export class EmulatedLibraries implements Disposable {
  readonly #runtime: OpenedLibrary<typeof RUNTIME>;

  /** @param hasAttention whether there is one for attention that no library is named for. */
  constructor(
    private readonly device: GpuDevice,
    private readonly stream: EmulatedStream,
    architecture: Architecture,
    private readonly hasAttention: boolean,
  ) {
    this.#runtime = openCompiled(runtimeLibrary(architecture), RUNTIME);
  }

  matmul(plan: MatmulPlan): void {
    if (columnMajorGemm(plan) === undefined) return; // throws for what cuBLASLt would not take
    const { a, b, bias, out, alpha = 1, activation, scaleA, scaleB } = plan;
    const batched = (x: Tensor) =>
      x.rank === 3 ? x : new Tensor(x.memory, x.dtype, [1, ...x.shape], [0, ...x.strides], x.offset);
    this.#call(
      "matmul",
      [batched(a), batched(b), bias, scaleA, scaleB, batched(out)],
      ([a, b, bias, scaleA, scaleB, out]) => {
        const gelu = activation === undefined ? 0 : 1;
        this.#runtime.symbols.simtMatmul(a, b, bias, scaleA, scaleB, out, alpha, gelu);
      },
    );
  }

  conv(plan: ConvPlan): void {
    this.#conv("conv", plan, undefined);
  }

  /** As cuDNN: not in f32. */
  convAdd(plan: ConvAddPlan): boolean {
    if (this.device.kind !== "cuda" || plan.x.dtype === "f32") return false;
    this.#conv("convAdd", plan, plan.residual);
    return true;
  }

  #conv(
    what: string,
    { x, weight, bias, out, stride, padding }: ConvPlan,
    residual: Tensor | undefined,
  ): void {
    const [images, channels, height, width] = x.shape;
    const [filters, , rows, columns] = weight.shape;
    const [top, left, bottom, right] = padding;
    // cuDNN takes all of them NCHW or all of them NHWC.
    const pictures = [x, weight, out, ...(residual === undefined ? [] : [residual])];
    const inOneOrder = (order: readonly number[]) =>
      pictures.every((tensor) => tensor.permute(order).isContiguous);
    if (!inOneOrder([0, 1, 2, 3]) && !inOneOrder([0, 2, 3, 1])) {
      throw new FfiError(`${this.device.name}: ${what}: ${pictures.join(", ")} differ in layout`);
    }
    requireShape(what, "weight", weight, [filters, channels, rows, columns]);
    if (bias !== undefined) requireShape(what, "bias", bias, [filters]);
    if (bias !== undefined && this.device.limits.convAddsBias === false) {
      throw new FfiError(`${this.device.name}: ${what}: there is no bias here`);
    }
    for (const other of [...pictures, bias ?? x]) {
      if (other.dtype !== x.dtype) {
        throw new FfiError(`${this.device.name}: ${what}: x is ${x}, another tensor ${other}`);
      }
    }
    requireShape(what, "out", out, [
      images,
      filters,
      Math.floor((height + top + bottom - rows) / stride) + 1,
      Math.floor((width + left + right - columns) / stride) + 1,
    ]);
    if (residual !== undefined) requireShape(what, "residual", residual, out.shape);
    this.#call(
      what,
      [x, weight, bias, residual, out],
      ([x, weight, bias, residual, out]) =>
        this.#runtime.symbols.simtConv(x, weight, bias, residual, out, stride, top, left),
    );
  }

  attention(plan: AttentionPlan): boolean {
    const { library, q, k, v, out, scale } = plan;
    if (library === "fa3" && !(this.device.kind === "cuda" && flashAttention3TakesPlan(plan))) return false;
    if (library === "aiter" && !(this.device.kind === "hip" && aiterTakesPlan(plan))) return false;
    if (library === undefined && !this.hasAttention) return false;
    const [batch, , heads, dim] = q.shape;
    requireShape("attention", "k", k, [batch, k.shape[1], heads, dim]);
    requireShape("attention", "v", v, k.shape);
    requireShape("attention", "out", out, q.shape);
    this.#call(
      "attention",
      [q, k, v, out],
      ([q, k, v, out]) => this.#runtime.symbols.simtAttention(q, k, v, out, scale),
    );
    return true;
  }

  [Symbol.dispose](): void {
    this.#runtime.close();
  }

  /** Calls a function of the runtime with its tensors as Views. */
  #call(
    what: string,
    tensors: readonly (Tensor | undefined)[],
    call: (views: readonly BigInt64Array<ArrayBuffer>[]) => void,
  ): void {
    const name = `${this.device.name}: ${what}`;
    const format = float8FormatOf(this.device.limits.architecture);
    const views = tensors.map((tensor) => viewOf(name, tensor, format));
    this.stream.run(name, tensors.filter((tensor) => tensor !== undefined), {}, () => call(views));
  }
}

function requireShape(op: string, what: string, tensor: Tensor, shape: readonly number[]): void {
  if (tensor.rank === shape.length && shape.every((size, dim) => size === tensor.shape[dim])) return;
  throw new FfiError(`emulated GPU: ${op}: ${what} is ${tensor}, expected [${shape.join(", ")}]`);
}

/** The types that simt_runtime.cpp loads and stores, by their numbers there. */
const DTYPES: readonly DType[] = ["f32", "bf16", "f16", "f8e4m3"];

/** A tensor as simt_runtime.cpp's View: address, type, four sizes, four strides. */
function viewOf(what: string, tensor: Tensor | undefined, float8: Float8Format): BigInt64Array<ArrayBuffer> {
  const view = new BigInt64Array(10);
  if (tensor === undefined) return view;
  const type = DTYPES.indexOf(tensor.dtype);
  if (type < 0) throw new FfiError(`${what}: no library takes ${tensor}`);
  view[0] = tensor.pointer;
  view[1] = BigInt(type + Number(tensor.dtype === "f8e4m3" && float8 === "fnuz"));
  view.set(tensor.shape.map(BigInt), 2);
  view.set(tensor.strides.map(BigInt), 6);
  return view;
}

const RUNTIME = {
  // void simtMatmul(const View *a, const View *b, const View *bias, const View *scaleA, const View *scaleB,
  //     const View *out, float alpha, int gelu)
  simtMatmul: {
    parameters: ["buffer", "buffer", "buffer", "buffer", "buffer", "buffer", "f32", "i32"],
    result: "void",
  },
  // void simtConv(const View *x, const View *weight, const View *bias, const View *residual, const View *out, int stride,
  //     int top, int left)
  simtConv: {
    parameters: ["buffer", "buffer", "buffer", "buffer", "buffer", "i32", "i32", "i32"],
    result: "void",
  },
  // void simtAttention(const View *q, const View *k, const View *v, const View *out, float scale)
  simtAttention: { parameters: ["buffer", "buffer", "buffer", "buffer", "f32"], result: "void" },
} as const satisfies Deno.ForeignLibraryInterface;
