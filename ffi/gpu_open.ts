/** What opening a GPU takes. */
export interface OpenGpuOptions {
  /** Folder that keeps compiled kernels from run to run; nothing is kept when left out. */
  readonly cacheDir?: string;
  /** Gets a line about a cache that cannot be used, or a library that would make it faster. */
  readonly onWarning?: (message: string) => void;
  /** Has NVIDIA's libraries read from the disk in the background, whether all of them will be used or not. */
  readonly readAhead?: boolean;
  /** Called when ways to do some work were measured, with how many times that was so far. */
  readonly onMeasured?: (count: number) => void;
}
