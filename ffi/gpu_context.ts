import type { GpuRuntime } from "./gpu_runtime.ts";

/** What libraries that work on a GPU need to know of it. */
export interface GpuContext<Runtime extends GpuRuntime = GpuRuntime> {
  readonly driver: Runtime;
  /** Which GPU it is, as the vendor's runtime counts them, too. */
  readonly index: number;
  /** All work of the device is issued to this one stream, so its order is the order of the calls. */
  readonly stream: bigint;
  /** Whether work is recorded now: what it uses must stay until no graph is in use. */
  isRecording(): boolean;
  /**
   * Address of at least `bytes` of scratch, aligned to 256. There is one piece for all calls on the stream: whoever
   * asks next gets the same bytes, so they are good for one call only.
   *
   * @throws {OutOfMemoryError}
   */
  workspace(bytes: number): bigint;
  /**
   * Index of the way to do some work that is to be taken: 0, or inside of {@link GpuDevice.measuring} that of the fastest,
   * which is kept in the cache under `key` (the library's version and the work).
   *
   * @param ways called where they have to be measured; each issues the work once, to the same memory, and returns false
   *   where the library refuses it
   */
  choose(key: string, ways: () => readonly (() => boolean)[]): number;
  /** What an earlier process has found out about some work; see {@link GpuDevice.adopt}. */
  prepared(key: string): Uint8Array<ArrayBuffer> | undefined;
}
