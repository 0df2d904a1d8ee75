/** How NVIDIA's libraries are named and numbered by their versions. */

/** The newest major version of CUDA whose libraries are bound. */
export const NEWEST_CUDA = 13;

/** File names of a library of the CUDA toolkit, newest first, up to what the driver takes: it refuses newer ones. */
export function cudaSonames(stem: string, newest: number): string[] {
  return [NEWEST_CUDA, NEWEST_CUDA - 1].filter((major) => major <= newest).map((major) =>
    `${stem}.so.${major}`
  );
}

/** Version numbers of cuBLASLt, cuDNN 9 and NCCL: 130100 is `"13.1.0"`, 91400 is `"9.14.0"`. */
export function dottedVersion(version: number): string {
  return [Math.floor(version / 10_000), Math.floor(version / 100) % 100, version % 100].join(".");
}

/** The CUDA 12 that brought each version of CUPTI. */
const CUPTI_OF_CUDA_12: Readonly<Record<number, string>> = {
  18: "12.0",
  19: "12.0",
  20: "12.2",
  21: "12.3",
  22: "12.4",
  23: "12.5",
  24: "12.6",
  26: "12.8",
  27: "12.9",
  28: "12.9",
};

/** Versions of CUPTI, which were counted from 1 before CUDA 13: 130001 is `"13.0.1"`, 24 is `"12.6"`. */
export function cuptiVersion(version: number): string {
  return version >= 130_000 ? dottedVersion(version) : CUPTI_OF_CUDA_12[version] ?? `API ${version}`;
}
