import type { Tensor } from "./tensor.ts";

/** Which family of runtime a device belongs to. */
export type DeviceKind = "cpu" | "cuda" | "hip";

/** A piece of device memory. What owns it frees it; a {@link Tensor} only looks at it. */
export interface Memory {
  /** Where it is. */
  readonly device: Device;
  /** Address on the device: 64-bit, so that offsets are additions. */
  readonly pointer: bigint;
  /** How much of it. */
  readonly byteLength: number;
  /** Nobody may write to it: a mapped file on the CPU. */
  readonly readOnly?: boolean;
}

/**
 * One matrix product `out = activation(alpha * a @ b^T + bias)`, accumulated in f32, or a batch of them.
 *
 * `a` is `[m, k]`, `b` is `[n, k]` (a Linear layer's own layout; a transposed view serves for `[k, n]`), `bias` is
 * `[n]`, `out` is `[m, n]`. Each may be strided with any row stride; one of a matrix's two strides is 1.
 * A batch is `[batch, m, k]`, `[batch, n, k]` and `[batch, m, n]` with any stride between its matrices; `bias` stays
 * `[n]`, for all of them.
 *
 * The dtypes of `a` and `b` are f32 or bf16, `out` is f32 or bf16. The CPU takes all of these mixed; a GPU takes `a` and
 * `b` of one dtype, `out` of that or f32, and `bias` of `out`'s dtype for an `out` with dense rows.
 *
 * Or `a` and `b` are both f8e4m3 and have scales, by which the sums are multiplied: `scaleA * scaleB * a @ b^T`. Then
 * there is no batch; a GPU takes rows of `a` and `b` that are dense, `k` and `n` that are multiples of 16, and a bf16
 * `bias`.
 */
export interface MatmulPlan {
  /** `[m, k]`. */
  readonly a: Tensor;
  /** `[n, k]`. */
  readonly b: Tensor;
  /** `[n]`. */
  readonly bias?: Tensor | undefined;
  /** `[m, n]`. */
  readonly out: Tensor;
  /** 1 when left out. */
  readonly alpha?: number | undefined;
  /** Applied to sum and bias before they are rounded. */
  readonly activation?: "geluTanh" | undefined;
  /** For f8e4m3: dense f32, both `[1]`, or `[m]` here and `[n]` in `scaleB`: one for each row of `a` and of `b`. */
  readonly scaleA?: Tensor | undefined;
  /** As `scaleA`, of `b`. */
  readonly scaleB?: Tensor | undefined;
  /** `b` never changes (a weight): a library may keep a packed copy of it, as long as `b`'s memory lives. */
  readonly constant?: boolean | undefined;
}

/**
 * One 2-D cross-correlation: `x` `[n, c, h, w]`, `weight` `[o, c, kh, kw]`, `bias` `[o]`, `out` `[n, o, oh, ow]`.
 * The shapes are logical; strides say whether a tensor is NCHW or NHWC. Weights are constant.
 */
export interface ConvPlan {
  /** `[n, c, h, w]`. */
  readonly x: Tensor;
  /** `[o, c, kh, kw]`. */
  readonly weight: Tensor;
  /** `[o]`. */
  readonly bias?: Tensor | undefined;
  /** `[n, o, oh, ow]`. */
  readonly out: Tensor;
  /** Pixels from one place of the kernel to the next, in both directions. */
  readonly stride: number;
  /** Zero rows and columns added around the picture: `[top, left, bottom, right]`. */
  readonly padding: readonly [number, number, number, number];
}

/** What a device says of itself. */
export interface DeviceProperties {
  /** Human-readable model, e.g. `"AMD EPYC 9R14, 2 cores"`. */
  readonly description: string;
  /** What does the work, e.g. `{ matmul: "oneDNN 2.6.3 (avx512_core_bf16), 2 threads", ..., other: "TypeScript" }`. */
  readonly providers: Readonly<Record<string, string>>;
  /** Whether matrix products in bf16 are native (else they are emulated in f32 and rounded). */
  readonly nativeBfloat16: boolean;
}

/** Bytes of memory that a device has. */
export interface MemoryUse {
  /** In use now for activations. */
  readonly current: number;
  /** The most that ever was in use for activations, and for what is kept beside them from call to call (scratch). */
  readonly peak: number;
  /** What the device holds for these, free parts included. */
  readonly reserved: number;
  /**
   * Weights that were allocated, and the copies that libraries keep of weights in their own layout. Mapped weights do
   * not count.
   */
  readonly weights: number;
}

/**
 * What memory is for. Activations come and go with the scopes; weights belong to no scope, and live until they are
 * freed or nothing refers to them any more. A GPU takes both from one place; the CPU does not.
 */
export type MemoryPurpose = "activations" | "weights";

/**
 * A place where tensors live and kernels run. CUDA, HIP and the CPU have the same verbs in the same order.
 *
 * Work is issued in order; a call may return before the work is done, and {@link synchronize} waits for it.
 */
export interface Device extends Disposable {
  /** The family of its runtime. */
  readonly kind: DeviceKind;
  /** As given to {@link openDevice}, with the index: `"cpu"`, `"cuda:0"`. */
  readonly name: string;
  /** What it is, and which libraries do the work. */
  properties(): DeviceProperties;
  /** Bytes in use now, and at most so far. */
  memoryUse(): MemoryUse;

  /**
   * Uninitialized memory, for activations when left out: those are freed at the end of the innermost {@link scope}.
   * Throws {@link OutOfMemoryError}.
   */
  alloc(byteLength: number, purpose?: MemoryPurpose): Memory;
  /** Gives memory back; the caller no longer uses it. Freeing twice is an error. */
  free(memory: Memory): void;
  /**
   * Runs `body` and frees all that it allocated, except the tensors that it returns (a tensor, an array or a plain
   * object of tensors), which then belong to the scope around it.
   */
  scope<T>(body: () => T): T;

  /**
   * Makes host bytes available on the device, a memory for each part, for as long as weights live. The CPU keeps using
   * them where they are, without a copy; a GPU streams them, those of a mapped file straight from the file.
   *
   * @param onBytes called now and then with how many bytes have arrived so far, of all parts.
   * @throws OutOfMemoryError; FfiError for a file that was shortened meanwhile. Then nothing stays allocated.
   */
  placeAll(parts: readonly Uint8Array[], onBytes?: (bytes: number) => void): Promise<Memory[]>;
  /** Says that a weight's memory holds other values now: what a library has made of the old ones is dropped. */
  changed(memory: Memory): void;
  /** Copies host bytes into the start of `memory`. */
  upload(bytes: Uint8Array, memory: Memory): void;
  /**
   * Waits for the work so far and copies a contiguous tensor's bytes to the host.
   *
   * @param into takes them, with just their length; new bytes when left out.
   */
  download(tensor: Tensor, into?: Uint8Array<ArrayBuffer>): Promise<Uint8Array<ArrayBuffer>>;

  /** Issues a matrix product. Throws {@link FfiError} for operands that the device does not take. */
  matmul(plan: MatmulPlan): void;
  /** Issues a convolution. Throws {@link FfiError} for operands that the device does not take. */
  conv(plan: ConvPlan): void;

  /** Resolves when all work issued so far is done. */
  synchronize(): Promise<void>;
}
