/** The fused kernels on the emulated GPU. */
import { fusedSuite } from "../support/kernel_suites/fused.ts";

fusedSuite();
