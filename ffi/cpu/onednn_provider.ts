import type { ConvPlan, DeviceProperties, MatmulPlan, Memory } from "../device.ts";
import { type DType, dtypeBytes } from "../dtype.ts";
import { ShapeError } from "../errors.ts";
import { Tensor } from "../tensor.ts";
import { type Allocate, Converter, copyRange, extentOf, wasmAddress } from "./convert.ts";
import { describeCpu } from "./describe.ts";
import type { CpuDevice } from "./device.ts";
import {
  type ConvLayouts,
  type Layout,
  type MatmulLayouts,
  type MemoryDesc,
  OneDnn,
  type Primitive,
} from "./onednn.ts";
import { PackedCache } from "./packed_cache.ts";
import { type CpuProvider, requireFloat } from "./provider.ts";
import type { WasmRunner } from "./runner.ts";
import { readVector } from "./vector.ts";

/** Constant operands stay reordered within this many bytes; later ones are used as they lie. */
const PACKED_BYTES = 2 ** 30;

/** A constant operand in the layout that a primitive asked for. oneDNN holds its address: keep the array. */
interface Packed {
  readonly bytes: Uint8Array<ArrayBuffer>;
  readonly pointer: bigint;
}

/**
 * Matrix products and convolutions through oneDNN. bf16 is native where the CPU has it, else operands are widened to
 * f32 and results rounded. Constant operands are reordered once into the library's own layout, per layout and weight.
 */
export class OneDnnProvider implements CpuProvider {
  readonly #dnnl: OneDnn;
  readonly #convert: Converter;
  readonly #packed = new PackedCache<Packed>(PACKED_BYTES, () => {});
  /** Layouts that weights have been packed in, each once: a primitive for another batch often asks for the same. */
  readonly #packedLayouts: MemoryDesc[] = [];
  readonly #threads: number;

  /** Throws {@link FfiError} with the reason where no oneDNN 2.x can be opened. */
  constructor(private readonly device: CpuDevice, runner: WasmRunner, threads: number) {
    this.#dnnl = new OneDnn(threads);
    this.#threads = threads;
    this.#convert = new Converter(device, runner);
  }

  properties(): DeviceProperties {
    const { version, isa, nativeBfloat16 } = this.#dnnl;
    const provider = `oneDNN ${version} (${isa}), ${this.#threads} thread${this.#threads === 1 ? "" : "s"}`;
    return { description: describeCpu(), providers: { matmul: provider, conv: provider }, nativeBfloat16 };
  }

  /** The implementations that oneDNN chose so far, e.g. `"matmul brgemm:avx512_core"`: the tests refuse slow ones. */
  implementations(): string[] {
    return this.#dnnl.implementations();
  }

