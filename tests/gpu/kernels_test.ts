/** Every kernel against its TypeScript reference, on the CUDA device. */
import { elementwiseSuite } from "../support/kernel_suites/elementwise.ts";
import { float8Suite } from "../support/kernel_suites/float8.ts";
import { normsSuite } from "../support/kernel_suites/norms.ts";

elementwiseSuite();
normsSuite();
float8Suite();
