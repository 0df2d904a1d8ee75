/** Every kernel against its TypeScript reference, on the CUDA device. */
import { attentionFloat8Suite } from "../support/kernel_suites/attention_float8.ts";
import { checksumSuite } from "../support/kernel_suites/checksum.ts";
import { convolutionSuite } from "../support/kernel_suites/convolutions.ts";
import { elementwiseSuite } from "../support/kernel_suites/elementwise.ts";
import { float8Suite } from "../support/kernel_suites/float8.ts";
import { fusedSuite } from "../support/kernel_suites/fused.ts";
import { normsSuite } from "../support/kernel_suites/norms.ts";

checksumSuite();
convolutionSuite();
elementwiseSuite();
normsSuite();
float8Suite();
fusedSuite();
attentionFloat8Suite();