  matmul(plan: MatmulPlan): void {
    const { a, b, bias, out, alpha = 1, constant = false } = plan;
    const [m, k] = a.shape;
    const [n] = b.shape;
    if (m === 0 || n === 0) return;
    requireFloat("matmul", a, b, out, bias);
    if (alpha === 0 && bias !== undefined) {
      throw new ShapeError("matmul: alpha 0 with a bias is not supported");
    }
    const compute = this.#dnnl.nativeBfloat16 && a.dtype === b.dtype ? a.dtype : "f32";
    // Results are rows of `out`; into any other form they are stored afterwards.
    const direct = (out.strides[1] === 1 || n === 1) && (out.dtype === "f32" || compute === "bf16");

    this.device.withScratch((scratch) => {
      const x = this.#operand(a, compute, scratch);
      const result = direct ? out : new Tensor(scratch(m * n * 4), "f32", [m, n]);
      const layouts = {
        source: matrixLayout(x.dtype, m, k, x.strides[0], x.strides[1]),
        target: matrixLayout(result.dtype, m, n, result.strides[0], 1),
        bias: bias && { dtype: "f32", shape: [1, n], strides: [n, 1] } as const,
        alpha,
      };
      const { primitive, weights } = this.#matmulWeights(layouts, b, constant, compute, scratch);
      const pointers = [x.pointer, weights, result.pointer];
      if (bias !== undefined) pointers.push(this.#bias(bias, scratch, alpha));
      this.#dnnl.execute(primitive, pointers);
      if (result !== out) {
        this.#convert.store(wasmAddress(result)!, m, n, out, out.strides[0], out.strides[1]);
      }
    });
  }

  conv(plan: ConvPlan): void {
    const { x, weight, bias, out, stride, padding } = plan;
    if (x.size === 0 || out.size === 0) return;
    requireFloat("conv", x, weight, out, bias);
    const compute = this.#dnnl.nativeBfloat16 && x.dtype === weight.dtype ? x.dtype : "f32";
    const direct = out.dtype === "f32" || compute === "bf16";

    this.device.withScratch((scratch) => {
      const picture = this.#operand(x, compute, scratch);
      // A result that is rounded afterwards is made with the strides of `out`, densely.
      const result = direct ? out : denseLike(out, scratch);
      const plain = {
        source: layoutOf(picture),
        weights: { dtype: compute, shape: weight.shape },
        target: layoutOf(result),
        bias: bias && { dtype: "f32", shape: bias.shape, strides: [1] } as const,
        stride,
        padding,
      };
      const primitive = this.#convPrimitive(plain);
      const weights = this.#packedPointer(weight, weight, compute, primitive.weights!) ??
        this.#reordered(
          layoutOf(weight),
          primitive.weights!,
          this.#operand(weight, compute, scratch),
          scratch,
        );
      const source = this.#dnnl.describe(plain.source);
      const target = this.#dnnl.describe(plain.target);
      const from = this.#dnnl.same(source, primitive.source)
        ? picture.pointer
        : this.#reordered(plain.source, primitive.source, picture, scratch);
      const inPlace = this.#dnnl.same(target, primitive.target);
      const to = inPlace ? result.pointer : scratch(this.#dnnl.byteLength(primitive.target)).pointer;
      const pointers = [from, weights, to];
      if (bias !== undefined) pointers.push(this.#bias(bias, scratch));
      this.#dnnl.execute(primitive, pointers);
      if (!inPlace) {
        this.#dnnl.execute(this.#dnnl.reorder(primitive.target, target), [to, result.pointer]);
      }
      if (result !== out) this.#round(result, out);
    });
  }

  forget(memory: Memory): void {
    this.#packed.forget(memory);
  }

  packedBytes(): number {
    return this.#packed.bytes;
  }

  [Symbol.dispose](): void {
    this.#packed.clear();
    this.#dnnl[Symbol.dispose]();
  }

  /**
   * The primitive of a product and the address of `b` for it, which oneDNN takes as [k, n]: b's transpose.
   *
   * A constant `b` is reordered where oneDNN has a kernel that reads blocks ("brgemm"). Its other kernel ("gemm") asks
   * for rows of [k, n], which is slower than `b` as it lies: rows of a power of two collide in the cache.
   */
  #matmulWeights(
    layouts: Omit<MatmulLayouts, "weights">,
    b: Tensor,
    constant: boolean,
    compute: DType,
    scratch: Allocate,
  ): { primitive: Primitive; weights: bigint } {
    const transposed = b.permute([1, 0]);
    const [k, n] = transposed.shape;
    if (constant) {
      const primitive = this.#dnnl.matmul({ ...layouts, weights: { dtype: compute, shape: [k, n] } });
      if (primitive.implementation.startsWith("brg")) {
        const weights = this.#packedPointer(b, transposed, compute, primitive.weights!);
        if (weights !== undefined) return { primitive, weights };
      } else if (b.dtype !== compute) {
        const plain = { dtype: compute, shape: [k, n], strides: [1, k] };
        const weights = this.#packedPointer(b, transposed, compute, this.#dnnl.describe(plain));
        if (weights !== undefined) {
          return { primitive: this.#dnnl.matmul({ ...layouts, weights: plain }), weights };
        }
      }
    }
    const y = this.#operand(transposed, compute, scratch);
    const plain = matrixLayout(y.dtype, k, n, y.strides[0], y.strides[1]);
    return { primitive: this.#dnnl.matmul({ ...layouts, weights: plain }), weights: y.pointer };
  }

  /** A convolution over the tensors as they lie where oneDNN has a fast kernel for that, else over its own layouts. */
  #convPrimitive(plain: ConvLayouts): Primitive {
    const free = {
      ...plain,
      source: { ...plain.source, strides: undefined },
      target: { ...plain.target, strides: undefined },
    };
    const channelsLast = plain.source.strides?.[1] === 1 && plain.target.strides?.[1] === 1;
    if (!channelsLast) return this.#dnnl.conv(free);
    const primitive = this.#dnnl.conv(plain);
    return isReference(primitive) ? this.#dnnl.conv(free) : primitive;
  }

  /** A tensor in the dtype that is computed in, at an address that fits its elements: itself, or a copy. */
  #operand(tensor: Tensor, compute: DType, scratch: Allocate): Tensor {
    if (tensor.dtype !== compute) return this.#convert.float32(tensor, scratch);
    const size = dtypeBytes(compute);
    if (tensor.pointer % BigInt(size) === 0n) return tensor;
    const extent = extentOf(tensor);
    const memory = scratch(extent * size);
    copyRange(tensor, 0, extent, memory.byteOffset, this.device.wasmMemory);
    return new Tensor(memory, compute, tensor.shape, tensor.strides);
  }

  /** Address of a bias as dense f32, divided by `alpha`: oneDNN scales the sum of product and bias. */
  #bias(bias: Tensor, scratch: Allocate, alpha = 1): bigint {
    if (alpha === 1 && bias.dtype === "f32" && bias.isContiguous && bias.pointer % 4n === 0n) {
      return bias.pointer;
    }
    const values = readVector(bias).map((value) => value / alpha);
    const memory = scratch(values.byteLength);
    this.device.upload(new Uint8Array(values.buffer), memory);
    return memory.pointer;
  }

