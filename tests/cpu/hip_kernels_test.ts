/** Every kernel against its TypeScript reference on an emulated AMD GPU: 64 threads in step, convolutions without bias. */
import { checksumSuite } from "../support/kernel_suites/checksum.ts";
import { convolutionSuite } from "../support/kernel_suites/convolutions.ts";
import { copySuite } from "../support/kernel_suites/copies.ts";
import { elementwiseSuite } from "../support/kernel_suites/elementwise.ts";
import { float8Suite } from "../support/kernel_suites/float8.ts";
import { float8FusedSuite } from "../support/kernel_suites/float8_fused.ts";
import { fusedSuite } from "../support/kernel_suites/fused.ts";
import { normsSuite } from "../support/kernel_suites/norms.ts";
import { parallelBranchesSuite } from "../support/kernel_suites/parallel_branches.ts";
import { randomSuite } from "../support/kernel_suites/random.ts";
import { tuningSuite } from "../support/kernel_suites/tuning.ts";

checksumSuite();
convolutionSuite();
elementwiseSuite();
copySuite();
normsSuite();
randomSuite();
float8Suite();
float8FusedSuite();
fusedSuite();
parallelBranchesSuite();
tuningSuite();
