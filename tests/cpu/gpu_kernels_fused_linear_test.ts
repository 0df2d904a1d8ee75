/** Scales of results that are not there yet, on the emulated GPU; fused products are for Hopper's. */
import { fusedLinearSuite } from "../support/kernel_suites/fused_linear.ts";

fusedLinearSuite();