  /** Address of `view` of `weight` in another layout, kept for the next time; undefined over the budget. */
  #packedPointer(weight: Tensor, view: Tensor, compute: DType, layout: MemoryDesc): bigint | undefined {
    let index = this.#packedLayouts.findIndex((known) => this.#dnnl.same(known, layout));
    if (index < 0) index = this.#packedLayouts.push(layout) - 1;
    const byteLength = this.#dnnl.byteLength(layout);
    return this.#packed.get(weight, `layout ${index}`, byteLength, () => {
      const packed = alignedBytes(byteLength);
      this.device.withScratch((scratch) => {
        const source = this.#operand(view, compute, scratch);
        const plain = this.#dnnl.describe(weightLayout(source));
        this.#dnnl.execute(this.#dnnl.reorder(plain, layout), [source.pointer, packed.pointer]);
      });
      return packed;
    })?.pointer;
  }

  /** Address of a scratch copy of `tensor` in another layout. */
  #reordered(from: Layout, to: MemoryDesc, tensor: Tensor, scratch: Allocate): bigint {
    const { pointer } = scratch(this.#dnnl.byteLength(to));
    const source = this.#dnnl.describe({ ...from, dtype: tensor.dtype });
    this.#dnnl.execute(this.#dnnl.reorder(source, to), [tensor.pointer, pointer]);
    return pointer;
  }

  /** Rounds a picture that was made by {@link denseLike} into `out`. */
  #round(result: Tensor, out: Tensor): void {
    const [images, channels, height, width] = out.shape;
    for (let image = 0; image < images; image++) {
      const from = result.narrow(0, image, 1);
      const to = out.narrow(0, image, 1);
      if (result.strides[1] === 1 && channels > 1) { // NHWC: each row of pixels is [width, channels]
        for (let y = 0; y < height; y++) {
          const row = wasmAddress(from.narrow(2, y, 1))!;
          this.#convert.store(row, width, channels, to.narrow(2, y, 1), out.strides[3], out.strides[1]);
        }
      } else if (out.strides[2] === width * out.strides[3]) {
        this.#convert.store(wasmAddress(from)!, channels, height * width, to, out.strides[1], out.strides[3]);
      } else {
        throw new ShapeError(`conv: strides [${out.strides}] of ${out} are neither NCHW's nor NHWC's`);
      }
    }
  }
}

/** Layout of a matrix; a stride that no element needs gets a value that oneDNN's checks accept. */
function matrixLayout(dtype: DType, rows: number, cols: number, row: number, col: number): Layout {
  const strides = rows === 1
    ? [cols === 1 ? 1 : cols * col, cols === 1 ? 1 : col]
    : cols === 1
    ? [row, row === 1 ? rows : 1]
    : [row, col];
  return { dtype, shape: [rows, cols], strides };
}

function weightLayout(weight: Tensor): Layout {
  if (weight.rank !== 2) return layoutOf(weight);
  return matrixLayout(weight.dtype, weight.shape[0], weight.shape[1], weight.strides[0], weight.strides[1]);
}

function layoutOf({ dtype, shape, strides }: Tensor): Layout {
  return { dtype, shape, strides };
}

/** Dense f32 scratch of the shape of `out`, channels last where `out` has them last. */
function denseLike(out: Tensor, scratch: Allocate): Tensor {
  const [images, channels, height, width] = out.shape;
  const memory = scratch(out.size * 4);
  return out.strides[1] === 1 && channels > 1
    ? new Tensor(memory, "f32", [images, height, width, channels]).permute([0, 3, 1, 2])
    : new Tensor(memory, "f32", out.shape);
}

function isReference({ implementation }: Primitive): boolean {
  return implementation.startsWith("ref");
}

/** Fresh bytes at an address that is a multiple of 64. */
function alignedBytes(byteLength: number): Packed {
  const bytes = new Uint8Array(byteLength + 64);
  const start = Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes));
  return { bytes, pointer: (start + 63n) & ~63n };
}
