/**
 * Kernels against their TypeScript references on an emulated AMD GPU, those that depend on it: with 64 threads in step, and
 * a convolution without bias.
 */
import { checksumSuite } from "../support/kernel_suites/checksum.ts";
import { convolutionSuite } from "../support/kernel_suites/convolutions.ts";
import { float8Suite } from "../support/kernel_suites/float8.ts";
import { fusedSuite } from "../support/kernel_suites/fused.ts";
import { normsSuite } from "../support/kernel_suites/norms.ts";
import { linearFewRowsSuite } from "../support/kernel_suites/linear_few_rows.ts";
import { relativeChangeSuite } from "../support/kernel_suites/relative_change.ts";

checksumSuite();
convolutionSuite();
normsSuite();
float8Suite();
fusedSuite();
linearFewRowsSuite();
relativeChangeSuite();
