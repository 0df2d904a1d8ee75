/** How NVIDIA's libraries are named and numbered by their versions. */

/** The newest major version of CUDA whose libraries are bound. */
export const NEWEST_CUDA = 13;

/** File names of a library of the CUDA toolkit, newest first, up to what the driver takes: it refuses newer ones. */
export function cudaSonames(stem: string, newest: number): string[] {
  return [NEWEST_CUDA, NEWEST_CUDA - 1].filter((major) => major <= newest).map((major) =>
    `${stem}.so.${major}`
  );
}

/** Version numbers of cuBLASLt, cuDNN 9, CUPTI and NCCL: 130100 is `"13.1.0"`, 91400 is `"9.14.0"`. */
export function dottedVersion(version: number): string {
  return [Math.floor(version / 10_000), Math.floor(version / 100) % 100, version % 100].join(".");
}
