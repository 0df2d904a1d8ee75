/** hipRTC, the run-time compiler of HIP: what it is called with. gpu_compiler.ts has its functions. */
import { RuntimeCompiler } from "../gpu_compiler.ts";
import { INSTALL_ROCM, rocmSonames } from "./versions.ts";

/** Where hipRTC is, newest first; before ROCm 6 it was a part of HIP's runtime. */
export const HIPRTC_SONAMES: readonly string[] = rocmSonames("libhiprtc");

/** The compiler, open. It needs no include folders: HIP's device headers are in it. */
export class Hiprtc extends RuntimeCompiler {
  /** Throws {@link LibraryNotFoundError}. */
  constructor(sonames = HIPRTC_SONAMES) {
    super({ name: "hipRTC", prefix: "hiprtc", code: "Code" }, { sonames, hint: INSTALL_ROCM });
  }

  /**
   * The options of every compilation, `arch` being e.g. `"gfx942"`. Divisions and square roots stay exact; products and sums
   * are fused within an expression only, since HIP's `__fmul_rn` is a plain product that would be fused with what is around it.
   */
  options(arch: string): string[] {
    return [`--offload-arch=${arch}`, "-std=c++17", "-O3", "-ffp-contract=on"];
  }
}
