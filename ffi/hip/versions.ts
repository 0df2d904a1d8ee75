/** How AMD's libraries are named and numbered by their versions. */

/** The newest major version of ROCm whose libraries are bound, and the oldest: memory mapping came with 6.1. */
export const ROCM_MAJORS: readonly number[] = [7, 6];

/** File names of HIP's own libraries, which carry ROCm's major version, newest first. */
export function rocmSonames(stem: string): string[] {
  return ROCM_MAJORS.map((major) => `${stem}.so.${major}`);
}

/** What HIP says of itself: 60241133 is `"6.2.41133"`. */
export function hipVersion(version: number): string {
  const major = Math.floor(version / 10_000_000);
  return [major, Math.floor(version / 100_000) % 100, version % 100_000].join(".");
}

/** What hipBLASLt says of itself: 100 is `"0.1.0"`, 100000 is `"1.0.0"`. */
export function hipblasLtVersion(version: number): string {
  return [Math.floor(version / 100_000), Math.floor(version / 100) % 1000, version % 100].join(".");
}

/** How to install ROCm's libraries, for hints. */
export const INSTALL_ROCM =
  "install ROCm 6.1 or newer (https://rocm.docs.amd.com), whose libraries lie in /opt/rocm/lib";
