/**
 * What a vendor's runtime does: the same checked calls for CUDA's driver (cuda/driver.ts) and for HIP (hip/runtime.ts),
 * for all that is written once for both of them.
 *
 * Streams, events, modules, kernels and graphs are handles, device addresses and page-locked host addresses are what they
 * are: 64-bit integers. Each call throws an {@link FfiError} with its name and the vendor's words, {@link OutOfMemoryError}
 * where memory is short.
 */
export interface GpuRuntime extends Disposable {
  /** Where the library was found. */
  readonly path: string;
  /** Whether an error has ended everything on the GPU: then all later calls fail, with that error's words. */
  readonly isLost: boolean;
  /** Throws where {@link isLost}. */
  checkAlive(): void;
  /** Makes the device current on this thread: calls do so by themselves, who calls another library for it does so before. */
  enter(): void;

  /** A stream that does not wait for the default one. */
  streamCreate(): bigint;
  /** Blocks until all work of the stream is done. */
  streamSynchronize(stream: bigint): void;
  /** Whether all work of the stream is done. */
  streamQuery(stream: bigint): boolean;
  /** Later work of the stream waits for the event. */
  streamWaitEvent(stream: bigint, event: bigint): void;
  streamDestroy(stream: bigint): void;
  /** @param timing whether {@link eventElapsedTime} takes it; without, it costs less */
  eventCreate(timing: boolean): bigint;
  eventRecord(event: bigint, stream: bigint): void;
  /** Blocks until the work before the event is done. */
  eventSynchronize(event: bigint): void;
  /** Whether the work before the event is done. */
  eventQuery(event: bigint): boolean;
  /** Milliseconds between two events that have happened. */
  eventElapsedTime(start: bigint, end: bigint): number;
  eventDestroy(event: bigint): void;

  /** Bytes of the GPU's memory: what no program uses, and all. */
  memGetInfo(): { free: number; total: number };
  /** Page-locked host memory, which copies read and write without the CPU. */
  memHostAlloc(bytes: number): bigint;
  memFreeHost(address: bigint): void;
  /** Sizes and addresses of mapped memory are multiples of this many bytes. */
  memGetAllocationGranularity(): number;
  /** A range of addresses with no memory behind them. */
  memAddressReserve(bytes: number): bigint;
  memAddressFree(pointer: bigint, bytes: number): void;
  /** Memory of the device that has no address yet. */
  memCreate(bytes: number): bigint;
  /** Gives the handle up; the memory goes when it is not mapped (any more). */
  memRelease(handle: bigint): void;
  memMap(pointer: bigint, bytes: number, handle: bigint): void;
  /** Lets this device read and write mapped memory. */
  memSetAccess(pointer: bigint, bytes: number): void;
  /** Takes whole mappings away. No work may use them any more. */
  memUnmap(pointer: bigint, bytes: number): void;

  /** Issues a copy from the host; the host's bytes are read later when `source` is page-locked. */
  memcpyHtoDAsync(target: bigint, source: bigint, bytes: number, stream: bigint): void;
  /** Issues a copy to the host; its bytes are written later when `target` is page-locked. */
  memcpyDtoHAsync(target: bigint, source: bigint, bytes: number, stream: bigint): void;
  /** Sets `count` bytes. */
  memsetD8Async(target: bigint, value: number, count: number, stream: bigint): void;

  /** @param image compiled code. @param name its file's, for messages. */
  moduleLoadData(image: Uint8Array<ArrayBuffer>, name: string): bigint;
  moduleUnload(module: bigint): void;
  /** @param file of the module, for messages. */
  moduleGetFunction(module: bigint, name: string, file: string): bigint;
  /**
   * @param parameters addresses of the arguments, or null. @param extra markers and the address of all arguments in one
   *   buffer, or null: one of both, unless the kernel has no parameters. All is read before it returns.
   * @param name the kernel's, for messages
   */
  launchKernel(
    kernel: bigint,
    grid: readonly [number, number, number],
    block: readonly [number, number, number],
    shared: number,
    stream: bigint,
    parameters: BigUint64Array<ArrayBuffer> | null,
    extra: BigUint64Array<ArrayBuffer> | null,
    name: string,
  ): void;

  /** Work that is issued to the stream is recorded from here on. */
  streamBeginCapture(stream: bigint): void;
  /** Ends recording, also one that has failed: then it throws. */
  streamEndCapture(stream: bigint): bigint;
  graphInstantiate(graph: bigint): bigint;
  graphLaunch(executable: bigint, stream: bigint): void;
  graphExecDestroy(executable: bigint): void;
  graphDestroy(graph: bigint): void;
}
