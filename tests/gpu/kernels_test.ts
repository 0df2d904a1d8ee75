/** Every kernel against its TypeScript reference, on the CUDA device. */
import { elementwiseSuite } from "../support/kernel_suites/elementwise.ts";
import { fusedSuite } from "../support/kernel_suites/fused.ts";
import { normsSuite } from "../support/kernel_suites/norms.ts";

elementwiseSuite();
normsSuite();
fusedSuite();
