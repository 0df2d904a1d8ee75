/** What opening a GPU takes. */
export interface OpenGpuOptions {
  /** Folder that keeps compiled kernels from run to run; nothing is kept when left out. */
  readonly cacheDir?: string;
  /** Gets a line about a cache that cannot be used, or a library that would make it faster. */
  readonly onWarning?: (message: string) => void;
  /** Called when ways to do some work were measured, with how many times that was so far. */
  readonly onMeasured?: (count: number) => void;
}
